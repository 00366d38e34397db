"""The LoRAs of several experts in one forward pass of the base model.

A batch's sequences are ordered by expert, equally many for each, so the experts'
updates are two batched products on a view: no gather, and no loop over experts.

Axes: E experts, B = E * rows sequences, S positions, N tokens of each expert,
M target tokens of all experts, I in-features, O out-features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from phatgoose.data.encoder import IGNORED
from phatgoose.errors import BaseModelError
from phatgoose.models.wrapped import WrappedLinear, replace_layers
from phatgoose.training.group.batch import Batch


class BatchedLora(WrappedLinear):
    """A frozen linear layer and a LoRA for each expert, with or without gates.

        y = W u + scaling * B A u                       without gates
        y = W u + scaling * B A u * sigmoid(v . u)      with gates (paper section 3.1)

    Args:
        base: the linear layer.
        a_ERI: down-projections A.
        b_ERO: up-projections B, transposed.
        scaling: LoRA's scaling, the same for all experts.
        gates_EI: gate vectors v; None for no gates.
    """

    def __init__(
        self,
        base: nn.Module,
        a_ERI: torch.Tensor,
        b_ERO: torch.Tensor,
        *,
        scaling: float = 1.0,
        gates_EI: torch.Tensor | None = None,
    ) -> None:
        super().__init__(base)
        self.a_ERI = a_ERI
        self.b_ERO = b_ERO
        self.gates_EI = gates_EI
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (B, S, I) -> (B, S, O), in the dtype of the base layer's output."""
        if x.dim() != 3:
            raise BaseModelError(
                "many experts cannot be trained at once on this base model",
                found=f"a layer whose input has shape {tuple(x.shape)}",
                expected="(sequences, positions, features), which tells which token belongs to which expert",
                fix="train one expert at a time: phatgoose train, phatgoose gate",
            )
        y: torch.Tensor = self.base(x)
        num_experts = self.a_ERI.shape[0]
        x_ENI = x.reshape(num_experts, -1, x.shape[-1])
        h_ENR = torch.bmm(x_ENI.to(self.a_ERI.dtype), self.a_ERI.transpose(1, 2))
        if self.gates_EI is not None:
            # As in GatedLinear: a product and a sum, which autocast leaves in fp32
            opening_EN1 = torch.sigmoid((x_ENI.float() * self.gates_EI.unsqueeze(1)).sum(dim=-1, keepdim=True))
            h_ENR = (h_ENR * opening_EN1).to(h_ENR.dtype)
        # A separate sum rather than baddbmm: the compiler fuses it with the operation that follows
        update = torch.bmm(h_ENR, self.b_ERO).view(y.shape)
        return torch.add(y, update, alpha=self.scaling).to(y.dtype)


class TargetHead(nn.Module):
    """An output head that computes logits only where target tokens are predicted.

    Logits of shape (B, S, V) would take more memory and time than the rest of the model.

    Args:
        head: the model's output layer.

    Attributes:
        positions_M: the positions that the next call computes, indices into its B * S.
    """

    positions_M: torch.Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (B, S, I) -> (1, M, V)."""
        logits_1MV: torch.Tensor = self.head(x.flatten(0, 1)[self.positions_M].unsqueeze(0))
        return logits_1MV

    @property
    def weight(self) -> Any:
        """Weight of the head."""
        return self.head.weight

    @property
    def bias(self) -> Any:
        """Bias of the head."""
        return self.head.bias


class BatchedModel(nn.Module):
    """A base model with `BatchedLora`s in place of its layers; `unwrap` restores it.

    Args:
        model: the base model; frozen from now on.
        layers: site -> the layer to put there; at least one.

    Attributes:
        adapts_head: whether the output head is among the sites (`equal_targets` of `assemble`).

    Raises:
        BaseModelError: the model has no output head.
    """

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, BatchedLora]) -> None:
        super().__init__()
        self.model = model
        self._before: list[dict[str, nn.Module]] = []
        model.requires_grad_(False)
        self._replace(layers)
        head = model.get_output_embeddings()
        name = next((name for name, module in model.named_modules() if module is head), None)
        if name is None:
            self.unwrap()
            raise BaseModelError(
                f"{type(model).__name__} has no output head", expected="a model that predicts tokens of a vocabulary"
            )
        self.head = TargetHead(head)
        self.adapts_head = isinstance(head, BatchedLora)
        self._replace({name: self.head})

    def forward(self, batch: Batch) -> torch.Tensor:
        """Each expert's cross-entropy (nats), summed over its targets and times its weight; fp32, shape (E,)."""
        self.head.positions_M = batch.positions_M
        logits_1MV = self.model(**batch.inputs, use_cache=False).logits
        losses_M = F.cross_entropy(
            logits_1MV.squeeze(0).float(), batch.targets_M, reduction="none", ignore_index=IGNORED
        )
        # Not index_add, whose sums vary between runs on a GPU
        experts_E1 = torch.arange(len(batch.weights_E), device=losses_M.device).unsqueeze(1)
        losses_EM = torch.where(batch.experts_M == experts_E1, losses_M, 0.0)
        return losses_EM.sum(dim=1) * batch.weights_E

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compile the model's repeated blocks (torch.compile); all blocks of one class share the compiled code."""
        kinds = set(self.model._no_split_modules or ())
        blocks = {name: module for name, module in self.model.named_modules() if type(module).__name__ in kinds}
        self._replace({name: torch.compile(block) for name, block in blocks.items()})  # type: ignore[misc]
        # One for each class of block, shape, and training or evaluation; past the limit, blocks run uncompiled
        with torch._dynamo.config.patch(recompile_limit=64):
            yield

    def unwrap(self) -> PreTrainedModel:
        """Put the base model's own layers back and return it."""
        while self._before:
            replace_layers(self.model, self._before.pop())
        return self.model

    def _replace(self, layers: Mapping[str, nn.Module]) -> None:
        self._before.append(replace_layers(self.model, layers))


def needs_mask(model: PreTrainedModel) -> bool:
    """Whether a model needs an attention mask although padding is on the right.

    If every attention layer is causal, only padding attends to padding, and
    attention without a mask is faster.
    """
    if not getattr(model.config, "is_causal", True):
        return True
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(model.config.is_encoder_decoder) or not causal or not all(causal)
