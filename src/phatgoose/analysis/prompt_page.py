"""A self-contained HTML page that shows which experts processed each token of prompts, at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phatgoose.analysis.prompt_table import to_json
from phatgoose.config import GenerationConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import ConfigError
from phatgoose.inference.generation import Answer, traced_answer
from phatgoose.report.html import write_html
from phatgoose.routing.model import RoutedModel

# factor of routing weights in the page: integers take half the space of decimals
UNIT = 1000


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt on the page.

    Attributes:
        prompt: the prompt as written.
        base_answer: the base model's answer; None to leave it out.
        pool_answer: the routed model's answer.
        routing: the routing of the prompt and the routed model's answer, from `prompt_table.to_json`.
    """

    prompt: str
    base_answer: str | None
    pool_answer: str
    routing: dict[str, Any]


def write_page(
    path: str | Path, samples: Sequence[Sample], *, pool_name: str, base: str, router: str, top_k: int
) -> None:
    """Write the page, and create the folders above it; an older file is replaced atomically.

    Args:
        path: the .html file.
        samples: one or more samples, all from one pool.
        pool_name: the pool's name, for people.
        base: name of the base model.
        router: name of the router.
        top_k: experts per token and site.

    Raises:
        ValueError: no sample, or samples from different pools.
    """
    if not samples:
        raise ValueError("a page needs at least one sample")
    experts = samples[0].routing["experts"]
    if any(sample.routing["experts"] != experts for sample in samples):
        raise ValueError("the samples of a page must come from one pool")
    write_html(
        path,
        "analysis/prompt_page.html.jinja",
        samples=[asdict(sample) for sample in samples],
        routings=[_packed(sample.routing) for sample in samples],
        experts=experts,
        pool_name=pool_name,
        base=base,
        router=router,
        top_k=top_k,
        unit=UNIT,
    )


def check_page_path(path: Path) -> None:
    """Raise ConfigError unless a page can be written to `path`; called before a model is loaded."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir():
        found = f"{path} is a folder" if path.is_dir() else f"{above} is a file"
        raise ConfigError(f"cannot write a page to {path}", found=found, expected="the name of a file to write")


def _packed(routing: dict[str, Any]) -> dict[str, Any]:
    """The part of `to_json` that the page's script reads, with weights as integers."""
    keys = ("tokens", "num_prompt", "streams", "layers", "kinds")
    numbers = ("token_shares", "weights", "layer_weights")
    return {key: routing[key] for key in keys} | {key: _integers(routing[key]) for key in numbers}


def _integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _integers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_integers(inner) for inner in value]
    return None if value is None else round(value * UNIT)


def routed_sample(
    model: RoutedModel, encoder: Encoder, text: str, config: GenerationConfig, base_answer: Answer | None = None
) -> Sample:
    """Answer a prompt with a routed model, and keep the routing.

    Args:
        model: the routed model.
        encoder: the encoder of its base model.
        text: the prompt.
        config: settings of the generation.
        base_answer: the base model's answer, to show beside it.
    """
    answer, trace = traced_answer(model, encoder, text, config)
    output_ids = [encoder.start_id, *answer.answer_ids] if encoder.encoder_decoder else answer.answer_ids
    tokens = [encoder.piece(i) for i in [*answer.prompt_ids, *output_ids]]
    routing = to_json(trace, tokens, len(answer.prompt_ids), encoder_decoder=encoder.encoder_decoder)
    return Sample(
        prompt=text,
        base_answer=base_answer.text if base_answer is not None else None,
        pool_answer=answer.text,
        routing=routing,
    )
