"""Methods: what a grid compares.

    ROUTER [OPTION=VALUE ...]   a router over the whole pool, as "phatgoose" or "phatgoose top_k=1"
    base                        the base model alone
    expert:NAME                 one expert for everything
    own                         the dataset's own expert (held-in only)
    chance                      the mean score of choices drawn blindly; no model runs
    multitask:ADAPTER           an adapter that is not in the pool, for everything: the paper's Multitask,
                                if it was trained on the union of all data

An option that has its default is left out of a method's name.
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
    """One of the methods above.

    Attributes:
        name: see above.
        router: of a router or a single expert; None for `base`, `own` and `chance`.
        other_pool: what `router` routes among, if it is not the grid's pool.
    """

    name: str
    router: RouterConfig | None = None
    other_pool: Pool | None = field(default=None, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """For the rows: every option."""
        options = {"router": self.name} if self.router is None else asdict(self.router)
        return options if self.other_pool is None else options | {"pool": self.other_pool.fingerprint}

    def router_for(self, dataset: str) -> RouterConfig | None:
        """The router for one dataset; None for the base model alone."""
        return single(dataset) if self.name == OWN else self.router


def single(expert: str) -> RouterConfig:
    """One expert for everything."""
    return RouterConfig(router="single", expert=expert, top_k=1)


def parse_methods(texts: Sequence[str], pool: Pool, top_k: int | None = None) -> list[Method]:
    """Read methods as the command line gives them, and check them against the pool.

    Args:
        texts: names as above, and `experts` for all single experts.
        pool: the experts.
        top_k: of the routers that take one and do not say otherwise.

    Raises:
        RouterError: no such method, or the pool lacks what it needs.
        PoolError: no such expert, or an adapter that is for another base.
        AdapterError: an adapter that cannot be routed.
        ConfigError: an option that does not exist or cannot be used.
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
        raise RouterError(
            f"unknown router {head!r}",
            expected=", ".join(
                (
                    *sorted(set(ROUTERS) - {"single"}),
                    BASE,
                    OWN,
                    CHANCE,
                    EXPERT + "NAME",
                    EXPERTS,
                    f"{MULTITASK}:ADAPTER",
                )
            ),
        )
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
