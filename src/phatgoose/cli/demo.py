"""The demo: prompts that no expert was trained on, answered by the base model and by the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Column, Table

from phatgoose.analysis.prompt_page import Sample, check_page_path, routed_sample, write_page
from phatgoose.config import GenerationConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.experts.pool import Pool
from phatgoose.inference.generation import answer
from phatgoose.models.base import load_base, load_tokenizer
from phatgoose.routing.model import RoutedModel

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


def run_demo(folder: Path, html: Path, *, top_k: int, max_new_tokens: int) -> None:
    """Answer `PROMPTS` with the base model and with the pool, print both, and write the page.

    Args:
        folder: of the pool.
        html: page to write.
        top_k: experts per token and site.
        max_new_tokens: longest answer.

    Raises:
        PhatgooseError: the pool, the base model or a setting cannot be used.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    check_page_path(html)
    console = Console()
    pool = Pool.open(folder)
    console.print(f"base model {pool.base}; {len(pool)} experts: {', '.join(pool.names)}")
    with console.status("loading the base model (the first time it is dequantised, about half a minute)"):
        model = load_base(pool.base.name, pool.base.revision)
        encoder = Encoder(load_tokenizer(pool.base.name, pool.base.revision), model.config, TextConfig())

    base_answers = [answer(model, encoder, prompt, config) for prompt in track(PROMPTS, "base model", console=console)]
    routed = RoutedModel.from_pool(model, pool, top_k=top_k)
    samples = [
        routed_sample(routed, encoder, prompt, config, base_answer)
        for prompt, base_answer in track(list(zip(PROMPTS, base_answers, strict=True)), "pool", console=console)
    ]
    for sample in samples:
        console.print(_panel(sample))
    write_page(html, samples, pool_name=folder.name, base=pool.base.name, router="phatgoose", top_k=top_k)
    console.print(f"routing per token and layer: {html}")


def token_table(routing: dict[str, Any]) -> Table:
    """Each token with its leading expert and that expert's share; see `routing_table.to_json`."""
    headers = ("token", "leading expert", "share", "next", "share")
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for i, (token, shares) in enumerate(zip(routing["tokens"], routing["token_shares"], strict=True)):
        if i == routing["num_prompt"]:
            table.add_section()
        if shares is None:  # no routed layer read it: the last token, or a whole input or output
            table.add_row(_plain(repr(token)), "-", "", "", "")
            continue
        order = sorted(range(len(shares)), key=lambda e: -shares[e])[:2]
        cells = [cell for e in order for cell in (routing["experts"][e], f"{shares[e]:.0%}")]
        table.add_row(_plain(repr(token)), *cells)
    return table


def _panel(sample: Sample) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]base", _plain(sample.base_answer or ""))
    grid.add_row("[bold]pool", _plain(sample.pool_answer))
    shares = sample.routing["shares"]
    for part in ("prompt", "answer"):
        if shares[part]:
            best = sorted(shares[part].items(), key=lambda item: -item[1])[:3]
            grid.add_row(f"[dim]{part} carried by", ", ".join(f"{name} {share:.0%}" for name, share in best))
    pairs = list(zip(sample.routing["tokens"], sample.routing["leading"], strict=True))[sample.routing["num_prompt"] :]
    answered = [f"{token.strip() or repr(token)}→{entry['expert']}" for token, entry in pairs if entry is not None][:8]
    if answered:
        grid.add_row("[dim]tokens", _plain("  ".join(answered)))
    return Panel(grid, title=_plain(sample.prompt.splitlines()[0][:100]), title_align="left")


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
