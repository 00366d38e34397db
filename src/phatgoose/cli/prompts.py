"""phatgoose generate and phatgoose route: one prompt through a routed pool."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phatgoose.cli.config_options import Fields, config_options
from phatgoose.cli.options import AsJson, Device, MaxNewTokens, ModelDtype, PoolBase, PoolOption, Separator
from phatgoose.config import Dtype, GenerationConfig, RouterConfig, TextConfig

if TYPE_CHECKING:
    from rich.table import Table

    from phatgoose.data.encoder import Encoder
    from phatgoose.routing.model import RoutedModel

Prompt = Annotated[str, typer.Argument(help="The prompt.")]
Router = Annotated[RouterConfig, Fields("router", "top_k", "expert")]
RouterOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the router, NAME=NUMBER: temperature, eps, ...; may be repeated."),
]


@config_options
def generate(
    *,
    text: Prompt,
    pool: PoolOption,
    base: PoolBase = None,
    router: Router,
    option: RouterOptions = None,
    text_config: Separator,
    config: GenerationConfig,
    dtype: ModelDtype = None,
    device: Device = None,
) -> None:
    """Answer a prompt with a routed pool."""
    from phatgoose.inference.generation import answer

    router = replace(router, **RouterConfig.parse(option or ()))
    model, encoder = _load(pool, base, router, text_config, dtype, device)
    typer.echo(answer(model, encoder, text, config).text)


@config_options
def route(
    *,
    text: Prompt,
    pool: PoolOption,
    base: PoolBase = None,
    router: Router,
    option: RouterOptions = None,
    text_config: Separator,
    max_new_tokens: MaxNewTokens = 32,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="File for a page that shows each token and layer.")] = None,
    dtype: ModelDtype = None,
    device: Device = None,
) -> None:
    """Show which experts carry each token of a prompt and of its answer."""
    import json

    from phatgoose.analysis.prompt_page import check_page_path, routed_sample, write_page

    config = GenerationConfig(max_new_tokens=max_new_tokens)
    if html is not None:
        check_page_path(html)
    router = replace(router, **RouterConfig.parse(option or ()))
    model, encoder = _load(pool, base, router, text_config, dtype, device)
    sample = routed_sample(model, encoder, text, config)
    if html is not None:
        base_name = base or model.pool.base.name
        write_page(html, [sample], pool_name=pool.name, base=base_name, router=router.router, top_k=router.top_k)
        typer.echo(f"page: {html}", err=True)
    if as_json:
        typer.echo(json.dumps({"answer": sample.pool_answer, **sample.routing}))
        return
    from rich.console import Console

    console = Console()
    console.print(token_table(sample.routing))
    console.print("answer: " + sample.pool_answer, markup=False, highlight=False, soft_wrap=True)


def token_table(routing: dict[str, Any]) -> Table:
    """One row per token with its two leading experts and their shares.

    Args:
        routing: see `phatgoose.analysis.prompt_table.to_json`.
    """
    from rich.table import Column, Table
    from rich.text import Text

    headers = ("token", "leading expert", "share", "next", "share")
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for i, (token, shares) in enumerate(zip(routing["tokens"], routing["token_shares"], strict=True)):
        if i == routing["num_prompt"]:
            table.add_section()
        if shares is None:  # no routed layer read it: the last token, or a whole input or output
            table.add_row(Text(repr(token)), "-", "", "", "")
            continue
        leading = sorted(range(len(shares)), key=lambda e: -shares[e])[:2]
        cells = [cell for e in leading for cell in (routing["experts"][e], f"{shares[e]:.0%}")]
        table.add_row(Text(repr(token)), *cells)
    return table


def _load(
    folder: Path, base: str | None, router: RouterConfig, text: TextConfig, dtype: Dtype | None, device: str | None
) -> tuple[RoutedModel, Encoder]:
    """The routed model of a pool, and the encoder of its prompts."""
    from phatgoose.data.encoder import Encoder
    from phatgoose.routing.model import RoutedModel

    model = RoutedModel.from_pool(base, folder, dtype=dtype, device=device, **asdict(router))
    return model, Encoder(model.tokenizer, model.config, text)
