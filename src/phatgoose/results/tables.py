"""A comparison as tables, and the tables as Markdown.

Scores and limits are in per cent, differences in points of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from phatgoose.report.tables import MINUS, NOTHING, Entry, Table, percent, plain_text, table_lines
from phatgoose.results.bootstrap import Interval
from phatgoose.results.comparison import TIE, Average, Comparison, Difference, SuiteComparison

TOLD, LACKS = "‡", "†"


def limits(interval: Interval | None) -> str:
    """Both limits in per cent; one that rounds to zero keeps its sign, which says on which side of zero it lies."""
    if interval is None:
        return NOTHING
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]".replace("-", MINUS)


def marked(method: str, average: Average | None) -> str:
    """A method's name with the marks that the notes explain."""
    if average is None:
        return method
    return method + (f" {TOLD}" if average.told else "") + (f" {LACKS}" if average.missing else "")


def main_table(comparison: Comparison) -> Table:
    """Methods × suites: macro averages."""
    rows = []
    for number, method in enumerate(comparison.methods, 1):
        averages = [suite.averages.get(method) for suite in comparison.suites]
        # told on one suite is told on all; what is lacking stands in the suite's own place
        told = any(average is not None and average.told for average in averages)
        row = [Entry(str(number)), Entry(f"{method} {TOLD}" if told else method)]
        for suite, average in zip(comparison.suites, averages, strict=True):
            row.append(Entry(_main(suite, average), bold=method in suite.best))
        rows.append(row)
    config = comparison.bootstrap
    notes = [
        f"Macro averages in per cent, with {_confidence(config.confidence)} intervals over examples"
        f" (other examples of the same tasks; {config.num_resamples:,} resamples). Bold: the best of the methods that"
        " can be used and have all tasks.",
        *_marks(comparison.suites),
        *comparison.notes,
    ]
    head = ["#", "method", *(f"{suite.suite} ({_tasks(len(suite.tasks))})" for suite in comparison.suites)]
    numeric = [True, False, *[True] * (len(head) - 2)]
    return Table(title="Averages", head=head, numeric=numeric, rows=rows, notes=notes, split_from=2)


def suite_tables(comparison: Comparison, suite: SuiteComparison) -> list[Table]:
    """Averages, differences from the reference, and the scores of each task."""
    tables = [_averages(suite), _differences(comparison, suite), _scores(comparison, suite)]
    return [table for table in tables if table.rows]


def all_tables(comparison: Comparison) -> list[Table]:
    """The main table, then those of each suite."""
    return [
        main_table(comparison),
        *(table for suite in comparison.suites for table in suite_tables(comparison, suite)),
    ]


def _averages(suite: SuiteComparison) -> Table:
    several = any(len(average.seeds) > 1 for average in suite.averages.values())
    rows = [
        [
            Entry(marked(method, average), bold=method in suite.best),
            Entry(percent(average.score), bold=method in suite.best),
            Entry(limits(average.over_examples)),
            Entry(limits(average.over_tasks)),
            Entry(_of(average.num_tasks, len(suite.tasks))),
            *([Entry(str(len(average.seeds))), Entry(_sd(average.seed_sd))] if several else []),
        ]
        for method, average in suite.averages.items()
    ]
    head = ["method", "average", "over examples", "over tasks", "tasks", *(["seeds", "sd"] if several else [])]
    return Table(
        title=f"{suite.suite}: averages",
        head=head,
        numeric=[False, *[True] * (len(head) - 1)],
        rows=rows,
        notes=[*_marks([suite]), *([_SD] if several else [])],
        split_from=1,
    )


_SD = "sd: standard deviation between seeds, on the tasks that have all of them."


def _differences(comparison: Comparison, suite: SuiteComparison) -> Table:
    several = any(difference.seed_sd is not None for difference in suite.differences.values())
    order = [method for method in suite.averages if method in suite.differences]
    rows = [_difference(suite, method, suite.differences[method], several) for method in order]
    head = [
        "method",
        "difference",
        "over examples",
        "over tasks",
        "won/lost/tied",
        "tasks",
        *(["sd"] if several else []),
    ]
    notes = [
        "In points of per cent, on the tasks that both have. Bold: the interval leaves out zero; with many intervals,"
        " some do so by chance.",
        *([_SD] if several else []),
    ]
    title = f"{suite.suite}: difference from {comparison.against}"
    numeric = [False, *[True] * (len(head) - 1)]
    return Table(title=title, head=head, numeric=numeric, rows=rows, notes=notes, split_from=1)


def _difference(suite: SuiteComparison, method: str, difference: Difference, several: bool) -> list[Entry]:
    return [
        Entry(marked(method, suite.averages[method])),
        Entry(percent(difference.score, sign=True)),
        *(
            Entry(limits(interval), bold=interval is not None and interval.excludes_zero())
            for interval in (difference.over_examples, difference.over_tasks)
        ),
        Entry(f"{difference.wins}/{difference.losses}/{difference.ties}"),
        Entry(_of(difference.num_tasks, len(suite.tasks))),
        *([Entry(_sd(difference.seed_sd))] if several else []),
    ]


def _scores(comparison: Comparison, suite: SuiteComparison) -> Table:
    methods = [method for method in comparison.methods if method in suite.scores]
    rows = []
    for task, metric in suite.tasks.items():
        usable = [
            suite.scores[method][task]
            for method in methods
            if task in suite.scores[method] and not suite.averages[method].told
        ]
        row = [Entry(task), Entry(metric)]
        for method in methods:
            score = suite.scores[method].get(task)
            best = score is not None and not suite.averages[method].told and score > max(usable) - TIE
            row.append(Entry(NOTHING if score is None else percent(score), bold=best))
        rows.append(row)
    head = ["task", "metric", *(marked(method, suite.averages[method]) for method in methods)]
    short = [marked(str(comparison.methods.index(method) + 1), suite.averages[method]) for method in methods]
    return Table(
        title=f"{suite.suite}: tasks",
        head=head,
        numeric=[False, False, *[True] * len(methods)],
        rows=rows,
        notes=[*_marks([suite]), *_at_chance(suite)],
        split_from=2,
        short_head=[*head[:2], *short],
    )


def _main(suite: SuiteComparison, average: Average | None) -> str:
    if average is None:
        return NOTHING
    text = percent(average.score)
    if average.over_examples is not None:
        text += f" {limits(average.over_examples)}"
    return f"{text} {LACKS} {average.num_tasks} of {len(suite.tasks)}" if average.missing else text


def _marks(suites: Iterable[SuiteComparison]) -> list[str]:
    averages = [average for suite in suites for average in suite.averages.values()]
    notes = []
    if any(average.told for average in averages):
        notes.append(f"{TOLD} uses the evaluation's labels, or is told the dataset: a bound, not a method to use.")
    if any(average.missing for average in averages):
        notes.append(f"{LACKS} lacks tasks of the suite: its average stands on other tasks than those beside it.")
    return notes


def _at_chance(suite: SuiteComparison) -> list[str]:
    """A sentence about tasks that are too hard for all."""
    if not suite.at_chance:
        return []
    names = ", ".join(suite.at_chance)
    return [f"No method's interval is above chance on {_of(len(suite.at_chance), len(suite.tasks))} tasks: {names}."]


def _of(number: int, all_of: int) -> str:
    return str(number) if number == all_of else f"{number} of {all_of}"


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number} tasks"


def _sd(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _confidence(share: float) -> str:
    return f"{100 * share:g} %"


def markdown(comparison: Comparison) -> str:
    """All tables as GitHub reads them."""
    lines = [
        "# Comparison",
        "",
        f"Base model: {plain_text(', '.join(comparison.bases))}. Pool: {plain_text(', '.join(comparison.pools))}.",
    ]
    for table in all_tables(comparison):
        lines += ["", *table_lines(table)]
    return "\n".join(lines) + "\n"
