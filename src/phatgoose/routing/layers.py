"""The routed layers of a base model: put in place, refilled and found.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from phatgoose.config import Dtype, RouterConfig
from phatgoose.errors import BaseModelError, ConfigError
from phatgoose.experts.adapter import LoraShape
from phatgoose.experts.checks import check_base_name
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.sites import check_sites
from phatgoose.experts.stack import stack_sites, stack_slot
from phatgoose.kernels import Backend, KernelOptions
from phatgoose.models.base import Quantization, base_id, load_base
from phatgoose.models.wrapped import replace_layers
from phatgoose.routers.base import PromptRouter, Router
from phatgoose.routing.fused import group_layers
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.state import RoutingState


def routed_linears(model: nn.Module) -> dict[str, RoutedLinear]:
    """Site -> its routed layer, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLinear)}


def experts_to_route(pool: Pool, config: RouterConfig, capacity: int | None) -> Pool:
    """The pool, or the one expert of it that every token gets. Raises ConfigError if that one has a capacity."""
    if config.expert is None:
        return pool
    if capacity is not None:
        raise ConfigError(
            f"router {config.router!r} has no use for a capacity",
            found=f"capacity {capacity}",
            expected="one expert for every token",
            fix="leave capacity out",
        )
    return pool.subset([config.expert])


def load_for_pool(
    base: PreTrainedModel | str | None,
    pool: Pool,
    *,
    dtype: Dtype | None,
    device: str | None,
    quantization: Quantization | None,
) -> PreTrainedModel:
    """The base model of a pool: the one given, once it is checked, or the one of that name.

    Args:
        base: a loaded model, a name, or None for the name that the pool gives.
        pool: the experts' pool, which names their base.
        dtype, device, quantization: see `load_base`; None beside a loaded model.

    Raises:
        BaseModelError: it is another model than the pool's, is routed already, or cannot be loaded.
        ConfigError: a loaded model with options for loading.
    """
    if base is None or isinstance(base, str):
        name = check_base_name(pool.folder, pool.base, base)
        return load_base(name, pool.base.revision, dtype=dtype, device=device, quantization=quantization)
    if not (dtype is None and device is None and quantization is None):
        raise ConfigError(
            "dtype, device and quantization say how to load a base model, and this one is loaded",
            found=f"dtype {dtype}, device {device}, quantization {quantization}",
            expected="none of them beside a loaded model",
            fix="load the model that way, or pass its name",
        )
    if not pool.base.matches(base_id(base)):
        raise BaseModelError(
            f"pool {pool.folder} is for another base model",
            found=str(base_id(base)),
            expected=str(pool.base),
            fix=f"load {pool.base}",
        )
    if routed_linears(base):
        raise BaseModelError("this model is routed already", fix="call unwrap() on the old RoutedModel first")
    return base


def route_layers(
    model: PreTrainedModel,
    experts: Sequence[Expert],
    router_type: type[Router],
    config: RouterConfig,
    *,
    backend: Backend,
    options: KernelOptions,
    capacity: int | None,
    state: RoutingState,
) -> None:
    """Put a RoutedLinear in the place of each layer that an expert adapts.

    Args:
        model: the base model; changed in place.
        experts: by expert id.
        router_type, config: the rule, made anew for each site.
        backend, options: see `RoutedLinear`.
        capacity: places for experts; None for as many as there are experts.
        state: shared by all the layers.

    Raises:
        BaseModelError: an expert adapts a layer that the model does not have.
        PoolError, AdapterError, GateError, PrototypeError: the experts' files are damaged or disagree.
    """
    check_sites(model, experts)
    stacks = stack_sites(experts, dtype=model.dtype, capacity=capacity, **_vectors_to_load(router_type))
    linears = {}
    for site, stack in stacks.items():
        rule = router_type(stack, config)
        linear = RoutedLinear(model.get_submodule(site), stack, rule, backend, options, site=site, state=state)
        linears[site] = linear.to_base()
    replace_layers(model, linears)
    if options.share_input:
        group_layers(linears.values())


def put_expert(
    linears: Mapping[str, RoutedLinear],
    slot: int,
    expert: Expert | None,
    router_type: type[Router],
    config: RouterConfig,
    prompt_router: PromptRouter | None,
) -> None:
    """Write an expert, or nothing, into a slot of every site. All is read before anything is written.

    Args:
        linears: all routed layers of a model, by site.
        slot: the expert's id.
        expert: None to empty the slot.
        router_type, config: the layers' rule.
        prompt_router: what reads prompts for them; None if nothing does.

    Raises:
        RouterError: the expert adapts a layer that is not routed, or has too large a rank.
        PoolError, AdapterError, GateError, PrototypeError: its files do not fit or are damaged.
    """
    shapes = {
        site: LoraShape(linear.a_ERI.shape[1], linear.a_ERI.shape[2], linear.b_ERO.shape[2])
        for site, linear in linears.items()
    }
    dtype = next(iter(linears.values())).a_ERI.dtype
    stacks = stack_slot(expert, shapes, dtype=dtype, **_vectors_to_load(router_type))
    rules = {site: router_type(stack, config) for site, stack in stacks.items()}
    if prompt_router is not None:
        prompt_router.put(slot, expert)
    for site, linear in linears.items():
        linear.put(slot, stacks[site], rules[site])


def _vectors_to_load(router_type: type[Router]) -> dict[str, bool]:
    """Which vectors beside the adapters a router needs in its stacks."""
    return {"with_gates": "gate" in router_type.needs, "with_activations": "activations" in router_type.needs}
