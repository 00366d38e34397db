"""Switches of the Triton kernels. They change speed, and nothing else beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What was measured to be fastest on an H200; docs/kernels.md has the numbers.

    Attributes:
        overlap_base: few tokens, in a CUDA graph: the base layer runs beside routing and A, on a stream of its own.
        base_last: many tokens: the updates are written first, and the base layer adds itself to them.
        share_input: layers of one input (q, k and v; gate and up) are computed in the launches of one.
        pdl_max_tokens: up to this many tokens, each kernel starts before the one in front has ended (programmatic
            dependent launch, Hopper and later), where pairs are not sorted; 0 is never.
        sort_above_pairs: from more (token, expert) pairs than this on, pairs are sorted by expert.
    """

    overlap_base: bool = True
    base_last: bool = True
    share_input: bool = True
    pdl_max_tokens: int = 128
    sort_above_pairs: int = 128

    def sorts(self, num_tokens: int, top_k: int) -> bool:
        """Whether the kernels for many tokens run, which sort pairs by expert."""
        return num_tokens * top_k > self.sort_above_pairs


DEFAULT_OPTIONS = KernelOptions()
