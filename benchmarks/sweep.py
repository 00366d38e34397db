"""Which settings of the Triton kernels are fastest: one field after the other, each kept if it helps."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from layers import TOP_K, Layer, Settings, check, chosen_settings, layers_of, with_kernels
from replays import microseconds

from phatgoose.kernels import KernelOptions

# "scores." are fields of the settings' `scores`
FEW: Mapping[str, Sequence[Any]] = {
    "pdl": (False, True),
    "scores.splits": (1, 2, 4, 8, 16, 32),
    "scores.block_e": (2, 4, 8, 16, 32),
    "scores.block_i": (64, 128, 256, 512, 1024),
    "scores.warps": (1, 2, 4, 8),
    "shrink_splits": (1, 2, 4, 8, 16, 32),
    "shrink_block_i": (64, 128, 256, 512),
    "shrink_warps": (1, 2, 4, 8),
    "expand_block_o": (32, 64, 128, 256, 512),
    "expand_warps": (1, 2, 4, 8),
}
MANY: Mapping[str, Sequence[Any]] = {
    "pdl": (False, True),
    "scores.block_e": (32, 64, 128),
    "scores.block_n": (64, 128),
    "scores.block_i": (32, 64, 128),
    "scores.stages": (2, 3, 4),
    "scores.splits": (1, 2, 4, 8),
    "scores.warps": (4, 8),
    "cublas": (False, True),
    "place_block_n": (512, 1024, 2048, 4096),
    "place_warps": (2, 4, 8, 16),
    "shrink_rows": (16, 32, 64),
    "shrink_block_i": (64, 128, 256),
    "shrink_splits": (1, 2, 4),
    "shrink_stages": (2, 3, 4, 5),
    "shrink_warps": (2, 4, 8),
    "expand_rows": (16, 32, 64),
    "expand_block_o": (64, 128, 256, 512),
    "expand_warps": (2, 4, 8),
    "expand_bytes": (8 << 20, 16 << 20, 24 << 20, 1 << 40),
}


def changed(chosen: Settings, field: str, value: Any) -> Settings:
    """With one field of it, or of its scores, set."""
    if field.startswith("scores."):
        scores = dataclasses.replace(chosen.scores, **{field.removeprefix("scores."): value})
        return dataclasses.replace(chosen, scores=scores)
    return dataclasses.replace(chosen, **{field: value})


def usable(chosen: Settings, layer: Layer) -> bool:
    """Whether every split has a block of features, and blocks for matrix units are large enough."""
    inputs = layer.x_NI.shape[1]
    scores = chosen.scores
    if scores.splits * scores.block_i > inputs or (scores.block_n > 1 and scores.block_e < 16):
        return False
    return chosen.shrink_splits * chosen.shrink_block_i <= inputs


def candidates(chosen: Settings, table: Mapping[str, Sequence[Any]], field: str, layer: Layer) -> Iterator[Settings]:
    """The other values of a field."""
    for value in table[field]:
        other = changed(chosen, field, value)
        if other != chosen and usable(other, layer):
            yield other


def sweep(args: argparse.Namespace) -> None:
    """Print, for each shape, the time of every change and the best settings."""
    device = "cpu" if args.device == "cpu" else "cuda"
    begin = time.perf_counter()
    for shape in args.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for experts in args.experts:
            for tokens in args.tokens:
                layers = layers_of(tokens, experts, inputs, outputs, device)
                is_few = not KernelOptions().sorts(tokens, TOP_K)
                chosen = chosen_settings(tokens, experts, inputs, is_few=is_few)
                table = FEW if is_few else MANY
                if device == "cuda":
                    compile_changes(chosen, table, layers[0], tokens, experts, inputs, outputs)
                print(f"[{time.perf_counter() - begin:5.0f} s] {shape} N {experts} T {tokens}", flush=True)
                best = descend(chosen, table, layers, device, begin + args.seconds)
                print(f"[{time.perf_counter() - begin:5.0f} s] best: {best}", flush=True)
                if time.perf_counter() - begin > args.seconds:
                    print("out of time", flush=True)
                    return


def compile_changes(
    chosen: Settings,
    table: Mapping[str, Sequence[Any]],
    layer: Layer,
    tokens: int,
    experts: int,
    inputs: int,
    outputs: int,
) -> None:
    """All single changes, with all cores; what a kept change makes new is compiled when it comes."""
    from compile_kernels import compile_layers

    every = [chosen, *(other for field in table for other in candidates(chosen, table, field, layer))]
    sizes = {"tokens": tokens, "experts": experts, "inputs": inputs, "outputs": outputs, "bias": False}
    compile_layers([{**sizes, "chosen": other} for other in every])


def descend(
    chosen: Settings, table: Mapping[str, Sequence[Any]], layers: list[Layer], device: str, deadline: float
) -> Settings:
    """Try the values of one field after the other; keep the fastest right one."""
    for field in table:
        if time.perf_counter() > deadline:
            break
        options = {"kept": chosen}
        for other in candidates(chosen, table, field, layers[0]):
            try:
                check(layers[0], partial(with_kernels, chosen=other))
            except Exception as error:  # too much shared memory, for one
                print(f"  {field}: {_value(other, field)} fails: {type(error).__name__} {str(error)[:90]}", flush=True)
                continue
            options[str(_value(other, field))] = other
        calls = {
            name: [partial(with_kernels, layer, option, base_layer=False) for layer in layers]
            for name, option in options.items()
        }
        times = microseconds(calls, 9 if device == "cuda" else 1, device)
        others = "  ".join(f"{name} {found:.2f}" for name, found in times.items() if name != "kept")
        print(f"  {field}: {_value(chosen, field)} {times['kept']:.2f}  {others}", flush=True)
        fastest = min(times, key=lambda name: times[name])
        if times[fastest] < 0.99 * times["kept"]:
            chosen = options[fastest]
    return chosen


def _value(chosen: Settings, field: str) -> Any:
    name = field.removeprefix("scores.")
    return getattr(chosen.scores if name != field else chosen, name)
