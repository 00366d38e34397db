"""Assertions that many tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from phatgoose.errors import PhatgooseError
from phatgoose.files import sha256


def files_of(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its checksum (but not the lock, which is always empty)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def fails(error: type[PhatgooseError], *words: str, action: Callable[[], Any]) -> PhatgooseError:
    """Check that `action` raises exactly `error`, with all `words` in what people read."""
    with pytest.raises(PhatgooseError) as caught:
        action()
    assert type(caught.value) is error, caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal within `relative` of the largest magnitude that is expected."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    assert difference <= relative * largest, f"off by {difference:.3g}, largest value {largest:.3g}"


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Contrast ratio of WCAG 2."""

    def luminance(rgb: Sequence[int]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
