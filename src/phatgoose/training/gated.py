"""The gated LoRA, in which a gate v is trained (paper section 3.1).

    y = W u + scaling * B A u * sigmoid(v . u)

Axes: I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from phatgoose.experts.adapter import LoraWeights
from phatgoose.experts.expert import Expert
from phatgoose.experts.sites import check_sites
from phatgoose.models.frozen_lora import FrozenLora
from phatgoose.models.wrapped import WrappedLinear, replace_layers


class GatedLinear(WrappedLinear):
    """A frozen linear layer and a frozen LoRA behind a trainable gate.

    Args:
        base: the linear layer.
        weights: the LoRA's weights.
        dtype: dtype of the LoRA's arithmetic. The gate stays in fp32.
    """

    def __init__(self, base: nn.Module, weights: LoraWeights, dtype: torch.dtype) -> None:
        super().__init__(base)
        device = next(base.parameters()).device
        self.lora = FrozenLora(weights, device, dtype)
        # Zero: every gate starts half open (paper section 3.1)
        self.gate_I = nn.Parameter(torch.zeros(weights.a_RI.shape[1], device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O), in the dtype of the base layer's output."""
        y: torch.Tensor = self.base(x)
        # A product and a sum, which autocast leaves in fp32
        opening = torch.sigmoid((x.float() * self.gate_I).sum(dim=-1, keepdim=True))
        return y + (self.lora(x) * opening).to(y.dtype)


class GatedModel(nn.Module):
    """A base model with one expert behind its gates, the only parameters that are trained and saved.

    The layers of `model` are replaced in place; `unwrap` puts them back.

    Args:
        model: the base model; frozen from now on.
        expert: the expert whose gate is trained.

    Raises:
        BaseModelError: the expert does not fit the model.
        AdapterError: the expert's weights are damaged.
    """

    def __init__(self, model: PreTrainedModel, expert: Expert) -> None:
        super().__init__()
        check_sites(model, [expert])
        self.model = model
        self.model.requires_grad_(False)
        loras = dict(expert.adapter.load())
        self._layers = {site: GatedLinear(model.get_submodule(site), loras[site], model.dtype) for site in loras}
        self._before = replace_layers(model, self._layers)

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The base model's forward, with the gated expert."""
        return self.model(**inputs)

    def gates(self) -> dict[str, nn.Parameter]:
        """Site -> v, shape (I,)."""
        return {site: layer.gate_I for site, layer in self._layers.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Site -> gate, without the base model, so that the Trainer's checkpoints are small."""
        return {site: v.detach() for site, v in self.gates().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the gates from one of the Trainer's checkpoints."""
        gates = self.gates()
        for site, v in state_dict.items():
            gates[site].data.copy_(v)
        return nn.modules.module._IncompatibleKeys([], [])

    def unwrap(self) -> PreTrainedModel:
        """Put the base model's own layers back and return it."""
        replace_layers(self.model, self._before)
        return self.model
