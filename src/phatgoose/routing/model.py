"""A base model whose linear layers route among a pool's experts.

Axes: B prompts, S positions, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import RouterConfig
from phatgoose.errors import BaseModelError, ConfigError, RouterError
from phatgoose.experts.adapter import LoraShape
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.sites import check_sites
from phatgoose.experts.stack import stack_sites, stack_slot
from phatgoose.kernels import BACKENDS, DEFAULT_OPTIONS, Backend, KernelOptions
from phatgoose.models.base import base_id, load_base, load_tokenizer
from phatgoose.routers import check_needs, check_pool, router_class
from phatgoose.routers.base import PromptRouter
from phatgoose.routers.record import RoutingRecord, ScoresRecord
from phatgoose.routing.fused import share_inputs
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.slots import Slots
from phatgoose.routing.trace import Trace


class RoutedModel(nn.Module):
    """A Hugging Face model with routed experts; call it, and `generate`, as the model itself.

    Everything that this class does not define (`generate`, `generate_batch`,
    `config`, `device`, ...) is the wrapped model's. `model.model` is the wrapped
    PreTrainedModel, for code that insists on one.

    Build it with `from_pool`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool,
        config: RouterConfig,
        prompt_router: PromptRouter | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        slots: Slots | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.pool = pool
        self.slots = slots or Slots(pool.names)
        self.router_config = config
        self.prompt_router = prompt_router
        self._tokenizer = tokenizer
        self._masked: frozenset[str] = frozenset()
        self._prompt_masked: Sequence[Sequence[str]] = ()
        self._tracing = False

    @classmethod
    def from_pool(
        cls,
        base: PreTrainedModel | str,
        pool: Pool,
        *,
        router: str = RouterConfig.router,
        top_k: int = RouterConfig.top_k,
        backend: Backend = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        capacity: int | None = None,
        kernel_options: KernelOptions = DEFAULT_OPTIONS,
        **options: Any,
    ) -> RoutedModel:
        """Route `base` among the experts of `pool`.

        The linear layers of `base` that experts adapt are replaced in place; its
        weights are shared, not copied. `unwrap` puts them back.

        Args:
            base: a loaded model, or what `phatgoose.models.base.load_base` takes.
            pool: the experts.
            router: a name in `phatgoose.routers.ROUTERS`.
            top_k: experts per token and site.
            backend: see `phatgoose.kernels`.
            tokenizer: for routers that read prompts; the base's own if None.
            capacity: slots for experts, so that `add_expert` and `remove_expert` can be called; memory is
                taken for all of them. None for as many as the pool has, which then stay.
            kernel_options: switches of the Triton kernels.
            options: the other fields of `RouterConfig` (`eps`, `temperature`, ...).

        Raises:
            ConfigError: an option that does not exist or cannot be used.
            BaseModelError: `base` is another model than the pool's.
            RouterError: the router cannot route among these experts.
            PoolError, AdapterError, GateError: the pool is empty or damaged.
        """
        config = RouterConfig.of(router=router, top_k=top_k, **options)
        if backend not in BACKENDS:
            raise ConfigError(f"unknown backend {backend!r}", expected=", ".join(BACKENDS))
        router_type = check_pool(pool, config)
        if config.expert is not None:
            pool = pool.subset([config.expert])
            if capacity is not None:
                raise ConfigError(
                    f"router {config.router!r} has no use for a capacity",
                    found=f"capacity {capacity}",
                    expected="one expert for every token",
                    fix="leave capacity out",
                )
        slots = Slots(pool.names, capacity)
        model = load_base(base, pool.base.revision) if isinstance(base, str) else base
        _check_base(model, pool)
        experts = pool.experts()
        check_sites(model, experts)
        stacks = stack_sites(
            experts,
            dtype=model.dtype,
            with_gates="gate" in router_type.needs,
            with_activations="activations" in router_type.needs,
            capacity=capacity,
        )
        for site, stack in stacks.items():
            rule = router_type(stack, config)
            routed = RoutedLinear(model.get_submodule(site), stack, rule, backend, kernel_options)
            model.set_submodule(site, routed.to_base())
        if kernel_options.share_input:
            share_inputs((site, linear) for site, linear in model.named_modules() if isinstance(linear, RoutedLinear))
        by_slot = [*experts, *[None] * (len(slots) - len(experts))]
        return cls(model, pool, config, router_type.for_prompts(by_slot, config), tokenizer, slots)

    def add_expert(self, expert: Expert) -> None:
        """Put an expert into an empty slot. No tensor moves, so captured and compiled graphs stay valid.

        `pool` becomes one with this expert; nothing changes on disk. Caches of keys and
        values from before are another pool's. Nobody may call the model meanwhile.

        Raises:
            RouterError: no slot is empty (or there are none, see `from_pool`); the expert lacks
                what the router needs, adapts a layer that is not routed, or has too large a rank.
            PoolError: the name is taken, or the expert was made for another base model.
            AdapterError, GateError, PrototypeError: its files are damaged. Nothing has changed then.
            RuntimeError: inside a `with` block of this model.
        """
        self.slots.check_open()
        pool = self.pool.with_expert(expert)
        check_needs(pool, self.router_config, [expert])
        self._put(self.slots.empty(), expert, pool)

    def remove_expert(self, name: str) -> None:
        """Empty an expert's slot, for others to use; see `add_expert`.

        Raises:
            PoolError: no expert of that name.
            RouterError: it is the last one, or there are no slots.
            RuntimeError: inside a `with` block of this model.
        """
        self.slots.check_open()
        self.pool.entry(name)
        others = [other for other in self.pool.names if other != name]
        if not others:
            raise RouterError(
                f"{name!r} is the last expert",
                expected="at least one expert left",
                fix="add another one first, or unwrap() the model",
            )
        self._put(self.slots.names.index(name), None, self.pool.subset(others))

    def _put(self, slot: int, expert: Expert | None, pool: Pool) -> None:
        """Write an expert, or nothing, into a slot of every site. All is read before anything is written."""
        if self._tracing or self._masked or self._prompt_masked or self._prompts_are_known():
            raise RuntimeError("experts cannot change inside trace(), recording(), without() or prompts()")
        linears, router_type = self.routed_linears(), router_class(self.router_config.router)
        shapes = {
            site: LoraShape(linear.a_ERI.shape[1], linear.a_ERI.shape[2], linear.b_ERO.shape[2])
            for site, linear in linears.items()
        }
        stacks = stack_slot(
            expert,
            shapes,
            dtype=next(iter(linears.values())).a_ERI.dtype,
            with_gates="gate" in router_type.needs,
            with_activations="activations" in router_type.needs,
        )
        rules = {site: router_type(stack, self.router_config) for site, stack in stacks.items()}
        if self.prompt_router is not None:
            self.prompt_router.put(slot, expert)
        for site, linear in linears.items():
            linear.put(slot, stacks[site], rules[site])
        self.slots.names[slot] = "" if expert is None else expert.name
        self.pool = pool

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
        trace = Trace(self.slots.names, list(self.routed_linears()))
        with self.recording(trace.records):
            yield trace

    @contextmanager
    def recording(self, records: Mapping[str, RoutingRecord | ScoresRecord]) -> Iterator[None]:
        """Report every call of a site inside the `with` block to its record.

        Args:
            records: by site, one for each.

        Raises:
            RuntimeError: the routing is being recorded already.
        """
        if self._tracing:
            raise RuntimeError("traces do not nest")
        linears = self.routed_linears()
        self._tracing = True
        try:
            for site, linear in linears.items():
                linear.record = records[site]
            yield
        finally:
            self._tracing = False
            for linear in linears.values():
                linear.record = None

    @contextmanager
    def without(self, names: Sequence[str]) -> Iterator[None]:
        """Mask experts out of the pool inside the `with` block, as if they had never been added.

        Raises:
            PoolError: no expert of that name.
            RouterError: no expert is left.
        """
        before = self._masked
        self._mask(before | self._known(names))
        try:
            yield
        finally:
            self._mask(before)

    @contextmanager
    def prompts(self, prompt_ids: Sequence[Sequence[int]], without: Sequence[Sequence[str]] = ()) -> Iterator[None]:
        """Say which prompt each row of the calls inside the `with` block belongs to.

        For routers that read prompts: `model(...)` and `model.generate(...)` take
        their own input as the prompt; this is for calls whose input is more (a
        prompt and its answer) or less (a step with a cache).

        Args:
            prompt_ids: token ids of B prompts, without padding. A call has a
                multiple of B rows: beams of one prompt lie beside each other.
            without: for each prompt, the names of experts that are masked out of
                the pool for it alone, beside those of `without(...)`; nothing for none.

        Raises:
            PoolError: no expert of that name.
            RouterError: no expert is left.
        """
        if self.prompt_router is None and not any(without):
            yield
            return
        linears = self.routed_linears()
        before = [(linear.prompt_bias_BE, linear.prompt_mask_BE) for linear in linears.values()]
        masked = self._prompt_masked
        try:
            if any(without):
                self._prompt_masked = without
                mask_BE = self.mask_BE(len(prompt_ids))
                for linear in linears.values():
                    linear.prompt_mask_BE = mask_BE.to(linear.a_ERI.device)
            if self.prompt_router is not None:
                bias = self.prompt_router.bias(self, prompt_ids)
                for site, linear in linears.items():
                    of_site_BE = bias if isinstance(bias, torch.Tensor) else bias[site]
                    linear.prompt_bias_BE = of_site_BE.to(linear.a_ERI.device)
            yield
        finally:
            self._prompt_masked = masked
            for linear, (bias_BE, masks_BE) in zip(linears.values(), before, strict=True):
                linear.prompt_bias_BE, linear.prompt_mask_BE = bias_BE, masks_BE

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        with self._own_prompts(args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")):
            return self.model(*args, **kwargs)

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The wrapped model's generate."""
        with self._own_prompts(kwargs.get("input_ids", inputs), kwargs.get("attention_mask")):
            generate: Any = self.model.generate
            return generate(inputs, **kwargs)

    def _own_prompts(self, input_ids_BS: torch.Tensor | None, mask_BS: torch.Tensor | None) -> Any:
        """`prompts` of a call's own input, unless somebody has said what they are."""
        if self.prompt_router is None or input_ids_BS is None or self._prompts_are_known():
            return nullcontext()
        if mask_BS is None:
            mask_BS = torch.ones_like(input_ids_BS)
        return self.prompts(
            [ids_S[keep_S.bool()].tolist() for ids_S, keep_S in zip(input_ids_BS, mask_BS, strict=True)]
        )

    def _prompts_are_known(self) -> bool:
        return any(linear.prompt_bias_BE is not None for linear in self.routed_linears().values())

    def texts(self, prompt_ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of prompts, for routers that read them. Loads the base's tokenizer if none was given."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pool.base.name, self.pool.base.revision)
        return [str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in prompt_ids]

    def mask_BE(self, num_prompts: int) -> torch.Tensor:
        """-inf for the experts that are masked for each of B prompts, 0 for the others; fp32 on the CPU.

        Raises:
            PoolError, RouterError: see `prompts`.
        """
        rows = [self._known(names) for names in self._prompt_masked] or [frozenset()] * num_prompts
        if len(rows) != num_prompts:
            raise ValueError(f"{num_prompts} prompts, but experts to mask for {len(rows)}")
        return torch.cat([self._mask_row(self._masked | row) for row in rows])

    def _mask(self, names: frozenset[str]) -> None:
        mask_1E = self._mask_row(names)
        self._masked = names
        for linear in self.routed_linears().values():
            linear.mask_1E = mask_1E.to(linear.a_ERI.device) if names else None

    def _known(self, names: Sequence[str]) -> frozenset[str]:
        return frozenset(self.pool.entry(name).name for name in names)

    def _mask_row(self, names: frozenset[str]) -> torch.Tensor:
        if names >= set(self.pool.names):
            raise RouterError(
                "every expert is masked", found=", ".join(sorted(names)), expected="at least one expert left"
            )
        return torch.tensor([[-torch.inf if name in names else 0.0 for name in self.slots.names]])

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
