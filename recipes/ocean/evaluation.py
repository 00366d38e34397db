"""Stage evaluate: all methods on all suites. Stage record: the routing of tasks."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict

from filelock import FileLock, Timeout
from grids import ALL, ROWS, Grid, todo
from times import timed
from training import TEXT, datasets

from phatgoose.analysis.recorder import record_tasks
from phatgoose.config import EvaluationConfig, RecordingConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.sampling import sample
from phatgoose.evaluation.grid import Cell, evaluate, plan, with_data
from phatgoose.evaluation.methods import MULTITASK, parse_methods
from phatgoose.evaluation.suites import load_tasks
from phatgoose.evaluation.suites.task import SuiteTask
from phatgoose.experts.pool import Pool
from phatgoose.models.base import load_base, load_tokenizer, placement
from phatgoose.results.writer import ResultsFolder
from phatgoose.routing.model import RoutedModel

RECORDED = ("phatgoose", "phatgoose-retrieval")


def evaluate_methods(args: argparse.Namespace, seed: int) -> None:
    """Evaluate all methods on all suites, except those that another process is evaluating."""
    folder = args.out / f"seed-{seed}"
    dtype, device = placement(args.dtype, None)
    model = load_base(args.base, dtype=dtype, device=device)
    encoder = Encoder(load_tokenizer(args.base), model.config, TEXT)
    # its warnings concern settings that are made here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # one chunk per method: many requests fill batches better
    config = EvaluationConfig(batch_tokens=args.batch_tokens, answer_tokens=args.answer_tokens, chunk_requests=10**9)
    tasks = Tasks(args)
    for grid, method in todo(seed, datasets(args), args.routers, args.pools):
        pool = pool_of(args, seed, grid)
        if pool is None:
            continue
        results = folder / grid.results
        results.mkdir(exist_ok=True)
        try:
            with FileLock(results / f".{method}.lock", timeout=0):
                cells = unfinished(args, seed, grid, method, pool, tasks)
                if cells:
                    with timed(args, seed, f"{method}, {grid.label or 'all experts'}, {len(cells)} tasks"):
                        evaluate(cells, model, encoder, pool, ResultsFolder(results, pool.fingerprint), config)
        except Timeout:
            continue


def pool_of(args: argparse.Namespace, seed: int, grid: Grid) -> Pool | None:
    """A grid's pool; None for a variant that was not trained."""
    folder = args.out / f"seed-{seed}" / (grid.variant or "") / "pool"
    if grid.variant is not None and not folder.exists():
        return None
    pool = Pool.open(folder)
    order = sample(pool.names, len(pool), seed=0)
    return pool if grid.experts is None else pool.subset(sorted(order[: grid.experts]))


class Tasks:
    """The tasks of suites; their files are read once for all methods."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._tasks: dict[tuple[str, tuple[str, ...]], list[SuiteTask]] = {}

    def limit(self, suite: str) -> int:
        """Most rows of each task."""
        return ROWS[suite] if self.args.rows is None else self.args.rows

    def of(self, suite: str, pool: Pool) -> list[SuiteTask]:
        """The requested tasks that have data."""
        key = suite, pool.names
        if key not in self._tasks:
            present, _ = with_data(load_tasks([suite], pool, data=self.args.data, limit=self.limit(suite)))
            self._tasks[key] = [task for task in present if not self.args.tasks or task.name in self.args.tasks]
        return self._tasks[key]


def unfinished(args: argparse.Namespace, seed: int, grid: Grid, method: str, pool: Pool, tasks: Tasks) -> list[Cell]:
    """A method's cells without a row."""
    folder = args.out / f"seed-{seed}"
    results = ResultsFolder(folder / grid.results, pool.fingerprint)
    methods = parse_methods([f"{MULTITASK}:{folder / MULTITASK}" if method == MULTITASK else method], pool)
    cells: list[Cell] = []
    for suite in grid.suites:
        settings = {"base": args.base, "dtype": args.dtype, "limit": tasks.limit(suite), "text": TEXT}
        cells += plan(tasks.of(suite, pool), methods, [seed], **settings)
    return [cell for cell in cells if results.find(cell.key) is None]


def record(args: argparse.Namespace, seed: int) -> None:
    """Record the routing of tasks, for `phatgoose analyse`."""
    folder = args.out / f"seed-{seed}"
    pool = Pool.open(folder / "pool")
    model, tokenizer = load_base(args.base, dtype=args.dtype), load_tokenizer(args.base)
    encoder = Encoder(tokenizer, model.config, TEXT)
    config = RecordingConfig(limit=args.recorded_rows, seed=seed, batch_tokens=args.batch_tokens // 2)
    tasks, _ = with_data(load_tasks(ALL, pool, data=args.data, limit=config.limit))
    tasks = [task for task in tasks if not args.tasks or task.name in args.tasks]
    wanted = [router for router in RECORDED if args.routers is None or router in args.routers]
    for method in parse_methods(wanted, pool):
        assert method.router is not None
        with timed(args, seed, f"record {method.name}"):
            routed = RoutedModel.from_pool(model, pool, tokenizer=tokenizer, **asdict(method.router))
            record_tasks(routed, encoder, tasks, method, config, folder / f"recording-{method.name}")
            routed.unwrap()
