"""Layers in the place of a model's own, and its own back again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.models import llama
from phatgoose.models.wrapped import WrappedLinear, replace_layers, replaced_layers

SITES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")


def wrapped(model: nn.Module) -> dict[str, nn.Module]:
    return {site: WrappedLinear(model.get_submodule(site)) for site in SITES}


def test_replaced_layers_are_put_back_after_an_error() -> None:
    model = llama()
    before, layers = dict(model.named_modules()), wrapped(model)
    with pytest.raises(ZeroDivisionError), replaced_layers(model, layers):
        assert all(model.get_submodule(site) is layer for site, layer in layers.items())
        raise ZeroDivisionError
    assert dict(model.named_modules()) == before


def test_replacements_nest() -> None:
    """A layer in a replaced one, and a block with replaced layers inside; each is put back by what it returned."""
    model = llama()
    before = dict(model.named_modules())
    first = replace_layers(model, wrapped(model))
    second = replace_layers(model, {"lm_head": WrappedLinear(model.get_submodule("lm_head"))})
    third = replace_layers(model, {"model.layers.0": nn.Sequential(model.get_submodule("model.layers.0"))})
    fourth = replace_layers(model, {"model.layers.0.0.self_attn.q_proj": nn.Identity()})
    for replaced in (fourth, third, second, first):
        replace_layers(model, replaced)
    assert dict(model.named_modules()) == before


def test_a_missing_layer_changes_nothing() -> None:
    model = llama()
    before, layers = dict(model.named_modules()), wrapped(model)
    with pytest.raises(AttributeError):
        replace_layers(model, layers | {"model.layers.9.mlp": nn.Identity()})
    assert dict(model.named_modules()) == before


def test_a_wrapped_layer_shows_its_base() -> None:
    with_bias, without = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    assert WrappedLinear(with_bias).weight is with_bias.weight and WrappedLinear(with_bias).bias is with_bias.bias
    assert WrappedLinear(without).bias is None
    assert isinstance(WrappedLinear(without).weight, torch.nn.Parameter)
