"""Small real data, and processes that are forked from one that has imported everything."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from accelerate.state import AcceleratorState, GradientState, PartialState
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from hf_fasttrain.checkpoint import complete_checkpoints
from hf_fasttrain.cli import main
from hf_fasttrain.data.cache import ENTRY, HEADER_BYTES, PixelCache
from hf_fasttrain.metrics import Metrics
from hf_fasttrain.study import processes

torch.set_num_threads(1)

GPU_FOLDER = Path(__file__).parent / "gpu"
LAUNCHER_VARIABLES = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the tests that need a GPU, and where they are asked for the others."""
    if GPU_TESTS:
        return True if collection_path.parent == GPU_FOLDER.parent and collection_path != GPU_FOLDER else None
    return True if collection_path == GPU_FOLDER else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if not GPU_TESTS:
        texts = (path.read_text() for path in GPU_FOLDER.glob("test_*.py"))
        number = sum(len(re.findall(r"^def test_", text, re.MULTILINE)) for text in texts)
        terminalreporter.write_line(f"{number} GPU tests not run: python benchmarks/gpu_check.py")


def num_kept(cache: PixelCache) -> int:
    """Return for how many rows a cache has an entry."""
    entries = np.memmap(cache.index_path, ENTRY, "r", offset=HEADER_BYTES, shape=(cache.num_rows,))
    return int(np.count_nonzero(entries["length"]))


def reset_accelerate() -> None:
    """Forget accelerate's process-wide state, as in a process that has just started."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let every test meet accelerate and the environment as they are at the start of a process."""
    monkeypatch.setenv("HF_FASTTRAIN_TUNINGS", str(tmp_path / "tunings"))
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reset_accelerate()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def run_processes(function: Callable[..., Any], *args: Any, num_processes: int = 2) -> list[Any]:
    """Return what `function(*args)` returns in each of `num_processes` processes that meet over gloo.

    The children are forked: they start in a tenth of a second, where torchrun needs ten to import torch.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(function, args, rank, num_processes, port, Path(folder)) for rank in range(num_processes)]
        for child in children:
            os.waitpid(child, 0)
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_processes)]
    for ok, value in results:
        assert ok, value
    return [value for _, value in results]


def in_child(function: Callable[[], Any]) -> Any:
    """Return what `function()` returns in a forked process; after torch's ONNX export no fork could train."""
    return run_processes(function, num_processes=1)[0]


def free_port() -> int:
    """Return a port at which processes may meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_processes(rank: int, world: int, port: int) -> None:
    """Let this process be one of several that meet over gloo, as launchers do it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def _fork(function: Callable[..., Any], args: Any, rank: int, world: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    join_processes(rank, world, port)
    try:
        reset_accelerate()
        outcome: tuple[bool, Any] = (True, function(*args))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        outcome = (False, traceback.format_exc())
    (folder / str(rank)).write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's model folder."""
    return load_file(run / "model" / "model.safetensors")


def steps_of(run: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints."""
    return [int(path.name.split("_")[1]) for path in complete_checkpoints(run / "checkpoints")]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Return an image folder of 3 classes x 8 small JPEGs in train, 3 x 4 in validation, that can be told apart."""
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
    """Let each evaluation measure a larger loss than the one before it: the first one is the best."""
    raise_losses(monkeypatch)


def raise_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `rising_loss` says."""
    real, count = Metrics.compute, itertools.count(1)

    def compute(self: Metrics, *add: Any) -> dict[str, float]:
        return {**real(self, *add), "loss": float(next(count))}

    monkeypatch.setattr(Metrics, "compute", compute)


@pytest.fixture
def forked_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies fork their arms from this process, which has imported everything and may have planted delays."""
    monkeypatch.setattr(processes, "CPU_METHOD", "fork")


def exit_status(arguments: list[str]) -> int:
    """Run the command line in this process, as if it were the first to; return its exit status."""
    reset_accelerate()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


RECIPE = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 32, workers: 0}
train: {duration: 2 steps, batch_size: 16}
log: {report: false}
"""


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
    """Run a Hub on loopback that this process's client and its children's talk to, logged in."""
    with running_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        own = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        places = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token")}
        for name, value in {**own, **places, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        children = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        for name, value in {**children, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        yield hub
