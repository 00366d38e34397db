"""A linear layer that routes among a pool's experts.

Axes: N tokens, I in-features, O out-features, R rank, E experts, B prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from phatgoose import kernels
from phatgoose.errors import RouterError
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import DEFAULT_OPTIONS, Backend, KernelOptions, Layer, Rule
from phatgoose.kernels.prototypes import split
from phatgoose.kernels.types import Routing
from phatgoose.models.wrapped import WrappedLinear
from phatgoose.routers.base import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.record import RoutingRecord, ScoresRecord
from phatgoose.routing.fused import SharedInput


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
        backend: how their updates are mixed. "auto" is "triton" where the base layer lies on a GPU that has it.
        options: switches of the Triton kernels.
    """

    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    gates_HPI: torch.Tensor
    gate_sums_E: torch.Tensor

    def __init__(
        self,
        base: nn.Module,
        stack: SiteStack,
        router: Router,
        backend: Backend = "auto",
        options: KernelOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(base)
        self.options = options
        self.router = router
        self.backend = backend
        if backend == "auto" and kernels.runs_triton(self._base_device(), stack.a_ERI.dtype):
            self.backend = "triton"
        self.record: RoutingRecord | ScoresRecord | None = None
        self.prompt_bias_BE: torch.Tensor | None = None
        self.prompt_mask_BE: torch.Tensor | None = None
        self.mask_1E: torch.Tensor | None = None
        # with others of the same input, and which of them this is
        self.shared: tuple[SharedInput, int] | None = None
        self.register_buffer("a_ERI", stack.a_ERI, persistent=False)
        self.register_buffer("b_ERO", stack.b_ERO, persistent=False)
        self.fused = self.beside = False
        # whether Numba's loops route and mix on a CPU; and what they read, once they have
        self.loops = False
        self._loops_layer: Any = None
        if isinstance(router, Phatgoose) and router.standardises:
            self.fused = self.backend == "triton"
            self.loops = self.backend in ("auto", "numba") and kernels.runs_numba(self.a_ERI.dtype)
        self._loops_take_one = self._loops_take(1)
        if self.fused or self.loops:
            assert isinstance(router, Phatgoose)
            prototypes = split(router.prototypes_EI, self.a_ERI.dtype)
            self.rule = Rule(router.top_k, router.eps, router.temperature)
            for name, tensor in prototypes._asdict().items():
                self.register_buffer(name, tensor, persistent=False)
        if self.fused:
            # then the operator computes the base layer: its weights are used, hooks on it are not called
            with_base = options.overlap_base or options.base_last
            self.beside = with_base and type(base) is nn.Linear and "forward" not in vars(base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O), in the dtype that the base layer gives."""
        if self.shared is not None:
            shared, g = self.shared
            found = shared.take(g, x)
            if found is not None:
                held, routing = found
                self._record(routing, x.shape, g)
                return held
        x_NI = x.reshape(-1, x.shape[-1])
        fused = self.fused and x_NI.dtype == self.a_ERI.dtype and not isinstance(self.record, ScoresRecord)
        if fused and self.beside and not _wants_gradients(x_NI, self.weight):
            bases, layers = [(self.weight, self.bias)], [self.layer(len(x_NI))]
            (y_NO,), routing = kernels.routed_linears(x_NI, bases, layers, self.rule, self.options)
            self._record(routing, x.shape)
            return y_NO.view(*x.shape[:-1], -1)
        y: torch.Tensor = self.base(x)
        in_place = self.backend == "triton" and y.is_contiguous() and not _wants_gradients(x_NI, y)
        if fused and in_place:
            ys, layers = [y.view(-1, y.shape[-1])], [self.layer(len(x_NI))]
            routing = kernels.route_and_add_(ys, x_NI, layers, self.rule, self.options)
            self._record(routing, x.shape)
            return y
        if self.loops and self.takes_loops(x_NI, y):
            from phatgoose.kernels import cpu

            layer, y_NO = self.loops_layer(len(x_NI)), y.view(-1, y.shape[-1])
            routing = cpu.route_and_add_([y_NO], x_NI, [layer], self.rule)
            self._record(routing, x.shape)
            return y
        bias_NE, mask_NE = self._bias(len(x_NI)), self._mask(len(x_NI))
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
            update_NO = kernels.mix_parameters(x_NI, self.a_ERI, self.b_ERO, routing)
        elif in_place:
            kernels.add_loras_(y.view(-1, y.shape[-1]), x_NI, self.a_ERI, self.b_ERO, routing)
            return y
        else:
            update_NO = kernels.mix_loras(x_NI, self.a_ERI, self.b_ERO, routing, backend=self.backend)
        return y + update_NO.view(y.shape).to(y.dtype)

    @torch.no_grad()
    def put(self, slot: int, stack: SiteStack, router: Router) -> None:
        """Write another expert in the place of the one in a slot; no tensor moves.

        Args:
            slot: its expert id.
            stack: of that expert alone, with as large a rank; or of an empty slot.
            router: the rule for this stack.
        """
        if self.shared is not None:
            self.shared[0].forget()
        self.a_ERI[slot].copy_(stack.a_ERI[0])
        self.b_ERO[slot].copy_(stack.b_ERO[0])
        self.router.put(slot, router)
        if self.fused or self.loops:
            assert isinstance(router, Phatgoose)
            one = split(router.prototypes_EI, self.a_ERI.dtype)
            self.gates_HPI[:, slot].copy_(one.gates_HPI[:, 0])
            self.gate_sums_E[slot].copy_(one.gate_sums_E[0])

    def to_base(self) -> RoutedLinear:
        """Move what is new to the device of the base layer (which may be quantised)."""
        device = self._base_device()
        self._loops_layer = None
        self.a_ERI = self.a_ERI.to(device)
        self.b_ERO = self.b_ERO.to(device)
        if self.fused or self.loops:
            self.gates_HPI, self.gate_sums_E = self.gates_HPI.to(device), self.gate_sums_E.to(device)
        self.router.to(device)
        return self

    def _base_device(self) -> torch.device:
        return next((p.device for p in self.base.parameters()), torch.device("cpu"))

    def layer(self, num_tokens: int) -> Layer:
        """What the kernels read, with the biases of so many tokens."""
        added_NE = self.router.absent_E.unsqueeze(0)
        for term_NE in (self._bias(num_tokens), self._mask(num_tokens)):
            if term_NE is not None:
                added_NE = added_NE + term_NE
        return Layer(self.a_ERI, self.b_ERO, self.gates_HPI, self.gate_sums_E, added_NE)

    def takes_loops(self, x_NI: torch.Tensor, *outputs: torch.Tensor) -> bool:
        """Whether Numba's loops are fast for these tokens, and nobody has to follow what happens to them.

        Args:
            outputs: of the base layer; of several layers, if they share x.
        """
        if isinstance(self.record, ScoresRecord) or torch.compiler.is_compiling() or _wants_gradients(x_NI, *outputs):
            return False
        if not (x_NI.is_cpu and x_NI.dtype == torch.float32):
            return False
        for y in outputs:
            if not (y.dtype == torch.float32 and y.is_contiguous()):
                return False
        return self._loops_take_one if len(x_NI) == 1 else self._loops_take(len(x_NI))

    def _loops_take(self, num_tokens: int) -> bool:
        num_experts, rank, _ = self.a_ERI.shape
        # beside Numba's loops "vectors" is for one token, whose routing they do as well
        mixing = kernels.backend_for(num_tokens, self.router.top_k, num_experts, rank, on_cpu=True, numba=True)
        return mixing in ("numba", "vectors")

    def loops_layer(self, num_tokens: int) -> Any:
        """What the loops read, with the biases of so many tokens."""
        from phatgoose.kernels import cpu

        if self._loops_layer is None:
            absent_1E = self.router.absent_E.unsqueeze(0)
            whole = Layer(self.a_ERI, self.b_ERO, self.gates_HPI, self.gate_sums_E, absent_1E)
            self._loops_layer = cpu.LayerArrays.of(whole)
        layer = self._loops_layer
        nothing_added = self.mask_1E is None and self.prompt_mask_BE is None and self.prompt_bias_BE is None
        if nothing_added and not self.router.reads_prompts:
            return layer
        for term_NE in (self._bias(num_tokens), self._mask(num_tokens)):
            if term_NE is not None:
                layer = layer._replace(bias_NE=layer.bias_NE + term_NE.detach().float().numpy())
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose loops read their own tensors."""
        return {**self.__dict__, "_loops_layer": None}

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLinear:
        """Move or convert; what the loops read is looked up again."""
        self._loops_layer = None
        return super()._apply(fn, recurse)

    def _record(self, routing: Routing, shape: torch.Size, g: int = 0) -> None:
        """For x of that shape, if there is a record; layer g of a routing with an axis G in front."""
        if self.record is not None:
            assert not isinstance(self.record, ScoresRecord)
            self.record.append(routing.layer(g), shape[:-1])

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
