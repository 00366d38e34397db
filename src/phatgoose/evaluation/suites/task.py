"""A task of a suite, as a task of lm-eval.

Its requests have two types of their own, which `phatgoose.evaluation.harness` answers:

    target_loss  (input, target)           mean loss per token of the target (nats), EOS included
    answer       (input, max_new_tokens)   a greedy answer, as text

lm-eval's `loglikelihood` does not return the number of tokens, and its
`generate_until` stops at strings, not at EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from phatgoose.errors import DataError, SuiteError
from phatgoose.evaluation.suites import datasets as hub
from phatgoose.evaluation.suites.metrics import MEASURES, answer_score, rank_classification
from phatgoose.evaluation.suites.rows import TaskRow, fingerprint, read_bigbench, read_rendered, sample

# name of every metric in lm-eval's tables
SCORE = "score"


class SuiteTask(Task):
    """A zero-shot task of the paper.

    Args:
        config: lm-eval's task configuration, with lm-eval's own fields for a
            dataset on the hub. Its `metadata` has: `suite`; `metric` (see
            `metrics`); `file`, the task's file in the data folder; `templates`,
            the file of T0's templates; `how_to_get`, where to get the file if
            the dataset is not on the hub. And from the user: `data`, the data
            folder (None to read from the hub); `limit`, most rows, a seeded
            sample.
    """

    VERSION = 1

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Task.__init__ is not called: it would download a dataset, and take the configuration for a task's name
        self._instances: list[Instance] | None = None
        self._config = TaskConfig(**{name: value for name, value in config.items() if name != "class"})
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]
        self.metadata: Mapping[str, Any] = self._config.metadata or {}

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return str(self.metadata["suite"])

    @property
    def name(self) -> str:
        """Name of the task within the suite."""
        return self.task_name.removeprefix(f"{self.suite}_")

    @property
    def metric(self) -> str:
        """Name of the metric, a key of `metrics.MEASURES`."""
        return str(self.metadata["metric"])

    @property
    def measure(self) -> str:
        """Name of the mean over the rows."""
        return MEASURES[self.metric]

    @property
    def is_written(self) -> bool:
        """Whether answers are written rather than chosen."""
        return not self.metric.startswith("multiple_choice")

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer."""
        return int((self._config.generation_kwargs or {})["max_gen_toks"])

    @cached_property
    def rows(self) -> list[TaskRow]:
        """The rows to evaluate.

        Raises:
            DataError, SuiteError: they cannot be read.
        """
        rows = list(self._all_rows())
        if not rows:
            raise DataError(f"task {self.task_name} has no rows", expected="at least one")
        return sample(rows, self.metadata.get("limit"))

    @property
    def num_requests(self) -> int:
        """Number of requests of all rows."""
        return sum(len(row.choices or ("an answer",)) for row in self.rows)

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows to evaluate."""
        return fingerprint(self.rows)

    def _all_rows(self) -> Sequence[TaskRow]:
        if self.metadata.get("data") is not None:
            return self._file_rows(self._file(Path(self.metadata["data"])))
        if self._config.dataset_path is None:
            raise self._missing("no dataset on a hub", "--data DIR with that file")
        return self._hub_rows()

    def _file(self, data: Path) -> Path:
        path = data / self.metadata["file"]
        if not path.is_file():
            fix = "leave --data out to read " + str(self._config.dataset_path) + " from the hub, or make the file"
            raise self._missing(f"no {path}", fix if self._config.dataset_path else "make the file")
        return path

    def _missing(self, found: str, fix: str) -> SuiteError:
        how = self.metadata.get("how_to_get")
        return SuiteError(
            f"task {self.task_name} has no data",
            found=found,
            expected=f"{self.metadata['file']} in the data folder" + (f": {how}" if how else ""),
            fix=f"{fix}; phatgoose eval --skip-missing skips the task",
        )

    def _file_rows(self, path: Path) -> Sequence[TaskRow]:
        if self.suite == "t0ho":
            return list(read_rendered(path))
        return list(read_bigbench(path, self.metric))

    def _hub_rows(self) -> Sequence[TaskRow]:
        config = self._config
        records = hub.read_dataset(config.dataset_path, config.dataset_name, config.validation_split)
        if "templates" in self.metadata:
            return list(hub.templated_rows(self.name, records, self.metadata["templates"]))
        if config.dataset_path == "lukaemon/bbh":
            return list(hub.bbh_rows(self.name, records, config.doc_to_choice))
        return list(hub.bigbench_rows(self.name, records, self.metric))

    # lm-eval's interface of a task

    def has_training_docs(self) -> bool:
        """No."""
        return False

    def has_validation_docs(self) -> bool:
        """Yes."""
        return True

    def has_test_docs(self) -> bool:
        """No."""
        return False

    def validation_docs(self) -> list[dict[str, Any]]:
        """The rows, as dicts."""
        return [asdict(row) for row in self.rows]

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The input."""
        return str(doc["input"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> list[str]:
        """The right answers."""
        return list(doc["targets"])

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        """Build the requests of all rows, of the first `limit`, or of those with the indices in `samples`.

        Raises:
            SuiteError: few-shot examples, a system prompt or a chat template are requested.
        """
        asked = {"num_fewshot": self._config.num_fewshot, **options}
        unsupported = [name for name in ("num_fewshot", "system_instruction", "apply_chat_template") if asked.get(name)]
        if unsupported:
            raise SuiteError(
                f"task {self.task_name} is zero-shot, without a chat template",
                found=", ".join(f"{name}: {asked[name]}" for name in unsupported),
                fix="leave these options out",
            )
        docs = self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size)
        self._instances = [
            request
            for number, doc in docs
            for request in self.construct_requests(doc, doc["input"], metadata=(self.task_name, number, 1))
        ]

    def construct_requests(
        self, doc: Mapping[str, Any], ctx: str, *, metadata: tuple[str | None, int | None, int | None], **kwargs: Any
    ) -> list[Instance]:
        """One `target_loss` request per choice, or one `answer` request."""
        requests: list[tuple[str, tuple[Any, ...]]]
        if doc["choices"] is None:
            requests = [("answer", (ctx, self.max_new_tokens))]
        else:
            requests = [("target_loss", (ctx, choice)) for choice in doc["choices"]]
        return [
            Instance(request_type=kind, doc=doc, arguments=arguments, idx=i, metadata=metadata)
            for i, (kind, arguments) in enumerate(requests)
        ]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        """The row's score, from 0 to 1."""
        if doc["choices"] is not None:
            return {SCORE: rank_classification(doc["choices"], results, doc["targets"])}
        return {SCORE: answer_score(self.metric, results[0], doc["targets"])}

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        """The mean over the rows."""
        return {SCORE: mean}

    def higher_is_better(self) -> dict[str, bool]:
        """Yes."""
        return {SCORE: True}
