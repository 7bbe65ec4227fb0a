"""Fixtures of the GPU tests, which run only if HF_FASTTRAIN_GPU_TESTS=1, and their planted defects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_children import DRY_RUN, ENABLED, PLANT
from gpu_kit import forget_settings
from gpu_plants import find
from gpu_rows import BY_NAME, row_of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip all tests unless they are requested."""
    if os.environ.get(ENABLED) != "1":
        gpu_items = [item for item in items if row_of(item.name)]
        config.hook.pytest_deselected(items=gpu_items)
        items[:] = [item for item in items if item not in gpu_items]


@pytest.fixture(autouse=True)
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the requested defect in the tests of its row."""
    row, _, name = os.environ.get(PLANT, "").partition("/")
    if row and row == row_of(request.node.name):
        find(row, name).apply(monkeypatch)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Return the first GPU, or in a dry run the CPU; skip a test that can't run on it."""
    row = BY_NAME[row_of(request.node.name)]
    if os.environ.get(DRY_RUN):
        if not row.on_cpu or request.node.get_closest_marker("needs_gpu"):
            pytest.skip("needs a GPU")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        yield torch.device("cpu")
        return
    if torch.cuda.device_count() < row.gpus:
        pytest.skip(f"needs {row.gpus} GPUs" if row.gpus > 1 else "needs a GPU")
    yield torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def clean_settings() -> Iterator[None]:
    """Restore torch's settings after a test and free the GPU's memory."""
    yield
    forget_settings()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder that does not exist yet."""
    return tmp_path / "run"


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers of this folder."""
    config.addinivalue_line("markers", "needs_gpu: can't run on a CPU, though other tests of its row can")
