"""What `import phatgoose` offers: this list, and nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import phatgoose

NAMES = [
    "Example",
    "Expert",
    "PhatgooseError",
    "Pool",
    "RoutedModel",
    "Router",
    "RouterConfig",
    "Trace",
    "TrainingJob",
    "load_base",
    "load_tokenizer",
    "read_examples",
    "train_adapter",
    "train_adapters",
    "train_gate",
    "train_gates",
]


def test_the_list() -> None:
    assert phatgoose.__all__ == dir(phatgoose) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_there_and_documented(name: str) -> None:
    thing = getattr(phatgoose, name)
    assert thing.__name__ == name
    assert inspect.getdoc(thing)


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Phatgoose'"):
        _ = phatgoose.Phatgoose


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, phatgoose; dir(phatgoose); print(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"
