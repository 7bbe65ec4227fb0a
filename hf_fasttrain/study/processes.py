"""Arms as processes: started from one that has imported everything, stopped while others have their turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from hf_fasttrain.errors import RunError, UserError, without_secrets
from hf_fasttrain.study.measure import Arm, ArmFailed
from hf_fasttrain.study.trial import Asked, Ready, Report, Trial, Turn, Wishes

# Before arms are forked: what a training imports when it first needs it takes seconds.
IMPORTED = ["hf_fasttrain.study.trial", "torch._dynamo", "timm", "datasets", "sklearn.datasets"]
CPU_METHOD = "forkserver"  # how arms begin where there is no GPU
Message = tuple[str, Any]


def require_one_process() -> None:
    """Raise RunError under a launcher of several processes: arms are processes of their own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("it measures on one device; start it without a launcher, as hf-fasttrain ablate, tune or doctor")
    if not hasattr(signal, "SIGSTOP"):
        raise RunError(
            "it needs processes that can be stopped (SIGSTOP), which this system has not; use Linux or macOS"
        )


class Starter:
    """Starts a recipe's arms; a context, which removes what they wrote on leaving."""

    def __init__(self, asked: Asked, *, on_gpu: bool) -> None:
        self.asked = asked
        # A process that has looked for a GPU can't be forked and use it; one that has only imported can.
        method = "spawn" if on_gpu else CPU_METHOD
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(IMPORTED)

    def __enter__(self) -> Starter:
        self.folder = Path(tempfile.mkdtemp(prefix="hf_fasttrain-study-"))
        self._environment = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR",)}
        # What was compiled earlier would make compiling look cheap.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "compiled")
        return self

    def __exit__(self, *_: Any) -> None:
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, arm: Arm, wishes: Wishes, limit_seconds: float | None = None) -> ArmProcess:
        """Return an arm that is built and waits; ArmFailed if it can't be."""
        overrides = (*self.asked.overrides, f"data.cache_dir={self.folder / 'pixels'}", *arm.overrides)
        asked = Asked(self.asked.text, self.asked.where, self.asked.name, overrides)
        return ArmProcess(self._context, asked, wishes, self.folder, limit_seconds)


class ArmProcess:
    """A process that trains in turns, and stands still between them."""

    def __init__(
        self, context: Any, asked: Asked, wishes: Wishes, folder: Path, limit_seconds: float | None = None
    ) -> None:
        self._own, theirs = context.Pipe()
        handle, name = tempfile.mkstemp(prefix="arm-", suffix=".log", dir=folder)
        os.close(handle)
        self._log = Path(name)
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        loaders = multiprocessing.get_start_method()
        arguments = (theirs, asked, wishes, name, environment, loaders)
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        with contextlib.nullcontext() if context.get_start_method() == "fork" else _without_main():
            self._process.start()
        theirs.close()
        self._stopped = False
        try:
            self.ready: Ready = self._answer(limit_seconds)
        except BaseException:
            self.close()
            raise
        self._stop()

    def turn(self, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run a turn; see `Running`."""
        self._go_on()
        report: Report = self._ask(("turn", turn), limit_seconds)
        self._stop()
        # Looked at from here while they stand still: loader processes would go on working meanwhile.
        return replace(report, host_bytes=host_bytes(self._process.pid))

    def ask(self, what: str, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run the loader or the computing alone; `what` is ``loader`` or ``compute``; not once turns have begun."""
        self._go_on()
        report: Report = self._ask((what, turn), limit_seconds)
        self._stop()
        return report

    def trace(self, path: Path, num_steps: int) -> None:
        """Write the torch profiler's trace of some steps."""
        self._go_on()
        self._ask(("trace", (str(path), num_steps)), None)
        self._stop()

    def _ask(self, message: Message, limit_seconds: float | None) -> Any:
        try:
            self._own.send(message)
        except OSError:
            raise ArmFailed(self._how_it_ended()) from None
        return self._answer(limit_seconds)

    def _answer(self, limit_seconds: float | None) -> Any:
        until = None if limit_seconds is None else time.monotonic() + limit_seconds
        while not self._own.poll(0.05):
            if not self._process.is_alive() and not self._own.poll(0):
                raise ArmFailed(self._how_it_ended())
            if until is not None and time.monotonic() > until:
                raise ArmFailed(f"not done after {limit_seconds:.0f} s, which is all the time it had")
        try:
            kind, value = self._own.recv()
        except (EOFError, OSError):
            raise ArmFailed(self._how_it_ended()) from None
        if kind == "failed":
            raise ArmFailed(value)
        return value

    def _how_it_ended(self) -> str:
        self._process.join(5)
        code = self._process.exitcode or 0
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = f": {without_secrets(said[-1].strip())}" if said else ""
        if code == -signal.SIGKILL:
            return "its process was killed, perhaps for want of memory"
        return f"its process ended ({f'signal {-code}' if code < 0 else f'status {code}'}){last}"

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self._stopped = True

    def _go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self._stopped = False

    def _signal(self, number: int) -> None:
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the process and its loader processes."""
        self._signal(signal.SIGKILL)
        if self._process.is_alive():
            self._process.kill()
        self._process.join(10)
        self._own.close()


def host_bytes(pid: int) -> int:
    """Return the memory of a process and its children, pages that several share counted by their share."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(memory, "pss", memory.rss)
    return total


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start a process that does not run the main script again: arms need nothing of it."""
    main = sys.modules["__main__"]
    saved = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    main.__file__, main.__spec__ = None, None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = saved["__file__"], saved["__spec__"]


# --- in the arm's process ----------------------------------------------------------------------------------


def _serve(
    connection: Connection, asked: Asked, wishes: Wishes, log: str, environment: dict[str, str], loaders: str
) -> None:
    """Build a trial and do what is asked of it, until nobody asks any more."""
    os.setpgid(0, 0)  # a group of its own, to be stopped with its loader processes, and out of Ctrl-C's reach
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Loader processes begin as in an ordinary training, not as this one did; they must be of its group.
    multiprocessing.set_start_method("spawn" if loaders == "forkserver" else loaders, force=True)
    try:
        trial = Trial(asked, wishes)
        connection.send(("ready", trial.ready))
        _answer_all(connection, trial)
    except (EOFError, BrokenPipeError):
        pass  # whoever asked is gone
    except BaseException as error:  # noqa: BLE001 - told to the one who asked, who goes on with other arms
        with contextlib.suppress(OSError):
            connection.send(("failed", _in_one_line(error)))
    finally:
        sys.stdout.flush()
        os._exit(0)  # at once: loader processes of a training that failed would be waited for


def _answer_all(connection: Connection, trial: Trial) -> None:
    while True:
        what, value = connection.recv()
        if what == "loader":
            connection.send(("report", trial.loader_alone(value)))
        elif what == "compute":
            connection.send(("report", trial.compute_alone(value)))
        else:
            _take_turns(connection, trial, what, value)


def _take_turns(connection: Connection, trial: Trial, what: str, value: Any) -> None:
    """Run `fit` from its first step on, by turns."""
    asked: list[Message] = [(what, value)]

    def next_turn(report: Report | None) -> Turn:
        if report is not None:
            connection.send(("report", report))
            asked[:] = [connection.recv()]
        what, value = asked[0]
        if what == "trace":
            path, num_steps = value
            trial.trace_next(path)
            return Turn(min_steps=num_steps, max_steps=num_steps)
        turn: Turn = value
        return turn

    trial.run(next_turn)


def _in_one_line(error: BaseException) -> str:
    from hf_fasttrain.out_of_memory import is_out_of_memory

    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if is_out_of_memory(error):
        return f"out of memory: {first}"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
