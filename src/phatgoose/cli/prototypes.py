"""phatgoose activations and phatgoose embeddings: what some routers need beside or instead of a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.config import Dtype, TextConfig

Text = TextConfig

AdapterFolder = Annotated[Path, typer.Argument(help="A PEFT adapter's folder; one inside a pool too.")]
Data = Annotated[str, typer.Option(help="What the adapter was trained on: a .jsonl file or a dataset's name.")]
Split = Annotated[str, typer.Option(help="Rows of this split; a file's rows without a split always count.")]
NumExamples = Annotated[int, typer.Option(help="Examples that are read, drawn at random if there are more.")]
Seed = Annotated[int, typer.Option(help="Of the drawing.")]


def activations(
    adapter: AdapterFolder,
    data: Data,
    base: Annotated[str | None, typer.Option(help="Base model; the one that the adapter names if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the base model's hub repository.")] = None,
    split: Split = "train",
    num_examples: NumExamples = 1000,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights and of the arithmetic.")] = "fp32",
    save_dtype: Annotated[Dtype, typer.Option(help="Of the numbers on disk.")] = "fp32",
    separator: Annotated[str, typer.Option(help="Text between input and target, as in training.")] = Text.separator,
    max_input_tokens: Annotated[int, typer.Option(help="Longer inputs are cut.")] = Text.max_input_tokens,
    max_target_tokens: Annotated[int, typer.Option(help="Longer targets are cut.")] = Text.max_target_tokens,
    device: Annotated[str | None, typer.Option(help='Such as "cuda" or "cpu"; a GPU if there is one.')] = None,
) -> None:
    """Compute an expert's mean activations, for router average-activation."""
    text = Text(separator=separator, max_input_tokens=max_input_tokens, max_target_tokens=max_target_tokens)

    from phatgoose.data.examples import read_examples
    from phatgoose.experts.checks import base_of
    from phatgoose.experts.location import editing, open_expert
    from phatgoose.experts.vectors import ACTIVATIONS
    from phatgoose.models.base import load_base, load_tokenizer
    from phatgoose.training.mean_activations import save_mean_activations

    wanted = base_of(open_expert(adapter), base, revision)
    examples = read_examples(data, split)
    model = load_base(wanted.name, wanted.revision, dtype=dtype, device=device)
    tokenizer = load_tokenizer(wanted.name, wanted.revision)
    with editing(adapter) as expert:
        save_mean_activations(
            model, tokenizer, expert, examples, text=text, num_examples=num_examples, seed=seed,
            batch_size=batch_size, save_dtype=save_dtype,
        )  # fmt: skip
    typer.echo(f"mean activations: {adapter / ACTIVATIONS.file}")


def embeddings(
    adapter: AdapterFolder, data: Data, split: Split = "train", num_examples: NumExamples = 1000, seed: Seed = 0
) -> None:
    """Embed an expert's examples, for routers retrieval, glider and phatgoose-retrieval. The texts are not kept."""
    from phatgoose.data.examples import read_examples
    from phatgoose.experts.embeddings import EMBEDDINGS_FILE, save_example_embeddings
    from phatgoose.experts.location import editing, open_expert

    open_expert(adapter)  # a wrong path must fail before the data are read
    examples = read_examples(data, split)
    with editing(adapter) as expert:
        save_example_embeddings(expert.folder, examples, num_examples=num_examples, seed=seed)
    typer.echo(f"embeddings: {adapter / EMBEDDINGS_FILE}")
