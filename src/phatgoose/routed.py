"""A base model whose linear layers route among a pool's experts.

Axes: N tokens, I in-features, O out-features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose import kernels
from phatgoose.base import base_id, load_base, load_tokenizer
from phatgoose.config import RouterConfig
from phatgoose.errors import BaseModelError, ConfigError, RouterError
from phatgoose.kernels import BACKENDS, Backend
from phatgoose.kernels import settings as kernel_settings
from phatgoose.kernels.prototypes import split
from phatgoose.pool import Pool
from phatgoose.routers import PromptRouter, Router, Routing, check_pool
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.sites import check_sites
from phatgoose.stack import SiteStack, stack_sites
from phatgoose.trace import RoutingRecord, ScoresRecord, Trace
from phatgoose.wrapped import WrappedLinear


class RoutedLinear(WrappedLinear):
    """`base(x) + sum of the chosen experts' updates of x`.

    Sees only `(..., I)`: no position or mask, so a token's routing depends on
    nothing but its activation. There are two exceptions. For routers that read
    prompts, `prompt_bias_BE` says what each of B prompts adds to the scores; and
    `prompt_mask_BE` says which experts are masked for one prompt and not for others.

    Args:
        base: the linear layer that is replaced; any kind, quantised ones too.
        stack: the experts at this site.
        router: chooses among them.
        backend: how their updates are mixed.
    """

    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    hi_EI: torch.Tensor
    lo_EI: torch.Tensor | None
    sums_E: torch.Tensor

    def __init__(self, base: nn.Module, stack: SiteStack, router: Router, backend: Backend = "auto") -> None:
        super().__init__(base)
        self.router = router
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        self.backend = kernels.resolve(backend, device, stack.a_ERI.dtype)
        self.record: RoutingRecord | ScoresRecord | None = None
        self.prompt_bias_BE: torch.Tensor | None = None
        self.prompt_mask_BE: torch.Tensor | None = None
        self.mask_1E: torch.Tensor | None = None
        self.register_buffer("a_ERI", stack.a_ERI, persistent=False)
        self.register_buffer("b_ERO", stack.b_ERO, persistent=False)
        self.fused = self.beside = False
        if self.backend == "triton":
            kernels.load("triton")  # registers its operators
        if self.backend == "triton" and isinstance(router, Phatgoose) and router.standardises:
            self.fused = True
            prototypes = split(router.prototypes_EI, self.a_ERI.dtype)
            self.eps: float = router.eps
            # then the operator computes the base layer: its weights are used, hooks on it are not called
            self.beside = kernel_settings.BASE_BESIDE and type(base) is nn.Linear and "forward" not in vars(base)
            for name, tensor in prototypes._asdict().items():
                self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O), in the dtype that the base layer gives."""
        x_NI = x.reshape(-1, x.shape[-1])
        bias_NE, mask_NE = self._bias(len(x_NI)), self._mask(len(x_NI))
        fused = self.fused and x_NI.dtype == self.a_ERI.dtype and not isinstance(self.record, ScoresRecord)
        if fused and self.beside and not _wants_gradients(x_NI, self.weight):
            question = self._question(bias_NE, mask_NE)
            y_NO, *choice = torch.ops.phatgoose.routed_linear(x_NI, self.weight, self.bias, *question)
            return self._recorded(Routing(*choice), x.shape, y_NO.view(*x.shape[:-1], -1))
        y: torch.Tensor = self.base(x)
        in_place = self.backend == "triton" and y.is_contiguous() and not _wants_gradients(x_NI, y)
        if fused and in_place:
            question = self._question(bias_NE, mask_NE)
            choice = torch.ops.phatgoose.route_and_add_(y.view(-1, y.shape[-1]), x_NI, *question)
            return self._recorded(Routing(*choice), x.shape, y)
        if isinstance(self.record, ScoresRecord):
            scores_NE = self.router.final_scores(x_NI, bias_NE, mask_NE)
            routing = self.router.choose(scores_NE, mask_NE)
            self.record.append_scores(scores_NE, routing, x.shape[:-1])
        else:
            routing = self.router(x_NI, bias_NE, mask_NE)
            if self.record is not None:
                self.record.append(routing, x.shape[:-1])
        x_NI = x_NI.to(self.a_ERI.dtype)
        if self.router.mixing == "parameters":
            update_NO = kernels.mix_parameters(x_NI, self.a_ERI, self.b_ERO, *routing)
        elif in_place:
            kernels.add_loras(y.view(-1, y.shape[-1]), x_NI, self.a_ERI, self.b_ERO, *routing)
            return y
        else:
            update_NO = kernels.mix_loras(
                x_NI, self.a_ERI, self.b_ERO, routing.weights_NK, routing.expert_ids_NK, self.backend
            )
        return y + update_NO.view(y.shape).to(y.dtype)

    def _question(self, bias_NE: torch.Tensor | None, mask_NE: torch.Tensor | None) -> tuple[Any, ...]:
        """What the operators that route take after x, or after the base's weights."""
        added_NE = self.router.absent_E.unsqueeze(0)
        for term_NE in (bias_NE, mask_NE):
            if term_NE is not None:
                added_NE = added_NE + term_NE
        prototypes = (self.hi_EI, self.lo_EI, self.sums_E)
        return self.a_ERI, self.b_ERO, *prototypes, added_NE, self.router.top_k, self.eps, self.router.temperature

    def _recorded(self, routing: Routing, shape: torch.Size, y: torch.Tensor) -> torch.Tensor:
        """y; the routing goes to the record, if there is one."""
        if self.record is not None:
            assert not isinstance(self.record, ScoresRecord)
            self.record.append(routing, shape[:-1])
        return y

    def _bias(self, num_tokens: int) -> torch.Tensor | None:
        """Each token's row of `prompt_bias_BE`."""
        if self.prompt_bias_BE is None and self.router.reads_prompts:
            raise RouterError(
                "this router reads whole prompts, and was given none",
                expected="model(...), model.generate(...), or calls inside `with model.prompts(ids):`",
                fix="call the RoutedModel, not the model inside it; generate_batch is for token-level routers",
            )
        return None if self.prompt_bias_BE is None else _rows(self.prompt_bias_BE, num_tokens)

    def _mask(self, num_tokens: int) -> torch.Tensor | None:
        """What the model masks, and each token's row of `prompt_mask_BE`."""
        if self.prompt_mask_BE is None:
            return self.mask_1E
        mask_NE = _rows(self.prompt_mask_BE, num_tokens)
        return mask_NE if self.mask_1E is None else mask_NE + self.mask_1E


def _wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether autograd follows: then nothing may be added in place."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _rows(prompts_BE: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Each token's prompt's row, (N, E); the tokens of one prompt lie together."""
    if num_tokens % len(prompts_BE):
        raise RouterError(
            "the prompts do not fit the batch",
            found=f"{len(prompts_BE)} prompts, {num_tokens} tokens",
            expected="as many tokens for each prompt",
        )
    # also right for beams, which lie beside each other
    return prompts_BE.repeat_interleave(num_tokens // len(prompts_BE), dim=0)


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
    ) -> None:
        super().__init__()
        self.model = model
        self.pool = pool
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
        **options: Any,
    ) -> RoutedModel:
        """Route `base` among the experts of `pool`.

        The linear layers of `base` that experts adapt are replaced in place; its
        weights are shared, not copied. `unwrap` puts them back.

        Args:
            base: a loaded model, or what `phatgoose.base.load_base` takes.
            pool: the experts.
            router: a name in `phatgoose.routers.ROUTERS`.
            top_k: experts per token and site.
            backend: see `phatgoose.kernels`.
            tokenizer: for routers that read prompts; the base's own if None.
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
        model = load_base(base, pool.base.revision) if isinstance(base, str) else base
        _check_base(model, pool)
        experts = pool.experts()
        check_sites(model, experts)
        stacks = stack_sites(
            experts,
            dtype=model.dtype,
            with_gates="gate" in router_type.needs,
            with_activations="activations" in router_type.needs,
        )
        for site, stack in stacks.items():
            linear = model.get_submodule(site)
            routed = RoutedLinear(linear, stack, router_type(stack, config), backend)
            model.set_submodule(site, _move_buffers(routed, linear))
        return cls(model, pool, config, router_type.for_prompts(experts, config), tokenizer)

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
        trace = Trace(self.pool.names, list(self.routed_linears()))
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
        linears = self.routed_linears().values()
        before = [(linear.prompt_bias_BE, linear.prompt_mask_BE) for linear in linears]
        masked = self._prompt_masked
        try:
            if any(without):
                self._prompt_masked = without
                mask_BE = self.mask_BE(len(prompt_ids))
                for linear in linears:
                    linear.prompt_mask_BE = mask_BE.to(linear.a_ERI.device)
            if self.prompt_router is not None:
                bias = self.prompt_router.bias(self, prompt_ids)
                for site, linear in self.routed_linears().items():
                    of_site_BE = bias if isinstance(bias, torch.Tensor) else bias[site]
                    linear.prompt_bias_BE = of_site_BE.to(linear.a_ERI.device)
            yield
        finally:
            self._prompt_masked = masked
            for linear, (bias_BE, masks_BE) in zip(linears, before, strict=True):
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
        return torch.tensor([[-torch.inf if name in names else 0.0 for name in self.pool.names]])

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
    if routed.fused:
        routed.hi_EI, routed.sums_E = routed.hi_EI.to(device), routed.sums_E.to(device)
        routed.lo_EI = None if routed.lo_EI is None else routed.lo_EI.to(device)
    routed.router.to(device)
    return routed
