"""The benchmarks run at tiny size on a CPU, and give no time to what is wrong."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    with torch.no_grad():
        yield peers


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_peers_rehearsal(peers: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "peers.csv"
    peers.main(["--device", "cpu", "--tokens", "1", "5", "--out", str(out)])
    methods = {experts: {row["method"] for row in read(out) if row["experts"] == experts} for experts in ("4", "9")}
    assert methods["4"] == {
        "base",
        "one static LoRA",
        "one LoRA (PEFT)",
        "Arrow (PEFT)",
        "X-LoRA layer (PEFT), scalings given",
        "loop over experts (official steps)",
        "ours, auto",
    }
    assert methods["9"] == methods["4"] - {"X-LoRA layer (PEFT), scalings given"}
    assert {row["mode"] for row in read(out)} == {"eager"}
    assert all(float(row["ratio_to_one_lora"]) == 1 for row in read(out) if row["method"] == "one static LoRA")

    peers.main(["--device", "cpu", "--experts", "9", "--tokens", "5", "--out", str(out)])
    assert len(read(out)) == 2 * (7 + 6)  # those of one shape were replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_check_every_method(peers: ModuleType, dtype: torch.dtype) -> None:
    """What mixes half of an expert, or its neighbour, is found out; rounding is not."""
    draw = peers.Draw("cpu", dtype)
    site = peers.Site.random(256, 128, 8, 70, draw)
    for tokens in (1, 70):
        x_NI = site.activations(tokens, draw)
        for name, method in peers.methods_for(8, ["auto", "triton"]).items():
            peers.check(site, method, method.build(site), x_NI)
            if name == "base":
                continue
            for b_ERO in (site.stack.b_ERO / 2, site.stack.b_ERO.roll(1, dims=0)):
                other = with_factors(site, b_ERO)
                with pytest.raises(peers.Wrong):
                    peers.check(site, method, method.build(other), x_NI)


def test_peers_leave_out_what_is_wrong(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def arrow(*_: Any) -> Any:
        return lambda x_NI: x_NI.new_zeros(len(x_NI), 96)

    def split_loop(*_: Any) -> Any:
        raise ValueError("not in this version")

    monkeypatch.setattr(peers, "arrow", arrow)
    monkeypatch.setattr(peers, "split_loop", split_loop)
    peers.main(["--device", "cpu", "--experts", "9", "--tokens", "1", "--out", str(tmp_path / "peers.csv")])
    methods = [row["method"] for row in read(tmp_path / "peers.csv")]
    assert methods == ["base", "one static LoRA", "one LoRA (PEFT)", "ours, auto"]
    printed = capsys.readouterr().out
    assert "WRONG, so without a time: Arrow (PEFT)" in printed
    assert "not built: loop over experts (official steps): ValueError not in this version" in printed


def test_figures_of_rows(peers: ModuleType, tmp_path: Path) -> None:
    """Both figures, from a rehearsal's rows and from rows like a GPU's; equal rows make equal files."""
    import plot_layers

    peers.main(["--device", "cpu", "--tokens", "1", "5", "--out", str(tmp_path / "peers.csv")])
    columns = {"device": "a GPU", "torch": "2", "inputs": 64, "outputs": 96, "ratio_to_one_lora": 1.1}
    rows = [
        {**columns, "experts": experts, "tokens": tokens, "method": method}
        for experts in (36, 166)
        for tokens, method in ((1, "triton, few"), (1, "triton, many"), (4096, "triton, many"))
    ]
    with (tmp_path / "routed_layer.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        plot_layers.main(["--rows", str(tmp_path), "--out", str(folder), "--shape", "64x96"])
    for name in ("layer_ours.svg", "layer_peers.svg"):
        once, again = ((folder / name).read_bytes() for folder in folders)
        assert once == again and b"<svg" in once


def with_factors(site: Any, b_ERO: torch.Tensor) -> Any:
    return dataclasses.replace(site, stack=dataclasses.replace(site.stack, b_ERO=b_ERO))
