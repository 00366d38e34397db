"""Methods that a grid compares.

    ROUTER [OPTION=VALUE ...]   a router over the whole pool, such as "phatgoose" or "phatgoose top_k=1"
    base                        the base model alone
    expert:NAME                 one expert of the pool for all tasks
    own                         each dataset's own expert (held-in only)
    chance                      the expected score of a random choice; runs no model
    multitask:ADAPTER           an adapter outside the pool for all tasks: the paper's Multitask, if it was
                                trained on the union of all datasets

Options with their default value are left out of a method's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from phatgoose.config import RouterConfig
from phatgoose.errors import RouterError
from phatgoose.experts.checks import check_base
from phatgoose.experts.pool import Pool
from phatgoose.results.names import BASE, CHANCE, EXPERT, OWN
from phatgoose.routers import ROUTERS, check_pool, router_class

EXPERTS, MULTITASK = "experts", "multitask"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of a grid.

    Attributes:
        name: the method's name in results.
        router: settings of the router; None for `base`, `own` and `chance`.
        other_pool: the pool that `router` routes among; None for the grid's pool.
    """

    name: str
    router: RouterConfig | None = None
    other_pool: Pool | None = field(default=None, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All options, as rows record them."""
        options = {"router": self.name} if self.router is None else asdict(self.router)
        return options if self.other_pool is None else options | {"pool": self.other_pool.fingerprint}

    def router_for(self, dataset: str) -> RouterConfig | None:
        """Settings of the router for a dataset; None for the base model alone."""
        return single(dataset) if self.name == OWN else self.router


def single(expert: str) -> RouterConfig:
    """Settings of a router that uses one expert for all tokens."""
    return RouterConfig(router="single", expert=expert, top_k=1)


def parse_methods(texts: Sequence[str], pool: Pool, top_k: int | None = None) -> list[Method]:
    """Parse methods as the command line gives them, and check them against the pool.

    Args:
        texts: methods as above; `experts` stands for all single experts.
        pool: the pool of experts.
        top_k: top_k of routers that have one and do not set it themselves.

    Raises:
        RouterError: unknown method, or the pool lacks what it needs.
        PoolError: unknown expert, or an adapter of another base model.
        AdapterError: an adapter that cannot be routed.
        ConfigError: an unknown option, or an invalid value.
    """
    methods: list[Method] = []
    for text in texts:
        head, *options = text.split()
        if head == EXPERTS and not options:
            methods += [_expert(name, pool) for name in pool.names]
        elif head.startswith(EXPERT) and not options:
            methods.append(_expert(head.removeprefix(EXPERT), pool))
        elif head in (BASE, OWN, CHANCE) and not options:
            methods.append(Method(name=head))
        elif head.startswith(MULTITASK + ":"):
            methods.append(_multitask(text.partition(":")[2], pool))
        else:
            methods.append(_router(head, options, pool, top_k))
    return list(dict.fromkeys(methods))


def _expert(name: str, pool: Pool) -> Method:
    pool.entry(name)
    check_pool(pool, single(name))
    return Method(name=EXPERT + name, router=single(name))


def _multitask(adapter: str, pool: Pool) -> Method:
    other = Pool.around(adapter)
    check_base(pool.folder, pool.base, other.experts()[0])
    return Method(name=MULTITASK, router=single(other.names[0]), other_pool=other)


def _router(head: str, texts: Sequence[str], pool: Pool, top_k: int | None) -> Method:
    if head not in ROUTERS or head == "single":
        others = (BASE, OWN, CHANCE, EXPERT + "NAME", EXPERTS, f"{MULTITASK}:ADAPTER")
        known = ", ".join((*sorted(set(ROUTERS) - {"single"}), *others))
        raise RouterError(f"unknown router {head!r}", expected=known)
    options: dict[str, Any] = RouterConfig.parse(texts)
    if top_k is not None and not router_class(head).fixed_top_k:
        options.setdefault("top_k", top_k)
    config = RouterConfig.of(router=head, **options)
    check_pool(pool, config)
    changed = [
        f"{name}={value}" for name, value in asdict(config).items() if name != "router" and value != _default(name)
    ]
    return Method(name=" ".join([head, *changed]), router=config)


def _default(name: str) -> Any:
    return {option.name: option.default for option in fields(RouterConfig) if option.default is not MISSING}[name]
