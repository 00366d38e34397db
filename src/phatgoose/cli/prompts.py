"""phatgoose generate, phatgoose route and phatgoose demo."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.config import Dtype, GenerationConfig, RouterConfig, TextConfig

if TYPE_CHECKING:
    from phatgoose.data.encoder import Encoder
    from phatgoose.routing.model import RoutedModel

TextArgument = Annotated[str, typer.Argument(help="The prompt.")]
PoolOption = Annotated[Path, typer.Option(help="The pool's folder.")]
Base = Annotated[str | None, typer.Option(help="Base model; the one that the pool names if not given.")]
RouterName = Annotated[str, typer.Option(help="How tokens choose experts.")]
TopK = Annotated[int, typer.Option(help="Experts per token and layer.")]
ExpertName = Annotated[str | None, typer.Option(help="The one expert of router single.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="NAME=NUMBER: temperature, eps, prior_strength, ... May be repeated."),
]
Separator = Annotated[str, typer.Option(help="Text after the prompt (decoder-only models), as in training.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.")]
ModelDtype = Annotated[Dtype | None, typer.Option(help="bf16 on a GPU and fp32 on a CPU if not given.")]
Device = Annotated[str | None, typer.Option(help='Such as "cuda" or "cpu"; a GPU if there is one.')]


def generate(
    text: TextArgument,
    pool: PoolOption,
    base: Base = None,
    router: RouterName = RouterConfig.router,
    top_k: TopK = RouterConfig.top_k,
    expert: ExpertName = RouterConfig.expert,
    option: Options = None,
    separator: Separator = TextConfig.separator,
    max_new_tokens: MaxNewTokens = GenerationConfig.max_new_tokens,
    num_beams: Annotated[int, typer.Option(help="Of beam search; 1 is greedy.")] = GenerationConfig.num_beams,
    sample: Annotated[bool, typer.Option("--sample", help="Draw from the distribution.")] = GenerationConfig.sample,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = GenerationConfig.seed,
    dtype: ModelDtype = None,
    device: Device = None,
) -> None:
    """Answer a prompt with a routed pool."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, num_beams=num_beams, sample=sample, seed=seed)

    from phatgoose.inference.generation import answer

    model, encoder = _load(pool, base, _router(router, top_k, expert, option), separator, dtype, device)
    typer.echo(answer(model, encoder, text, config).text)


def route(
    text: TextArgument,
    pool: PoolOption,
    base: Base = None,
    router: RouterName = RouterConfig.router,
    top_k: TopK = RouterConfig.top_k,
    expert: ExpertName = RouterConfig.expert,
    option: Options = None,
    separator: Separator = TextConfig.separator,
    max_new_tokens: MaxNewTokens = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows each token and layer.")] = None,
    dtype: ModelDtype = None,
    device: Device = None,
) -> None:
    """Show which experts carry each token of a prompt and of its answer."""
    config = GenerationConfig(max_new_tokens=max_new_tokens)

    from phatgoose.analysis.prompt_page import check_page_path, routed_sample, write_page

    if html is not None:
        check_page_path(html)
    model, encoder = _load(pool, base, _router(router, top_k, expert, option), separator, dtype, device)
    sample = routed_sample(model, encoder, text, config)
    if html is not None:
        base_name = base or model.pool.base.name
        write_page(html, [sample], pool_name=pool.name, base=base_name, router=router, top_k=top_k)
        typer.echo(f"page: {html}", err=True)
    if as_json:
        typer.echo(json.dumps({"answer": sample.pool_answer, **sample.routing}))
        return
    from rich.console import Console

    from phatgoose.cli.demo import token_table

    console = Console()
    console.print(token_table(sample.routing))
    console.print("answer: " + sample.pool_answer, markup=False, highlight=False, soft_wrap=True)


def demo(
    pool: Annotated[Path, typer.Option(help="The pool's folder.")] = Path("demo/pool"),
    html: Annotated[Path, typer.Option(help="Page to write.")] = Path("out/demo.html"),
    top_k: TopK = RouterConfig.top_k,
    max_new_tokens: MaxNewTokens = 40,
) -> None:
    """Answer a few prompts with the demo pool, beside the base model, and show the routing."""
    from phatgoose.cli.demo import run_demo

    run_demo(pool, html, top_k=top_k, max_new_tokens=max_new_tokens)


def _load(
    folder: Path, base: str | None, config: RouterConfig, separator: str, dtype: Dtype | None, device: str | None
) -> tuple[RoutedModel, Encoder]:
    """The routed model and its encoder; what can be checked without the weights is checked first."""
    text = TextConfig(separator=separator)

    from phatgoose.data.encoder import Encoder
    from phatgoose.experts.checks import check_base_name
    from phatgoose.experts.pool import Pool
    from phatgoose.models.base import load_base, load_tokenizer
    from phatgoose.routers import check_pool
    from phatgoose.routing.model import RoutedModel

    pool = Pool.open(folder)
    check_pool(pool, config)
    name = check_base_name(folder, pool.base, base)
    loaded = load_base(name, pool.base.revision, dtype=dtype, device=device)
    tokenizer = load_tokenizer(name, pool.base.revision)
    model = RoutedModel.from_pool(loaded, pool, tokenizer=tokenizer, **asdict(config))
    return model, Encoder(tokenizer, loaded.config, text)


def _router(router: str, top_k: int, expert: str | None, options: list[str] | None) -> RouterConfig:
    return RouterConfig.of(**({"router": router, "top_k": top_k, "expert": expert} | RouterConfig.parse(options or ())))
