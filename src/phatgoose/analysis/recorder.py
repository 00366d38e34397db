"""Records the routing of tasks: means over rows of means over a row's tokens.

A row is read as in training: its input, then its first right target by teacher
forcing. The end of the target is left out, because the model never reads it.
Nothing is generated, so all routers see the same tokens.

Tokens have equal weight within a row, and rows within a task; otherwise a few
long rows would dominate a task.

Axes: B rows, S positions, E experts, M sites, V values (E weights and two
entropies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from phatgoose.analysis.recording import RecordingHeader
from phatgoose.analysis.recording_folder import RecordingFolder
from phatgoose.analysis.site_usage import SiteUsage, TokenWeights
from phatgoose.analysis.task_routing import Array, TaskRouting
from phatgoose.config import RecordingConfig
from phatgoose.data.batching import by_length
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.errors import RouterError
from phatgoose.evaluation.methods import Method
from phatgoose.evaluation.suites.task import SuiteTask
from phatgoose.experts.site_names import INPUT, OUTPUT, TEXT, describe_site
from phatgoose.models.base import DTYPES
from phatgoose.results.names import LEAVE_ONE_OUT
from phatgoose.results.writer import PACKAGES
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.model import RoutedModel

EncodedRow = dict[str, list[int]]


def record_tasks(
    model: RoutedModel,
    encoder: Encoder,
    tasks: Sequence[SuiteTask],
    method: Method,
    config: RecordingConfig,
    out: Path,
) -> int:
    """Record the tasks that are not recorded yet, and write each as soon as it is finished.

    One progress bar is shown, on standard error.

    Args:
        model: the routed model.
        encoder: the encoder of its base model.
        tasks: tasks of any suites, made with the limit of `config`.
        method: the method that the model routes with.
        config: rows, seed and size of batches.
        out: the recording folder.

    Returns:
        Number of tasks that were recorded before.

    Raises:
        RouterError: the model has empty slots.
        ResultsError: `out` is not a folder, holds another recording, is
            damaged, or is being written to.
        DataError, SuiteError, BaseModelError: see `record_task`.
    """
    if "" in model.slots.names:
        raise RouterError(
            "routing of a model with empty slots cannot be recorded",
            found=f"{len(model.pool)} experts in {len(model.slots)} slots",
            fix="RoutedModel.from_pool without a capacity",
        )
    header = RecordingHeader(
        method=method.name,
        router=method.settings,
        pool=model.pool.fingerprint,
        pool_name=model.pool.folder.resolve().name,
        base=model.pool.base.name,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == model.dtype),
        encoder_decoder=encoder.encoder_decoder,
        text=asdict(encoder.text),
        limit=config.limit,
        seed=config.seed,
        experts=tuple(model.slots.names),
        sites=tuple(model.routed_linears()),
        versions={package: version(package) for package in PACKAGES},
    )
    recording = RecordingFolder(out, header)
    pending = [task for task in tasks if not recording.has(task.suite, task.name, task.fingerprint)]
    with recording.writing(), tqdm(pending, unit="task") as bar:
        for task in bar:
            bar.set_description(f"{method.name} on {task.task_name}")
            recording.add(record_task(model, encoder, task, batch_tokens=config.batch_tokens))
    return len(tasks) - len(pending)


@torch.no_grad()
def record_task(model: RoutedModel, encoder: Encoder, task: SuiteTask, *, batch_tokens: int) -> TaskRouting:
    """Run a task's rows through a routed model. In leave-one-out, the task's own expert is masked.

    Args:
        model: the routed model.
        encoder: the encoder of its base model.
        task: a task of any suite.
        batch_tokens: most positions of a batch, padding included; a batch has at least one row.

    Raises:
        DataError, SuiteError: the task's rows cannot be read.
        BaseModelError: a routed layer does not see all tokens of a batch.
    """
    masked = (task.name,) if task.suite == LEAVE_ONE_OUT else ()
    prompts = encoder.prompts([row.input for row in task.rows])
    targets = encoder.targets([row.targets[0] for row in task.rows])
    rows = [encoder.row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    tokens = TokenWeights()
    usages = _usages(model, tokens, encoder_decoder=encoder.encoder_decoder)
    options = _without_logits(model)
    with model.without(masked) if masked else nullcontext():
        for numbers in by_length([max(map(len, _texts(row))) for row in rows], max_positions=batch_tokens):
            batch = encoder.collate([rows[i] for i in numbers])
            labels_BS, mask_BS = batch.pop("labels"), batch["attention_mask"]
            streams = {INPUT: mask_BS, OUTPUT: (labels_BS != IGNORED).long()}
            tokens.set(streams if encoder.encoder_decoder else {TEXT: mask_BS})
            inputs = {name: values.to(model.device) for name, values in batch.items()}
            # outside the prompts, a router's own first pass would be recorded
            with model.prompts([prompts[i] for i in numbers]), model.recording(usages):
                model(**inputs, use_cache=False, **options)
        usable_M = _usable(list(model.routed_linears().values()), model.mask_BE(1)[0])
    means_MV = _means(list(usages.values()), len(rows))
    return TaskRouting(
        suite=task.suite,
        task=task.name,
        data=task.fingerprint,
        num_rows=len(rows),
        num_tokens=sum(len(ids) for row in rows for ids in _texts(row)),
        masked=masked,
        weights_ME=means_MV[:, :-2],
        entropy_all_M=means_MV[:, -2],
        entropy_chosen_M=means_MV[:, -1],
        usable_M=usable_M,
    )


def _usages(model: RoutedModel, tokens: TokenWeights, *, encoder_decoder: bool) -> dict[str, SiteUsage]:
    """Site -> empty sums of its routing."""
    return {
        site: SiteUsage(
            site,
            describe_site(site, encoder_decoder=encoder_decoder).stream,
            linear,
            tokens,
            model.router_config.temperature,
        )
        for site, linear in model.routed_linears().items()
    }


def _texts(row: EncodedRow) -> list[list[int]]:
    """The token ids that the model reads: one sequence, or the encoder's and the decoder's."""
    return [ids for name, ids in row.items() if name != "labels"]


def _without_logits(model: RoutedModel) -> dict[str, Any]:
    """Options of the forward pass that skip most logits, unless the output layer is routed."""
    wrapped: Any = model.model
    routed = isinstance(wrapped.get_output_embeddings(), RoutedLinear)
    return {} if routed or "logits_to_keep" not in signature(wrapped.forward).parameters else {"logits_to_keep": 1}


def _usable(linears: Sequence[RoutedLinear], mask_E: torch.Tensor) -> Array:
    masks = [linear.router.absent_E + mask_E.to(linear.router.absent_E.device) for linear in linears]
    return _read_back(masks, lambda masks_ME: (masks_ME > -torch.inf).sum(dim=1))


def _means(usages: Sequence[SiteUsage], num_rows: int) -> Array:
    means_MV = _read_back([usage.sums_V for usage in usages], lambda sums_MV: sums_MV / num_rows)
    means_MV[[not usage.called for usage in usages]] = np.nan
    return means_MV


def _read_back(parts: Sequence[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Array:
    """Copy all sites' values to the CPU at once: the only place where it waits for the device."""
    stacked = torch.stack([part.to(parts[0].device) for part in parts])
    return change(stacked).cpu().double().numpy()
