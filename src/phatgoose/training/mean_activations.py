"""Mean activations of an expert's own examples: the prototypes of Average Activation (paper section 4.2).

The expert is active while its examples are read, as in the official code. That
code takes the decoder's activations from the last step of a generation only;
here every token of prompt and target counts.

Axes: B sequences, S positions, N = B * S tokens, I in-features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import Dtype, PrototypeConfig, TextConfig
from phatgoose.data.batching import by_length
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example, fingerprint
from phatgoose.data.sampling import sample
from phatgoose.experts.adapter import WEIGHTS_FILE, LoraWeights
from phatgoose.experts.expert import Expert
from phatgoose.experts.provenance import ActivationsProvenance
from phatgoose.experts.site_names import INPUT, OUTPUT, TEXT, describe_site
from phatgoose.experts.sites import check_sites
from phatgoose.experts.vectors import ACTIVATIONS
from phatgoose.files import sha256
from phatgoose.models.base import DTYPES, base_id
from phatgoose.models.frozen_lora import FrozenLora
from phatgoose.models.wrapped import WrappedLinear, replaced_layers


class AveragingLinear(WrappedLinear):
    """A frozen linear layer with a frozen LoRA that adds up its own inputs.

    Args:
        base: the linear layer.
        weights: the LoRA's weights.
        stream: which text's tokens the layer reads (`describe_site`).
        dtype: dtype of the LoRA's arithmetic.

    Attributes:
        sum_I: weighted sum of all inputs so far, fp64.
        weights_BS: weight of each token of the next call; set before it.
    """

    def __init__(self, base: nn.Module, weights: LoraWeights, stream: str, dtype: torch.dtype) -> None:
        super().__init__(base)
        self.stream = stream
        device = next(base.parameters()).device
        self.lora = FrozenLora(weights, device, dtype)
        self.sum_I = torch.zeros(weights.a_RI.shape[1], device=device, dtype=torch.float64)
        self.weights_BS: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (B, S, I) or (N, I) -> the same shape with O out-features."""
        assert self.weights_BS is not None
        # fp64 over batches only: fp64 copies of all activations of a batch would take most of the time
        self.sum_I += self.weights_BS.flatten() @ x.reshape(-1, x.shape[-1]).float()
        y: torch.Tensor = self.base(x)
        return y + self.lora(x).to(y.dtype)


def save_mean_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert: Expert,
    examples: Sequence[Example],
    *,
    text: TextConfig | None = None,
    num_examples: int = PrototypeConfig.num_examples,
    seed: int = PrototypeConfig.seed,
    batch_size: int = PrototypeConfig.batch_size,
    save_dtype: Dtype = "fp32",
) -> dict[str, torch.Tensor]:
    """Compute an expert's mean activations and write them into its folder.

    Args:
        model: the base model; unchanged afterwards.
        tokenizer: the base model's tokenizer.
        expert: the expert; its folder gets activations.safetensors and activations_config.json.
        examples: the expert's training data.
        text: how examples become tokens; the same as in training.
        num_examples: number of examples to read, sampled if there are more.
        seed: random seed for sampling.
        batch_size: examples per forward pass.
        save_dtype: dtype of the saved tensors.

    Returns:
        Site -> vector, shape (I,), fp32: the mean over examples of the mean over their tokens.

    Raises:
        BaseModelError: the expert does not fit the model.
        AdapterError: the expert's weights are damaged.
    """
    text = text or TextConfig()
    chosen = sample(examples, num_examples, seed)
    vectors = mean_activations(model, Encoder(tokenizer, model.config, text), expert, chosen, batch_size)
    base = base_id(model)
    provenance = ActivationsProvenance(
        base=base.name,
        revision=base.revision,
        data=fingerprint(chosen),
        adapter_sha256=sha256(expert.folder / WEIGHTS_FILE),
        num_examples=len(chosen),
        settings={"seed": seed, "text": asdict(text)},
    )
    ACTIVATIONS.save(expert.folder, vectors, provenance, DTYPES[save_dtype])
    return vectors


@torch.no_grad()
def mean_activations(
    model: PreTrainedModel,
    encoder: Encoder,
    expert: Expert,
    examples: Sequence[Example],
    batch_size: int = PrototypeConfig.batch_size,
) -> dict[str, torch.Tensor]:
    """Mean activations of an expert on all of `examples`; see `save_mean_activations`.

    Returns:
        Site -> vector, shape (I,), fp32, on the CPU.
    """
    check_sites(model, [expert])
    layers: dict[str, AveragingLinear] = {}
    for site, weights in expert.adapter.load():
        stream = describe_site(site, encoder_decoder=encoder.encoder_decoder).stream
        layers[site] = AveragingLinear(model.get_submodule(site), weights, stream, model.dtype)
    rows = encoder.encode_all(examples)
    lengths = [len(row["input_ids"]) for row in rows]
    with replaced_layers(model, layers):
        for indices in by_length(lengths, max_items=batch_size, shortest_first=True):
            batch = {name: ids.to(model.device) for name, ids in encoder.collate([rows[i] for i in indices]).items()}
            weights_of = _token_weights(batch, encoder)
            for layer in layers.values():
                layer.weights_BS = weights_of[layer.stream]
            del batch["labels"]
            model(**batch, use_cache=False)
    return {site: (layer.sum_I / len(rows)).float().cpu() for site, layer in layers.items()}


def _token_weights(batch: Mapping[str, torch.Tensor], encoder: Encoder) -> dict[str, torch.Tensor]:
    """Stream -> weights_BS: 1 / (tokens of the row) for its tokens, 0 for padding."""
    masks = {TEXT: batch["attention_mask"]}
    if encoder.encoder_decoder:
        # The decoder has read as many tokens as there are labels
        masks = {INPUT: batch["attention_mask"], OUTPUT: batch["labels"] != IGNORED}
    return {stream: mask_BS / mask_BS.sum(dim=1, keepdim=True) for stream, mask_BS in masks.items()}
