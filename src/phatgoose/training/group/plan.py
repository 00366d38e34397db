"""Which experts train together."""

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

_SAMPLED = 200  # examples whose lengths stand for all


def training_groups(
    jobs: Sequence[TrainingJob],
    finished: Sequence[bool],
    encoder: Encoder,
    batching: BatchingConfig,
    batch_size: int,
    suffix: str,
) -> list[list[TrainingJob]]:
    """Put the experts that are not finished into groups with rows of like length.

    A group that was interrupted comes first, as it was: its checkpoint is of all of them.
    The work folders of groups that are finished, or half deleted, are deleted.

    Args:
        jobs: all of them.
        finished: which have their result already.
        encoder: of the base model.
        batching: how large a group may be.
        batch_size: rows of each expert in a batch.
        suffix: of the work folders' names.

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
    lengths = {job.name: _lengths(job, encoder) for job in rest}
    # a batch is as long as its longest row, which a tenth of the rows nearly reach
    rest.sort(key=lambda job: (float(np.quantile(lengths[job.name], 0.9)), job.name))
    if batching.positions_at_once is None:
        num_groups = -(-len(rest) // batching.experts_at_once)
        # of like size too, so that no group is left with a few experts
        bounds = [len(rest) * i // max(1, num_groups) for i in range(num_groups + 1)]
        return groups + [rest[start:end] for start, end in pairwise(bounds)]
    found: list[list[TrainingJob]] = []
    for job in rest:
        wider = [*found[-1], job] if found else [job]
        positions = len(wider) * batch_size * max(max(lengths[one.name]) for one in wider)
        if found and len(wider) <= batching.experts_at_once and positions <= batching.positions_at_once:
            found[-1] = wider
        else:
            found.append([job])
    return groups + found


def group_label(group: Sequence[TrainingJob], number: int, total: int) -> str:
    """How progress calls a group, the `number`th of `total`."""
    names = [job.name for job in group]
    listed = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"{number} of {total}: {listed}"


def is_interrupted(group: Sequence[TrainingJob], suffix: str) -> bool:
    """Whether a run of a group, which its first expert leads, was begun and is not finished."""
    return (group[0].work(suffix) / RUN_FILE).is_file()


def _sweep(jobs: Sequence[TrainingJob], finished: Sequence[bool], suffix: str) -> None:
    """Delete what a run that was killed at its very end has left."""
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
    """The group that `lead` led when it was interrupted; empty if it led none."""
    path = lead.work(suffix) / RUN_FILE
    if not path.is_file():
        return []
    by_name = {job.name: job for job in jobs}
    names = json.loads(path.read_text(encoding="utf-8")).get("experts")
    if names is None and is_finished:  # it was trained alone, and only its checkpoints were not yet removed
        return []
    missing = sorted(set(names or {}) - by_name.keys())
    if names is None or missing:
        raise ConfigError(
            f"{path.parent} holds an unfinished run of other experts",
            found=f"with {missing[0]}" if missing else f"{lead.name} alone",
            expected=f"only some of: {', '.join(sorted(by_name))}",
            fix=f"finish it with the command that began it, or delete {path.parent} to begin anew",
        )
    return [by_name[name] for name in names]


def _lengths(job: TrainingJob, encoder: Encoder) -> list[int]:
    """Lengths of a sample of an expert's rows."""
    step = max(1, len(job.examples) // _SAMPLED)
    return [len(row["input_ids"]) for row in encoder.encode_all(job.examples[::step])]
