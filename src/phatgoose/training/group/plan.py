"""The plan: which experts train together, and in which order the groups train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from phatgoose.config import BatchingConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import ConfigError
from phatgoose.training.group.jobs import TrainingJob
from phatgoose.training.run import RUN_FILE

_SAMPLED = 200  # examples of an expert whose lengths are measured


def training_groups(
    jobs: Sequence[TrainingJob],
    finished: Sequence[bool],
    encoder: Encoder,
    batching: BatchingConfig,
    batch_size: int,
    suffix: str,
) -> list[list[TrainingJob]]:
    """Put the experts that are not finished into groups whose rows have similar lengths.

    Interrupted groups come first and stay as they were, because one checkpoint covers all
    experts of a group. Work folders of finished groups, whole or half deleted, are deleted.

    Args:
        jobs: all jobs of the call.
        finished: for each job, whether its result is in place.
        encoder: the base model's encoder.
        batching: how large a group may be.
        batch_size: rows of each expert in a batch.
        suffix: suffix of the work folders' names.

    Raises:
        ConfigError: an interrupted group has an expert that is not in `jobs`.
    """
    _sweep(jobs, finished, suffix)
    groups = [
        group
        for job, is_finished in zip(jobs, finished, strict=True)
        if (group := _interrupted(job, is_finished, jobs, suffix))
    ]
    taken = [job for group in groups for job in group]
    rest = [job for job, is_finished in zip(jobs, finished, strict=True) if not is_finished and job not in taken]
    return groups + _new_groups(rest, encoder, batching, batch_size)


def group_label(group: Sequence[TrainingJob], number: int, total: int) -> str:
    """Name of a group in progress bars: "2 of 5: boolq, rte and 4 more"."""
    names = [job.name for job in group]
    listed = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"{number} of {total}: {listed}"


def is_interrupted(group: Sequence[TrainingJob], suffix: str) -> bool:
    """Whether a run of this group, whose first expert leads it, was begun and not finished."""
    return (group[0].work(suffix) / RUN_FILE).is_file()


def _new_groups(
    jobs: list[TrainingJob], encoder: Encoder, batching: BatchingConfig, batch_size: int
) -> list[list[TrainingJob]]:
    lengths = {job.name: _lengths(job, encoder) for job in jobs}
    # A batch is as long as its longest row; about a tenth of an expert's rows come close to that
    ordered = sorted(jobs, key=lambda job: (float(np.quantile(lengths[job.name], 0.9)), job.name))
    if batching.positions_at_once is None:
        num_groups = -(-len(ordered) // batching.experts_at_once)
        # Groups of similar size, so that none is left with a few experts
        bounds = [len(ordered) * i // max(1, num_groups) for i in range(num_groups + 1)]
        return [ordered[start:end] for start, end in pairwise(bounds)]
    groups: list[list[TrainingJob]] = []
    for job in ordered:
        wider = [*groups[-1], job] if groups else [job]
        positions = len(wider) * batch_size * max(max(lengths[one.name]) for one in wider)
        if groups and len(wider) <= batching.experts_at_once and positions <= batching.positions_at_once:
            groups[-1] = wider
        else:
            groups.append([job])
    return groups


def _sweep(jobs: Sequence[TrainingJob], finished: Sequence[bool], suffix: str) -> None:
    """Delete work folders of runs that were killed after their results were in place."""
    done = {job.name for job, is_finished in zip(jobs, finished, strict=True) if is_finished}
    for job in jobs:
        work = job.work(suffix)
        path = work / RUN_FILE
        if not work.is_dir():
            continue
        names = json.loads(path.read_text(encoding="utf-8")).get("experts") if path.is_file() else {}
        if names is not None and set(names) <= done:
            shutil.rmtree(work)


def _interrupted(lead: TrainingJob, is_finished: bool, jobs: Sequence[TrainingJob], suffix: str) -> list[TrainingJob]:
    """The interrupted group that `lead` leads; empty if there is none."""
    path = lead.work(suffix) / RUN_FILE
    if not path.is_file():
        return []
    by_name = {job.name: job for job in jobs}
    names = json.loads(path.read_text(encoding="utf-8")).get("experts")
    if names is None and is_finished:  # trained alone, and killed before its checkpoints were deleted
        return []
    missing = sorted(set(names or {}) - by_name.keys())
    if names is None or missing:
        raise ConfigError(
            f"{path.parent} holds an unfinished run of other experts",
            found=f"with {missing[0]}" if missing else f"{lead.name} alone",
            expected=f"only some of: {', '.join(sorted(by_name))}",
            fix=f"finish it with the command that began it, or delete {path.parent} to start over",
        )
    return [by_name[name] for name in names]


def _lengths(job: TrainingJob, encoder: Encoder) -> list[int]:
    """Lengths of evenly spaced rows of an expert."""
    step = max(1, len(job.examples) // _SAMPLED)
    return [len(row["input_ids"]) for row in encoder.encode_all(job.examples[::step])]
