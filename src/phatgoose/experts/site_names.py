"""What a site's name says: its layer, its kind, and the tokens that it reads. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

TEXT, INPUT, OUTPUT = "text", "input", "output"
_CROSS_KEY_OR_VALUE = re.compile(r"EncDecAttention\.[kv]$|encoder_attn\.[kv]_proj$")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site's place in the model.

    Attributes:
        name: name of the module.
        kind: last part of the name ("q_proj", "wo").
        layer: first number in the name ("7"), after "encoder " or "decoder " if the
            model has both; the kind if the name has no number ("lm_head").
        stream: the tokens whose positions enter the site: TEXT in a decoder-only
            model, else INPUT or OUTPUT.
    """

    name: str
    kind: str
    layer: str
    stream: str


def describe_site(name: str, *, encoder_decoder: bool = False) -> Site:
    """Read layer, kind and stream from a site's name."""
    kind = name.rpartition(".")[2]
    number = _NUMBER.search(name)
    layer = number.group() if number else kind
    if not encoder_decoder:
        return Site(name=name, kind=kind, layer=layer, stream=TEXT)
    in_encoder = name.startswith("encoder.") or ".encoder." in name
    if number:
        layer = f"{'encoder' if in_encoder else 'decoder'} {layer}"
    reads_input = in_encoder or _CROSS_KEY_OR_VALUE.search(name) is not None
    return Site(name=name, kind=kind, layer=layer, stream=INPUT if reads_input else OUTPUT)
