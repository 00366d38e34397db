"""The kernels compile for a Hopper GPU, without spills, with 16-byte loads and matrix units. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from compile_kernels import layer_launches, usage
for tokens, experts, pdl, layers in json.loads(sys.argv[2]):
    for launch in layer_launches(tokens, experts, 4096, 4096, pdl=pdl, layers=layers):
        compiled = launch.compile()
        early = "launch_pdl" in launch.options
        text = compiled.asm["ptx"], compiled.asm["ttgir"]
        print(json.dumps([[tokens, experts, layers], launch.kernel.__name__, early, usage(compiled), *text]))
"""


@pytest.mark.slow
def test_compiles_for_hopper() -> None:
    """In another process, because this one may have defined the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(BENCHMARKS),
        json.dumps(
            [
                (1, 166, False, 1),
                (32, 166, False, 1),
                (2, 166, False, 3),
                (4096, 36, False, 1),
                (4096, 166, False, 1),
                (4096, 166, False, 3),
            ]
        ),
    ]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [(shape[0], name) for shape, name, *_ in found] == [
        *((tokens, name) for tokens in (1, 32, 2) for name in ("partial_scores", "shrink_few", "expand_few")),
        *((4096, name) for name in ("partial_scores", "choose_many", "place_pairs", "shrink_many")),
        *((4096, "expand_many"),) * 4,  # two slots for each of two ranges of columns
        *((4096, name) for name in ("choose_many", "place_pairs", "shrink_many")),  # scores by cuBLAS
        *((4096, "expand_many"),) * 4,
        *((4096, name) for name in ("choose_many", "place_pairs", "shrink_many")),
        *((4096, "expand_many"),) * 12,
    ]
    assert {name for _, name, early, *_ in found if early} == {
        "partial_scores", "shrink_few", "expand_few", "expand_many"
    }  # fmt: skip
    weighs = {}
    for (tokens, experts, layers), name, early, usage, ptx, ttgir in found:
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert usage["DYNAMIC"] <= 227 * 1024, name
        if name not in ("choose_many", "place_pairs"):  # they read scores and ids
            assert "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx, name
        if (tokens, name) == (4096, "partial_scores"):
            assert "wgmma.mma_async.sync.aligned.m64n128k16" in ptx
            assert re.search(r"warp_group_dot_wait .*pendings = 1", ttgir)  # a product may run while the next is begun
            assert {"x_NI": 3, "v_VI": 3}.items() <= buffers(ttgir).items()
        elif (tokens, name) == (4096, "shrink_many"):
            # with x x^T for the sums of squares, two products may run
            pendings = re.findall(r"warp_group_dot_wait .*pendings = (\d)", ttgir)[0]
            late = "%squares_MM" in ttgir and pendings == "2"
            found_buffers = buffers(ttgir)
            assert found_buffers["x_MI"] == found_buffers["a_RI"] == (4 if layers == 1 else 5)
            weighs[experts, layers] = late
        elif tokens == 4096 and name.endswith("_many") and name != "choose_many":
            assert "mma" in ptx
        if name == "choose_many":
            assert "bar.sync" not in ptx  # one warp
        if early:  # programmatic dependent launch: nothing is read before the kernel in front has ended
            first_read = min(ptx.find(read) for read in ("ld.global", "cp.async") if read in ptx)
            assert 0 < ptx.find("griddepcontrol.wait") < first_read, name
        else:
            assert "griddepcontrol" not in ptx, name
    assert weighs == {(36, 1): False, (166, 1): True, (166, 3): True}


def buffers(ttgir: str) -> dict[str, int]:
    """In shared memory, of each operand that steps fetch ahead.

    Products are unfinished when the next step begins: each operand needs one buffer more than steps are in flight.
    """
    found = re.findall(r"%(\w+?)(?:_\d+)? = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", ttgir)
    return {name: int(number) for name, number in found}
