"""Label oracles: methods that choose an expert by the evaluation's labels.

Both are made from the rows of single experts ("expert:NAME"). Neither can be
used on data without labels: they are upper bounds to compare with (paper section
4.2: Oracle takes the best expert of each dataset, Best Individual the one
expert with the best average over the benchmark).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from phatgoose.results.names import BEST_INDIVIDUAL, EXPERT, ORACLE, is_expert
from phatgoose.results.rows import Result

# method "expert:NAME" -> task -> its row
ExpertRows = Mapping[str, Mapping[str, Result]]


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """The expert that a label oracle chose.

    Attributes:
        suite, method, seed: the method's rows.
        task: the task; None if the choice holds for the whole suite.
        expert: name of the chosen expert.
        num_experts: number of candidates.
    """

    suite: str
    method: str
    seed: int
    task: str | None
    expert: str
    num_experts: int


Chosen = tuple[ExpertChoice, Sequence[Result]]


def label_oracles(results: Iterable[Result]) -> tuple[list[Result], list[ExpertChoice], list[str]]:
    """Oracle and Best Individual for each suite and seed that has rows of single experts.

    An expert without a row for a task cannot be chosen there (in leave-one-out,
    a dataset's own expert is masked). Candidates for Best Individual have all
    tasks of the suite. Ties go to the first expert by name.

    Returns:
        The oracles' rows, their choices, and notes on suites where some expert
        was not a candidate.
    """
    experts: dict[tuple[str, int], dict[str, dict[str, Result]]] = defaultdict(lambda: defaultdict(dict))
    present: dict[str, set[str]] = defaultdict(set)
    tasks: dict[str, set[str]] = defaultdict(set)
    for result in results:
        present[result.suite].add(result.method)
        tasks[result.suite].add(result.task)
        if is_expert(result.method):
            experts[result.suite, result.seed][result.method][result.task] = result
    rows: list[Result] = []
    choices: list[ExpertChoice] = []
    seeds: dict[str, list[str]] = defaultdict(list)
    for (suite, seed), own in sorted(experts.items()):
        chosen: list[Chosen] = []
        notes: list[str] = []
        if ORACLE not in present[suite]:
            chosen += _oracle(suite, seed, own, notes)
        if BEST_INDIVIDUAL not in present[suite]:
            chosen += _best_individual(suite, seed, own, tasks[suite], notes)
        for choice, cells in chosen:
            choices.append(choice)
            rows += [replace(cell, method=choice.method, config=None) for cell in cells]
        for note in notes:
            seeds[note].append(str(seed))
    return rows, choices, [f"{note} (seed {', '.join(numbers)})." for note, numbers in seeds.items()]


def _oracle(suite: str, seed: int, experts: ExpertRows, notes: list[str]) -> list[Chosen]:
    """The best expert of each task."""
    chosen: list[Chosen] = []
    for task in sorted(set().union(*experts.values())):
        candidates = {name: cells[task] for name, cells in sorted(experts.items()) if task in cells}
        best = max(candidates, key=lambda name: candidates[name].score)
        chosen.append((_choice(suite, ORACLE, seed, task, best, len(candidates)), [candidates[best]]))
    fewest = min(choice.num_experts for choice, _ in chosen)
    if fewest < len(experts):
        notes.append(f"{ORACLE} on {suite} had only {fewest} of {len(experts)} experts to choose from on some tasks")
    return chosen


def _best_individual(suite: str, seed: int, experts: ExpertRows, tasks: set[str], notes: list[str]) -> list[Chosen]:
    """The expert with the best average among those that have all tasks; nothing if there is none."""
    complete = {name: rows for name, rows in sorted(experts.items()) if rows.keys() == tasks}
    if not complete:
        notes.append(f"{BEST_INDIVIDUAL} on {suite} is missing: no expert has all its tasks")
        return []
    if len(complete) < len(experts):
        notes.append(
            f"{BEST_INDIVIDUAL} on {suite} was chosen among {len(complete)} of {len(experts)} experts:"
            " the others lack tasks"
        )
    averages = {name: np.mean([cell.score for cell in cells.values()]) for name, cells in complete.items()}
    best = max(averages, key=lambda name: averages[name])
    return [(_choice(suite, BEST_INDIVIDUAL, seed, None, best, len(averages)), list(complete[best].values()))]


def _choice(suite: str, method: str, seed: int, task: str | None, best: str, num_experts: int) -> ExpertChoice:
    expert = best.removeprefix(EXPERT)
    return ExpertChoice(suite=suite, method=method, seed=seed, task=task, expert=expert, num_experts=num_experts)
