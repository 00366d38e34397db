"""Fixtures of all tests, and what must be set before PyTorch, Transformers and Triton are imported."""

from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread a process, also in processes that tests start: more threads than cores slow each other tenfold.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("helpers")

# Triton's kernels run in its interpreter where there is no GPU; it asks when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def no_older_graphs() -> Iterator[None]:
    """Compiled code is kept by line of source, with a limit: a layer of one test is a recompilation in the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def unchanged_originals() -> Iterator[None]:
    """Adapters and pools are made once and copied; a test that wrote to an original has changed what others got."""
    from helpers.originals import originals

    yield
    assert originals().changed() == []
    originals().folder.cleanup()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data, which is not in this repository; without it, its tests are skipped, but not in CI."""
    folder = Path(os.environ.get("PHATGOOSE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        reason = f"there is no {folder}: set PHATGOOSE_DATA to the folder with t0hi, t0ho and bbh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium; without one, its tests are skipped, but not in CI."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    if executable is None:
        reason = "there is no chromium: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()
