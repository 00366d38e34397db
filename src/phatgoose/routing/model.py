"""A base model whose linear layers route among a pool's experts.

Axes: B prompts, S positions, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import Dtype, RouterConfig
from phatgoose.data.encoder import pad
from phatgoose.errors import ConfigError, RouterError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.kernels import BACKENDS, DEFAULT_OPTIONS, Backend, KernelOptions
from phatgoose.models.base import Quantization, base_id, load_tokenizer
from phatgoose.models.wrapped import replace_layers
from phatgoose.routers import check_needs, check_pool
from phatgoose.routers.base import PromptRouter, Router
from phatgoose.routers.record import RoutingRecord, ScoresRecord
from phatgoose.routing.layers import experts_to_route, load_for_pool, put_expert, route_layers, routed_linears
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.slots import Slots
from phatgoose.routing.state import CallState, RoutingState
from phatgoose.routing.trace import Trace


class RoutedModel(nn.Module):
    """A Hugging Face model with routed experts; call it, and `generate`, as the model itself.

    Everything that this class does not define (`generate_batch`, `config`, `device`, ...)
    is the wrapped model's. `model.model` is the wrapped PreTrainedModel, for code that
    insists on one. The `with` blocks of this class count for the thread (or asyncio task)
    that entered them, as torch.no_grad does: calls side by side do not see each other's
    masks, prompts and traces.

    Build it with `from_pool`.

    Attributes:
        model: the wrapped model.
        pool: the experts that it routes among.
        slots: which expert lies in which place of the stacks.
        router_config: the router and its options.
        state: what the layers know of the calls that are running.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool,
        config: RouterConfig,
        router_type: type[Router],
        slots: Slots,
        state: RoutingState,
        prompt_router: PromptRouter | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.pool = pool
        self.slots = slots
        self.router_config = config
        self.router_type = router_type
        self.state = state
        self.prompt_router = prompt_router
        self._tokenizer = tokenizer

    @classmethod
    def from_pool(
        cls,
        base: PreTrainedModel | str | None,
        pool: Pool | str | Path,
        *,
        router: str | type[Router] = RouterConfig.router,
        top_k: int = RouterConfig.top_k,
        dtype: Dtype | None = None,
        device: str | None = None,
        quantization: Quantization | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: Backend = "auto",
        capacity: int | None = None,
        kernel_options: KernelOptions = DEFAULT_OPTIONS,
        **options: Any,
    ) -> RoutedModel:
        """Route a base model among the experts of a pool.

        The linear layers that experts adapt are replaced in place; the base's weights
        are shared, not copied. `unwrap` puts the layers back. What can be checked
        without the base's weights is checked before they are loaded.

        Args:
            base: a loaded model, its name for `phatgoose.load_base`, or None for the base that the pool names.
            pool: the experts, or the folder of a pool.
            router: a name in `phatgoose.routers.ROUTERS`, or a class of your own (`phatgoose.Router`).
            top_k: experts per token and site.
            dtype, device, quantization: where and how to load the base; see `phatgoose.load_base`.
            tokenizer: the base's, for routers that read prompts; loaded when it is needed if None.
            backend: how updates are computed; see `phatgoose.kernels`.
            capacity: places for experts, so that `add_expert` and `remove_expert` can be called; memory is
                taken for all of them. None for as many as the pool has, which then stay.
            kernel_options: switches of the Triton kernels.
            options: the other fields of `RouterConfig` (`eps`, `temperature`, ...).

        Raises:
            ConfigError: an option does not exist or cannot be used.
            BaseModelError: `base` is not the pool's base, or cannot be loaded.
            RouterError: the router cannot route among these experts.
            PoolError, AdapterError, GateError: the pool is empty or damaged.
        """
        pool = pool if isinstance(pool, Pool) else Pool.open(pool)
        name = router if isinstance(router, str) else f"{router.__module__}:{router.__qualname__}"
        config = RouterConfig.of(router=name, top_k=top_k, **options)
        if backend not in BACKENDS:
            raise ConfigError(f"unknown backend {backend!r}", expected=", ".join(BACKENDS))
        router_type = check_pool(pool, config, None if isinstance(router, str) else router)
        pool = experts_to_route(pool, config, capacity)
        slots = Slots(pool.names, capacity)
        model = load_for_pool(base, pool, dtype=dtype, device=device, quantization=quantization)
        state, experts = RoutingState(), pool.experts()
        route_layers(
            model,
            experts,
            router_type,
            config,
            backend=backend,
            options=kernel_options,
            capacity=capacity,
            state=state,
        )
        by_slot = [*experts, *[None] * (len(slots) - len(experts))]
        prompt_router = router_type.for_prompts(by_slot, config)
        return cls(model, pool, config, router_type, slots, state, prompt_router, tokenizer)

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
        check_needs(pool, self.router_config, [expert], self.router_type)
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
        if self.state.is_active():
            raise RuntimeError("experts cannot change inside trace(), recording(), without(), prompts() or a call")
        put_expert(self.routed_linears(), slot, expert, self.router_type, self.router_config, self.prompt_router)
        self.slots.names[slot] = "" if expert is None else expert.name
        self.pool = pool

    def unwrap(self) -> PreTrainedModel:
        """Put the base model's own layers back and return it."""
        replace_layers(self.model, {site: linear.base for site, linear in self.routed_linears().items()})
        return self.model

    def routed_linears(self) -> dict[str, RoutedLinear]:
        """Site -> its routed layer, in the order of the model."""
        return routed_linears(self.model)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record the routing of every call that this thread makes inside the `with` block.

        Raises:
            RuntimeError: another trace is being recorded.
        """
        trace = Trace(self.slots.names, self.site_names())
        with self.recording(trace.records):
            yield trace

    @contextmanager
    def recording(self, records: Mapping[str, RoutingRecord | ScoresRecord]) -> Iterator[None]:
        """Report every call of a site inside the `with` block to its record.

        Args:
            records: one record for each site, by name.

        Raises:
            RuntimeError: the routing is being recorded already.
        """
        call = self.state.own()
        if call.records is not None:
            raise RuntimeError("traces do not nest")
        with self.state.during(replace(call, records=records)):
            yield

    @contextmanager
    def without(self, names: Sequence[str]) -> Iterator[None]:
        """Mask experts out of the pool inside the `with` block, as if they had never been added.

        Raises:
            PoolError: no expert of that name.
            RouterError: no expert is left.
        """
        call = self.state.own()
        masked = call.masked | self._known(names)
        mask_1E = self._mask_row(masked).to(self.device) if masked else None
        with self.state.during(replace(call, masked=masked, mask_1E=mask_1E)):
            yield

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
                the pool for it alone, beside those of `without(...)`; empty if no prompt has any.

        Raises:
            PoolError: no expert of that name.
            RouterError: no expert is left.
        """
        call = self.state.own()
        if any(without):
            call = replace(call, prompt_masked=without)
            call = replace(call, prompt_mask_BE=self._masks_BE(call, len(prompt_ids)).to(self.device))
        if self.prompt_router is not None:
            with self.state.during(call):
                bias = self.prompt_router.bias(self, prompt_ids)
            call = replace(call, prompt_bias=_on_device(bias, self.device))
        with self.state.during(call):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        with self._own_prompts(args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")):
            return self.model(*args, **kwargs)

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The wrapped model's generate."""
        with self._own_prompts(kwargs.get("input_ids", inputs), kwargs.get("attention_mask")):
            generate: Any = self.model.generate
            return generate(inputs, **kwargs)

    def _own_prompts(
        self, input_ids_BS: torch.Tensor | None, mask_BS: torch.Tensor | None
    ) -> AbstractContextManager[None]:
        """`prompts` of a call's own input, unless somebody has said what they are."""
        call = self.state.own()
        if self.prompt_router is None or input_ids_BS is None or call.prompt_bias is not None:
            return self.state.during(call)  # this thread's own, whatever others enter meanwhile
        if mask_BS is None:
            mask_BS = torch.ones_like(input_ids_BS)
        return self.prompts(
            [ids_S[keep_S.bool()].tolist() for ids_S, keep_S in zip(input_ids_BS, mask_BS, strict=True)]
        )

    @property
    def num_experts(self) -> int:
        """E: places for experts, empty ones included."""
        return len(self.slots)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the wrapped model is an encoder-decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer; loaded at the first use if none was given."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(base_id(self.model).name, self.pool.base.revision)
        return self._tokenizer

    def site_names(self) -> list[str]:
        """Names of the routed sites, in the order of the model."""
        return list(self.routed_linears())

    def texts(self, prompt_ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of prompts, for routers that read them."""
        return [str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in prompt_ids]

    @torch.no_grad()
    def first_pass(
        self,
        prompt_ids: Sequence[Sequence[int]],
        records: Mapping[str, RoutingRecord | ScoresRecord],
        bias_BE: torch.Tensor | None = None,
    ) -> None:
        """See `PromptReader.first_pass`. Masks count; an encoder-decoder reads with its encoder alone."""
        # a mask hides padding from attention, and causal models never look right, so its id does not matter
        input_ids_BS = pad(prompt_ids, 0).to(self.device)
        mask_BS = pad([[1] * len(ids) for ids in prompt_ids], 0).to(self.device)
        reader = self.model.get_encoder() if self.is_encoder_decoder else self.model.base_model
        with self.state.during(replace(self.state.own(), records=records, prompt_bias=bias_BE, first_pass=True)):
            reader(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False)

    def mask_BE(self, num_prompts: int) -> torch.Tensor:
        """-inf for the experts that are masked for each of B prompts, 0 for the others; fp32 on the CPU.

        Raises:
            PoolError: no expert of that name.
            RouterError: no expert is left.
        """
        return self._masks_BE(self.state.own(), num_prompts)

    def _masks_BE(self, call: CallState, num_prompts: int) -> torch.Tensor:
        rows = [self._known(names) for names in call.prompt_masked] or [frozenset()] * num_prompts
        if len(rows) != num_prompts:
            raise ValueError(f"{num_prompts} prompts, but experts to mask for {len(rows)}")
        return torch.cat([self._mask_row(call.masked | row) for row in rows])

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


def _on_device(
    bias: torch.Tensor | Mapping[str, torch.Tensor], device: torch.device
) -> torch.Tensor | Mapping[str, torch.Tensor]:
    if isinstance(bias, torch.Tensor):
        return bias.to(device)
    return {site: bias_BE.to(device) for site, bias_BE in bias.items()}
