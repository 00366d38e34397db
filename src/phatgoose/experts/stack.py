"""The weights of all experts at one site, stacked.

Axes: E experts, I in-features, O out-features, R largest rank (smaller ranks are
padded with zeros, which changes no sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from phatgoose.errors import PoolError, RouterError
from phatgoose.experts.adapter import LoraShape
from phatgoose.experts.expert import Expert

# torch's grouped_mm needs rows that start at multiples of 16 bytes: 8 numbers in bf16, 4 in fp32
RANK_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class SiteStack:
    """The experts' tensors at one site.

    Attributes:
        a_ERI: down-projections A.
        b_ERO: up-projections B, transposed and multiplied by LoRA's scale.
        gates_EI: gate vectors as trained, fp32; None unless requested.
        present_E: whether each expert adapts this site. The rows of an absent expert
            are zero; a router must score it -inf, because a zero gate still competes.
        activations_EI: mean activations, fp32; None unless requested.
        filled_E: whether each slot holds an expert; None for stacks without free slots.
    """

    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    gates_EI: torch.Tensor | None
    present_E: torch.Tensor
    activations_EI: torch.Tensor | None = None
    filled_E: torch.Tensor | None = None


def stack_sites(
    experts: Sequence[Expert],
    *,
    dtype: torch.dtype,
    with_gates: bool = False,
    with_activations: bool = False,
    capacity: int | None = None,
) -> dict[str, SiteStack]:
    """Load experts one after another into one stack per site.

    Peak memory is the stacks and one pair of tensors.

    Args:
        experts: opened experts, at least one; the position is the expert id.
        dtype: dtype of a_ERI and b_ERO.
        with_gates: load the gates too.
        with_activations: load the mean activations too.
        capacity: number of slots E, the last ones empty; by default one per expert.

    Returns:
        Site -> stack, on the CPU.

    Raises:
        PoolError: two experts have different shapes at one site.
        AdapterError, GateError, PrototypeError: an expert's files are damaged.
    """
    shapes = {
        site: shape._replace(rank=-(-shape.rank // RANK_MULTIPLE) * RANK_MULTIPLE)
        for site, shape in _site_shapes(experts).items()
    }
    stacks = {
        site: _empty_stack(capacity or len(experts), shape, dtype, with_gates, with_activations, capacity is not None)
        for site, shape in shapes.items()
    }
    for e, expert in enumerate(experts):
        _fill(stacks, e, expert)
    return stacks


def stack_slot(
    expert: Expert | None,
    shapes: Mapping[str, LoraShape],
    *,
    dtype: torch.dtype,
    with_gates: bool = False,
    with_activations: bool = False,
) -> dict[str, SiteStack]:
    """Load one expert in the shape of existing stacks, each with E = 1.

    Args:
        expert: the expert; None for an empty slot.
        shapes: site -> shape of its stack, for all sites with a stack.
        dtype, with_gates, with_activations: see `stack_sites`.

    Returns:
        Site -> stack with E = 1, on the CPU.

    Raises:
        RouterError: the expert adapts a layer without a stack, or has a larger rank than a stack.
        PoolError: the expert was trained on another base model.
        AdapterError, GateError, PrototypeError: the expert's files are damaged.
    """
    stacks = {
        site: _empty_stack(1, shape, dtype, with_gates, with_activations, slots=True) for site, shape in shapes.items()
    }
    if expert is not None:
        for site, shape in expert.shapes.items():
            _check_fits(expert.name, site, shape, shapes)
        _fill(stacks, 0, expert)
    return stacks


def _fill(stacks: Mapping[str, SiteStack], e: int, expert: Expert) -> None:
    """Load one expert into slot `e`, which must be empty."""
    for site, (a_RI, b_OR, scaling) in expert.adapter.load():
        stack, rank = stacks[site], a_RI.shape[0]
        stack.a_ERI[e, :rank] = a_RI.to(stack.a_ERI.dtype)
        stack.b_ERO[e, :rank] = (b_OR.T.float() * scaling).to(stack.b_ERO.dtype)
        stack.present_E[e] = True
    one = next(iter(stacks.values()))
    if one.gates_EI is not None:
        for site, v_I in expert.load_gate().items():
            gates_EI = stacks[site].gates_EI
            assert gates_EI is not None
            gates_EI[e] = v_I
    if one.activations_EI is not None:
        for site, v_I in expert.load_activations().items():
            activations_EI = stacks[site].activations_EI
            assert activations_EI is not None
            activations_EI[e] = v_I
    for stack in stacks.values():
        if stack.filled_E is not None:
            stack.filled_E[e] = True


def _check_fits(expert: str, site: str, shape: LoraShape, shapes: Mapping[str, LoraShape]) -> None:
    rebuild = "build the model again, with this expert in its pool"
    known = shapes.get(site)
    if known is None:
        raise RouterError(
            f"expert {expert!r} adapts {site}, which this model does not route",
            found=site,
            expected=f"one of its {len(shapes)} routed layers: {', '.join(list(shapes)[:3])}, ...",
            fix=rebuild,
        )
    if known[1:] != shape[1:]:
        raise PoolError(
            f"expert {expert!r} does not fit the base model at {site}",
            found=f"{shape.in_features}->{shape.out_features}",
            expected=f"{known.in_features}->{known.out_features}",
            fix="train it on the base model of the pool",
        )
    if shape.rank > known.rank:
        raise RouterError(
            f"expert {expert!r} has too large a rank at {site}",
            found=f"rank {shape.rank}",
            expected=f"a rank of at most {known.rank}, which the slots have room for",
            fix=rebuild,
        )


def _site_shapes(experts: Sequence[Expert]) -> Mapping[str, LoraShape]:
    """Site -> the experts' feature counts and their largest rank."""
    shapes: dict[str, LoraShape] = {}
    owners: dict[str, str] = {}
    for expert in experts:
        for site, shape in expert.shapes.items():
            known = shapes.setdefault(site, shape)
            owners.setdefault(site, expert.name)
            if known[1:] != shape[1:]:
                raise PoolError(
                    f"experts {owners[site]!r} and {expert.name!r} were made for different base models",
                    found=f"{site} is {known.in_features}->{known.out_features} in one "
                    f"and {shape.in_features}->{shape.out_features} in the other",
                    expected="one shape per site",
                    fix=f"phatgoose pool remove POOL {expert.name}",
                )
            shapes[site] = known._replace(rank=max(known.rank, shape.rank))
    return shapes


def _empty_stack(
    num_experts: int, shape: LoraShape, dtype: torch.dtype, with_gates: bool, with_activations: bool, slots: bool
) -> SiteStack:
    return SiteStack(
        a_ERI=torch.zeros(num_experts, shape.rank, shape.in_features, dtype=dtype),
        b_ERO=torch.zeros(num_experts, shape.rank, shape.out_features, dtype=dtype),
        gates_EI=torch.zeros(num_experts, shape.in_features) if with_gates else None,
        activations_EI=torch.zeros(num_experts, shape.in_features) if with_activations else None,
        present_E=torch.zeros(num_experts, dtype=torch.bool),
        filled_E=torch.zeros(num_experts, dtype=torch.bool) if slots else None,
    )
