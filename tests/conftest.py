"""Small real data, and helpers for processes forked from one that has imported everything."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # fixtures of a module train too, and forked children can't use two
GPU_TESTS = os.environ.get("HF_FASTTRAIN_GPU_TESTS") == "1"
if not GPU_TESTS:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
import torch
import torch._dynamo
from helpers.hub_server import TOKEN, Hub, running_hub
from helpers.processes import LAUNCHER_VARIABLES, reset_accelerate
from helpers.runs import RECIPE, raise_losses
from huggingface_hub import constants
from PIL import Image

from hf_fasttrain.study import arm_process

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as what a script starts with & has it; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPU_FOLDER = Path(__file__).parent / "gpu"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ignore the tests that need a GPU; if they are requested, ignore the others."""
    if GPU_TESTS:
        return True if collection_path.parent == GPU_FOLDER.parent and collection_path != GPU_FOLDER else None
    return True if collection_path == GPU_FOLDER else None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders of tests in two processes, if pytest-xdist is there; files that are named are run in this one."""
    option = config.option
    if not hasattr(option, "numprocesses") or hasattr(config, "workerinput"):
        return
    folders = all((config.invocation_params.dir / argument).is_dir() for argument in config.args)
    if option.numprocesses is None and folders and not option.usepdb and option.capture != "no" and not GPU_TESTS:
        option.numprocesses = 2
    if option.numprocesses and option.dist == "no":
        option.dist = "worksteal"


COLLECTED = pytest.StashKey[set[Path]]()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Record the files in which tests were found."""
    item.config.stash.setdefault(COLLECTED, set()).add(item.path)


@pytest.fixture
def collected_files(request: pytest.FixtureRequest) -> set[Path]:
    """Return the files in which this run has found tests, deselected ones included."""
    return set(request.config.stash[COLLECTED])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the tests that were not run."""
    if not GPU_TESTS:
        texts = (path.read_text() for path in GPU_FOLDER.glob("test_*.py"))
        number = sum(len(re.findall(r"^def test_", text, re.MULTILINE)) for text in texts)
        terminalreporter.write_line(f"{number} GPU tests not run: python benchmarks/gpu_check.py")


def pytest_unconfigure() -> None:
    """Let the collector have what `fresh_process` has hidden from it: extension modules complain about what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Reset accelerate and the environment to their state at the start of a process."""
    monkeypatch.setenv("HF_FASTTRAIN_TUNINGS", str(tmp_path / "tunings"))
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reset_accelerate()
    gc.collect()
    gc.freeze()  # what is imported: training would collect it, which takes 0.3 s, and forks would copy it
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Return an image folder of 3 distinguishable classes: 3 x 8 small JPEGs in train, 3 x 4 in validation."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("validation", 4)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 90, (20 + i, 24, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 120
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    return root


@pytest.fixture
def rising_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss rise with each evaluation, so that the first one is the best."""
    raise_losses(monkeypatch)


@pytest.fixture
def forked_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make studies fork their arms from this process, which has imported everything and may have planted delays."""
    monkeypatch.setattr(arm_process, "CPU_METHOD", "fork")


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small recipe, or the given text, and returns its path."""

    def write(text: str = RECIPE, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Run a Hub on loopback, used by the clients of this process and its children, logged in."""
    with running_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        paths = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token")}
        for name, value in {**settings, **paths, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        children = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        for name, value in {**children, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        yield hub
