"""Training many experts on many machines: one Ray task for each group of experts.

Ray places the tasks, and restarts one whose worker or machine is lost. Everything
else goes through the folder of the experts, which all machines share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from phatgoose import __version__
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, GateConfig, RayConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import PhatgooseError
from phatgoose.models.base import empty_base, load_tokenizer
from phatgoose.training.cluster.ray_cluster import connected, import_ray, run_tasks
from phatgoose.training.cluster.task import NOTES, GroupTask
from phatgoose.training.group.jobs import TrainingJob, has_adapter, has_own_gate, read_jobs
from phatgoose.training.group.plan import group_label, is_interrupted, training_groups
from phatgoose.training.run import ADAPTER_WORK, GATE_WORK


def train_on_ray(
    files: Sequence[Path],
    out: Path,
    base: str,
    revision: str | None = None,
    *,
    config: AdapterTrainingConfig | None = None,
    gate_config: GateConfig | None = None,
    gates: bool = True,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    split: str = "train",
    validation_split: str | None = None,
    device: str | None = None,
    cluster: RayConfig | None = None,
    progress: bool = True,
) -> list[Path]:
    """Train an adapter and a gate for each data file on a Ray cluster; see `train_adapters` and `train_gates`.

    Groups and results are those of a single machine, except for rounding that differs
    between machines. Finished experts are skipped. A group whose machine is lost
    resumes from its last checkpoint on another machine, and interrupted groups resume
    when the call is repeated.

    Every machine needs the same version of this package, and must see `files`, `out`
    and, if it is a folder, `base` at the same paths. If this process is connected to a
    cluster already, that cluster is used.

    Args:
        files: a .jsonl or .jsonl.gz file for each expert, which is named after it.
        out: folder in which each expert gets its folder, and `.ray` a log for each group.
        base: name of the base model, which each task loads (`load_base`).
        revision: revision of the base model's hub repository.
        config: settings of the adapters; the base model's weights have its dtype.
        gate_config: settings of the gates.
        gates: whether to train gates.
        text: how examples become tokens.
        batching: how many experts train at once.
        save_dtype: dtype of the saved tensors.
        split: split of the rows to train on.
        validation_split: split of the rows to choose adapters' checkpoints by; None for none.
        device: device of the base model; None for a GPU if the task has one.
        cluster: address of the cluster, and resources that each group takes.
        progress: whether to show a bar, and a line for each group that ends.

    Returns:
        Each expert's folder, in the order of `files`.

    Raises:
        ConfigError: Ray is not installed, a setting is invalid, or `out` holds an
            unfinished run with other settings.
        ClusterError: the cluster cannot be reached, no machine has what a group
            takes, a machine does not share `out`, or a group was lost too often.
        PhatgooseError: whatever else training raises, after the other groups have
            finished; the common subclass if all errors have one.
    """
    ray = import_ray()
    cluster = cluster or RayConfig()
    template = GroupTask(
        files=tuple(file.absolute() for file in files),
        out=out.absolute(),
        cwd=Path.cwd(),
        marker="",
        version=__version__,
        base=base,
        revision=revision,
        device=device,
        split=split,
        validation_split=validation_split,
        config=config or AdapterTrainingConfig(),
        gate_config=(gate_config or GateConfig()) if gates else None,
        text=text or TextConfig(),
        batching=batching or BatchingConfig(),
        save_dtype=save_dtype,
        lock_timeout_s=cluster.lock_timeout_s,
    )
    jobs = read_jobs(template.files, template.out, split, validation_split)
    file_of = {job.name: file for job, file in zip(jobs, template.files, strict=True)}
    groups = pending_groups(jobs, template)
    if groups:
        with _marked(template.out) as marker, connected(ray, cluster.address):
            tasks = {
                group_label(group, i, len(groups)): replace(
                    template, marker=marker, files=tuple(file_of[job.name] for job in group)
                )
                for i, group in enumerate(groups, start=1)
            }
            _raise(run_tasks(ray, tasks, cluster, progress=progress))
    return [out / job.name for job in jobs]


def pending_groups(jobs: Sequence[TrainingJob], task: GroupTask) -> list[list[TrainingJob]]:
    """The groups that are not finished, the same as on a single machine; interrupted ones come first.

    Args:
        jobs: all jobs of the call.
        task: settings that all tasks share.

    Raises:
        ConfigError: an interrupted group has an expert that is not in `jobs`.
        AdapterError: a job's folder holds something else.
        BaseModelError: there is no such base model.
    """
    encoder = Encoder(load_tokenizer(task.base, task.revision), empty_base(task.base, task.revision).config, task.text)
    adapters = [has_adapter(job) for job in jobs]
    groups = training_groups(jobs, adapters, encoder, task.batching, task.config.batch_size, ADAPTER_WORK)
    if task.gate_config is not None:  # a task that trains adapters trains their gates as well
        taken = {job.name for group in groups for job in group}
        rest = [job for job in jobs if job.name not in taken]
        finished = [has_own_gate(job) for job in rest]
        groups += training_groups(rest, finished, encoder, task.batching, task.gate_config.batch_size, GATE_WORK)
    groups.sort(key=lambda group: not (is_interrupted(group, ADAPTER_WORK) or is_interrupted(group, GATE_WORK)))
    return groups


@contextmanager
def _marked(out: Path) -> Iterator[str]:
    """Name of a new file in `out`/NOTES: a machine that sees the file shares the folder."""
    notes = out / NOTES
    notes.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="driver-", dir=notes) as file:
        yield Path(file.name).name


def _raise(failures: Sequence[Exception]) -> None:
    """Raise the errors of the groups, if there are any, as one error."""
    of_users = [failure for failure in failures if isinstance(failure, PhatgooseError)]
    for failure in failures:
        if not isinstance(failure, PhatgooseError):
            raise failure
    texts = list(dict.fromkeys(map(str, of_users)))
    if len(texts) == 1:
        raise of_users[0]
    if texts:
        kinds = {type(failure) for failure in of_users}
        kind = kinds.pop() if len(kinds) == 1 else PhatgooseError
        raise kind("\n".join(texts))
