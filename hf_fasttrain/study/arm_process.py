"""Runs arms in processes: forked from one that has imported everything, suspended between their turns."""

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

from hf_fasttrain.data.pixels.cache_limits import nearest_existing
from hf_fasttrain.from_recipe.cache_plan import cache_folder, can_write
from hf_fasttrain.study.bench import Arm, ArmFailed
from hf_fasttrain.study.messages import ArmOptions, ArmRequest, Ready, Report, Turn
from hf_fasttrain.study.trial import Trial
from hf_fasttrain.train.launcher import num_processes
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.errors import NotEnoughMemory, RunError, UserError, first_line
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import COMPILER, let_forkserver_exit

# Imported before arms are forked: lazy imports of a training take seconds.
IMPORTED = ["hf_fasttrain.study.trial", COMPILER, "timm", "datasets", "sklearn.datasets"]
CPU_METHOD = "forkserver"  # start method of arms without a GPU
Message = tuple[str, Any]


def require_one_process() -> None:
    """Raise RunError under a launcher of several processes: arms are separate processes."""
    if num_processes() > 1:
        raise RunError("it measures on one device; start it without a launcher, as hf-fasttrain ablate, tune or doctor")
    if not hasattr(signal, "SIGSTOP"):
        raise RunError("it needs to stop processes (SIGSTOP), which this system can't; use Linux or macOS")


class Starter:
    """Starts the arms of a recipe; a context manager that removes their files at the end."""

    def __init__(self, recipe: ArmRequest, *, on_gpu: bool) -> None:
        self.recipe = recipe
        # CUDA can't be used in a fork of a process that has initialised it; the fork server has only imported it.
        method = "spawn" if on_gpu else CPU_METHOD
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(IMPORTED)

    def __enter__(self) -> Starter:
        self.folder = Path(tempfile.mkdtemp(prefix="hf_fasttrain-study-", dir=_folder_on_cache_disk(self.recipe)))
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, arm: Arm, options: ArmOptions, limit_seconds: float | None = None) -> ArmProcess:
        """Build an arm and return it, suspended; ArmFailed if that fails."""
        overrides = (*self.recipe.overrides, f"data.cache_dir={self.folder / 'pixels'}", *arm.overrides)
        recipe = ArmRequest(self.recipe.text, self.recipe.where, self.recipe.name, overrides)
        return ArmProcess(self._context, arm.name, recipe, options, self.folder, limit_seconds)


def _folder_on_cache_disk(recipe: ArmRequest) -> Path | None:
    """Return a folder on the disk of data.cache=disk, None for the default folder of temporary files."""
    try:
        folder = cache_folder(recipe.load())
    except UserError:  # arms will report it
        return None
    return nearest_existing(folder) if can_write(folder) else None


class ArmProcess:
    """A process that trains in turns and is suspended between them."""

    def __init__(
        self,
        context: Any,
        name: str,
        recipe: ArmRequest,
        options: ArmOptions,
        folder: Path,
        limit_seconds: float | None = None,
    ) -> None:
        self._connection, child_connection = context.Pipe()
        handle, log = tempfile.mkstemp(prefix="arm-", suffix=".log", dir=folder)
        os.close(handle)
        self._log = Path(log)
        # A cache that is shared with earlier runs or other arms would make compiling look cheap.
        compiled = folder / f"compiled-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        loader_start_method = multiprocessing.get_start_method()
        arguments = (child_connection, recipe, options, log, environment, loader_start_method)
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        try:
            self._start(context.get_start_method())
            child_connection.close()
            self.ready: Ready = self._answer(limit_seconds)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def _start(self, method: str) -> None:
        try:
            with _without_ctrl_c(), _without_main(unless=method == "fork"):
                self._process.start()
        except (EOFError, OSError) as error:
            if method != "forkserver" or (isinstance(error, OSError) and not isinstance(error, ConnectionError)):
                raise ArmFailed(f"its process could not be started: {first_line(error)}") from None
            raise ArmFailed(
                "its process could not be started: the fork server, which has imported everything, has ended; it may "
                "have been killed for lack of memory: end other programs, or allow more memory or processes",
                out_of_memory=True,
            ) from None

    def turn(self, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run a turn; see `bench.Running`."""
        report: Report = self._send(("turn", turn), limit_seconds)
        # Measured from here, while the arm is suspended: its loader processes would otherwise continue meanwhile.
        return replace(report, host_bytes=host_bytes(self._process.pid))

    def request(self, what: str, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run the loader or the computation alone; `what` is ``loader`` or ``compute``. Only before the first turn."""
        report: Report = self._send((what, turn), limit_seconds)
        return report

    def trace(self, path: Path, num_steps: int) -> None:
        """Write the torch profiler's trace of some steps."""
        self._send(("trace", (str(path), num_steps)), None)

    def _send(self, message: Message, limit_seconds: float | None) -> Any:
        """Resume the arm until it has answered a message."""
        self._signal(signal.SIGCONT)
        try:
            self._connection.send(message)
        except OSError:
            raise self._exit_error() from None
        answer = self._answer(limit_seconds)
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self, limit_seconds: float | None) -> Any:
        deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
        while not self._connection.poll(0.05):
            if not self._process.is_alive() and not self._connection.poll(0):
                raise self._exit_error()
            if deadline is not None and time.monotonic() > deadline:
                raise ArmFailed(f"not done after {limit_seconds:.0f} s, which is all the time it had")
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._exit_error() from None
        if kind == "failed":
            raise ArmFailed(value[0], out_of_memory=value[1])
        return value

    def _exit_error(self) -> ArmFailed:
        self._process.join(5)
        code = self._process.exitcode or 0
        output = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = f": {without_secrets(output[-1].strip())}" if output else ""
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
            self._process.kill()  # it may not have its own process group yet
            self._process.join(10)
        self._connection.close()


def host_bytes(pid: int) -> int:
    """Return the peak memory of a process plus the unshared memory (USS) of its children."""
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
    """Start a process that Ctrl-C does not reach, even before it has its own process group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main(*, unless: bool) -> Iterator[None]:
    """Start a process that does not import the main script: arms do not need it."""
    main = sys.modules["__main__"]
    saved = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    if not unless:
        main.__file__, main.__spec__ = None, None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = saved["__file__"], saved["__spec__"]


def _serve(
    connection: Connection,
    recipe: ArmRequest,
    options: ArmOptions,
    log: str,
    environment: dict[str, str],
    loader_start_method: str,
) -> None:
    """Build a trial and answer messages until the connection is closed."""
    # When the fork server ends too, the kernel wakes suspended arms (SIGCONT to orphaned groups), and they end.
    let_forkserver_exit()
    os.setpgid(0, 0)  # its own group, to be suspended with its loader processes, and out of Ctrl-C's reach
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Start loader processes as in ordinary training, but not by the fork server: they must be in this group.
    multiprocessing.set_start_method(
        "spawn" if loader_start_method == "forkserver" else loader_start_method, force=True
    )
    try:
        trial = Trial(recipe, options)
        connection.send(("ready", trial.ready))
        _answer_messages(connection, trial)
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except BaseException as error:  # noqa: BLE001 - sent to the parent, which continues with other arms
        with contextlib.suppress(OSError):
            connection.send(("failed", _describe_failure(error)))
    finally:
        sys.stdout.flush()
        os._exit(0)  # at once: a normal exit would wait for loader processes of a failed training


def _answer_messages(connection: Connection, trial: Trial) -> None:
    while True:
        what, value = connection.recv()
        if what == "loader":
            connection.send(("report", trial.loader_alone(value)))
        elif what == "compute":
            connection.send(("report", trial.compute_alone(value)))
        else:
            _take_turns(connection, trial, what, value)


def _take_turns(connection: Connection, trial: Trial, what: str, value: Any) -> None:
    """Train from the first step, turn by turn."""
    message: list[Message] = [(what, value)]

    def next_turn(report: Report | None) -> Turn:
        if report is not None:
            connection.send(("report", report))
            message[:] = [connection.recv()]
        what, value = message[0]
        if what == "trace":
            path, num_steps = value
            trial.trace_next(path)
            return Turn(min_steps=num_steps, max_steps=num_steps)
        turn: Turn = value
        return turn

    trial.run(next_turn)


def _describe_failure(error: BaseException) -> tuple[str, bool]:
    """Return an error as one line, and whether memory ran out."""
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}", True
    if isinstance(error, UserError):
        return str(error), isinstance(error, NotEnoughMemory)
    detail = "" if first_line(error) == type(error).__name__ else f": {first_line(error)}"
    return f"{type(error).__name__}{detail}", False
