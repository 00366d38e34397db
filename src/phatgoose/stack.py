"""The weights of all experts at one site, stacked.

Axes: E experts, I in-features, O out-features, R rank (the largest; smaller
ones are padded with zeros, which changes no sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from phatgoose.adapter import LoraShape
from phatgoose.errors import PoolError
from phatgoose.expert import Expert

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
    """

    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    gates_EI: torch.Tensor | None
    present_E: torch.Tensor
    activations_EI: torch.Tensor | None = None


def stack_sites(
    experts: Sequence[Expert], *, dtype: torch.dtype, with_gates: bool = False, with_activations: bool = False
) -> dict[str, SiteStack]:
    """Load experts one after the other into one stack per site.

    Peak memory is the stacks and one tensor pair. Expert ids are positions in `experts`.

    Args:
        experts: opened experts, at least one.
        dtype: of a_ERI and b_ERO.
        with_gates: whether to load the gates too.
        with_activations: whether to load the mean activations too.

    Raises:
        PoolError: experts disagree about a site's shape.
        AdapterError, GateError, PrototypeError: an expert's files are damaged.
    """
    stacks = {
        site: _empty_stack(len(experts), shape, dtype, with_gates, with_activations)
        for site, shape in _site_shapes(experts).items()
    }
    for e, expert in enumerate(experts):
        for site, (a_RI, b_OR, scaling) in expert.adapter.load():
            stack, rank = stacks[site], a_RI.shape[0]
            stack.a_ERI[e, :rank] = a_RI.to(dtype)
            stack.b_ERO[e, :rank] = (b_OR.T.float() * scaling).to(dtype)
            stack.present_E[e] = True
        if with_gates:
            for site, v_I in expert.load_gate().items():
                gates_EI = stacks[site].gates_EI
                assert gates_EI is not None
                gates_EI[e] = v_I
        if with_activations:
            for site, v_I in expert.load_activations().items():
                activations_EI = stacks[site].activations_EI
                assert activations_EI is not None
                activations_EI[e] = v_I
    return stacks


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
    num_experts: int, shape: LoraShape, dtype: torch.dtype, with_gates: bool, with_activations: bool
) -> SiteStack:
    rank = -(-shape.rank // RANK_MULTIPLE) * RANK_MULTIPLE
    return SiteStack(
        a_ERI=torch.zeros(num_experts, rank, shape.in_features, dtype=dtype),
        b_ERO=torch.zeros(num_experts, rank, shape.out_features, dtype=dtype),
        gates_EI=torch.zeros(num_experts, shape.in_features) if with_gates else None,
        activations_EI=torch.zeros(num_experts, shape.in_features) if with_activations else None,
        present_E=torch.zeros(num_experts, dtype=torch.bool),
    )
