"""Arms as processes: started from one that has imported everything, stopped while others have their turn."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import multiprocessing.forkserver
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

from hf_fasttrain.from_recipe.accelerator import num_processes
from hf_fasttrain.from_recipe.cache_plan import cache_folder, can_write, nearest_existing
from hf_fasttrain.study.bench import Arm, ArmFailed
from hf_fasttrain.study.messages import ArmOptions, ArmRequest, Ready, Report, Turn
from hf_fasttrain.study.trial import Trial
from hf_fasttrain.utils.errors import NotEnoughMemory, RunError, UserError, first_line, without_secrets
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import COMPILER, let_forkserver_exit

# Before arms are forked: what a training imports when it first needs it takes seconds.
IMPORTED = ["hf_fasttrain.study.trial", COMPILER, "timm", "datasets", "sklearn.datasets"]
CPU_METHOD = "forkserver"  # how arms begin where there is no GPU
Message = tuple[str, Any]


def require_one_process() -> None:
    """Raise RunError under a launcher of several processes: arms are processes of their own."""
    if num_processes() > 1:
        raise RunError("it measures on one device; start it without a launcher, as hf-fasttrain ablate, tune or doctor")
    if not hasattr(signal, "SIGSTOP"):
        raise RunError(
            "it needs processes that can be stopped (SIGSTOP), which this system has not; use Linux or macOS"
        )


class Starter:
    """Starts a recipe's arms; a context, which removes what they wrote on leaving."""

    def __init__(self, asked: ArmRequest, *, on_gpu: bool) -> None:
        self.asked = asked
        # A process that has looked for a GPU can't be forked and use it; one that has only imported can.
        method = "spawn" if on_gpu else CPU_METHOD
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(IMPORTED)

    def __enter__(self) -> Starter:
        self.folder = Path(tempfile.mkdtemp(prefix="hf_fasttrain-study-", dir=_where_caches_are(self.asked)))
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, arm: Arm, options: ArmOptions, limit_seconds: float | None = None) -> ArmProcess:
        """Return an arm that is built and waits; ArmFailed if it can't be."""
        overrides = (*self.asked.overrides, f"data.cache_dir={self.folder / 'pixels'}", *arm.overrides)
        asked = ArmRequest(self.asked.text, self.asked.where, self.asked.name, overrides)
        return ArmProcess(self._context, arm.name, asked, options, self.folder, limit_seconds)


def _where_caches_are(asked: ArmRequest) -> Path | None:
    """Return a folder on the disk that data.cache=disk would use, None for the usual one for temporary files."""
    try:
        wished = cache_folder(asked.load())
    except UserError:  # arms will say so
        return None
    return nearest_existing(wished) if can_write(wished) else None


class ArmProcess:
    """A process that trains in turns, and stands still between them."""

    def __init__(
        self,
        context: Any,
        name: str,
        asked: ArmRequest,
        options: ArmOptions,
        folder: Path,
        limit_seconds: float | None = None,
    ) -> None:
        self._own, theirs = context.Pipe()
        handle, log = tempfile.mkstemp(prefix="arm-", suffix=".log", dir=folder)
        os.close(handle)
        self._log = Path(log)
        # What was compiled earlier, or by another arm, would make compiling look cheap.
        compiled = folder / f"compiled-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        loaders = multiprocessing.get_start_method()
        arguments = (theirs, asked, options, log, environment, loaders)
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        try:
            with _without_ctrl_c(), _without_main(unless=context.get_start_method() == "fork"):
                self._process.start()
            theirs.close()
            self.ready: Ready = self._answer(limit_seconds)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run a turn; see `Running`."""
        report: Report = self._ask(("turn", turn), limit_seconds)
        # Looked at from here while they stand still: loader processes would go on working meanwhile.
        return replace(report, host_bytes=host_bytes(self._process.pid))

    def request(self, what: str, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run the loader or the computing alone; `what` is ``loader`` or ``compute``; not once turns have begun."""
        report: Report = self._ask((what, turn), limit_seconds)
        return report

    def trace(self, path: Path, num_steps: int) -> None:
        """Write the torch profiler's trace of some steps."""
        self._ask(("trace", (str(path), num_steps)), None)

    def _ask(self, message: Message, limit_seconds: float | None) -> Any:
        """Let the arm go on until it has answered."""
        self._signal(signal.SIGCONT)
        try:
            self._own.send(message)
        except OSError:
            raise self._how_it_ended() from None
        answer = self._answer(limit_seconds)
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self, limit_seconds: float | None) -> Any:
        until = None if limit_seconds is None else time.monotonic() + limit_seconds
        while not self._own.poll(0.05):
            if not self._process.is_alive() and not self._own.poll(0):
                raise self._how_it_ended()
            if until is not None and time.monotonic() > until:
                raise ArmFailed(f"not done after {limit_seconds:.0f} s, which is all the time it had")
        try:
            kind, value = self._own.recv()
        except (EOFError, OSError):
            raise self._how_it_ended() from None
        if kind == "failed":
            raise ArmFailed(value[0], out_of_memory=value[1])
        return value

    def _how_it_ended(self) -> ArmFailed:
        self._process.join(5)
        code = self._process.exitcode or 0
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = f": {without_secrets(said[-1].strip())}" if said else ""
        if code == -signal.SIGKILL:
            return ArmFailed("its process was killed, possibly out of memory", out_of_memory=True)
        return ArmFailed(f"its process ended ({f'signal {-code}' if code < 0 else f'status {code}'}){last}")

    def _signal(self, number: int) -> None:
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the process and its loader processes."""
        if self._process.pid is not None:
            self._signal(signal.SIGKILL)
            self._process.kill()  # it may not have a group of its own yet
            self._process.join(10)
        self._own.close()


def host_bytes(pid: int) -> int:
    """Return the most memory that a process has had, and what its children have now that nobody else has."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        total = _peak_bytes(process)
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += child.memory_full_info().uss
    return total


def _peak_bytes(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # not Linux
        return int(process.memory_info().rss)
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Start a process that Ctrl-C does not reach, not even before it has a group of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main(*, unless: bool) -> Iterator[None]:
    """Start a process that does not run the main script again: arms need nothing of it."""
    main = sys.modules["__main__"]
    saved = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    if not unless:
        main.__file__, main.__spec__ = None, None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = saved["__file__"], saved["__spec__"]


# --- in the arm's process ----------------------------------------------------------------------------------


def _serve(
    connection: Connection, asked: ArmRequest, options: ArmOptions, log: str, environment: dict[str, str], loaders: str
) -> None:
    """Build a trial and do what is asked of it, until nobody asks any more."""
    # When the fork server ends too, the kernel wakes arms that stand still (SIGCONT to orphaned groups), and they end.
    let_forkserver_exit()
    os.setpgid(0, 0)  # a group of its own, to be stopped with its loader processes, and out of Ctrl-C's reach
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Loader processes begin as in an ordinary training, not as this one did; they must be of its group.
    multiprocessing.set_start_method("spawn" if loaders == "forkserver" else loaders, force=True)
    try:
        trial = Trial(asked, options)
        connection.send(("ready", trial.ready))
        _answer_all(connection, trial)
    except (EOFError, BrokenPipeError):
        pass  # whoever asked is gone
    except BaseException as error:  # noqa: BLE001 - told to the one who asked, who goes on with other arms
        with contextlib.suppress(OSError):
            connection.send(("failed", _why_it_failed(error)))
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
    """Train from the first step on, by turns."""
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


def _why_it_failed(error: BaseException) -> tuple[str, bool]:
    """Return a line about an error, and whether memory was short."""
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}", True
    if isinstance(error, UserError):
        return str(error), isinstance(error, NotEnoughMemory)
    named = "" if first_line(error) == type(error).__name__ else f": {first_line(error)}"
    return f"{type(error).__name__}{named}", False
