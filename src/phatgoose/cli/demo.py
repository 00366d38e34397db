"""phatgoose demo: prompts that no expert was trained on, answered by the base model and by the pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.options import MaxNewTokens, TopK
from phatgoose.config import GenerationConfig, RouterConfig, TextConfig

if TYPE_CHECKING:
    from rich.panel import Panel

    from phatgoose.analysis.prompt_page import Sample

# Written for the demo. None is a row, or the wording, of a dataset that an expert was
# trained on; some are of kinds that no expert knows (mail, offers, weather).
PROMPTS = (
    "A customer wrote: the kettle broke after two days and nobody answered my letters. "
    "Is the customer happy or unhappy?",
    "Which department should read this mail: Sports, Finance or Science?\n\n"
    "The club signed a new goalkeeper on Monday, two days before the cup final.",
    "Do these two messages ask for the same thing? Yes or no?\n\n"
    "1: How do I get my money back?\n2: What is the way to a refund?",
    "Write one sentence with these three words: lamp, cat, window",
    "Where would you keep milk so that it stays fresh?\n\n- a shelf\n- a fridge\n- a garden\n- a drawer",
    "In one sentence, what do the two agree on?\n\n"
    "Ida: Shall we take the early train?\nOle: I would rather sleep. The one at ten?\nIda: Fine, ten it is.",
    "What does this ask for: a person, a place, a number or a definition?\n\nHow many bridges cross the river?",
    "Turn these notes into a sentence.\n\n- name: Mara Lind\n- born: 1931, Bergen\n- work: painter",
)


def demo(
    pool: Annotated[Path, typer.Option(help="Folder of the pool.")] = Path("demo/pool"),
    html: Annotated[Path, typer.Option(help="File for the page.")] = Path("out/demo.html"),
    top_k: TopK = RouterConfig.top_k,
    max_new_tokens: MaxNewTokens = 40,
) -> None:
    """Answer a few prompts with the base model and with the demo pool, and show the routing."""
    from rich.console import Console
    from rich.progress import track

    from phatgoose.analysis.prompt_page import check_page_path, routed_sample, write_page
    from phatgoose.data.encoder import Encoder
    from phatgoose.experts.pool import Pool
    from phatgoose.inference.generation import answer
    from phatgoose.models.base import load_base, load_tokenizer
    from phatgoose.routing.model import RoutedModel

    config = GenerationConfig(max_new_tokens=max_new_tokens)
    check_page_path(html)
    console = Console()
    opened = Pool.open(pool)
    console.print(f"base model {opened.base}; {len(opened)} experts: {', '.join(opened.names)}")
    with console.status("loading the base model (the first time it is dequantised, about half a minute)"):
        model = load_base(opened.base.name, opened.base.revision)
        encoder = Encoder(load_tokenizer(opened.base.name, opened.base.revision), model.config, TextConfig())

    base_answers = [answer(model, encoder, prompt, config) for prompt in track(PROMPTS, "base model", console=console)]
    routed = RoutedModel.from_pool(model, opened, top_k=top_k)
    samples = [
        routed_sample(routed, encoder, prompt, config, base_answer)
        for prompt, base_answer in track(list(zip(PROMPTS, base_answers, strict=True)), "pool", console=console)
    ]
    for sample in samples:
        console.print(_panel(sample))
    write_page(html, samples, pool_name=pool.name, base=opened.base.name, router="phatgoose", top_k=top_k)
    console.print(f"routing per token and layer: {html}")


def _panel(sample: Sample) -> Panel:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]base", Text(sample.base_answer or ""))
    grid.add_row("[bold]pool", Text(sample.pool_answer))
    shares = sample.routing["shares"]
    for part in ("prompt", "answer"):
        if shares[part]:
            best = sorted(shares[part].items(), key=lambda item: -item[1])[:3]
            grid.add_row(f"[dim]{part} carried by", ", ".join(f"{name} {share:.0%}" for name, share in best))
    pairs = list(zip(sample.routing["tokens"], sample.routing["leading"], strict=True))[sample.routing["num_prompt"] :]
    answered = [f"{token.strip() or repr(token)}→{entry['expert']}" for token, entry in pairs if entry is not None][:8]
    if answered:
        grid.add_row("[dim]tokens", Text("  ".join(answered)))
    return Panel(grid, title=Text(sample.prompt.splitlines()[0][:100]), title_align="left")
