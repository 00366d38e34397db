"""The trained values of several experts, as one matrix with a row for each expert.

So the norms of the experts' gradients, AdamW and a checkpoint take a few calls,
however many sites there are, and no expert's values depend on another's.

Axes: E experts, P values of each expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn


class ExpertMatrix:
    """The values in fp32, and the parameters that layers compute with.

    Args:
        initial: name -> initial values, shape (E, ...).
        dtype: dtype of the parameters. Gradients are rounded to it, as under autocast.

    Attributes:
        master_EP: the values, fp32; its gradient holds those of all parameters.
        parameters: name -> parameter, shape (E, ...), in `dtype`: a view of `master_EP`
            if that is fp32, else of a copy.
    """

    def __init__(self, initial: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._shapes = {name: value.shape for name, value in initial.items()}
        self.master_EP = nn.Parameter(torch.cat([value.flatten(1).float() for value in initial.values()], dim=1))
        self.master_EP.grad = torch.zeros_like(self.master_EP)
        values_EP = self.master_EP.detach()
        self._copy_EP = None if dtype == torch.float32 else values_EP.to(dtype)
        views = self.split(values_EP if self._copy_EP is None else self._copy_EP)
        self.parameters = {name: nn.Parameter(view) for name, view in views.items()}

    def split(self, values_EP: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> view, shape (E, ...), of a matrix shaped like `master_EP`."""
        lengths = [math.prod(shape[1:]) for shape in self._shapes.values()]
        parts = values_EP.split(lengths, dim=1)
        # Splitting the last axis of a part always gives a view, whatever the stride of its rows
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """After a backward pass: add the parameters' gradients to the master's, and clear them."""
        assert self.master_EP.grad is not None
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad  # None for a layer that the model never calls
            for p in self.parameters.values()
        ]
        self.master_EP.grad += torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def clip_gradients(self, most: float) -> None:
        """Scale down each expert's gradient to a norm of at most `most`, as torch's clip_grad_norm_ does."""
        assert self.master_EP.grad is not None
        norms_E1 = self.master_EP.grad.norm(dim=1, keepdim=True)
        self.master_EP.grad *= (most / (norms_E1 + 1e-6)).clamp(max=1)

    @torch.no_grad()
    def finish_step(self) -> None:
        """After an optimiser step: copy the new values to the parameters, and clear the master's gradient."""
        assert self.master_EP.grad is not None
        self.master_EP.grad.zero_()
        if self._copy_EP is not None:
            self._copy_EP.copy_(self.master_EP)
