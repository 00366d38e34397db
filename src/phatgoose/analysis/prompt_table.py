"""A trace as tables: each expert's share of each token, over all sites and by layer.

A routing weight is the weight of one expert's update at one site; the weights of
a token at a site sum to 1. All numbers here are means of routing weights.

In an encoder-decoder model, the sites of the encoder, and the keys and values
of cross-attention, read the input; the other sites of the decoder read the
output. These are two *streams* with separate positions; tables concatenate them,
input first. A decoder-only model has one stream, "text". Positions of a stream
that no routed site reads have no shares.

Axes: B sequences, S positions (of all streams), K chosen experts, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phatgoose.experts.site_names import INPUT, OUTPUT, TEXT, Site, describe_site
from phatgoose.routing.trace import Trace

ALL_KINDS = "all"
DECIMALS = 3


@dataclass(frozen=True, kw_only=True)
class TokenShares:
    """Each expert's share of each token: its mean weight over the sites that read the token.

    Attributes:
        experts: names, by expert id.
        streams: stream of each position.
        num_prompt: number of positions of the prompt; the rest is the answer.
        shares_SE: each row sums to 1, or is NaN where no site read the position.
        leading_S: id of the expert with the largest share; ties go to the first.
        leading_share_S: its share; NaN where no site read the position.
        text_E: mean over all positions that a site read.
        prompt_E: mean over those of the prompt; None if there are none.
        answer_E: mean over those of the answer; None if there are none.
    """

    experts: tuple[str, ...]
    streams: tuple[str, ...]
    num_prompt: int
    shares_SE: torch.Tensor
    leading_S: torch.Tensor
    leading_share_S: torch.Tensor
    text_E: torch.Tensor
    prompt_E: torch.Tensor | None
    answer_E: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Mean routing weights by layer. NaN where a layer has no such site.

    Attributes:
        layers: labels of layers, in the order of the model.
        kinds: kinds of sites, in the order of the model.
        tokens_SLE: means over the sites of a layer that read the position.
        means: stream -> kind of site -> mean_LE over the stream's positions;
            kind "all" stands for all sites.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    tokens_SLE: torch.Tensor
    means: dict[str, dict[str, torch.Tensor]]


def token_shares(
    trace: Trace, num_prompt: int | None = None, *, encoder_decoder: bool = False, sequence: int = 0
) -> TokenShares:
    """Each expert's share of each token, of the prompt, of the answer and of the text.

    Args:
        trace: a trace in which at least one site was called.
        num_prompt: number of positions of the prompt. None for the whole input
            of an encoder-decoder model, and for all positions otherwise.
            Required if no site reads the input, because the trace then lacks it.
        encoder_decoder: whether the traced model is an encoder-decoder.
        sequence: index along B.

    Raises:
        ValueError: the trace is empty, sites of one stream saw different numbers
            of positions, or `num_prompt` is missing or does not fit.
    """
    traced = _Traced(trace, encoder_decoder, sequence, num_prompt)
    num_prompt = traced.num_prompt(num_prompt)
    sums_SE, sites_S = traced.zeros(), torch.zeros(traced.num_positions)
    for site, weights_SE in traced.sites():
        at = traced.positions(site.stream)
        sums_SE[at] += weights_SE
        sites_S[at] += 1
    shares_SE = sums_SE / sites_S[:, None]
    leading_share_S, leading_S = shares_SE.max(dim=-1)
    return TokenShares(
        experts=trace.expert_names,
        streams=traced.streams(),
        num_prompt=num_prompt,
        shares_SE=shares_SE,
        leading_S=leading_S,
        leading_share_S=leading_share_S,
        text_E=shares_SE.nanmean(dim=0),
        prompt_E=_mean(shares_SE[:num_prompt]),
        answer_E=_mean(shares_SE[num_prompt:]),
    )


def layer_weights(
    trace: Trace, num_prompt: int | None = None, *, encoder_decoder: bool = False, sequence: int = 0
) -> LayerWeights:
    """Mean routing weights by token, layer and expert, and by layer, expert and kind of site.

    See `token_shares` for arguments and errors.
    """
    traced = _Traced(trace, encoder_decoder, sequence, num_prompt)
    layers = list(dict.fromkeys(site.layer for site in traced.described))
    sums_SLE = traced.zeros(len(layers))
    sites_SL = torch.zeros(traced.num_positions, len(layers))
    for site, weights_SE in traced.sites():
        layer, at = layers.index(site.layer), traced.positions(site.stream)
        sums_SLE[at, layer] += weights_SE
        sites_SL[at, layer] += 1
    return LayerWeights(
        layers=tuple(layers),
        kinds=tuple(dict.fromkeys(site.kind for site in traced.described)),
        tokens_SLE=sums_SLE / sites_SL[:, :, None],
        means=_means(traced, layers),
    )


def to_json(
    trace: Trace,
    tokens: Sequence[str],
    num_prompt: int | None = None,
    *,
    encoder_decoder: bool = False,
    sequence: int = 0,
) -> dict[str, Any]:
    """The routing of one sequence as plain data.

    Args:
        trace: a trace in which at least one site was called.
        tokens: text of each position's token (input before output, which
            includes its start token). There may be more tokens than positions:
            the model never reads the last token of an answer, and no site reads
            the output if only the encoder is adapted. Such tokens, and an input
            that no site reads, get null.
        num_prompt: see `token_shares`.
        encoder_decoder: whether the traced model is an encoder-decoder.
        sequence: index along B.

    Returns:
        Means of routing weights, rounded to 3 decimals:

        experts: [name], by expert id
        tokens: [text]
        num_prompt: number of tokens of the prompt
        streams: [per token: "text", or "input" or "output"]
        sites: [name]
        layers: [label]
        kinds: [last part of the sites' names]
        leading: [per token: {"expert": name, "share": number}, or null]
        shares: {"text", "prompt", "answer": {expert name: number}, or null}
        token_shares: [per token: [per expert: number], or null]
        weights: [per token: [per layer: [per expert: number], or null], or null]
        layer_weights: {stream: {"all" or kind: [per layer: [per expert: number], or null]}}

    Raises:
        ValueError: see `token_shares`; or there are fewer tokens than positions.
    """
    shares = token_shares(trace, num_prompt, encoder_decoder=encoder_decoder, sequence=sequence)
    by_layer = layer_weights(trace, num_prompt, encoder_decoder=encoder_decoder, sequence=sequence)
    unread = len(tokens) - len(shares.shares_SE)
    if unread < 0:
        raise ValueError(f"{len(tokens)} tokens, but {len(shares.shares_SE)} positions were traced")
    nothing = [None] * unread
    leading = zip(shares.leading_S.tolist(), _rounded(shares.leading_share_S), strict=True)
    parts = {"text": shares.text_E, "prompt": shares.prompt_E, "answer": shares.answer_E}
    return {
        "experts": list(shares.experts),
        "tokens": list(tokens),
        "num_prompt": shares.num_prompt,
        "streams": [*shares.streams, *[OUTPUT if encoder_decoder else TEXT] * unread],
        "sites": trace.sites,
        "layers": list(by_layer.layers),
        "kinds": list(by_layer.kinds),
        "leading": [share if share is None else {"expert": shares.experts[i], "share": share} for i, share in leading]
        + nothing,
        "shares": {part: _named(shares.experts, mean_E) for part, mean_E in parts.items()},
        "token_shares": _rounded(shares.shares_SE) + nothing,
        "weights": _rounded(by_layer.tokens_SLE) + nothing,
        "layer_weights": {
            stream: {kind: _rounded(mean_LE) for kind, mean_LE in kinds.items()}
            for stream, kinds in by_layer.means.items()
        },
    }


class _Traced:
    """One sequence of a trace, with its streams concatenated."""

    def __init__(self, trace: Trace, encoder_decoder: bool, sequence: int, num_prompt: int | None) -> None:
        self.described = [describe_site(name, encoder_decoder=encoder_decoder) for name in trace.sites]
        self.weights_SE = [trace.weights(site.name)[sequence] for site in self.described]
        self.num_experts = len(trace.expert_names)
        lengths: dict[str, set[int]] = {INPUT if encoder_decoder else TEXT: set()}
        for site, weights_SE in self.sites():
            lengths.setdefault(site.stream, set()).add(len(weights_SE))
        if num_prompt is not None and num_prompt > 0 and OUTPUT in lengths and not lengths[INPUT]:
            lengths[INPUT] = {num_prompt}
        for stream, counts in lengths.items():
            if len(counts) != 1:
                saw = f"sites that read the {stream} saw {sorted(counts) or 'no'} positions"
                raise ValueError(f"{saw}: trace one call of the model, or one generation with a cache")
        self.lengths = {stream: min(counts) for stream, counts in lengths.items()}
        self.num_positions = sum(self.lengths.values())

    def sites(self) -> Iterator[tuple[Site, torch.Tensor]]:
        """Each site with its weights_SE, where S are the positions of its stream."""
        return zip(self.described, self.weights_SE, strict=True)

    def positions(self, stream: str) -> slice:
        start = self.lengths[INPUT] if stream == OUTPUT else 0
        return slice(start, start + self.lengths[stream])

    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream, length in self.lengths.items() for _ in range(length))

    def zeros(self, *more: int) -> torch.Tensor:
        return torch.zeros(self.num_positions, *more, self.num_experts)

    def num_prompt(self, given: int | None) -> int:
        most = self.num_positions if TEXT in self.lengths else self.lengths[INPUT]
        least = 0 if TEXT in self.lengths else most
        if given is not None and not least <= given <= most:
            raise ValueError(f"num_prompt is {given}, but the trace allows {least} to {most}")
        return most if given is None else given


def _means(traced: _Traced, layers: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Stream -> kind of site -> mean_LE."""
    parts: dict[str, dict[str, list[list[torch.Tensor]]]] = {stream: {} for stream in traced.lengths}
    for site, weights_SE in traced.sites():
        for kind in (ALL_KINDS, site.kind):
            by_layer = parts[site.stream].setdefault(kind, [[] for _ in layers])
            by_layer[layers.index(site.layer)].append(weights_SE.mean(dim=0))
    none_E = torch.full((traced.num_experts,), torch.nan)
    return {
        stream: {
            kind: torch.stack([torch.stack(rows).mean(dim=0) if rows else none_E for rows in by_layer])
            for kind, by_layer in kinds.items()
        }
        for stream, kinds in parts.items()
        if kinds
    }


def _mean(shares_SE: torch.Tensor) -> torch.Tensor | None:
    """Mean over the positions that a site read; None if there are none."""
    read_SE = shares_SE[~shares_SE.isnan().any(dim=-1)]
    return read_SE.mean(dim=0) if len(read_SE) else None


def _rounded(values: torch.Tensor) -> list[Any]:
    """Nested lists; NaN, or a row of NaN, becomes None (nothing was averaged)."""
    if values.dim() == 1:
        return [None if math.isnan(value) else round(value, DECIMALS) for value in values.tolist()]
    return [None if row.isnan().all() else _rounded(row) for row in values]


def _named(experts: Sequence[str], mean_E: torch.Tensor | None) -> dict[str, float] | None:
    return None if mean_E is None else dict(zip(experts, _rounded(mean_E), strict=True))
