"""vLLM's `fused_moe_lora` as a peer: one layer's updates, with the choice of experts and their sorting given.

vLLM has no router for LoRA experts; this kernel mixes the LoRA adapters of a mixture's experts. It is loaded from
vLLM's files, without what vLLM itself needs: from an unpacked wheel (0.33.0 was read), or an installation's folder.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, M = N * K pairs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl

OPERATORS = Path("vllm/lora/ops/triton_ops")
# rows of a block of sorted pairs; up to so many numbers of A x, vLLM takes pairs as they are
ROWS, MOST_UNSORTED = 32, 1024


class SortedPairs(NamedTuple):
    """Pairs in blocks of one expert each, as vLLM's `moe_lora_align_block_size` gives them.

    Attributes:
        pairs: n * K + k of each place; M where a block is not full.
        expert_ids: of each block; -1 beyond the last.
        length: number of places in use.
    """

    pairs: torch.Tensor
    expert_ids: torch.Tensor
    length: torch.Tensor


def sort_pairs(expert_ids_NK: torch.Tensor, num_experts: int) -> SortedPairs:
    """Blocks of ROWS pairs, as many as the worst choice needs."""
    ids_M = expert_ids_NK.flatten()
    counts_E = torch.bincount(ids_M, minlength=num_experts)
    blocks_E = (counts_E + ROWS - 1) // ROWS
    order_M = ids_M.argsort(stable=True)
    begins_E, firsts_E = counts_E.cumsum(0) - counts_E, (blocks_E.cumsum(0) - blocks_E) * ROWS
    sorted_M = ids_M[order_M]
    places_M = firsts_E[sorted_M] + torch.arange(len(ids_M), device=ids_M.device) - begins_E[sorted_M]
    most_blocks = len(ids_M) // ROWS + min(num_experts, len(ids_M))
    pairs = torch.full((most_blocks * ROWS,), len(ids_M), dtype=torch.int32, device=ids_M.device)
    pairs[places_M] = order_M.int()
    found = torch.full((most_blocks,), -1, dtype=torch.int32, device=ids_M.device)
    of_blocks = torch.arange(num_experts, device=ids_M.device).repeat_interleave(blocks_E).int()
    found[: len(of_blocks)] = of_blocks
    return SortedPairs(pairs[None], found[None], (blocks_E.sum() * ROWS).int()[None])


def load(folder: Path) -> ModuleType:
    """vLLM's module with the kernel.

    Args:
        folder: where `vllm` lies.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = folder / OPERATORS / "fused_moe_lora_op.py"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: unpack a wheel of vLLM there")
    name = ".".join((*OPERATORS.parts, path.stem))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {**_stand_ins(), name: module}):
        spec.loader.exec_module(module)
    return module


class VllmUpdate:
    """A base layer and its experts' updates; x of shape (..., I) -> (..., O).

    Args:
        module: of `load`.
        base: the base layer.
        a_ERI, b_ERO: the experts.
        route: x_NI -> (weights_NK, expert_ids_NK). Asked once for each x: neither it nor sorting is in the time.
    """

    def __init__(self, module: ModuleType, base: Any, a_ERI: torch.Tensor, b_ERO: torch.Tensor, route: Any) -> None:
        self.module, self.base, self.route = module, base, route
        self.num_experts, self.rank, _ = a_ERI.shape
        self.a_1ERI, self.b_1EOR = a_ERI[None].contiguous(), b_ERO.transpose(1, 2).contiguous()[None]
        self.one_adapter = torch.ones(1, dtype=torch.int32)  # vLLM counts them on the host
        self._given: dict[int, tuple[torch.Tensor, ...]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer, the kernel, and one product that adds up each token's updates."""
        x_NI = x.view(-1, x.shape[-1])
        weights_NK, *sorted_pairs, mapping_N, one = self._ask(x_NI)
        y_NO = self.base(x_NI)
        num_tokens, top_k = weights_NK.shape
        updates_NKO = y_NO.new_empty(num_tokens, top_k, y_NO.shape[1])
        pairs, expert_ids, length = sorted_pairs
        blocks = {"block_size_m": ROWS, "block_size_n": 64, "block_size_k": 64, "group_size_m": 1}
        blocks |= {"num_warps": 4, "num_stages": 3, "split_k": 1}  # of kernels that short ranks do not take
        self.module.fused_moe_lora(
            updates_NKO, x_NI, [self.a_1ERI], [self.b_1EOR], weights_NK, pairs if len(pairs) else None, expert_ids,
            length if len(pairs) else None, mapping_N, self.rank, top_k, mapping_N[:1], self.one_adapter,
            one, **{f"{part}_{key}": value for part in ("shrink", "expand") for key, value in blocks.items()},
            add_inputs=False,
        )  # fmt: skip
        # weights are those of pairs, in the order of tokens: the kernel's own weighting reads x at n * K + k
        y_N1O = torch.baddbmm(y_NO.unsqueeze(1), weights_NK.unsqueeze(1).to(y_NO.dtype), updates_NKO)
        return y_N1O.view(*x.shape[:-1], -1)

    def _ask(self, x_NI: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(weights_NK, pairs, expert_ids, length, mapping_N, 1), the same for the same tensor; no pairs: unsorted."""
        if x_NI.data_ptr() not in self._given:
            weights_NK, expert_ids_NK = self.route(x_NI)
            new: dict[str, Any] = {"dtype": torch.int32, "device": x_NI.device}
            if expert_ids_NK.numel() * self.rank <= MOST_UNSORTED:
                empty = torch.empty(0, **new)
                given = SortedPairs(empty, expert_ids_NK.flatten().int(), empty)
            else:
                given = sort_pairs(expert_ids_NK, self.num_experts)
            self._given[x_NI.data_ptr()] = (
                weights_NK, *given, torch.zeros(len(x_NI), **new), torch.ones(1, **new)
            )  # fmt: skip
        return self._given[x_NI.data_ptr()]


def _stand_ins() -> dict[str, ModuleType]:
    """What vLLM's file imports, as far as the two kernels that short ranks take need it."""

    def units(index: int | None) -> int:
        return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 1

    def unused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("vLLM took a path that short ranks do not take")

    def not_registered(*_: Any, **__: Any) -> Any:
        raise AttributeError("vLLM's file then calls its functions without an operator")

    def to_device(numbers: list[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device)

    platform = SimpleNamespace(
        num_compute_units=units, is_xpu=lambda: False, is_cuda_alike=lambda: True, is_cuda=lambda: True
    )
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"tensor_model_parallel_all_gather": unused, "tensor_model_parallel_all_reduce": unused},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.triton_utils.allocation": {"set_triton_allocator": unused},
        "vllm.utils": {},
        "vllm.utils.mem_utils": {"get_max_shared_memory_bytes": lambda index: 227 << 10},
        "vllm.utils.torch_utils": {"async_tensor_h2d": to_device, "direct_register_custom_op": not_registered},
        "vllm.lora.ops.triton_ops.utils": {"supports_pdl": unused, "supports_tma": unused},
    }
    found = {}
    for name, values in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(values)
    return found
