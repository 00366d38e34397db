"""Routers: rules by which each token chooses its experts at each site.

A new router is one file in this folder, with a subclass of `Router` (base.py), and one
line in `ROUTERS`; docs/extending.md has an example. A router of one's own needs neither:
`RoutedModel.from_pool` takes its class, and `--router` takes MODULE:CLASS.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from phatgoose.config import RouterConfig
from phatgoose.errors import RouterError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routers.base import Need, Router

# name -> "module:class"; imported only when asked for
ROUTERS = {
    "phatgoose": "phatgoose.routers.phatgoose:Phatgoose",
    "phatgoose-prior": "phatgoose.routers.phatgoose_prior:PhatgoosePrior",
    "phatgoose-retrieval": "phatgoose.routers.phatgoose_retrieval:PhatgooseRetrieval",
    "phatgoose-raw": "phatgoose.routers.phatgoose_raw:PhatgooseRaw",
    "phatgoose-sequence": "phatgoose.routers.phatgoose_sequence:PhatgooseSequence",
    "average-activation": "phatgoose.routers.average_activation:AverageActivation",
    "arrow": "phatgoose.routers.arrow:Arrow",
    "arrow-peft": "phatgoose.routers.arrow:ArrowPeft",
    "spectr": "phatgoose.routers.spectr:Spectr",
    "lag": "phatgoose.routers.lag:Lag",
    "retrieval": "phatgoose.routers.retrieval:Retrieval",
    "glider": "phatgoose.routers.glider:Glider",
    "merged": "phatgoose.routers.merged:Merged",
    "merged-parameters": "phatgoose.routers.merged:MergedParameters",
    "uniform": "phatgoose.routers.uniform:Uniform",
    "single": "phatgoose.routers.single:Single",
}
# what an expert may have to bring along -> how people call it, and the command that makes it
NEEDS: dict[Need, tuple[str, str]] = {
    "gate": ("a gate", "phatgoose gate {folder} --data DATA"),
    "activations": ("mean activations", "phatgoose activations {folder} --data DATA"),
    "embeddings": ("embeddings of examples", "phatgoose embeddings {folder} --data DATA"),
}


def router_class(name: str) -> type[Router]:
    """The router called `name` in `ROUTERS`. Imports nothing else, so `name` may come from a file.

    Raises:
        RouterError: there is none.
    """
    if name not in ROUTERS:
        raise _unknown(name, None)
    return _load(ROUTERS[name])


def router_of_ones_own(name: str) -> type[Router]:
    """The router that MODULE:CLASS names. Imports that module: `name` must come from the user, never from a file.

    Raises:
        RouterError: there is none.
    """
    try:
        router = _load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise _unknown(name, str(error)) from error
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise _unknown(name, f"{router!r}, which is not a phatgoose.Router")
    return router


def _load(name: str) -> type[Router]:
    module, _, attribute = name.partition(":")
    router: type[Router] = getattr(import_module(module), attribute)
    return router


def _unknown(name: str, reason: str | None) -> RouterError:
    expected = f"{', '.join(sorted(ROUTERS))}; or MODULE:CLASS of a router of your own"
    return RouterError(f"unknown router {name!r}", found=reason, expected=expected)


def check_pool(pool: Pool, config: RouterConfig, router_type: type[Router] | None = None) -> type[Router]:
    """Check, before anything is loaded, that a router can route among a pool's experts.

    Args:
        pool: the experts.
        config: names the router and its options.
        router_type: the router's class, if it has no name in `ROUTERS`.

    Returns:
        The router's class.

    Raises:
        RouterError: unknown router, an expert that lacks what the router needs,
            top_k larger than the pool, or an unknown or superfluous `expert`.
        PoolError: the pool is empty.
    """
    if router_type is None:
        router_type = (router_of_ones_own if ":" in config.router else router_class)(config.router)
    experts = pool.experts()
    if config.top_k > len(experts) and not router_type.fixed_top_k:
        raise RouterError(
            f"top_k {config.top_k} is larger than pool {pool.folder}",
            found=f"{len(experts)} experts: {', '.join(pool.names)}",
            expected=f"top_k of at most {len(experts)}",
            fix=f"--top-k {len(experts)}",
        )
    if (config.expert is not None) != (config.router == "single") or config.expert not in (None, *pool.names):
        raise RouterError(
            f"router {config.router!r} and expert {config.expert!r} do not go together",
            found=f"experts: {', '.join(pool.names)}",
            expected="router single with one of the pool's experts, or another router without --expert",
            fix=f"--router single --expert {pool.names[0]}",
        )
    check_needs(pool, config, experts, router_type)
    return router_type


def check_needs(pool: Pool, config: RouterConfig, experts: Sequence[Expert], router_type: type[Router]) -> None:
    """Check that these experts of a pool bring along what the router needs. Raises RouterError."""
    for need in sorted(router_type.needs - {"adapter"}):
        lacking = [expert for expert in experts if not expert.brings(need)]
        if lacking:
            noun, command = NEEDS[need]
            entry = pool.entry(lacking[0].name)
            fix = command.format(folder=pool.folder / (entry.path or f"experts/{entry.name}"))
            if entry.path is None:  # its folder is the hub's cache, where nothing of ours should lie
                fix = f"phatgoose pool remove {pool.folder} {entry.name}, add it again without --link, then {fix}"
            raise RouterError(
                f"router {config.router!r} needs {noun}, which these experts lack: "
                + ", ".join(expert.name for expert in lacking),
                found=f"{len(lacking)} of {len(experts)} experts without",
                expected=f"{noun} beside every adapter",
                fix=fix,
            )
