"""Training many adapters, and many gates, several over one forward pass of the base model.

Each result equals that of `train_adapter` and `train_gate`, except for rounding and,
if the base model has dropout, its random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, GateConfig, TextConfig
from phatgoose.errors import AdapterError, GateError
from phatgoose.experts.expert import Expert
from phatgoose.experts.sites import check_sites
from phatgoose.training.group.adapters import AdapterRun
from phatgoose.training.group.gates import GateRun
from phatgoose.training.group.jobs import TrainingJob
from phatgoose.training.run import diverged


def train_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainingJob],
    *,
    config: AdapterTrainingConfig | None = None,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    progress: bool = True,
) -> None:
    """Train a LoRA adapter for each job, several over one forward pass (paper section 4.1).

    Each adapter ends as `train_adapter` would leave it, except for rounding. Jobs whose
    folder already holds an adapter are skipped. A killed run resumes from its last
    checkpoint when the call is repeated.

    Args:
        model: the base model; its weights are not changed.
        tokenizer: the base model's tokenizer.
        jobs: one for each adapter, with distinct names; their folders are created.
        config: settings of the training, the same for all; None for the defaults.
        text: how examples become tokens; None for the defaults.
        batching: how many experts train at once; None for the defaults.
        save_dtype: dtype of the saved tensors.
        progress: whether to show progress bars.

    Raises:
        AdapterError: a job's folder holds something else, or the training of
            some adapters diverged (the others are saved).
        ConfigError: `config` names layers that cannot be adapted, two jobs have
            the same name, a work folder holds an unfinished run with other
            settings, this is one of several processes, or memory does not suffice.
        BaseModelError: the base model cannot train several experts at once.
    """
    config = config or AdapterTrainingConfig()
    run = AdapterRun(model, tokenizer, config, text, batching, save_dtype=save_dtype, progress=progress)
    if lost := run.train_all(jobs):
        raise AdapterError(**diverged(f"adapter {_folders(lost)}", config))


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainingJob],
    *,
    config: GateConfig | None = None,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    progress: bool = True,
) -> None:
    """Train the gate of each job's adapter, several over one forward pass (paper section 3.1).

    Each gate ends as `train_gate` would leave it, except for rounding. Experts that
    have a gate are skipped, unless it was trained for another adapter. A killed run
    resumes from its last checkpoint when the call is repeated.

    Args:
        model: the base model that the adapters were trained on; its weights are not changed.
        tokenizer: the base model's tokenizer.
        jobs: one for each expert, with the adapter's training data. Each folder gets
            gate.safetensors and gate_config.json. The last gate is kept, as in the
            paper, so validation data is not used.
        config: settings of the training, the same for all; None for the defaults.
        text: how examples become tokens, the same as for the adapters; None for the defaults.
        batching: how many experts train at once; None for the defaults.
        save_dtype: dtype of the saved tensors.
        progress: whether to show progress bars.

    Raises:
        BaseModelError: an expert does not fit the model, or the model cannot train several at once.
        AdapterError: an expert's adapter is missing or damaged.
        GateError: the training of some gates diverged (the others are saved).
        ConfigError: two jobs have the same name, a work folder holds an unfinished
            run with other settings, this is one of several processes, or memory does
            not suffice.
    """
    config = config or GateConfig()
    check_sites(model, [Expert(job.folder) for job in jobs])
    run = GateRun(model, tokenizer, config, text, batching, save_dtype=save_dtype, progress=progress)
    if lost := run.train_all([replace(job, validation=()) for job in jobs]):
        raise GateError(**diverged(f"the gate of {_folders(lost)}", config))


def _folders(jobs: Sequence[TrainingJob]) -> str:
    return ", ".join(str(job.folder) for job in jobs)
