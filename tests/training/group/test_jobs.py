"""Jobs from data files."""

from __future__ import annotations

from pathlib import Path

from helpers.checks import fails
from phatgoose.errors import ConfigError
from phatgoose.training.group.jobs import TrainingJob, check_names, read_jobs


def test_jobs_from_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"input": "<5>", "target": "<6>"}\n')
    jobs = read_jobs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", "train", None)
    assert [(job.name, job.folder) for job in jobs] == [("a", tmp_path / "out" / "a"), ("b", tmp_path / "out" / "b")]
    fails(
        ConfigError,
        "two experts are named 'a'",
        action=lambda: check_names([jobs[0], TrainingJob(folder=tmp_path / "a", examples=[])]),
    )
    fails(ConfigError, "a.csv", ".jsonl.gz", action=lambda: read_jobs([Path("a.csv")], tmp_path, "train", None))
    fails(ConfigError, "'_a'", action=lambda: read_jobs([tmp_path / "_a.jsonl"], tmp_path, "train", None))
