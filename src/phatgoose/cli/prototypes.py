"""phatgoose activations and phatgoose embeddings: prototypes that some routers need beside or instead of a gate."""

from __future__ import annotations

from typing import Annotated

import typer

from phatgoose.cli.config_options import Fields, config_options, described
from phatgoose.cli.options import AdapterBase, AdapterData, AdapterFolder, Device, Revision, SaveDtype, Split
from phatgoose.config import Dtype, GateConfig, PrototypeConfig, TextConfig


@config_options
def activations(
    *,
    adapter: AdapterFolder,
    data: AdapterData,
    base: AdapterBase = None,
    revision: Revision = None,
    split: Split = "train",
    config: PrototypeConfig,
    dtype: Annotated[Dtype, described(GateConfig, "dtype")] = "fp32",
    save_dtype: SaveDtype = "fp32",
    text: TextConfig,
    device: Device = None,
) -> None:
    """Compute an expert's mean activations, for router average-activation."""
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
            model, tokenizer, expert, examples, text=text, num_examples=config.num_examples, seed=config.seed,
            batch_size=config.batch_size, save_dtype=save_dtype,
        )  # fmt: skip
    typer.echo(f"mean activations: {adapter / ACTIVATIONS.file}")


@config_options
def embeddings(
    *,
    adapter: AdapterFolder,
    data: AdapterData,
    split: Split = "train",
    config: Annotated[PrototypeConfig, Fields("num_examples", "seed")],
) -> None:
    """Embed an expert's examples, for routers retrieval, glider and phatgoose-retrieval. The texts are not stored."""
    from phatgoose.data.examples import read_examples
    from phatgoose.experts.embeddings import EMBEDDINGS_FILE, save_example_embeddings
    from phatgoose.experts.location import editing, open_expert

    open_expert(adapter)  # a wrong path fails before the data are read
    examples = read_examples(data, split)
    with editing(adapter) as expert:
        save_example_embeddings(expert.folder, examples, num_examples=config.num_examples, seed=config.seed)
    typer.echo(f"embeddings: {adapter / EMBEDDINGS_FILE}")
