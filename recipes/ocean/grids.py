"""What is evaluated: methods, suites, seeds, and how many rows of each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from phatgoose.config import RouterConfig
from phatgoose.evaluation.methods import EXPERTS, MULTITASK
from phatgoose.results.names import CHANCE, EXPERT, HELD_IN, LEAVE_ONE_OUT, OWN

HELD_OUT = ("t0ho", "bbh")
ALL = (*HELD_OUT, HELD_IN, LEAVE_ONE_OUT)
ROUTERS = (
    "phatgoose", "phatgoose-prior", "phatgoose-retrieval", "arrow", "retrieval", "merged", "average-activation",
    "glider", "spectr", "arrow-peft", "lag", "uniform", "merged-parameters",
)  # fmt: skip
# GLIDER's authors use a scale of 3 for unseen tasks, which is the default, and 100 for seen ones
SETTINGS = (
    "phatgoose-raw", "phatgoose-sequence", "phatgoose top_k=1", "phatgoose top_k=3", "phatgoose top_k=4",
    "phatgoose top_k=8", "phatgoose temperature=0.5", "phatgoose temperature=2.0", "glider global_scale=100.0",
    "phatgoose-prior prior_strength=1.0", "phatgoose-prior prior_strength=4.0", "phatgoose-prior prior_steps=3",
    "phatgoose-retrieval retrieval_scale=5.0", "phatgoose-retrieval retrieval_scale=10.0",
    "phatgoose-retrieval top_k=1", "phatgoose-retrieval top_k=4",
)  # fmt: skip
# methods and settings with rows of all tasks; the other settings only have the tasks with choices
ALL_TASKS = ("base", *ROUTERS[:4], "merged", *SETTINGS[:8])
# the same adapters with gates trained for other steps or at another rate (JOINT: adapters and gates trained together)
GATES = {
    "gates-10": {"steps": 10}, "gates-30": {"steps": 30}, "gates-300": {"steps": 300},
    "rate-1e-4": {"learning_rate": 1e-4}, "rate-2e-3": {"learning_rate": 2e-3}, "rate-5e-3": {"learning_rate": 5e-3},
}  # fmt: skip
JOINT = "joint"
SIZES = (9, 18)
MAIN = "main"
# most rows of each task: a seeded sample, the same for every method and seed
ROWS = {"t0ho": 100, "bbh": 60, HELD_IN: 40, LEAVE_ONE_OUT: 40}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Methods on suites, with one pool.

    Attributes:
        methods, suites: names.
        experts: number of experts in the pool, the first in a fixed random order; None for all.
        variant: variant of the experts, a name in `GATES` or `JOINT`; None for the experts themselves.
        seeds: number of training seeds, from 0; None for all.
    """

    methods: tuple[str, ...]
    suites: tuple[str, ...]
    experts: int | None = None
    variant: str | None = None
    seeds: int | None = None

    @property
    def pool(self) -> str:
        """The pool's name in `--pools`: `MAIN`, a number of experts or a variant's name."""
        return str(self.experts) if self.experts is not None else (self.variant or MAIN)

    @property
    def label(self) -> str:
        """How the pool differs from the main pool; empty if it does not."""
        return f"{self.experts} experts" if self.experts is not None else (self.variant or "")

    @property
    def results(self) -> str:
        """Name of the results folder; each holds one pool."""
        return "-".join(["results", *self.label.split()[:1]])


POOLS = (MAIN, *GATES, JOINT, *map(str, SIZES))
GRIDS = (
    Grid(methods=(*ROUTERS[:3], "base", CHANCE, MULTITASK, *ROUTERS[3:]), suites=ALL),
    Grid(methods=(OWN,), suites=(HELD_IN,)),
    Grid(methods=(EXPERTS,), suites=HELD_OUT),
    Grid(methods=SETTINGS, suites=ALL, seeds=1),
    *(Grid(methods=("phatgoose",), suites=ALL, variant=name, seeds=1) for name in (*GATES, JOINT)),
    *(
        Grid(
            methods=("phatgoose", "phatgoose-prior", "phatgoose-retrieval", "arrow", "merged"),
            suites=HELD_OUT,
            experts=size,
            seeds=1,
        )
        for size in SIZES
    ),
)


def todo(
    seed: int, experts: Sequence[str], routers: Sequence[str] | None = None, pools: Sequence[str] | None = None
) -> Iterator[tuple[Grid, str]]:
    """Each grid with each of its methods.

    Args:
        seed: the training seed.
        experts: names of all experts.
        routers: only these methods; those of no grid are evaluated on all suites.
        pools: only these pools (see `Grid.pool`).
    """
    grids = list(GRIDS)
    if routers is not None:
        known = {method for grid in GRIDS for method in grid.methods}
        others = tuple(name for name in routers if name not in known)
        grids = [replace(grid, methods=tuple(name for name in grid.methods if name in routers)) for grid in GRIDS]
        grids.append(Grid(methods=others, suites=ALL))
    for grid in grids:
        if (grid.seeds is not None and seed >= grid.seeds) or (grid.experts or 0) >= len(experts):
            continue
        if pools is not None and grid.pool not in pools:
            continue
        for method in grid.methods:
            # a pool of fewer than k experts has no top k
            if RouterConfig.parse(method.split()[1:]).get("top_k", 0) <= len(experts):
                for one in [EXPERT + name for name in experts] if method == EXPERTS else [method]:
                    yield grid, one
