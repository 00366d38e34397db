"""PHATGOOSE: route every token, at every layer, among independently trained LoRA experts.

    from phatgoose import RoutedModel
    model = RoutedModel.from_pool("BASE", "POOL", router="phatgoose", top_k=2)

An independent implementation of "Learning to Route Among Specialized Experts
for Zero-Shot Generalization" (arXiv 2402.05859).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from phatgoose.config import RouterConfig as RouterConfig
    from phatgoose.data.examples import Example as Example
    from phatgoose.data.examples import read_examples as read_examples
    from phatgoose.errors import PhatgooseError as PhatgooseError
    from phatgoose.experts.expert import Expert as Expert
    from phatgoose.experts.pool import Pool as Pool
    from phatgoose.models.base import load_base as load_base
    from phatgoose.models.base import load_tokenizer as load_tokenizer
    from phatgoose.routers.base import Router as Router
    from phatgoose.routing.model import RoutedModel as RoutedModel
    from phatgoose.routing.trace import Trace as Trace
    from phatgoose.training.group.jobs import TrainingJob as TrainingJob
    from phatgoose.training.group.train import train_adapters as train_adapters
    from phatgoose.training.group.train import train_gates as train_gates
    from phatgoose.training.single import train_adapter as train_adapter
    from phatgoose.training.single import train_gate as train_gate

_PUBLIC = {
    "Example": "phatgoose.data.examples",
    "Expert": "phatgoose.experts.expert",
    "PhatgooseError": "phatgoose.errors",
    "Pool": "phatgoose.experts.pool",
    "RoutedModel": "phatgoose.routing.model",
    "Router": "phatgoose.routers.base",
    "RouterConfig": "phatgoose.config",
    "Trace": "phatgoose.routing.trace",
    "TrainingJob": "phatgoose.training.group.jobs",
    "load_base": "phatgoose.models.base",
    "load_tokenizer": "phatgoose.models.base",
    "read_examples": "phatgoose.data.examples",
    "train_adapter": "phatgoose.training.single",
    "train_adapters": "phatgoose.training.group.train",
    "train_gate": "phatgoose.training.single",
    "train_gates": "phatgoose.training.group.train",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, the version some time; `phatgoose --help` must not wait for them
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    """Version of the installed package; without an installation, that of the checkout's pyproject.toml."""
    from importlib import metadata

    try:
        return metadata.version("phatgoose")
    except metadata.PackageNotFoundError:
        import tomllib

        pyproject = Path(__file__).parents[2] / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
