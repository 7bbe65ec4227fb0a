"""Processes that are forked from one that has imported everything, and accelerate as a new process has it."""

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

from accelerate.state import AcceleratorState, GradientState, PartialState

LAUNCHER_VARIABLES = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def reset_accelerate() -> None:
    """Forget accelerate's process-wide state, as in a process that has just started."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def run_processes(function: Callable[..., Any], *args: Any, num_processes: int = 2) -> list[Any]:
    """Return what `function(*args)` returns in each of `num_processes` processes that meet over gloo.

    The children are forked: they start in a tenth of a second, where torchrun needs ten to import torch.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(function, args, rank, num_processes, port, Path(folder)) for rank in range(num_processes)]
        for child in children:
            os.waitpid(child, 0)
        return results_of_children(Path(folder), num_processes)


def results_of_children(folder: Path, number: int) -> list[Any]:
    """Return what the children that ended in `end_child` have returned; a child's exception is an AssertionError."""
    outcomes = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(number)]
    for ok, value in outcomes:
        assert ok, f"{value.strip().splitlines()[-1]}\n{value}"
    return [value for _, value in outcomes]


def end_child(work: Callable[[], Any], file: Path) -> NoReturn:
    """Write what `work()` returns or raises to a file, and end this forked process."""
    try:
        reset_accelerate()
        outcome: tuple[bool, Any] = (True, work())
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        outcome = (False, traceback.format_exc())
    file.write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)


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
    gc.freeze()  # collecting what was inherited would copy all of it
    join_processes(rank, world, port)
    end_child(lambda: function(*args), folder / str(rank))
