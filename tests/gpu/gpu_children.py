"""Runs rows in a child of a process that has imported everything and not touched CUDA.

A child that dies, hangs or breaks its context loses one row: the rest of its group runs in a new child.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_rows import BY_NAME, row_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENABLED, DRY_RUN, PLANT = "HF_FASTTRAIN_GPU_TESTS", "HF_FASTTRAIN_GPU_DRY_RUN", "HF_FASTTRAIN_GPU_PLANT"
LINES = 12  # of an error that a result keeps
PR_SET_PDEATHSIG = 1  # of prctl
NO_TIME = "not run: time"
MOST_TEXT = 20_000  # characters of a failure


@dataclass
class Outcome:
    """How a row ended."""

    row: str
    status: str  # green, red, skipped, not run: ...
    seconds: float = 0.0
    error: str = ""  # its first lines
    facts: dict[str, Any] = field(default_factory=dict)  # recorded by its tests
    text: str = ""  # the complete text of a failure


def import_everything() -> None:
    """Import what the tests need, so that children start at once. Does not touch CUDA."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # otherwise asking for a GPU makes forked children unable to use it
    )
    import datasets  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torch._dynamo
    from transformers.models.dinov2 import modeling_dinov2  # noqa: F401

    import hf_fasttrain.cli
    import hf_fasttrain.study.trial  # noqa: F401

    assert not torch.cuda.is_initialized()


def can_fork() -> bool:
    """Return whether a child that is forked from this process can use the GPU."""
    child = os.fork()
    if not child:
        import torch

        try:
            torch.zeros(1, device="cuda").item()
        except BaseException:  # noqa: BLE001 - whatever it is, children have to be started another way
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def run_group(
    rows: Sequence[str],
    *,
    dry_run: bool,
    plant: str = "",
    limit: Callable[[str], float] = lambda row: BY_NAME[row].limit_seconds,
    fork: bool = True,
) -> Iterator[Outcome]:
    """Yield the outcomes of rows, run in one child until one of them fails.

    `limit` returns the seconds that a row may take from now on; 0: it is not started. After a red row, which may have
    damaged the child's context, the others get a new child.
    """
    left = list(rows)
    while left:
        if limit(left[0]) <= 0:
            yield Outcome(left.pop(0), NO_TIME)
            continue
        child = _Child(left, dry_run=dry_run, plant=plant, fork=fork)
        try:
            for outcome in child.outcomes(limit):
                left.remove(outcome.row)
                yield outcome
                if outcome.status != "green" and outcome.status != "skipped":
                    break
        finally:
            child.end()


class _Child:
    """A process that runs rows and reports their outcomes."""

    def __init__(self, rows: Sequence[str], *, dry_run: bool, plant: str, fork: bool) -> None:
        self.rows, self._buffer = list(rows), b""
        self.folder = tempfile.TemporaryDirectory(prefix="gpu-rows-")  # of all that its tests write
        self.log = open(Path(self.folder.name) / "log.txt", "w")  # noqa: SIM115 - closed in `end`
        self._receiving, sending = os.pipe()
        environment = {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            ENABLED: "1",
            DRY_RUN: "1" if dry_run else "",
            PLANT: plant,
        }
        if fork:
            sys.stdout.flush()
            sys.stderr.flush()
            self.pid = os.fork()
            if not self.pid:
                _be_child(self.rows, sending, self.folder.name, self.log.fileno(), environment)
            os.close(sending)
            return
        command = [sys.executable, __file__, str(sending), self.folder.name, *self.rows]
        process = subprocess.Popen(
            command,
            pass_fds=[sending],
            env={**os.environ, **environment},
            stdout=self.log.fileno(),
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        os.close(sending)
        self.pid = process.pid
        process.returncode = 0  # this process waits for it

    def outcomes(self, limit: Callable[[str], float]) -> Iterator[Outcome]:
        """Yield the child's outcomes; a row in which it dies, or that takes too long, is red."""
        started, row = time.monotonic(), self.rows[0]
        until = started + limit(row)
        done: list[str] = []
        while len(done) < len(self.rows):
            message = self._message(until)
            if not message:
                yield self._lost(row, time.monotonic() - started, died=message is not None)
                return
            if "begins" in message:
                row, started = message["begins"], time.monotonic()
                until = started + limit(row)
                if until <= started:
                    yield Outcome(row, NO_TIME)
                    return
                continue
            outcome = Outcome(**message)
            done.append(outcome.row)
            yield outcome
            row, started = next((name for name in self.rows if name not in done), row), time.monotonic()
            until = started + limit(row)

    def _message(self, until: float) -> dict[str, Any] | None:
        """Return the child's next message; {} if it has ended, None when it is too late."""
        while b"\n" not in self._buffer:
            exit_info = self._ending()  # checked first, so that everything written before is still read
            left = until - time.monotonic()
            ready, _, _ = select.select([self._receiving], [], [], 0 if exit_info else max(0.0, min(0.2, left)))
            chunk = os.read(self._receiving, 1 << 16) if ready else b""
            if not chunk and (ready or exit_info):
                return {}
            if not chunk and left <= 0:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _ending(self, *, wait: bool = False) -> Any:
        """Return how the child has ended, None if it is running; its loaders may hold the pipe longer."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG))

    def _lost(self, row: str, seconds: float, *, died: bool) -> Outcome:
        output = Path(self.log.name).read_text(errors="replace")[-MOST_TEXT:]
        if not died and seconds < BY_NAME[row].limit_seconds - 1:
            return Outcome(row, NO_TIME, seconds)
        if not died:
            return Outcome(row, "red", seconds, f"took longer than {seconds:.0f} s", text=output)
        ending = self._ending(wait=True)
        exited = ending.si_code == os.CLD_EXITED
        reason = f"status {ending.si_status}" if exited else f"signal {signal.Signals(ending.si_status).name}"
        error = "\n".join([f"the process ended ({reason})", *output.strip().splitlines()[-LINES:]])
        return Outcome(row, "red", seconds, error, text=output)

    def end(self) -> None:
        """End the child and all processes that it has started."""
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._receiving)
        self.log.close()
        self.folder.cleanup()


def _be_child(rows: Sequence[str], sending: int, folder: str, log: int, environment: dict[str, str]) -> None:
    """Run rows in this process, which was forked for them, and exit."""
    try:
        os.setpgid(0, 0)  # so that all its processes can be ended
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and not to outlive its parent
        gc.freeze()  # the garbage collector never visits objects from before the fork
        os.environ.update(environment)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_rows(rows, sending, folder)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def run_rows(rows: Sequence[str], sending: int, folder: str) -> None:
    """Run the tests of rows with pytest, in a folder, and write their outcomes to the pipe."""
    import pytest

    reporter = _Reporter(rows, sending)
    files = sorted({BY_NAME[row].file for row in rows})
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",  # it may run in a process of one that distributes tests
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "--basetemp",
        f"{folder}/tests",
    ]
    options += ["-o", "addopts=", "-o", "filterwarnings=default", "-o", "timeout=0"]
    pytest.main([*options, *(str(HERE / file) for file in files)], plugins=[reporter])
    for row in reporter.untold:
        reporter.tell(Outcome(row, "red", 0.0, f"no test of it was run\n{reporter.not_collected}"))


class _Reporter:
    """A pytest plugin: selects the tests of rows, in their order, and sends each row's outcome to the parent."""

    def __init__(self, rows: Sequence[str], sending: int) -> None:
        self.rows, self.sending = list(rows), sending
        self.untold = list(rows)
        self.not_collected = ""  # why test files could not be collected
        self._row = ""
        self._reports: list[Any] = []
        self._began = 0.0

    def tell(self, outcome: Outcome) -> None:
        """Write an outcome to the pipe."""
        if outcome.row in self.untold:
            self.untold.remove(outcome.row)
        self._write(asdict(outcome))

    def _write(self, message: dict[str, Any]) -> None:
        os.write(self.sending, json.dumps(message).encode() + b"\n")

    def pytest_collectreport(self, report: Any) -> None:
        """Record why a test file could not be collected."""
        if report.failed:
            self.not_collected = report.longreprtext[-MOST_TEXT:]

    def pytest_collection_modifyitems(self, session: Any, config: Any, items: list[Any]) -> None:
        """Keep only the requested rows' tests, in the rows' order."""
        chosen = [item for item in items if row_of(item.name) in self.rows]
        items[:] = sorted(chosen, key=lambda item: self.rows.index(row_of(item.name)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Send the outcome of the last row if this test belongs to another one."""
        row = row_of(nodeid.rsplit("::")[-1])
        if row != self._row:
            self._finish()
            self._row, self._reports, self._began = row, [], time.monotonic()
            self._write({"begins": row})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record pytest's reports of a test."""
        self._reports.append(report)

    def pytest_sessionfinish(self) -> None:
        """Send the outcome of the last row."""
        self._finish()

    def _finish(self) -> None:
        if self._row and self._row in self.untold:
            self.tell(summed_up(self._row, self._reports, time.monotonic() - self._began))


def summed_up(row: str, reports: Sequence[Any], seconds: float) -> Outcome:
    """Return the outcome of a row from pytest's reports of its tests."""
    failed = [report for report in reports if report.failed]
    facts = {name: value for report in reports if report.when == "teardown" for name, value in report.user_properties}
    if failed:
        lines = [line for report in failed for line in _error_lines(report)]
        text = "\n\n".join(f"{report.nodeid} ({report.when})\n{report.longreprtext}" for report in failed)[:MOST_TEXT]
        return Outcome(row, "red", seconds, "\n".join(lines[:LINES]), facts, text)
    skipped = [report for report in reports if report.skipped]
    if skipped and not any(report.passed and report.when == "call" for report in reports):
        reason = skipped[0].longrepr[2] if isinstance(skipped[0].longrepr, tuple) else str(skipped[0].longrepr)
        return Outcome(row, "skipped", seconds, reason.removeprefix("Skipped: "), facts)
    return Outcome(row, "green", seconds, "", facts)


def _error_lines(report: Any) -> list[str]:
    """Return the failed test, its location, and the first lines of its error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return [report.nodeid, *report.longreprtext.splitlines()[-LINES:]]
    location = f"{Path(crash.path).name}:{crash.lineno}"
    return [f"{report.nodeid.rsplit('::')[-1]} at {location}", *crash.message.splitlines()[: LINES - 1]]


if __name__ == "__main__":  # if forked children can't use the GPU
    run_rows(sys.argv[3:], int(sys.argv[1]), sys.argv[2])
