"""Processes forked from one that has imported everything, with accelerate as in a new process."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

LAUNCHER_VARIABLES = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def reset_accelerate() -> None:
    """Reset accelerate's process-wide state, as in a new process."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def run_processes(function: Callable[..., Any], *args: Any, num_processes: int = 2) -> list[Any]:
    """Return the results of `function(*args)` in `num_processes` processes connected over gloo.

    The children are forked: they start in a tenth of a second, where torchrun needs ten to import torch.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(function, args, rank, num_processes, port, Path(folder)) for rank in range(num_processes)]
        for child in children:
            os.waitpid(child, 0)
        return results_of_children(Path(folder), num_processes)


def results_of_children(folder: Path, number: int) -> list[Any]:
    """Return the results of children that ended in `end_child`; a child's exception becomes an AssertionError."""
    outcomes = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(number)]
    for ok, value in outcomes:
        assert ok, f"{value.strip().splitlines()[-1]}\n{value}"
    return [value for _, value in outcomes]


def end_child(work: Callable[[], Any], file: Path) -> NoReturn:
    """Write the result or exception of `work()` to a file and end this forked process."""
    try:
        reset_accelerate()
        outcome: tuple[bool, Any] = (True, work())
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        outcome = (False, traceback.format_exc())
    file.write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)


def in_child(function: Callable[[], Any]) -> Any:
    """Return the result of `function()` in a forked process; after torch's ONNX export no fork could train."""
    return run_processes(function, num_processes=1)[0]


UNKNOWN_USER = 65533  # an id without an entry in /etc/passwd
can_become_others = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def as_unknown_user(work: Callable[[], Any], folder: Path) -> Any:
    """Return what `work` returns in a process of that user, who may write to `folder` and has no home."""
    for path in (folder, *folder.parents):
        if path.is_relative_to(tempfile.gettempdir()) and path != Path(tempfile.gettempdir()):
            path.chmod(0o777)

    reader, writer = os.pipe()
    if not (child := os.fork()):
        outcome: tuple[bool, Any] = (False, None)
        try:
            os.setgroups([])
            os.setgid(UNKNOWN_USER)
            os.setuid(UNKNOWN_USER)
            for name in ("HOME", "HF_FASTTRAIN_CACHE", "HF_FASTTRAIN_TUNINGS", "XDG_CACHE_HOME"):
                os.environ.pop(name, None)
            tempfile.tempdir = str(folder)
            outcome = (True, work())
        except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
            outcome = (False, traceback.format_exc())
        finally:
            os.write(writer, pickle.dumps(outcome))
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        ok, value = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    assert ok, value
    return value


def free_port() -> int:
    """Return a free port for a process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_processes(rank: int, world: int, port: int) -> None:
    """Make this process one of several connected over gloo, as launchers do."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def _fork(function: Callable[..., Any], args: Any, rank: int, world: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    gc.freeze()  # garbage collection would copy all inherited memory
    join_processes(rank, world, port)
    end_child(lambda: function(*args), folder / str(rank))
