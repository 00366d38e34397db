"""Settings of training and routing. A default lives here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from phatgoose.errors import ConfigError

Dtype = Literal["fp32", "bf16"]
SEEDS = 2**32  # NumPy's, which transformers seeds too


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts.

    Attributes:
        router: a name in `phatgoose.routers.ROUTERS`.
        top_k: experts per token and site (not sampling's top_k).
        eps: added to the variance when a gate or an activation is standardised.
            1e-5 is the official code's LayerNorm; 0 is the paper's formula.
        temperature: divides the scores before the softmax; 1 is the paper.
        expert: name of the expert that router `single` gives every token.
        global_scale: what `glider` multiplies the similarity of prompt and
            expert with; 3 is its authors' value for unseen tasks (held-in: 100).
        retrieval_scale: what `phatgoose-retrieval` multiplies cosines with before
            the exponential; 20 is the sentence encoder's own training loss.
        prior_strength: what `phatgoose-prior` multiplies its prior with; 0 is `phatgoose`.
        prior_steps: passes over the prompt in which `phatgoose-prior` finds its
            prior, each with that of the one before.
        filter_k: experts that `lag` keeps from Arrow for SpectR; 20 in its paper.
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
        """From plain options. Raises ConfigError for one that does not exist or cannot be used."""
        known = sorted(field.name for field in fields(cls))
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r} of a router", expected=", ".join(known))
        return cls(**options)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> dict[str, float]:
        """Options as people write them, "temperature=0.5", for `of`. Raises ConfigError."""
        defaults = {field.name: field.default for field in fields(cls) if isinstance(field.default, int | float)}
        found = {}
        for text in texts:
            name, sign, value = text.partition("=")
            try:
                found[name] = type(defaults[name])(value)
            except (KeyError, ValueError) as error:
                raise ConfigError(
                    f"cannot use the router's option {text!r}",
                    found=text if sign else f"{text} without a value",
                    expected="NAME=NUMBER; names are " + ", ".join(sorted(defaults)),
                ) from error
        return found

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError("top_k must be at least 1", found=str(self.top_k), expected="1 or more")
        for name in ("filter_k", "prior_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(getattr(self, name)), expected="1 or more")
        for name in ("eps", "global_scale", "retrieval_scale", "prior_strength"):
            if not getattr(self, name) >= 0:  # so written, NaN is refused too
                raise ConfigError(f"{name} must not be negative", found=str(getattr(self, name)), expected="0 or more")
        if not self.temperature > 0:
            raise ConfigError("temperature must be positive", found=str(self.temperature), expected="above 0")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How an example becomes tokens.

    A decoder-only model reads `input + separator + target + EOS`, an
    encoder-decoder model reads `input` and writes `target + EOS`.

    Attributes:
        separator: text between input and target (decoder-only models).
        max_input_tokens: longer inputs are cut (decoder-only: at the front,
            because instructions stand next to the answer; encoder-decoder: at
            the end, as in the official code).
        max_target_tokens: longer targets are cut at the end.
    """

    separator: str = "\n"
    max_input_tokens: int = 512
    max_target_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("max_input_tokens", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is drawn.

    Attributes:
        max_new_tokens: longest answer.
        num_beams: of beam search; 1 is greedy.
        sample: draw from the distribution instead of taking the best.
        seed: of the drawing.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    sample: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(getattr(self, name)), expected="1 or more")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a grid is evaluated. None of it changes a score beyond rounding.

    Attributes:
        batch_tokens: positions of a batch, padding included.
        answer_tokens: likewise, of a batch of answers that are written, with
            their prompts; None for `batch_tokens`. A step of writing computes
            one position a row, so larger batches cost little but their cache.
        chunk_requests: tasks are evaluated together until they have so many
            requests; then their rows are written. A killed run loses no more.
    """

    batch_tokens: int = 4096
    answer_tokens: int | None = None
    chunk_requests: int = 1000

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "answer_tokens", "chunk_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(value), expected="1 or more")


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """How much routing is recorded.

    Attributes:
        limit: rows of each task, a seeded sample.
        batch_tokens: positions of a batch, padding included; changes nothing but rounding.
        seed: of what a router draws; it also tells repetitions (pools of other training seeds) apart.
    """

    limit: int = 50
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(getattr(self, name)), expected="1 or more")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant rate (paper section 4.1).

    Attributes:
        steps: optimiser steps.
        batch_size: examples per forward pass and device.
        accumulation: forward passes per step. The paper's batch is 1024
            examples in all.
        learning_rate: peak rate.
        warmup_ratio: share of the steps with a rising rate, rounded down.
        clip: largest norm of the gradient.
        weight_decay: AdamW's.
        seed: of the data order and of a new adapter's initial values.
        dtype: of the frozen weights and of the arithmetic. What is trained
            stays in fp32.
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
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(getattr(self, name)))
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
        """Steps of warm-up; the first of them has rate 0 (as in the official code)."""
        return int(self.steps * self.warmup_ratio)


@dataclass(frozen=True, kw_only=True)
class GateConfig(OptimizerConfig):
    """Gate training (paper section 3, settings of section 4.1)."""

    steps: int = 100


@dataclass(frozen=True, kw_only=True)
class AdapterTrainingConfig(OptimizerConfig):
    """LoRA training (paper section 4.1 where not said otherwise).

    Attributes:
        rank: rank of the update.
        alpha: LoRA's alpha; None means `rank`, a scale of 1. (The paper's
            code has alpha 1: a scale of 1/16, with its learning rate to match.)
        target_modules: "all-linear", or a comma-separated list of names.
        learning_rate: 1e-3, the rate that suits a scale of 1.
        save_steps: a checkpoint every so many steps; a killed run starts
            again from the last one.
        joint_gates: train the gate together with the adapter, as the paper's
            ablation does (appendix A), instead of after it. Only `train_adapters` can.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    rank: int = 16
    alpha: float | None = None
    target_modules: str = "all-linear"
    save_steps: int = 100
    joint_gates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.save_steps < 1:
            raise ConfigError("rank and save_steps must be at least 1", found=f"{self.rank} and {self.save_steps}")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError("alpha must be positive", found=str(self.alpha), expected="above 0, or None")


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How experts are trained over one forward pass. None of it changes a result beyond rounding.

    Attributes:
        experts_at_once: most experts in a batch; each has `batch_size` rows there.
        positions_at_once: about the most positions of a batch, padding included; None for any number.
            Experts with short rows then train in larger groups than those with long rows.
        length_multiple: batches are padded to a multiple of so many positions, so that few shapes occur.
        compile: compile the model's blocks. Faster on a GPU, after a minute for the compiler.
    """

    experts_at_once: int = 8
    positions_at_once: int | None = None
    length_multiple: int = 32
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("experts_at_once", "length_multiple", "positions_at_once"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", found=str(getattr(self, name)), expected="1 or more")


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """How intervals of averages are drawn.

    Attributes:
        num_resamples: the error that the drawing itself leaves in a limit falls
            with its root; with 10,000 it is about 3 % of the standard error.
        confidence: share of the draws between the limits.
        seed: of the drawing.
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


def _check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise ConfigError("seed is out of range", found=str(seed), expected=f"0 to {SEEDS - 1}")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How groups of experts are spread over a Ray cluster.

    Attributes:
        address: of a running cluster; None means $RAY_ADDRESS, or else a
            cluster of this machine alone, started for the call.
        num_gpus: share of a GPU that a group takes, at most 1; None means 1
            if the cluster has GPUs.
        num_cpus: CPU cores that a group takes.
        max_retries: how often a group is begun again after its worker or
            machine was lost.
        lock_timeout_s: seconds that a task waits for another process that
            holds its group and writes no checkpoint.
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
