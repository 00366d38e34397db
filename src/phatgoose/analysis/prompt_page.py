"""One HTML page that shows how a pool's experts routed each token at each layer.

The page carries everything it needs and loads nothing, so it can be mailed,
archived or opened from a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from phatgoose.analysis.prompt_table import to_json
from phatgoose.config import GenerationConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import ConfigError
from phatgoose.files import replacing
from phatgoose.inference.generation import Answer, traced_answer
from phatgoose.routing.model import RoutedModel

TEMPLATE = "prompt_page.html.jinja"
# What a routing weight is multiplied by in the page: integers take half the space of decimals.
UNIT = 1000


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt on the page.

    Attributes:
        prompt: as the user wrote it.
        base_answer: of the base model alone; None to leave it out.
        pool_answer: of the routed model.
        routing: what `phatgoose.analysis.prompt_table.to_json` made of its trace.
    """

    prompt: str
    base_answer: str | None
    pool_answer: str
    routing: dict[str, Any]


def write_page(
    path: str | Path, samples: Sequence[Sample], *, pool_name: str, base: str, router: str, top_k: int
) -> None:
    """Write the page, and the folders above it; an older file at `path` is replaced as one step.

    Args:
        path: of the .html file.
        samples: at least one, all from one pool.
        pool_name: as people should read it.
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
    html = _template().render(
        samples=[asdict(sample) for sample in samples],
        routings=[_packed(sample.routing) for sample in samples],
        experts=experts,
        pool_name=pool_name,
        base=base,
        router=router,
        top_k=top_k,
        unit=UNIT,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def check_page_path(path: Path) -> None:
    """Raise ConfigError unless a page can be written to `path`: before a model is loaded, not after."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    found = f"{path} is a folder" if path.is_dir() else None if above.is_dir() else f"{above} is a file"
    if found is not None:
        raise ConfigError(f"cannot write a page to {path}", found=found, expected="the name of a file to write")


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("phatgoose.analysis", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` writes <, >, & and ' as \u003c and so on: no text can close the script element
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(TEMPLATE)


def _packed(routing: dict[str, Any]) -> dict[str, Any]:
    """What the page's script reads: `to_json` with weights as integers."""
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
    """Answer one prompt with the pool and keep the routing."""
    found, trace = traced_answer(model, encoder, text, config)
    written = [encoder.start_id, *found.answer_ids] if encoder.encoder_decoder else found.answer_ids
    tokens = [encoder.piece(i) for i in [*found.prompt_ids, *written]]
    routing = to_json(trace, tokens, len(found.prompt_ids), encoder_decoder=encoder.encoder_decoder)
    return Sample(
        prompt=text,
        base_answer=base_answer.text if base_answer is not None else None,
        pool_answer=found.text,
        routing=routing,
    )
