"""Command lines in forked processes that are watched, for fuzzers: what came of each, and what was wrong with it."""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

IMPORTED = (
    "datasets", "jinja2", "matplotlib.figure", "matplotlib.font_manager", "plotly.offline",
    "safetensors.torch", "sklearn.datasets", "timm", "transformers", "hf_fasttrain.cli",
    "hf_fasttrain.from_recipe.trainer", "hf_fasttrain.hub.push", "hf_fasttrain.inference", "hf_fasttrain.report.report",
    "hf_fasttrain.train.trainer",
)  # fmt: skip
STATUSES = (0, 2, 74, 75)
MOST_MEMORY, MOST_SECONDS = 2 << 30, 60.0
MOST_ADDRESSES = 16 << 30  # bytes; a command that asks for all memory ends instead of the machine
MOST_CHARACTERS = 20_000  # of a message
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
WARNING = re.compile(r"^\S+\.py:\d+: \w*Warning: .*", re.MULTILINE)  # of Python, which no user can do anything about
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {  # audit events that change files, and which of their arguments are paths
    "os.chmod": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.symlink": 2,
    "os.truncate": 1, "os.utime": 1, "shutil.rmtree": 1,
}  # fmt: skip
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")


@dataclass(frozen=True)
class Outcome:
    """What a command did. `status`: negative for a signal, None if it was still running when its time was up."""

    status: int | None
    output: str
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is counted as."""
        return "still running" if self.status is None else f"status {self.status}"


class Watch:
    """Records which files outside of a folder are changed, which programs started, and which addresses looked up."""

    def __init__(self, folder: Path, record: Path) -> None:
        self.allowed = (f"{os.path.realpath(folder)}/", "/dev/null", "/proc/")
        self._record, self._is_on = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND), True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & WRITES:
            paths: Sequence[Any] = args[:1]
        elif event in CHANGES:
            paths = args[: CHANGES[event]]
        elif event.startswith(PROGRAMS):
            paths = () if event == "socket.connect" and isinstance(args[1], str | bytes) else ("/ started or reached",)
        else:
            return
        if self._is_on and not all(self._is_allowed(path) for path in paths):
            self._is_on = False  # what follows may be of this
            os.write(self._record, f"{event} {args}\n"[:500].encode(errors="replace"))
            self._is_on = True

    def _is_allowed(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        name = os.fsdecode(path)
        place = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        return f"{place}/".startswith(self.allowed[0]) or name.startswith(self.allowed[1:])


def run_watched(arguments: Sequence[str], place: Path, prepare: Callable[[], object] = lambda: None) -> Outcome:
    """Run a command line of hf-fasttrain in a forked process, in the folder `place/given`, which is all it may change.

    `prepare` is called in that process. What is beside the folder is compared before and after.
    """
    given, log, record = place / "given", place / "output.txt", place / "record.txt"
    for path in (log, record):
        path.unlink(missing_ok=True)
    before = dict(_files_beside(place))
    gc.freeze()  # collecting what is inherited would copy all of it
    child = os.fork()
    if not child:
        _be_command(arguments, given, log, record, prepare)
    status, memory = _wait(child)
    left = _left_running(child)
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    problems = [*_problems(status, output), *record.read_text(errors="replace").splitlines()]
    if memory > MOST_MEMORY:
        problems.append(f"{memory >> 20} MiB of memory")
    if left:
        problems.append(f"left running: {left}")
    if dict(_files_beside(place)) != before:
        problems.append("a file outside of the folder was changed")
    return Outcome(status, output, tuple(problems))


def _be_command(
    arguments: Sequence[str], given: Path, log: Path, record: Path, prepare: Callable[[], object]
) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.chdir(given)
        os.environ |= {"HOME": str(given), "TMPDIR": str(given), "XDG_CACHE_HOME": str(given / "cache")}
        os.environ |= {"HF_FASTTRAIN_CACHE": str(given / "pixels"), "HF_FASTTRAIN_TUNINGS": str(given / "tunings")}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(given / "inductor")
        tempfile.tempdir = None
        output, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in ((0, nothing), (1, output), (2, output)):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Watch(given, record)
        prepare()
        from hf_fasttrain.cli import main

        sys.argv = ["hf-fasttrain", *arguments]
        main(list(arguments))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter prints it
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as the interpreter does
            util._exit_function()  # type: ignore[attr-defined] # ends loader processes, as the interpreter does
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _wait(child: int) -> tuple[int | None, int]:
    """Return exit status and the largest memory in bytes; after MOST_SECONDS the process group is killed."""
    end = time.monotonic() + MOST_SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            return None, usage.ru_maxrss << 10
        time.sleep(0.002)


def _left_running(session: int) -> list[str]:
    """Return the processes of a session that has ended, and end them; they have a second to end by themselves."""
    end = time.monotonic() + 1
    while (found := dict(_members(session))) and time.monotonic() < end:
        time.sleep(0.01)
    for process in found:
        os.kill(process, signal.SIGKILL)
    return sorted(found.values())


def _members(session: int) -> Iterator[tuple[int, str]]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path("/proc", name, "stat").read_text(errors="replace")
        except OSError:
            continue
        program, state = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if int(state[3]) == session and state[0] != "Z":
            yield int(name), program


def _files_beside(place: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in sorted(place.rglob("*")):
        if "given" not in path.relative_to(place).parts[:1] and path.name not in ("output.txt", "record.txt"):
            status = path.lstat()
            yield str(path), (status.st_size, status.st_mtime_ns)


def _problems(status: int | None, output: str) -> Iterator[str]:
    errors = len(re.findall(r"^error: ", output, re.MULTILINE))
    if status not in STATUSES:
        yield "still running" if status is None else f"exit status {status}"
    if "Traceback (most recent call last)" in output:
        yield f"a traceback, {output.strip().splitlines()[-1][:200]}"
    if status == 0 and errors:
        yield f"status 0 and {errors} errors"
    if status == 2 and errors != 1:
        yield f"{errors} lines of errors"
    if status != 0 and len(output) > MOST_CHARACTERS:
        yield f"{len(output):,} characters"
    if found := CONTROL.search(output):
        yield f"prints the control character {found[0]!r}"
    if warned := WARNING.search(output):
        yield f"a warning, {warned[0][:200]}"


@dataclass(frozen=True)
class Case:
    """An input of a fuzzer: commands of which each is run if the one before it ended well, and the files to keep.

    `in_command` is called in the process of a command, `problem` after it.
    """

    description: str
    commands: list[list[str]]
    files: list[Path]
    in_command: Callable[[], object] = lambda: None
    problem: Callable[[], str | None] = lambda: None


Prepare = Callable[[Path], object]  # writes into an empty folder what the cases need
MakeCase = Callable[[int, int, Path], Case]  # seed, number and folder -> the case, whose files are in the folder


def fuzz(seed: int, numbers: Sequence[int], prepare: Prepare, make_case: MakeCase, keep: Path) -> Counter[str]:
    """Run cases in a folder of their own, print and keep those that went wrong, and return how many gave what."""
    counts: Counter[str] = Counter()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        place = Path(folder).resolve()
        prepare(place)
        for number in numbers:
            case = make_case(seed, number, place)
            for command in case.commands:
                outcome = run_watched(command, place, case.in_command)
                if problem := case.problem():
                    outcome = replace(outcome, problems=(*outcome.problems, problem))
                counts[f"{command[0]}: {'wrong' if outcome.problems else outcome.name}"] += 1
                if outcome.problems:
                    print(f"{number}: {case.description}; {command[0]}: {'; '.join(outcome.problems)}", flush=True)
                    _keep(keep / f"{seed}_{number}", case, command, outcome)
                if outcome.status != 0:
                    break
    return counts


def _keep(folder: Path, case: Case, command: list[str], outcome: Outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.txt").write_text(f"{case.description}\n{command!r}\n{outcome.problems}\n{outcome.output}")
    for path in case.files:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def import_everything() -> None:
    """Import what commands import when they are called, so that forked processes need not."""
    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    platform.processor()  # starts uname, once


def fuzz_from_command_line(about: str, prepare: Prepare, make_case: MakeCase) -> None:
    """Read options, run cases in several processes, and end with exit status 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep", type=Path, default=None, help="folder for what went wrong")
    args = parser.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp(prefix="fuzz_kept_"))
    print(f"seed {args.seed}", flush=True)
    import_everything()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        numbers = range(args.first, args.first + args.count)
        parts = [numbers[start :: args.jobs] for start in range(args.jobs)]
        running = [pool.submit(fuzz, args.seed, part, prepare, make_case, keep) for part in parts]
        counts = sum((each.result() for each in running), Counter[str]())
    wrong = sum(count for name, count in counts.items() if name.endswith("wrong"))
    print(f"{args.count} inputs, seed {args.seed}: {dict(sorted(counts.items()))}; {wrong} went wrong; kept in {keep}")
    sys.exit(1 if wrong else 0)
