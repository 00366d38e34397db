"""Records the routing of tasks: means over tokens and rows, added up where the model runs.

A row is read as in training: its input, and its (first) right target with the
tokens before each as given, the end of the target left out because no model
reads it. So nothing is generated, and all routers see the same tokens.

Tokens weigh equally within a row, rows equally within a task. Otherwise a few
long rows would speak for a task.

Axes: B rows, S positions, N = B * S tokens, E experts, M sites, V values (E
weights and two entropies).
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

from phatgoose.analysis.recording import RecordingFolder, RecordingHeader
from phatgoose.analysis.task_routing import Array, TaskRouting
from phatgoose.config import RecordingConfig
from phatgoose.data.batching import by_length
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.errors import BaseModelError, RouterError
from phatgoose.evaluation.methods import Method
from phatgoose.evaluation.suites.task import SuiteTask
from phatgoose.experts.site_names import INPUT, OUTPUT, TEXT, describe_site
from phatgoose.kernels.types import Routing
from phatgoose.models.base import DTYPES
from phatgoose.results.names import LEAVE_ONE_OUT
from phatgoose.results.writer import PACKAGES
from phatgoose.routers.record import ScoresRecord
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.model import RoutedModel

EncodedRow = dict[str, list[int]]


class TokenWeights:
    """What each token of the batch at hand counts for: 1 / the tokens of its row, 0 if it is padding."""

    def __init__(self) -> None:
        self._streams: dict[str, torch.Tensor] = {}
        self._moved: dict[tuple[str, torch.device], torch.Tensor] = {}

    def set(self, masks: dict[str, torch.Tensor]) -> None:
        """Begin a batch.

        Args:
            masks: stream (see `Site.stream`) -> mask_BS, 1 for tokens, 0 for padding.
        """
        self._streams = {
            stream: (mask_BS / mask_BS.sum(dim=1, keepdim=True)).flatten() for stream, mask_BS in masks.items()
        }
        self._moved = {}

    def on(self, stream: str, device: torch.device) -> torch.Tensor:
        """weights_N, fp32, of one stream; moved once a batch."""
        key = stream, device
        if key not in self._moved:
            self._moved[key] = self._streams[stream].to(device)
        return self._moved[key]


class SiteUsage(ScoresRecord):
    """Adds up one site's routing weights and entropies.

    Nothing is read back from the device, and no routing of a single token is kept.

    Args:
        site: its name.
        stream: whose tokens it reads.
        linear: the routed layer.
        tokens: of the batch at hand.
        temperature: of the router.
    """

    def __init__(self, site: str, stream: str, linear: RoutedLinear, tokens: TokenWeights, temperature: float) -> None:
        self.site = site
        self.stream = stream
        self.tokens = tokens
        self.temperature = temperature
        self.called = False
        self.sums_V = torch.zeros(len(linear.router.absent_E) + 2, device=linear.router.absent_E.device)

    def append_scores(self, scores_NE: torch.Tensor, routing: Routing, leading_shape: torch.Size) -> None:
        """See `ScoresRecord.append_scores`."""
        weights_N = self.tokens.on(self.stream, scores_NE.device)
        if len(weights_N) != len(scores_NE):
            raise BaseModelError(
                f"{self.site} does not see each token of a batch once, so its routing cannot be averaged",
                found=f"{len(scores_NE)} activations",
                expected=f"{len(weights_N)}, padding included",
                fix="analyse a pool whose experts leave this layer alone",
            )
        # a token that may choose nobody has NaN here and weights of 0
        probabilities_NE = torch.softmax(scores_NE / self.temperature, dim=-1).nan_to_num(0.0)
        # ids are distinct within a row, so that a plain scatter is exact, and the same each time
        spread_NE = torch.zeros_like(scores_NE).scatter(1, routing.expert_ids_NK, routing.weights_NK)
        values_NV = torch.cat(
            [
                spread_NE,
                torch.special.entr(probabilities_NE).sum(dim=1, keepdim=True),
                torch.special.entr(routing.weights_NK).sum(dim=1, keepdim=True),
            ],
            dim=1,
        )
        self.sums_V += weights_N @ values_NV
        self.called = True


def record_tasks(
    model: RoutedModel,
    encoder: Encoder,
    tasks: Sequence[SuiteTask],
    method: Method,
    config: RecordingConfig,
    out: Path,
) -> int:
    """Record the tasks that are not there yet, each as soon as it is finished. One progress bar, on standard error.

    Args:
        model: to watch.
        encoder: of its base model.
        tasks: of any suites, made with the limit of `config`.
        method: that the model routes by.
        config: rows, seed and size of batches.
        out: recording folder.

    Returns:
        How many were there already.

    Raises:
        RouterError: the model has empty slots.
        ResultsError: `out` is no folder, holds another recording, or is damaged
            or being written to.
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
        model: to watch.
        encoder: of its base model.
        task: of any suite.
        batch_tokens: positions of a batch, padding included; one row at least.

    Raises:
        DataError, SuiteError: the task's rows cannot be read.
        BaseModelError: a routed layer does not see all tokens of a batch.
    """
    masked = (task.name,) if task.suite == LEAVE_ONE_OUT else ()
    prompts = encoder.prompts([row.input for row in task.rows])
    targets = encoder.targets([row.targets[0] for row in task.rows])
    rows = [encoder.row(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    linears = model.routed_linears()
    tokens = TokenWeights()
    usages = {
        site: SiteUsage(
            site,
            describe_site(site, encoder_decoder=encoder.encoder_decoder).stream,
            linear,
            tokens,
            model.router_config.temperature,
        )
        for site, linear in linears.items()
    }
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
        usable_M = _usable(list(linears.values()), model.mask_BE(1)[0])
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


def _texts(row: EncodedRow) -> list[list[int]]:
    """What the model reads: one text, or the encoder's and the decoder's."""
    return [ids for name, ids in row.items() if name != "labels"]


def _without_logits(model: RoutedModel) -> dict[str, Any]:
    """Options that save most of the output layer's work, unless that layer is routed."""
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
    """All sites' values at once: the one place where the CPU waits for the device."""
    stacked = torch.stack([part.to(parts[0].device) for part in parts])
    return change(stacked).cpu().double().numpy()
