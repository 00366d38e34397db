"""A comparison as tables, and the tables as Markdown.

Scores and limits are in percent, differences in percentage points.
"""

from __future__ import annotations

from collections.abc import Iterable

from phatgoose.report.tables import MINUS, NOTHING, Table, TableCell, escape_markdown, markdown_lines, percent
from phatgoose.results.bootstrap import Interval
from phatgoose.results.comparison import Comparison
from phatgoose.results.suite_comparison import TIE, Average, Difference, SuiteComparison

BOUND, LACKS = "‡", "†"


def limits(interval: Interval | None) -> str:
    """Both limits in percent; a limit that rounds to zero keeps its sign, which tells its side of zero."""
    if interval is None:
        return NOTHING
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]".replace("-", MINUS)


def marked(method: str, average: Average | None) -> str:
    """A method's name, followed by the marks that the notes explain."""
    if average is None:
        return method
    return method + (f" {BOUND}" if average.uses_labels else "") + (f" {LACKS}" if average.missing else "")


def main_table(comparison: Comparison) -> Table:
    """Macro averages: methods × suites."""
    rows = []
    for number, method in enumerate(comparison.methods, 1):
        averages = [suite.averages.get(method) for suite in comparison.suites]
        # a method that uses labels does so on every suite; tasks may be lacking on one of them only
        bound = any(average is not None and average.uses_labels for average in averages)
        row = [TableCell(str(number)), TableCell(f"{method} {BOUND}" if bound else method)]
        for suite, average in zip(comparison.suites, averages, strict=True):
            row.append(TableCell(_main(suite, average), bold=method in suite.best))
        rows.append(row)
    config = comparison.bootstrap
    notes = [
        f"Macro averages in percent, with {_confidence(config.confidence)} intervals over examples"
        f" (other examples of the same tasks; {config.num_resamples:,} resamples). Bold: the best of the methods that"
        " use no labels and have all tasks.",
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
            TableCell(marked(method, average), bold=method in suite.best),
            TableCell(percent(average.score), bold=method in suite.best),
            TableCell(limits(average.over_examples)),
            TableCell(limits(average.over_tasks)),
            TableCell(_of(average.num_tasks, len(suite.tasks))),
            *([TableCell(str(len(average.seeds))), TableCell(_sd(average.seed_sd))] if several else []),
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
        "In percentage points, on the tasks that both have. Bold: the interval excludes zero; with many intervals,"
        " some do so by chance.",
        *([_SD] if several else []),
    ]
    title = f"{suite.suite}: difference from {comparison.against}"
    numeric = [False, *[True] * (len(head) - 1)]
    return Table(title=title, head=head, numeric=numeric, rows=rows, notes=notes, split_from=1)


def _difference(suite: SuiteComparison, method: str, difference: Difference, several: bool) -> list[TableCell]:
    return [
        TableCell(marked(method, suite.averages[method])),
        TableCell(percent(difference.score, sign=True)),
        *(
            TableCell(limits(interval), bold=interval is not None and interval.excludes_zero())
            for interval in (difference.over_examples, difference.over_tasks)
        ),
        TableCell(f"{difference.wins}/{difference.losses}/{difference.ties}"),
        TableCell(_of(difference.num_tasks, len(suite.tasks))),
        *([TableCell(_sd(difference.seed_sd))] if several else []),
    ]


def _scores(comparison: Comparison, suite: SuiteComparison) -> Table:
    methods = [method for method in comparison.methods if method in suite.scores]
    rows = []
    for task, metric in suite.tasks.items():
        usable = [
            suite.scores[method][task]
            for method in methods
            if task in suite.scores[method] and not suite.averages[method].uses_labels
        ]
        row = [TableCell(task), TableCell(metric)]
        for method in methods:
            score = suite.scores[method].get(task)
            best = score is not None and not suite.averages[method].uses_labels and score > max(usable) - TIE
            row.append(TableCell(NOTHING if score is None else percent(score), bold=best))
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
    if any(average.uses_labels for average in averages):
        notes.append(
            f"{BOUND} uses the evaluation's labels, or knows the dataset: an upper bound, not a usable method."
        )
    if any(average.missing for average in averages):
        notes.append(f"{LACKS} lacks tasks of the suite: its average is over other tasks than the averages beside it.")
    return notes


def _at_chance(suite: SuiteComparison) -> list[str]:
    """A sentence about the tasks on which no method is above chance."""
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
    """All tables in GitHub's Markdown."""
    lines = [
        "# Comparison",
        "",
        escape_markdown(f"Base model: {', '.join(comparison.bases)}. Pool: {', '.join(comparison.pools)}."),
    ]
    for table in all_tables(comparison):
        lines += ["", *markdown_lines(table)]
    return "\n".join(lines) + "\n"
