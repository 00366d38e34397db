"""The benchmarks run at tiny size on a CPU, and give no time to what is wrong."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from phatgoose.kernels import DEFAULT_OPTIONS

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


@pytest.mark.slow
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


@pytest.mark.parametrize("pattern", ["random", "one takes all", "the last two"])
def test_pairs_sorted_for_vllm(peers: ModuleType, pattern: str, tmp_path: Path) -> None:
    """Blocks of one expert each hold every pair once."""
    vllm_layer = pytest.importorskip("vllm_layer", reason="needs triton", exc_type=ImportError)
    experts, tokens = 9, 70
    ids_NK = {
        "random": torch.randn(tokens, experts).topk(2).indices,
        "one takes all": torch.full((tokens, 2), 3),
        "the last two": torch.tensor([[8, 7]]).expand(tokens, 2),
    }[pattern]
    pairs, of_blocks, length = (tensor[0] for tensor in vllm_layer.sort_pairs(ids_NK, experts))
    blocks = pairs.view(-1, vllm_layer.ROWS)
    used = int(length) // vllm_layer.ROWS
    assert len(of_blocks) == len(blocks) >= used
    assert (blocks[used:] == 2 * tokens).all() and (of_blocks[used:] == -1).all()
    found = blocks[:used]
    assert sorted(found[found < 2 * tokens].tolist()) == list(range(2 * tokens))
    for block, expert in zip(found, of_blocks, strict=False):
        assert (ids_NK.flatten()[block[block < 2 * tokens]] == expert).all()
    with pytest.raises(FileNotFoundError, match="unpack a wheel"):
        peers.methods_for(9, [], vllm=tmp_path)


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


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "cases"), [("tiny", 5), ("tiny-t5", 4)])
def test_model_rehearsal(shape: str, cases: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import model

    out = tmp_path / "model.csv"
    for prompt in ("7", "8"):  # the second run replaces the rows of the first
        options = f"--what decode prefill generate --experts 5 --batches 1 3 --prompt {prompt} --new-tokens 2"
        model.main(f"--shape {shape} {options} --prefill 2 6 --rounds 1 --out {out}".split())
    rows = read(out)
    assert len(rows) == cases
    assert all(0 < float(row["bound"]) < 1 and float(row["ratio"]) > 0 for row in rows)
    assert all(float(row["lora_ratio"]) > 0 for row in rows)
    decoding = {row["sequences"]: row for row in rows if row["what"] == "decode"}
    assert decoding["1"]["experts_a_site"] == "2.0" and float(decoding["3"]["experts_a_site"]) > 2
    # the encoder and the keys and values of cross-attention are not computed again
    assert {row["sites"] for row in decoding.values()} == {"14" if shape == "tiny" else "18"}
    assert {row["backend"] for row in rows} == {"auto"}


@pytest.mark.slow
def test_model_with_switches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One model after the other in the same run; the settings are as before."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import model

    out = tmp_path / "model.csv"
    options = "--shape tiny --backend triton --what decode --experts 5 --batches 2 --prompt 4 --rounds 1"
    model.main([*options.split(), "--switches", "none", "beside+shared+pdl", "after", "--out", str(out)])
    expected = ["triton", "triton, base beside, shared input, pdl", "triton, base after"]
    assert [row["backend"] for row in read(out)] == expected
    assert model.switches_of(DEFAULT_OPTIONS) == "beside+shared+after+pdl"
    with pytest.raises(SystemExit, match="unknown switches"):
        model.main([*options.split(), "--switches", "besides"])


def test_bounds_count_what_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding one token reads all weights but the other rows of the embedding, and two experts at every site."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bounds
    import model

    args = argparse.Namespace(shape="tiny", dtype="fp32", device="cpu", rank=8, top_k=2, backend="auto", prompt=4)
    base = model.make_model(args)
    routed = model.routed_randomly(base, 6, DEFAULT_OPTIONS, args)
    work = bounds.base_work(base, model.decode(base, 1, args))
    embedding = base.get_input_embeddings().weight
    linears = [module for module in base.modules() if isinstance(module, torch.nn.Linear)]
    assert work.bytes == sum(p.nbytes for p in base.parameters()) - embedding.nbytes + embedding[0].nbytes
    assert work.flops == sum(2 * linear.weight.numel() for linear in linears)

    added = bounds.experts_work(routed, model.decode(routed, 1, args))
    sites = [linear for linear in linears if linear is not base.get_output_embeddings()]
    factors = sum(8 * (site.in_features + site.out_features) for site in sites)
    gates = sum(6 * site.in_features for site in sites)
    assert (added.sites, added.experts) == (len(sites), 2 * len(sites))
    assert added.bytes == 4 * (gates + 2 * factors)
    assert added.flops == 2 * (gates + 2 * factors)


def with_factors(site: Any, b_ERO: torch.Tensor) -> Any:
    return dataclasses.replace(site, stack=dataclasses.replace(site.stack, b_ERO=b_ERO))


def test_bandwidth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bandwidth

    for _ in range(2):  # the second run's row replaces the first's
        bandwidth.main(["--gb", "0.01", "--rounds", "1", "--out", str(tmp_path / "bandwidth.csv")])
    (row,) = read(tmp_path / "bandwidth.csv")
    assert int(row["threads"]) == torch.get_num_threads() and float(row["gb_a_second"]) > 0
