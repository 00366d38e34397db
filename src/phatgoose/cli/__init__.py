"""The command line: phatgoose train | gate | train-many | activations | embeddings | pool | generate | route | demo
| eval | lm-eval | compare | record | analyse.

Nothing heavy is imported until a command runs, so that --help answers at once:
each command imports what it needs inside its function.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import NoReturn

import typer

from phatgoose.cli.analysis import analyse, record
from phatgoose.cli.demo import demo
from phatgoose.cli.evaluation import evaluate, lm_eval
from phatgoose.cli.pool import pool_app
from phatgoose.cli.prompts import generate, route
from phatgoose.cli.prototypes import activations, embeddings
from phatgoose.cli.results import compare
from phatgoose.cli.training import gate, train, train_many
from phatgoose.errors import PhatgooseError

# how a disk refuses; any other OSError is a bug of this package
_REFUSALS = frozenset(
    (
        errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
        errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
    )
)  # fmt: skip

app = typer.Typer(
    name="phatgoose",
    help="Route every token, at every layer, among independently trained LoRA experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(gate)
app.command()(train_many)
app.command()(activations)
app.command()(embeddings)
app.add_typer(pool_app, name="pool")
app.command()(generate)
app.command()(route)
app.command("eval")(evaluate)
# lm-eval parses its own arguments
_UNPARSED = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
app.command("lm-eval", context_settings=_UNPARSED)(lm_eval)
app.command()(compare)
app.command()(record)
app.command()(analyse)
app.command()(demo)


def _version(wanted: bool) -> None:
    if wanted:
        from phatgoose import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports bitsandbytes, which warns about a kernel that only 4-bit models on a CPU could use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def main() -> None:
    """Run a command. A user error, or a disk that refuses, ends with one message and exit code 2."""
    try:
        app(prog_name="phatgoose")  # also as `python -m phatgoose`
    except PhatgooseError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _fail(PhatgooseError(f"cannot use {error.filename or 'the disk'}", found=error.strerror))


def _fail(error: PhatgooseError) -> NoReturn:
    typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    sys.exit(2)
