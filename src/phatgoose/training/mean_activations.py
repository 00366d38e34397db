"""Mean activations of an expert's own examples: the prototypes of Average Activation (paper section 4.2).

The expert is active while its examples are read, as in the official code. That
code takes the decoder's activations from the last step of a generation only;
here all tokens of prompt and target count.

Axes: B sequences, S positions, I in-features.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import Dtype, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example, fingerprint
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

NUM_EXAMPLES = 1000


class AveragingLinear(WrappedLinear):
    """A frozen linear layer with a LoRA, and the weighted sum of all that has entered it.

    Args:
        base: the linear layer.
        weights: of the LoRA.
        stream: whose tokens enter it (`phatgoose.analysis.prompt_table`).
        dtype: of the LoRA's arithmetic.
    """

    def __init__(self, base: nn.Module, weights: LoraWeights, stream: str, dtype: torch.dtype) -> None:
        super().__init__(base)
        self.stream = stream
        device = next(base.parameters()).device
        self.lora = FrozenLora(weights, device, dtype)
        self.sum_I = torch.zeros(weights.a_RI.shape[1], device=device, dtype=torch.float64)
        # what each token of the next call counts
        self.counts_BS: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O)."""
        assert self.counts_BS is not None
        # summed in fp64 over batches only: of a whole batch's activations, fp64 copies would take most of the time
        self.sum_I += self.counts_BS.flatten() @ x.reshape(-1, x.shape[-1]).float()
        y: torch.Tensor = self.base(x)
        return y + self.lora(x).to(y.dtype)


def save_mean_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert: Expert,
    examples: Sequence[Example],
    *,
    text: TextConfig | None = None,
    num_examples: int = NUM_EXAMPLES,
    seed: int = 0,
    batch_size: int = 16,
    save_dtype: Dtype = "fp32",
) -> dict[str, torch.Tensor]:
    """Compute an expert's mean activations and write them into its folder.

    Args:
        model: the base model; unchanged afterwards.
        tokenizer: of the base model.
        expert: its folder gets activations.safetensors and activations_config.json.
        examples: what the expert was trained on.
        text: how examples become tokens; as in training.
        num_examples: read so many, drawn at random if there are more.
        seed: of the drawing.
        batch_size: examples per forward pass.
        save_dtype: of the numbers on disk.

    Returns:
        Site -> vector, shape (I,), fp32: the mean over examples of the mean over their tokens.

    Raises:
        BaseModelError: the expert does not fit the model.
        AdapterError: the expert's weights are damaged.
    """
    text = text or TextConfig()
    sample = random.Random(seed).sample(list(examples), min(num_examples, len(examples)))
    vectors = mean_activations(model, Encoder(tokenizer, model.config, text), expert, sample, batch_size)
    base = base_id(model)
    provenance = ActivationsProvenance(
        base=base.name,
        revision=base.revision,
        data=fingerprint(sample),
        adapter_sha256=sha256(expert.folder / WEIGHTS_FILE),
        num_examples=len(sample),
        settings={"seed": seed, "text": asdict(text)},
    )
    ACTIVATIONS.save(expert.folder, vectors, provenance, DTYPES[save_dtype])
    return vectors


@torch.no_grad()
def mean_activations(
    model: PreTrainedModel, encoder: Encoder, expert: Expert, examples: Sequence[Example], batch_size: int = 16
) -> dict[str, torch.Tensor]:
    """Site -> mean over examples of the mean over their tokens of what enters the site; see `save_mean_activations`."""
    check_sites(model, [expert])
    layers: dict[str, AveragingLinear] = {}
    for site, weights in expert.adapter.load():
        stream = describe_site(site, encoder_decoder=encoder.encoder_decoder).stream
        layers[site] = AveragingLinear(model.get_submodule(site), weights, stream, model.dtype)
    rows = sorted(encoder.encode_all(examples), key=lambda row: len(row["input_ids"]))
    with replaced_layers(model, layers):
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(model.device) for k, v in encoder.collate(rows[start : start + batch_size]).items()}
            counts = _token_counts(batch, encoder)
            batch.pop("labels")
            for layer in layers.values():
                layer.counts_BS = counts[layer.stream]
            model(**batch, use_cache=False)
    return {site: (layer.sum_I / len(rows)).float().cpu() for site, layer in layers.items()}


def _token_counts(batch: Mapping[str, torch.Tensor], encoder: Encoder) -> dict[str, torch.Tensor]:
    """Stream -> (B, S): 1 / (its number of tokens) for each token of an example, 0 for padding."""
    masks = {TEXT: batch["attention_mask"]}
    if encoder.encoder_decoder:
        # the decoder has read as many tokens as there are labels
        masks = {INPUT: batch["attention_mask"], OUTPUT: batch["labels"] >= 0}
    return {stream: mask_BS / mask_BS.sum(dim=1, keepdim=True) for stream, mask_BS in masks.items()}
