"""Errors of the system that no function expects: the command line's messages and statuses."""

from __future__ import annotations

import errno
import os

import pytest

from hf_fasttrain.utils.errors import Stopped
from hf_fasttrain.utils.limits import THREAD_REFUSED
from hf_fasttrain.utils.system_errors import explain_system_error


def error_of(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *([names[0], None, *names[1:]] if names else []))


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (error_of(errno.EACCES, "data/cat"), 2, "data/cat: Permission denied; give user "),
        (error_of(errno.ELOOP, "data"), 2, "data: Too many levels of symbolic links; a symbolic link leads back"),
        (error_of(errno.EXDEV, "a", "b"), 2, "a -> b: Invalid cross-device link"),
        (error_of(errno.ENOSPC), Stopped.NOT_WRITTEN, "the system reports: No space left on device; free some space"),
        (error_of(errno.EMFILE, "x"), 2, "too many open files (ulimit -n is "),
        (RuntimeError(THREAD_REFUSED), 2, "too many threads ("),
        (
            ImportError("advice\nError: libx.so: failed to map segment from shared object\nmore"),
            2,
            "no memory to load Error: libx.so: failed to map segment from shared object",
        ),
        (MemoryError(), 2, "out of memory; end other programs"),
    ],
)
def test_each_is_one_message(error: BaseException, status: int, text: str) -> None:
    explained = explain_system_error(error)
    assert explained is not None
    assert str(explained).startswith(text)
    assert explained.status == status


def test_errors_of_programs_are_left_alone() -> None:
    assert explain_system_error(RuntimeError("shape mismatch")) is None
    assert explain_system_error(ImportError("no module named x")) is None
    assert explain_system_error(OSError("of a library, without a number")) is None
