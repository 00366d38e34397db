"""The weights of all experts at one site, stacked.

Axes: E experts, I in-features, O out-features, R rank (the largest; smaller
ones are padded with zeros, which changes no sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from phatgoose.errors import PoolError, RouterError
from phatgoose.experts.adapter import LoraShape
from phatgoose.experts.expert import Expert

# torch's grouped_mm wants rows that start at multiples of 16 bytes: 8 bf16 or 4 fp32 numbers.
RANK_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class SiteStack:
    """What routing needs at one site.

    Attributes:
        a_ERI: down-projections.
        b_ERO: up-projections, transposed, with LoRA's scale folded in.
        gates_EI: the gate vectors as trained, fp32; None if not asked for.
        activations_EI: the mean activations, fp32; None if not asked for.
        present_E: which experts adapt this site. The others' rows are zero and
            a router must score them -inf: a zero gate would still compete.
        filled_E: which slots hold an expert of the pool at all; None where all
            do and none will ever change.
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
    """Load experts one after the other into one stack per site.

    Peak memory is the stacks and one tensor pair. Expert ids are positions in `experts`.

    Args:
        experts: opened experts, at least one.
        dtype: of a_ERI and b_ERO.
        with_gates: whether to load the gates too.
        with_activations: whether to load the mean activations too.
        capacity: slots, of which those behind the experts stay empty; None for as many as experts.

    Raises:
        PoolError: experts disagree about a site's shape.
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
    """Load one expert as it would lie in stacks that exist, each with E = 1.

    Args:
        expert: None for an empty slot.
        shapes: of all sites that have a stack; the ranks are the stacks'.
        dtype, with_gates, with_activations: see `stack_sites`.

    Raises:
        RouterError: the expert adapts another layer, or has a larger rank.
        PoolError: it was made for another base model.
        AdapterError, GateError, PrototypeError: its files are damaged.
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
    """Load one expert into the slot `e`, which is empty."""
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
    again = "build the model again, with this expert in its pool"
    known = shapes.get(site)
    if known is None:
        raise RouterError(
            f"expert {expert!r} adapts {site}, which this model does not route",
            found=site,
            expected=f"one of its {len(shapes)} routed layers: {', '.join(list(shapes)[:3])}, ...",
            fix=again,
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
            fix=again,
        )


def _site_shapes(experts: Sequence[Expert]) -> Mapping[str, LoraShape]:
    """Per site the common feature counts and the largest rank."""
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
