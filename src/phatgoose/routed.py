"""A base model whose linear layers route among a pool's experts.

Axes: N tokens, I in-features, O out-features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from phatgoose import kernels
from phatgoose.base import base_id, load_base
from phatgoose.config import RouterConfig
from phatgoose.errors import BaseModelError, ConfigError
from phatgoose.kernels import BACKENDS, Backend
from phatgoose.pool import Pool
from phatgoose.routers import Router, check_pool
from phatgoose.sites import check_sites
from phatgoose.stack import SiteStack, stack_sites
from phatgoose.trace import SiteRecord, Trace


class RoutedLinear(nn.Module):
    """`base(x) + sum of the chosen experts' updates of x`.

    Sees only `(..., I)`: no batch, position or mask, so a token's routing
    depends on nothing but its activation.

    Args:
        base: the linear layer that is replaced; any kind, quantised ones too.
        stack: the experts at this site.
        router: chooses among them.
        backend: how their updates are mixed.
    """

    a_ERI: torch.Tensor
    b_ERO: torch.Tensor

    def __init__(self, base: nn.Module, stack: SiteStack, router: Router, backend: Backend = "auto") -> None:
        super().__init__()
        self.base = base
        self.router = router
        self.backend = backend
        self.record: SiteRecord | None = None
        self.register_buffer("a_ERI", stack.a_ERI, persistent=False)
        self.register_buffer("b_ERO", stack.b_ERO, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O), in the dtype that the base layer gives."""
        y: torch.Tensor = self.base(x)
        x_NI = x.reshape(-1, x.shape[-1])
        routing = self.router(x_NI)
        if self.record is not None:
            self.record.append(routing, x.shape[:-1])
        update_NO = kernels.mix_loras(
            x_NI.to(self.a_ERI.dtype),
            self.a_ERI,
            self.b_ERO,
            routing.weights_NK,
            routing.expert_ids_NK,
            self.backend,
        )
        return y + update_NO.view(y.shape).to(y.dtype)

    # Models look at these of their linear layers (T5 reads wo.weight.dtype).
    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base.bias


class RoutedModel(nn.Module):
    """A Hugging Face model with routed experts; call it, and `generate`, as the model itself.

    Everything that this class does not define (`generate`, `generate_batch`,
    `config`, `device`, ...) is the wrapped model's. `model.model` is the wrapped
    PreTrainedModel, for code that insists on one.

    Build it with `from_pool`.
    """

    def __init__(self, model: PreTrainedModel, pool: Pool, config: RouterConfig) -> None:
        super().__init__()
        self.model = model
        self.pool = pool
        self.router_config = config
        self._tracing = False

    @classmethod
    def from_pool(
        cls,
        base: PreTrainedModel | str,
        pool: Pool,
        *,
        router: str = RouterConfig.router,
        top_k: int = RouterConfig.top_k,
        eps: float = RouterConfig.eps,
        temperature: float = RouterConfig.temperature,
        backend: Backend = "auto",
    ) -> RoutedModel:
        """Route `base` among the experts of `pool`.

        The linear layers of `base` that experts adapt are replaced in place; its
        weights are shared, not copied. `unwrap` puts them back.

        Args:
            base: a loaded model, or what `phatgoose.base.load_base` takes.
            pool: the experts.
            router: a name in `phatgoose.routers.ROUTERS`.
            top_k: experts per token and site.
            eps: see `RouterConfig`.
            temperature: see `RouterConfig`.
            backend: see `phatgoose.kernels`.

        Raises:
            BaseModelError: `base` is another model than the pool's.
            RouterError: the router cannot route among these experts.
            PoolError, AdapterError, GateError: the pool is empty or damaged.
        """
        config = RouterConfig(router=router, top_k=top_k, eps=eps, temperature=temperature)
        if backend not in BACKENDS:
            raise ConfigError(f"unknown backend {backend!r}", expected=", ".join(BACKENDS))
        router_type = check_pool(pool, config)
        model = load_base(base, pool.base.revision) if isinstance(base, str) else base
        _check_base(model, pool)
        experts = pool.experts()
        check_sites(model, experts)
        stacks = stack_sites(experts, dtype=model.dtype, with_gates="gate" in router_type.needs)
        for site, stack in stacks.items():
            linear = model.get_submodule(site)
            routed = RoutedLinear(linear, stack, router_type(stack, config), backend)
            model.set_submodule(site, _move_buffers(routed, linear))
        return cls(model, pool, config)

    def unwrap(self) -> PreTrainedModel:
        """Put the base model's own layers back and return it."""
        for site, module in list(self.routed_linears().items()):
            self.model.set_submodule(site, module.base)
        return self.model

    def routed_linears(self) -> dict[str, RoutedLinear]:
        """Site -> its routed layer, in the order of the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, RoutedLinear)}

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record the routing of every call inside the `with` block.

        Raises:
            RuntimeError: another trace is being recorded.
        """
        if self._tracing:
            raise RuntimeError("traces do not nest")
        linears = self.routed_linears()
        trace = Trace(self.pool.names, list(linears))
        self._tracing = True
        try:
            for site, linear in linears.items():
                linear.record = trace.records[site]
            yield trace
        finally:
            self._tracing = False
            for linear in linears.values():
                linear.record = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet
                raise
            return getattr(self.model, name)


def _check_base(model: PreTrainedModel, pool: Pool) -> None:
    found = base_id(model)
    if not pool.base.matches(found):
        raise BaseModelError(
            f"pool {pool.folder} is for another base model",
            found=str(found),
            expected=str(pool.base),
            fix=f"load {pool.base}",
        )
    if any(isinstance(module, RoutedLinear) for module in model.modules()):
        raise BaseModelError("this model is routed already", fix="call unwrap() on the old RoutedModel first")


def _move_buffers(routed: RoutedLinear, linear: nn.Module) -> RoutedLinear:
    """Put what is new on the device of the layer that it replaces (which may be quantised)."""
    device = next((p.device for p in linear.parameters()), torch.device("cpu"))
    routed.a_ERI = routed.a_ERI.to(device)
    routed.b_ERO = routed.b_ERO.to(device)
    routed.router.to(device)
    return routed
