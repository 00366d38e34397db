"""What older versions wrote opens as it is: the demo's pool, results and recordings of this repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phatgoose.analysis.recording import read_recording
from phatgoose.experts.pool import Pool
from phatgoose.results.reader import read_results

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "rows"
NUM_SITES, NUM_EXPERTS = 210, 36  # of SmolLM2-135M, and of the pools that were evaluated


def test_demo_pool() -> None:
    pool = Pool.open(ROOT / "demo" / "pool")
    assert pool.names == (
        "agnews", "rottentomatoes", "qqp", "trec", "commonsenseqa", "samsum", "wikibio", "commongen"
    )  # fmt: skip
    assert pool.check() == []
    assert pool.fingerprint == "5a74aeb1435ecd2fe211592af3df6ea3d7a12aacd223645145f3737d3b6d6a41"
    assert all(expert.has_gate for expert in pool.experts())


@pytest.mark.parametrize(
    ("name", "number", "mean"),
    [
        ("seed-0-results-18.tar.xz", 160, 0.3334375),
        ("seed-0-results-9.tar.xz", 160, 0.3418125),
        ("seed-0-results-gates-10.tar.xz", 104, 0.3419290107745866),
        ("seed-0-results-gates-30.tar.xz", 104, 0.34869887250521536),
        ("seed-0-results-gates-300.tar.xz", 104, 0.34743461473674936),
        ("seed-0-results-joint.tar.xz", 104, 0.3325691030233871),
    ],
)
def test_results(name: str, number: int, mean: float) -> None:
    results, warnings = read_results([ROWS / "ocean" / name])
    assert (len(results), warnings) == (number, [])
    assert sum(result.score for result in results) / number == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("router", ["phatgoose", "phatgoose-retrieval"])
def test_recordings(router: str, seed: int) -> None:
    recording = read_recording(ROWS / "ocean" / f"seed-{seed}-recording-{router}")
    header = recording.header
    assert (header.method, header.seed) == (router, seed)
    assert (len(header.sites), len(header.experts)) == (NUM_SITES, NUM_EXPERTS)
    assert len(recording.tasks) == 104
    for task in recording.tasks.values():
        np.testing.assert_allclose(task.weights_ME.sum(axis=1), np.ones(NUM_SITES), atol=5e-3)  # stored in fp16
