"""The size of one routed layer and of its input."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    rank: int
    inputs: int
    outputs: int
