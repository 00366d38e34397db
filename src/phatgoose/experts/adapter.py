"""A LoRA adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

Only the two files are read, so a pool opens without PEFT and without the base
model. Axes: I in-features, O out-features, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from phatgoose.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
T = TypeVar("T")

# fields of PEFT's LoraConfig with which an adapter is not a low-rank update of an unchanged base
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the base weights, so its updates cannot be summed",
    "use_qalora": "QALoRA pools the input before A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "lora_bias": "lora_bias adds a bias to B",
    "modules_to_save": "modules_to_save replaces whole layers of the base",
    "trainable_token_indices": "trainable_token_indices replaces embeddings of the base",
    "target_parameters": "target_parameters adapts tensors that are not linear layers",
    "layer_replication": "layer_replication changes the base's architecture",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "arrow_config": "this is a bundle of adapters, not one",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA changes the adapted layers",
}
# the others (pissa, olora, loftq, corda, lora_ga, ...) move a part of the base's weights into the adapter
_BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class LoraWeights(NamedTuple):
    """Factors of the update `scaling * B @ A` at one site."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float


class LoraShape(NamedTuple):
    """Rank and feature counts of the update at one site."""

    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields of adapter_config.json that determine the update.

    Attributes:
        base: name of the base model; "" if the file does not name one.
        revision: revision of the base model; None if not pinned.
        rank: rank R, where `rank_pattern` has no other.
        alpha: LoRA's alpha, where `alpha_pattern` has no other.
        use_rslora: divide alpha by sqrt(R) instead of R.
        rank_pattern: pattern of a site's name -> its rank.
        alpha_pattern: pattern of a site's name -> its alpha.
    """

    base: str
    revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> AdapterConfig:
        """Read a folder's adapter_config.json.

        Raises:
            AdapterError: the file is missing or not JSON, or the adapter is not LoRA,
                or a variant of LoRA that cannot be routed.
        """
        raw = _read_config(folder)
        if raw.get("peft_type") != "LORA":
            raise AdapterError(
                f"adapter {folder} is not a LoRA adapter",
                found=f"peft_type {raw.get('peft_type')!r}",
                expected="peft_type 'LORA'",
                fix="convert it with peft's save_as_lora, or leave it out",
            )
        _reject_variants(folder, raw)
        _check_values(folder, raw)
        return cls(
            base=raw.get("base_model_name_or_path") or "",
            revision=raw.get("revision"),
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            use_rslora=raw.get("use_rslora", False),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )

    def site_rank(self, site: str) -> int:
        """Rank at `site`, by PEFT's rules."""
        return _by_pattern(self.rank_pattern, site, self.rank)

    def scaling(self, site: str) -> float:
        """Scale of the update at `site`: alpha / R, or alpha / sqrt(R) with rsLoRA."""
        rank = self.site_rank(site)
        alpha = _by_pattern(self.alpha_pattern, site, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class Adapter:
    """A LoRA adapter on disk. Opening it reads its config and the header of its weights.

    Args:
        folder: folder with adapter_config.json and adapter_model.safetensors.

    Attributes:
        shapes: site -> rank, in-features, out-features, sorted by site.

    Raises:
        AdapterError: the folder is not a LoRA adapter that can be routed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = AdapterConfig.load(self.folder)
        self.weights_file = self.folder / WEIGHTS_FILE
        self._keys: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, LoraShape] = {}
        with self._opened() as tensors:
            self._keys = _pair_keys(self.folder, list(tensors.keys()))
            for site, (key_a, key_b) in self._keys.items():
                a, b = tensors.get_slice(key_a).get_shape(), tensors.get_slice(key_b).get_shape()
                self.shapes[site] = self._shape(site, a, b)

    def load(self) -> Iterator[tuple[str, LoraWeights]]:
        """Yield each site with its weights, on the CPU and in the file's dtype.

        Raises:
            AdapterError: a weight is not finite, or the file cannot be read.
        """
        with self._opened() as tensors:
            for site, (key_a, key_b) in self._keys.items():
                a_RI, b_OR = tensors.get_tensor(key_a), tensors.get_tensor(key_b)
                if not (torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all()):
                    raise AdapterError(
                        f"adapter {self.folder} has a weight that is not finite",
                        found=f"NaN or infinity at {site}",
                        expected="finite numbers",
                        fix="train it again with a lower learning rate",
                    )
                yield site, LoraWeights(a_RI, b_OR, self.config.scaling(site))

    def _shape(self, site: str, a: list[int], b: list[int]) -> LoraShape:
        if len(a) != 2 or len(b) != 2:
            raise AdapterError(
                f"adapter {self.folder} adapts {site}, which is not a linear layer",
                found=f"A {tuple(a)}, B {tuple(b)}",
                expected="two matrices",
                fix="train it with linear layers as target_modules",
            )
        rank = self.config.site_rank(site)
        if a[0] != rank or b[1] != rank:
            raise AdapterError(
                f"adapter {self.folder} does not match its {CONFIG_FILE} at {site}",
                found=f"A {tuple(a)}, B {tuple(b)}",
                expected=f"rank {rank}: A ({rank}, in), B (out, {rank})",
                fix="save the adapter again with PEFT's save_pretrained",
            )
        return LoraShape(rank, a[1], b[0])

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if not self.weights_file.is_file():
            pickled = self.folder / "adapter_model.bin"
            raise AdapterError(
                f"adapter {self.folder} has no {WEIGHTS_FILE}",
                found=f"{pickled.name}, a pickle, which is never loaded" if pickled.is_file() else "no weights",
                expected=WEIGHTS_FILE,
                fix="save it with PEFT's save_pretrained(..., safe_serialization=True)",
            )
        try:
            with safe_open(self.weights_file, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise AdapterError(
                f"cannot read {self.weights_file}",
                found=f"{self.weights_file.stat().st_size} bytes: {error}",
                expected="a whole safetensors file",
                fix="copy or download the adapter again",
            ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} is not a PEFT adapter",
            found="a folder without " + CONFIG_FILE if folder.is_dir() else "no such folder",
            expected=f"{CONFIG_FILE} and {WEIGHTS_FILE}",
            fix=f"phatgoose train DATA --base BASE --out {folder}, or PEFT's save_pretrained",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"cannot read {path}", found=str(error), expected="JSON", fix="copy or download the adapter again"
        ) from error
    if not isinstance(raw, dict):
        raise AdapterError(f"cannot read {path}", found=type(raw).__name__, expected="a JSON object")
    missing = [key for key in ("r", "lora_alpha") if key not in raw]
    if raw.get("peft_type") == "LORA" and missing:
        raise AdapterError(f"{path} is incomplete", found=f"no {', '.join(missing)}", expected="PEFT's LoraConfig")
    return raw


def _reject_variants(folder: Path, raw: dict[str, Any]) -> None:
    reasons = [f"{key}: {why}" for key, why in _UNSUPPORTED.items() if raw.get(key)]
    if raw.get("bias", "none") != "none":
        reasons.append(f"bias {raw['bias']!r}: the adapter changes the base's biases")
    if raw.get("init_lora_weights") not in _BASE_KEEPING_INITS:
        reasons.append(f"init_lora_weights {raw['init_lora_weights']!r}: it changed the base weights")
    if reasons:
        raise AdapterError(
            f"adapter {folder} cannot be an expert",
            found="; ".join(reasons),
            expected="plain LoRA or rsLoRA on an unchanged base",
            fix="convert it with peft's save_as_lora, or train it again with plain LoRA",
        )


def _check_values(folder: Path, raw: dict[str, Any]) -> None:
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    wrong = [
        key
        for key, is_right in {
            "r": _is_rank(raw["r"]),
            "lora_alpha": _is_number(raw["lora_alpha"]),
            "use_rslora": isinstance(raw.get("use_rslora", False), bool),
            "rank_pattern": _is_pattern(ranks) and all(map(_is_rank, ranks.values())),
            "alpha_pattern": _is_pattern(alphas) and all(map(_is_number, alphas.values())),
            "base_model_name_or_path": isinstance(raw.get("base_model_name_or_path"), str | None),
            "revision": isinstance(raw.get("revision"), str | None),
        }.items()
        if not is_right
    ]
    if wrong:
        raise AdapterError(
            f"cannot use {folder / CONFIG_FILE}",
            found=f"{wrong[0]}: {raw.get(wrong[0])!r}",
            expected="what PEFT's LoraConfig writes there",
            fix="save the adapter again with PEFT's save_pretrained",
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, dict) and all(re.compile(pattern) for pattern in value)
    except re.error:
        return False


def _pair_keys(folder: Path, keys: list[str]) -> dict[str, tuple[str, str]]:
    factors: dict[str, dict[str, str]] = {}
    unpaired = []
    for key in keys:
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            unpaired.append(key)
        else:
            factors.setdefault(match[1], {})[match[2]] = key
    incomplete = [site for site, pair in factors.items() if len(pair) != 2]
    if unpaired or incomplete or not factors:
        found = "no tensors"
        if unpaired:
            found = f"tensor {unpaired[0]!r}"
        elif incomplete:
            found = f"only one factor at {incomplete[0]}"
        raise AdapterError(
            f"adapter {folder} holds something that is not a LoRA pair",
            found=found,
            expected=f"{PREFIX}<module>.lora_A.weight and .lora_B.weight, nothing else",
            fix="save it again with PEFT's save_pretrained, without trained embeddings or other layers",
        )
    return {site: (pair["A"], pair["B"]) for site, pair in sorted(factors.items())}


def _by_pattern(patterns: dict[str, T], site: str, default: T) -> T:
    """PEFT's rule: the first pattern that matches a suffix of the site's name wins."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return default
