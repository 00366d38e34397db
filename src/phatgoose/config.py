"""Settings, with their defaults: the one place where a default is written.

The first sentence of each `Attributes:` entry is also the help text of the
command-line option that sets the attribute (`phatgoose.cli.config_options`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from phatgoose.errors import ConfigError

Dtype = Literal["fp32", "bf16"]
SEEDS = 2**32  # seeds lie below this limit of NumPy, which transformers seeds too


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts.

    Attributes:
        router: How tokens choose experts. A name in `phatgoose.routers.ROUTERS`.
        top_k: Experts per token and layer. Not the top_k of sampling.
        eps: Added to the variance when gates and activations are standardised.
            1e-5 is LayerNorm's default, as in the official code; the paper's
            formula has 0.
        temperature: Divides the scores before the softmax. The paper has 1.
        expert: The one expert of router `single`.
        global_scale: Factor on the similarity of prompt and expert in `glider`.
            3 is its authors' value for unseen tasks (100 for held-in tasks).
        retrieval_scale: Factor on the cosines before the exponential in
            `phatgoose-retrieval`. 20 is the sentence encoder's own training value.
        prior_strength: Factor on the prior of `phatgoose-prior`; 0 is `phatgoose`.
        prior_steps: Passes over the prompt that estimate the prior of
            `phatgoose-prior`, each with the prior of the pass before.
        filter_k: Experts that `lag` keeps from Arrow for SpectR. Its paper has 20.
    """

    router: str = "phatgoose"
    top_k: int = 2
    eps: float = 1e-5
    temperature: float = 1.0
    expert: str | None = None
    global_scale: float = 3.0
    retrieval_scale: float = 20.0
    prior_strength: float = 2.0
    prior_steps: int = 1
    filter_k: int = 20

    @classmethod
    def of(cls, **options: Any) -> RouterConfig:
        """Build a config from plain options. Raises ConfigError for an unknown option or an invalid value."""
        known = sorted(field.name for field in fields(cls))
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r} of a router", expected=", ".join(known))
        return cls(**options)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> dict[str, Any]:
        """Parse options written as "temperature=0.5", for `of`. Raises ConfigError."""
        defaults = {field.name: field.default for field in fields(cls) if isinstance(field.default, int | float)}
        options: dict[str, Any] = {}
        for text in texts:
            name, sign, value = text.partition("=")
            try:
                options[name] = type(defaults[name])(value)
            except (KeyError, ValueError) as error:
                raise ConfigError(
                    f"cannot use the router's option {text!r}",
                    found=text if sign else f"{text} without a value",
                    expected="NAME=NUMBER; names are " + ", ".join(sorted(defaults)),
                ) from error
        return options

    def __post_init__(self) -> None:
        _check_at_least_one(self, "top_k", "filter_k", "prior_steps")
        for name in ("eps", "global_scale", "retrieval_scale", "prior_strength"):
            if not getattr(self, name) >= 0:  # `< 0` would let NaN through
                raise ConfigError(f"{name} must not be negative", found=str(getattr(self, name)), expected="0 or more")
        if not self.temperature > 0:
            raise ConfigError("temperature must be positive", found=str(self.temperature), expected="above 0")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How an example becomes tokens.

    A decoder-only model reads `input + separator + target + EOS`, an
    encoder-decoder model reads `input` and writes `target + EOS`.

    Attributes:
        separator: Text between input and target (decoder-only models), the same in training and use.
        max_input_tokens: Longer inputs are cut. Decoder-only models lose the
            front, because instructions stand next to the answer; encoder-decoder
            models lose the end, as in the official code.
        max_target_tokens: Longer targets are cut at the end.
    """

    separator: str = "\n"
    max_input_tokens: int = 512
    max_target_tokens: int = 512

    def __post_init__(self) -> None:
        _check_at_least_one(self, "max_input_tokens", "max_target_tokens")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        num_beams: Number of beams of beam search; 1 is greedy decoding.
        sample: Sample from the model's distribution instead of decoding greedily.
        seed: Random seed for sampling.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    sample: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_at_least_one(self, "max_new_tokens", "num_beams")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a grid is evaluated. None of these settings changes a score beyond rounding.

    Attributes:
        batch_tokens: Positions in a batch, padding included.
        answer_tokens: Positions in a batch of generated answers, prompts included;
            as --batch-tokens if not given. A decoding step computes one position
            per row, so a larger batch costs little beyond its key-value cache.
        chunk_requests: Requests of the tasks that are evaluated together, after
            which their rows are written. A killed run loses at most one chunk.
    """

    batch_tokens: int = 4096
    answer_tokens: int | None = None
    chunk_requests: int = 1000

    def __post_init__(self) -> None:
        _check_at_least_one(self, "batch_tokens", "answer_tokens", "chunk_requests")


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """How much routing is recorded.

    Attributes:
        limit: Rows per task, a seeded sample.
        batch_tokens: Positions in a batch, padding included. Changes nothing beyond rounding.
        seed: Random seed of the router; use another for each training seed's pool, to tell their recordings apart.
    """

    limit: int = 50
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        _check_at_least_one(self, "limit", "batch_tokens")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant learning rate (paper section 4.1).

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples of an expert per forward pass and device.
        accumulation: Forward passes per optimiser step. The paper's batch has
            1024 examples in all.
        learning_rate: Peak learning rate of AdamW.
        warmup_ratio: Fraction of the steps with a rising learning rate. The
            number of steps is rounded down.
        clip: Largest norm of the gradient; a larger one is scaled down.
        weight_decay: Weight decay of AdamW.
        seed: Random seed of the data order and of a new adapter's initial values.
        dtype: Dtype of the frozen weights and of the arithmetic. Trained weights
            stay in fp32.
    """

    steps: int
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-3
    warmup_ratio: float = 0.06
    clip: float = 1.0
    weight_decay: float = 0.0
    seed: int = 42
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        _check_at_least_one(self, "steps", "batch_size", "accumulation")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError("warmup_ratio must lie between 0 and 1", found=str(self.warmup_ratio))
        if not (0 < self.learning_rate < math.inf and self.clip > 0):
            raise ConfigError(
                "learning_rate and clip must be positive",
                found=f"{self.learning_rate} and {self.clip}",
                expected="numbers above 0",
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError("weight_decay must not be negative", found=str(self.weight_decay), expected="0 or more")
        _check_seed(self.seed)
        if self.dtype not in ("fp32", "bf16"):
            raise ConfigError("unknown dtype", found=str(self.dtype), expected="fp32 or bf16")

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps; the first has learning rate 0, as in the official code."""
        return int(self.steps * self.warmup_ratio)


@dataclass(frozen=True, kw_only=True)
class GateConfig(OptimizerConfig):
    """Settings of gate training (paper section 3.1; values of section 4.1)."""

    steps: int = 100


@dataclass(frozen=True, kw_only=True)
class AdapterTrainingConfig(OptimizerConfig):
    """Settings of LoRA training (paper section 4.1, with exceptions named below).

    Attributes:
        rank: Rank of the update.
        alpha: LoRA's alpha; the rank if not given, which is a scale of 1. The
            paper's code has alpha 1, a scale of 1/16, with its learning rate to match.
        target_modules: Layers to adapt: "all-linear", or names separated by commas.
        learning_rate: Peak learning rate of AdamW. 1e-3 suits a scale of 1.
        save_steps: Steps between checkpoints, from which a killed run resumes.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    rank: int = 16
    alpha: float | None = None
    target_modules: str = "all-linear"
    save_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "rank", "save_steps")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError("alpha must be positive", found=str(self.alpha), expected="above 0, or None")


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How many experts train over one forward pass. None of these settings changes a result beyond rounding.

    Attributes:
        experts_at_once: Largest number of experts in a batch. Each has `batch_size` rows in it.
        positions_at_once: Approximate limit on the positions in a batch, padding included; no limit if not
            given. Experts with short rows then train in larger groups than experts with long rows.
        length_multiple: Batches are padded to a multiple of this number of tokens. Few distinct shapes occur.
        compile: Compile the model's blocks; faster on a GPU, after a minute of compilation.
    """

    experts_at_once: int = 8
    positions_at_once: int | None = None
    length_multiple: int = 32
    compile: bool = False

    def __post_init__(self) -> None:
        _check_at_least_one(self, "experts_at_once", "length_multiple", "positions_at_once")


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig:
    """How many of an expert's examples its mean activations or embeddings are made from.

    Attributes:
        num_examples: Largest number of examples to read; a random sample if there are more.
        seed: Random seed of the sample.
        batch_size: Examples per forward pass.
    """

    num_examples: int = 1000
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        _check_at_least_one(self, "num_examples", "batch_size")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """Bootstrap intervals of averages.

    Attributes:
        num_resamples: Resamples of the bootstrap. The sampling error that they leave in a limit falls with
            their square root; with 10,000 it is about 3 % of the standard error.
        confidence: Fraction of the resamples between the limits of an interval.
        seed: Random seed of the bootstrap.
    """

    num_resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 100:
            raise ConfigError(
                "too few resamples for an interval", found=str(self.num_resamples), expected="100 or more"
            )
        if not 0 < self.confidence < 1:
            raise ConfigError("confidence must lie between 0 and 1", found=str(self.confidence))
        _check_seed(self.seed)


def _check_at_least_one(config: Any, *names: str) -> None:
    """Raise ConfigError if one of these numbers is below 1; None is allowed where the type allows it."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1", found=str(value), expected="1 or more")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise ConfigError("seed is out of range", found=str(seed), expected=f"0 to {SEEDS - 1}")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How groups of experts are spread over a Ray cluster.

    Attributes:
        address: Address of a running cluster; by default $RAY_ADDRESS, or a cluster of this machine alone. The
            latter is started for the call.
        num_gpus: Fraction of a GPU for each group of experts; by default 1 if the cluster has GPUs.
        num_cpus: CPU cores for each group of experts.
        max_retries: How often a group is restarted after its worker or machine was lost.
        lock_timeout_s: Seconds to wait for another process that holds a group but writes no checkpoint.
    """

    address: str | None = None
    num_gpus: float | None = None
    num_cpus: float = 1
    max_retries: int = 3
    lock_timeout_s: float = 3600

    def __post_init__(self) -> None:
        if self.num_gpus is not None and not 0 <= self.num_gpus <= 1:
            raise ConfigError(
                "a group trains on one GPU", found=f"num_gpus: {self.num_gpus}", expected="a number from 0 to 1"
            )
        if not self.num_cpus > 0:
            raise ConfigError("num_cpus must be positive", found=str(self.num_cpus), expected="a number above 0")
        if self.max_retries < 0 or not self.lock_timeout_s >= 0:
            raise ConfigError(
                "max_retries and lock_timeout_s must not be negative",
                found=f"{self.max_retries} and {self.lock_timeout_s}",
            )
