"""Methods that read the evaluation's labels to choose: Oracle and Best Individual.

Both are made from the rows of single experts ("expert:NAME"). Neither can be
used on data without labels; they are bounds to compare with (paper section
4.2: Oracle takes the best expert of each dataset, Best Individual the one
expert with the best average over the benchmark).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from phatgoose.results.names import BEST_INDIVIDUAL, EXPERT, ORACLE, is_expert
from phatgoose.results.rows import Result


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which expert a method that reads labels took.

    Attributes:
        suite, method, seed: where.
        task: None if the choice holds for the whole suite.
        expert: its name.
        num_experts: among how many it was chosen.
    """

    suite: str
    method: str
    seed: int
    task: str | None
    expert: str
    num_experts: int


def label_readers(results: Iterable[Result]) -> tuple[list[Result], list[Choice], list[str]]:
    """Oracle and Best Individual for each suite and seed that has rows of single experts.

    An expert without a row for a task (a dataset's own expert is masked in
    leave-one-out) cannot be chosen there. Best Individual is only made of
    experts that have all tasks of the suite; of equally good experts, the
    first by name is taken.

    Returns:
        The new cells, what was chosen, and notes on suites where not every
        expert could be a candidate.
    """
    groups: dict[tuple[str, int], dict[str, dict[str, Result]]] = defaultdict(lambda: defaultdict(dict))
    present: dict[str, set[str]] = defaultdict(set)
    tasks: dict[str, set[str]] = defaultdict(set)
    for result in results:
        present[result.suite].add(result.method)
        tasks[result.suite].add(result.task)
        if is_expert(result.method):
            groups[result.suite, result.seed][result.method][result.task] = result
    cells: list[Result] = []
    choices: list[Choice] = []
    notes: dict[str, list[str]] = defaultdict(list)
    for (suite, seed), experts in sorted(groups.items()):
        made: list[tuple[Choice, Sequence[Result]]] = []
        if ORACLE not in present[suite]:
            made += [_oracle(suite, seed, task, experts) for task in sorted(set().union(*experts.values()))]
            fewest = min(choice.num_experts for choice, _ in made)
            if fewest < len(experts):
                note = f"{ORACLE} on {suite} had only {fewest} of {len(experts)} experts to choose from on some tasks"
                notes[note].append(str(seed))
        if BEST_INDIVIDUAL not in present[suite]:
            complete = {name: rows for name, rows in experts.items() if rows.keys() == tasks[suite]}
            if len(complete) < len(experts):
                note = f"{BEST_INDIVIDUAL} on {suite} is missing: no expert has all its tasks"
                if complete:
                    note = f"{BEST_INDIVIDUAL} on {suite} was chosen among {len(complete)} of {len(experts)} experts"
                    note += ": the others lack tasks"
                notes[note].append(str(seed))
            if complete:
                made.append(_best_individual(suite, seed, complete))
        for choice, chosen in made:
            choices.append(choice)
            cells += [replace(cell, method=choice.method, config=None) for cell in chosen]
    return cells, choices, [f"{note} (seed {', '.join(seeds)})." for note, seeds in notes.items()]


def _oracle(suite: str, seed: int, task: str, experts: dict[str, dict[str, Result]]) -> tuple[Choice, list[Result]]:
    candidates = {name: cells[task] for name, cells in sorted(experts.items()) if task in cells}
    best = max(candidates, key=lambda name: candidates[name].score)
    return _choice(suite, ORACLE, seed, task, best, len(candidates)), [candidates[best]]


def _best_individual(suite: str, seed: int, experts: dict[str, dict[str, Result]]) -> tuple[Choice, list[Result]]:
    averages = {name: np.mean([cell.score for cell in cells.values()]) for name, cells in sorted(experts.items())}
    best = max(averages, key=lambda name: averages[name])
    return _choice(suite, BEST_INDIVIDUAL, seed, None, best, len(averages)), list(experts[best].values())


def _choice(suite: str, method: str, seed: int, task: str | None, best: str, num_experts: int) -> Choice:
    expert = best.removeprefix(EXPERT)
    return Choice(suite=suite, method=method, seed=seed, task=task, expert=expert, num_experts=num_experts)
