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
from phatgoose.kernels import DEFAULT_OPTIONS, Backend, KernelOptions, Layer
from phatgoose.kernels.prototypes import split
from phatgoose.models.wrapped import WrappedLinear
from phatgoose.routers.base import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.record import ScoresRecord
from phatgoose.routing.fused import FusedGroup
from phatgoose.routing.state import CallState, RoutingState


class RoutedLinear(WrappedLinear):
    """`base(x) + sum of the chosen experts' updates of x`.

    Sees only `(..., I)`: no position or attention mask, so a token's routing depends on its
    activation alone, and on what the call says of masks and prompts (`RoutingState`).
    There are two ways through `forward`: `FusedGroup.take`, where kernels route and mix
    for this layer (and those that share its input) at once, and `formula`, which says
    the same with the router's own tensors.

    Args:
        base: the linear layer that is replaced; any kind, quantised ones too.
        stack: the experts at this site.
        router: chooses among them.
        backend: how their updates are mixed. "auto" is "triton" where the base layer lies on a GPU that has it.
        options: switches of the Triton kernels.
        site: the layer's name in the model.
        state: shared by all routed layers of a model; a new one if None.

    Attributes:
        group: the layers that kernels compute together with this one; None if no kernel knows the router's rule.
        index: this layer's place in the group.
        gates_HPI, gate_sums_E: the router's prototypes as kernels read them (`kernels.prototypes`); with a group only.
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
        *,
        site: str = "",
        state: RoutingState | None = None,
    ) -> None:
        super().__init__(base)
        self.router = router
        self.site = site
        self.state = state or RoutingState()
        self.options = options
        self.backend = backend
        if backend == "auto" and kernels.runs_triton(self._base_device(), stack.a_ERI.dtype):
            self.backend = "triton"
        self.register_buffer("a_ERI", stack.a_ERI, persistent=False)
        self.register_buffer("b_ERO", stack.b_ERO, persistent=False)
        self.group: FusedGroup | None = None
        self.index = 0
        if isinstance(router, Phatgoose) and router.standardises and self._has_kernels():
            for name, tensor in split(router.prototypes_EI, self.a_ERI.dtype)._asdict().items():
                self.register_buffer(name, tensor, persistent=False)
            self.group = FusedGroup([self])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O), in the dtype that the base layer gives."""
        call = self.state.current()
        if self.group is not None:
            y = self.group.take(self.index, x, call)
            if y is not None:
                return y
        return self.formula(x, call)

    def formula(self, x: torch.Tensor, call: CallState) -> torch.Tensor:
        """The definition: the base layer, plus the updates of the experts that the router chooses.

        Args:
            x: activations of shape (..., I).
            call: the call that asks; its masks, prompts and record count.

        Returns:
            The output, of shape (..., O).
        """
        x_NI = x.reshape(-1, x.shape[-1])
        y: torch.Tensor = self.base(x)
        bias_NE, mask_NE = self._bias(call, len(x_NI)), self._mask(call, len(x_NI))
        record = call.record(self.site)
        if isinstance(record, ScoresRecord):
            scores_NE = self.router.final_scores(x_NI, bias_NE, mask_NE)
            routing = self.router.choose(scores_NE, mask_NE)
            record.append_scores(scores_NE, routing, x.shape[:-1])
        else:
            routing = self.router(x_NI, bias_NE, mask_NE)
            if record is not None:
                record.append(routing, x.shape[:-1])
        x_NI = x_NI.to(self.a_ERI.dtype)
        sums_updates = type(self.router).mix is Router.mix
        if self.backend == "triton" and sums_updates and y.is_contiguous() and not wants_gradients(x_NI, y):
            kernels.add_loras_(y.view(-1, y.shape[-1]), x_NI, self.a_ERI, self.b_ERO, routing)
            return y
        update_NO = self.router.mix(x_NI, self.a_ERI, self.b_ERO, routing, self.backend)
        return y + update_NO.view(y.shape).to(y.dtype)

    @torch.no_grad()
    def put(self, slot: int, stack: SiteStack, router: Router) -> None:
        """Write another expert in the place of the one in a slot; no tensor moves.

        Args:
            slot: the expert's id.
            stack: the weights of that expert alone, padded to the same rank, or of an empty slot.
            router: the rule for this stack.
        """
        self.a_ERI[slot].copy_(stack.a_ERI[0])
        self.b_ERO[slot].copy_(stack.b_ERO[0])
        self.router.put(slot, router)
        if self.group is not None:
            assert isinstance(router, Phatgoose)
            one = split(router.prototypes_EI, self.a_ERI.dtype)
            self.gates_HPI[:, slot].copy_(one.gates_HPI[:, 0])
            self.gate_sums_E[slot].copy_(one.gate_sums_E[0])
            self.group.forget()

    def to_base(self) -> RoutedLinear:
        """Move the experts' tensors to the device of the base layer (which may be quantised)."""
        device = self._base_device()
        self.a_ERI, self.b_ERO = self.a_ERI.to(device), self.b_ERO.to(device)
        if self.group is not None:
            self.gates_HPI, self.gate_sums_E = self.gates_HPI.to(device), self.gate_sums_E.to(device)
            self.group.forget()
        self.router.to(device)
        return self

    def layer(self, added_NE: torch.Tensor) -> Layer:
        """The experts as kernels read them, with what is added to the scores."""
        return Layer(self.a_ERI, self.b_ERO, self.gates_HPI, self.gate_sums_E, added_NE)

    def added_scores(self, call: CallState, num_tokens: int) -> torch.Tensor:
        """What is added to the scores before the choice, (1, E) or (N, E), fp32: absent experts, masks, prompts."""
        added_NE = self.router.absent_E.unsqueeze(0)
        for term_NE in (self._bias(call, num_tokens), self._mask(call, num_tokens)):
            if term_NE is not None:
                added_NE = added_NE + term_NE
        return added_NE

    def _has_kernels(self) -> bool:
        """Whether kernels that route exist for this backend and these numbers."""
        return self.backend == "triton" or (self.backend in ("auto", "numba") and kernels.runs_numba(self.a_ERI.dtype))

    def _base_device(self) -> torch.device:
        return next((p.device for p in self.base.parameters()), torch.device("cpu"))

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLinear:
        """Move or convert; what was computed or looked up before no longer counts."""
        if self.group is not None:
            self.group.forget()
        return super()._apply(fn, recurse)

    def _bias(self, call: CallState, num_tokens: int) -> torch.Tensor | None:
        """What each token's prompt adds to its scores, (N, E); None for nothing."""
        bias_BE = call.bias_BE(self.site)
        if bias_BE is not None:
            return _rows(bias_BE.to(self.a_ERI.device), num_tokens)
        if self.router.reads_prompts and not call.first_pass:
            raise RouterError(
                "this router reads whole prompts, and was given none",
                expected="model(...), model.generate(...), or calls inside `with model.prompts(ids):`",
                fix="call the RoutedModel, not the model inside it; generate_batch is for token-level routers",
            )
        return None

    def _mask(self, call: CallState, num_tokens: int) -> torch.Tensor | None:
        """-inf for the experts that a token may not have, (1, E) or (N, E); None if nothing is masked."""
        device = self.a_ERI.device
        mask_1E = None if call.mask_1E is None else call.mask_1E.to(device)
        if call.prompt_mask_BE is None:
            return mask_1E
        mask_NE = _rows(call.prompt_mask_BE.to(device), num_tokens)
        return mask_NE if mask_1E is None else mask_NE + mask_1E


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether autograd follows these tensors, so that nothing may be added in place."""
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
