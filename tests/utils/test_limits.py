"""Limits on threads, processes and files: tried before they are needed, and one message that names them."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
from helpers.processes import in_child

from hf_fasttrain.utils import control_groups, limits
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.limits import explain_limit, process_limit, raise_file_limit, require_files, require_threads


def test_threads_that_can_run_are_started_and_end() -> None:
    before = threading.active_count()
    require_threads(20, "this")
    assert threading.active_count() == before


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system refuse a third thread."""
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError(limits.THREAD_REFUSED)
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("controllers", "version"), [("pids", 1), ("", 2)])
def test_too_few_threads_are_one_message_with_the_limit_of_the_container(
    controllers: str, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_groups, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "PROCESS_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"3:cpu:/elsewhere\n{2 if controllers else 0}:{controllers}:/job/part\n")
    folder = tmp_path / controllers / "job"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "pids.max").write_text("max\n")
    (folder / "pids.max").write_text("8\n")
    (folder / "pids.current").write_text("6\n")
    with pytest.raises(
        RunError,
        match=r"^numpy: 5 more processes and threads are needed, and 2 can be started "
        r"\(the container's pids.max is 8, of which 6 are in use[;)].*lower data.workers",
    ):
        require_threads(5, "numpy")


def test_absurd_numbers_are_refused_without_being_tried() -> None:
    with pytest.raises(RunError, match="1,000,000 more processes and threads can't be started"):
        require_threads(1_000_000, "this")
    with pytest.raises(RunError, match="1,000,000 more files must be open"):
        require_files(1_000_000, "this")


def test_too_few_files_are_one_message_and_none_stays_open() -> None:
    def try_it() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        first = os.open(os.devnull, os.O_RDONLY)
        os.close(first)
        os.closerange(first, 100)
        require_files(100 - first, "this")
        with pytest.raises(RunError, match=r"^this: 101 more files must be open \(ulimit -n is 100\). Raise the limit"):
            require_files(101, "this")
        require_files(100 - first, "this")

    in_child(try_it)


def test_the_limit_on_files_is_raised_as_far_as_it_goes() -> None:
    def try_it() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 300))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, 300)

    in_child(try_it)


def test_errors_of_limits_are_told_from_others() -> None:
    assert "too many threads" in str(explain_limit(RuntimeError(limits.THREAD_REFUSED)))
    assert "too many open files" in str(explain_limit(OSError(24, "Too many open files")))
    assert "too many processes" in str(process_limit(BlockingIOError(11, "Resource temporarily unavailable")))
    assert explain_limit(RuntimeError("other")) is explain_limit(OSError(2, "No such file")) is None
    assert process_limit(OSError(2, "No such file")) is None
