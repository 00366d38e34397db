"""Parity of the baselines with the official code; see test_golden.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.checks import assert_close
from helpers.data import as_text
from helpers.golden import BASE, GOLDEN, base, by_site, golden, logits
from helpers.models import PAD, make_tokenizer
from phatgoose.config import TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.official import import_official
from phatgoose.experts.pool import Pool
from phatgoose.experts.provenance import ActivationsProvenance
from phatgoose.experts.site_names import INPUT, describe_site
from phatgoose.experts.stack import stack_sites
from phatgoose.experts.vectors import ACTIVATIONS
from phatgoose.files import sha256
from phatgoose.routers.spectrum import spectrum
from phatgoose.routing.model import RoutedModel
from phatgoose.training.mean_activations import mean_activations


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    checkpoint = GOLDEN / "official_checkpoint.safetensors"
    return import_official(checkpoint, base(), BASE, tmp_path_factory.mktemp("baselines") / "pool")


@pytest.mark.parametrize("router", ["merged", "uniform"])
def test_outer_product_average(pool: Pool, router: str) -> None:
    expected = golden("baselines")["outer_product_average.logits"]
    assert_close(logits(RoutedModel.from_pool(base(), pool, router=router)), expected)


def test_outer_product_average_of_single_sites(pool: Pool) -> None:
    model = RoutedModel.from_pool(base(), pool, router="merged")
    for site, delta_OI in by_site("baselines", "outer_product_average.delta_weight.").items():
        linear = model.routed_linears()[site]
        identity_II = torch.eye(delta_OI.shape[1])
        assert_close(linear(identity_II) - linear.base(identity_II), delta_OI.T, relative=1e-4)


def test_parameter_average(pool: Pool) -> None:
    found = logits(RoutedModel.from_pool(base(), pool, router="merged-parameters"))
    assert_close(found, golden("baselines")["param_average.logits"])


def test_arrow_prototypes(pool: Pool) -> None:
    sites = by_site("baselines", "top1_eigen_weighted_vector.router_embeddings.")
    stacks = stack_sites(pool.experts(), dtype=torch.float32)
    assert sites.keys() == stacks.keys()
    for site, expected_EI in sites.items():
        found_EI = spectrum(stacks[site]).right_ERI[:, 0]
        cosine_E = torch.nn.functional.cosine_similarity(found_EI, expected_EI).abs()
        torch.testing.assert_close(cosine_E, torch.ones_like(cosine_E), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("router", "numbers"), [("arrow", "arrow_default"), ("arrow-peft", "arrow_t1_noscale")])
def test_arrow_logits(pool: Pool, router: str, numbers: str) -> None:
    assert_close(logits(RoutedModel.from_pool(base(), pool, router=router)), golden("baselines")[f"{numbers}.logits"])


@pytest.mark.parametrize(("router", "numbers"), [("arrow", "arrow_default"), ("arrow-peft", "arrow_t1_noscale")])
def test_arrow_routing_weights(pool: Pool, router: str, numbers: str) -> None:
    model = RoutedModel.from_pool(base(), pool, router=router)
    with model.trace() as trace:
        logits(model)
    for site, all_BSE in by_site("baselines", f"{numbers}.routing_weights.").items():
        top_BSK, ids_BSK = all_BSE.topk(2)
        expected = torch.zeros_like(all_BSE).scatter(2, ids_BSK, top_BSK / top_BSK.sum(-1, keepdim=True))
        assert_close(trace.weights(site), expected)


def test_average_activation_logits(pool: Pool, tmp_path: Path) -> None:
    other = Pool.open(shutil.copytree(pool.folder, tmp_path / "pool"))
    vectors = by_site("average_activation", "router_embeddings.")
    for i, expert in enumerate(other.experts()):
        provenance = ActivationsProvenance(
            base=BASE,
            revision=None,
            data="",
            adapter_sha256=sha256(expert.folder / WEIGHTS_FILE),
            num_examples=6,
            settings={},
            phatgoose="test",
        )
        own = {site: vectors_EI[i] for site, vectors_EI in vectors.items()}
        ACTIVATIONS.save(expert.folder, own, provenance)
    found = logits(RoutedModel.from_pool(base(), other, router="average-activation"))
    assert_close(found, golden("average_activation")["logits"])


@pytest.mark.parametrize("i", range(5))
def test_mean_activations_where_the_official_code_averages(pool: Pool, i: int) -> None:
    """Sites that read the input; of the others, the official code keeps the last step of a generation only."""
    model = base()
    rows = golden("average_activation")[f"input_ids.{i}"].flatten(0, 1)
    examples = [Example(input=as_text(ids[ids != PAD].tolist()), target="<5>") for ids in rows]
    encoder = Encoder(make_tokenizer(model.config.vocab_size), model.config, TextConfig())
    expert: Expert = pool.experts()[i]
    found = mean_activations(model, encoder, expert, examples, batch_size=4)
    expected = by_site("average_activation", "router_embeddings.")
    assert found.keys() == expected.keys()
    checked = [site for site in found if describe_site(site, encoder_decoder=True).stream == INPUT]
    assert len(checked) == 18  # 14 of the encoder, and keys and values of two cross-attentions
    for site in checked:
        assert_close(found[site], expected[site][i])
