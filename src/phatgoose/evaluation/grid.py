"""A grid of methods x tasks x seeds, evaluated into a results folder cell by cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from lm_eval import evaluator
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from phatgoose.config import EvaluationConfig, RouterConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import ConfigError, SuiteError
from phatgoose.evaluation.harness import RoutedLM
from phatgoose.evaluation.methods import MULTITASK, Method
from phatgoose.evaluation.suites.task import SCORE, SuiteTask
from phatgoose.experts.pool import Pool
from phatgoose.results.names import CHANCE, HELD_IN, LEAVE_ONE_OUT, OWN
from phatgoose.results.writer import PACKAGES, ResultsFolder
from phatgoose.routing.model import RoutedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A method on a task, with one seed.

    Attributes:
        task, method: the task and the method.
        seed: random seed of the router; it also distinguishes repetitions.
        key: the fields `CELL` and `SETTINGS` of the cell's row.
    """

    task: SuiteTask
    method: Method
    seed: int
    key: dict[str, Any]

    @property
    def router(self) -> RouterConfig | None:
        """Settings of the router; None for the base model alone."""
        return self.method.router_for(self.task.name)

    @property
    def masked(self) -> tuple[str, ...]:
        """Experts that are masked out of the pool."""
        whole_pool = self.router is not None and self.router.expert is None
        return (self.task.name,) if self.task.suite == LEAVE_ONE_OUT and whole_pool else ()


def plan(
    tasks: Sequence[SuiteTask],
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    base: str,
    dtype: str,
    limit: int | None,
    text: TextConfig,
) -> list[Cell]:
    """All cells of a grid. Reads the rows of its tasks, so that invalid data fails before anything runs.

    `own` is evaluated on held-in only. Leave-one-out has neither a dataset's own
    expert nor `multitask`, which was trained on all datasets.

    Args:
        tasks: tasks of any suites.
        methods: methods that were checked against the pool.
        seeds: one seed for each repetition.
        base: name of the base model.
        dtype: dtype of its weights.
        limit: the limit with which the tasks were made.
        text: settings with which requests become tokens.

    Raises:
        ConfigError: `own` without held-in.
        DataError, SuiteError: a task's rows cannot be read.
    """
    if any(method.name == OWN for method in methods) and all(task.suite != HELD_IN for task in tasks):
        raise ConfigError(f"method {OWN!r} is only for suite {HELD_IN}", fix=f"--suite {HELD_IN}, or leave it out")
    data = {id(task): task.fingerprint for task in tasks}
    return [
        Cell(
            task=task,
            method=method,
            seed=seed,
            key={
                "suite": task.suite,
                "task": task.name,
                "method": method.name,
                "seed": seed,
                "config": method.settings,
                "limit": limit,
                "base": base,
                "data": data[id(task)],
                "text": asdict(text),
                "dtype": dtype,
            },
        )
        for seed in seeds
        for method in methods
        for task in tasks
        if _exists(method, task)
    ]


def with_data(tasks: Sequence[SuiteTask]) -> tuple[list[SuiteTask], list[SuiteError]]:
    """The tasks that have data, and the errors of those that have none."""
    present, missing = [], []
    for task in tasks:
        try:
            task.rows  # noqa: B018
            present.append(task)
        except SuiteError as error:
            missing.append(error)
    return present, missing


def evaluate(
    cells: Sequence[Cell],
    model: PreTrainedModel,
    encoder: Encoder,
    pool: Pool,
    results: ResultsFolder,
    config: EvaluationConfig,
) -> None:
    """Evaluate cells, and write each as soon as it is finished.

    A method's tasks are batched together if they are scored in the same way. One
    progress bar is shown, on standard error.

    Args:
        cells: cells, in the order of their methods.
        model: the base model; it is restored afterwards.
        encoder: the encoder of the base model.
        pool: the pool of experts.
        results: the results folder to write to.
        config: sizes of batches and chunks.
    """
    results.folder.mkdir(parents=True, exist_ok=True)  # an unwritable folder fails before the work
    versions = {name: version(name) for name in PACKAGES}
    total = sum(cell.task.num_requests for cell in cells)
    with tqdm(total=total, unit="request", smoothing=0.05) as bar:
        for same_router in _runs(cells, lambda cell: (cell.seed, cell.method.name, cell.router)):
            first = same_router[0]
            if first.method.name == CHANCE:
                for cell in same_router:
                    _write(cell, [row.chance for row in cell.task.rows], 0.0, pool, results, versions)
                    bar.update(cell.task.num_requests)
                continue
            set_seed(first.seed)
            with _routed(model, encoder, first.method.other_pool or pool, first.router) as routed:
                lm = RoutedLM(
                    routed,
                    encoder,
                    batch_tokens=config.batch_tokens,
                    answer_tokens=config.answer_tokens,
                    on_batch=bar.update,
                    without={cell.task.task_name: cell.masked for cell in same_router},
                )
                # answers are never batched with choices, and take longer per request
                for alike in _runs(same_router, lambda cell: cell.task.is_written):
                    for chunk in _chunks(alike, config.chunk_requests):
                        bar.set_description(f"{first.method.name} on {chunk[0].task.task_name}")
                        _evaluate_chunk(chunk, lm, pool, results, versions)


def _exists(method: Method, task: SuiteTask) -> bool:
    if method.name == OWN:
        return task.suite == HELD_IN
    if task.suite != LEAVE_ONE_OUT:
        return True
    # neither multitask nor a dataset's own expert leaves the dataset out
    expert = None if method.router is None else method.router.expert
    return method.name != MULTITASK and expert != task.name


@contextmanager
def _routed(model: PreTrainedModel, encoder: Encoder, pool: Pool, router: RouterConfig | None) -> Iterator[Any]:
    if router is None:
        yield model
        return
    routed = RoutedModel.from_pool(model, pool, tokenizer=encoder.tokenizer, **asdict(router))
    try:
        yield routed
    finally:
        routed.unwrap()


def _evaluate_chunk(
    cells: Sequence[Cell], lm: RoutedLM, pool: Pool, results: ResultsFolder, versions: dict[str, str]
) -> None:
    start = time.monotonic()
    tasks = {cell.task.task_name: cell.task for cell in cells}
    report = evaluator.evaluate(lm, {"tasks": tasks}, bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - start
    requests = sum(cell.task.num_requests for cell in cells)
    for cell in cells:
        samples = sorted(report["samples"][cell.task.task_name], key=lambda sample: sample["doc_id"])
        scores = [float(sample[SCORE]) for sample in samples]
        _write(cell, scores, seconds * cell.task.num_requests / requests, pool, results, versions)


def _write(
    cell: Cell, scores: Sequence[float], seconds: float, pool: Pool, results: ResultsFolder, versions: dict[str, str]
) -> None:
    results.append(
        cell.key,
        {
            "metric": cell.task.measure,
            "score": sum(scores) / len(scores),
            "num_rows": len(scores),
            "pool_name": pool.folder.resolve().name,
            "versions": versions,
            "seconds": round(seconds, 3),
        },
        [row.example_id for row in cell.task.rows],
        list(scores),
    )


def _runs(cells: Sequence[Cell], key: Callable[[Cell], Any]) -> list[list[Cell]]:
    """Group cells by key, in the order of their first cells."""
    runs: dict[Any, list[Cell]] = {}
    for cell in cells:
        runs.setdefault(key(cell), []).append(cell)
    return list(runs.values())


def _chunks(cells: Sequence[Cell], requests: int) -> Iterator[list[Cell]]:
    chunk: list[Cell] = []
    for cell in cells:
        chunk.append(cell)
        if sum(one.task.num_requests for one in chunk) >= requests:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
