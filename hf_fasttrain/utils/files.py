"""Files that are whole or not there: written beside their place, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

Bytes = bytes | memoryview
BLOCK = 32 << 20  # bytes that are written at once


class NewFile:
    """A file that is written from its beginning; its bytes are hashed on their way and synced at the end.

    Raises OSError where the disk is full or fails; a write that stops in its middle is taken up again.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = self._pending = 0
        self._hash = xxhash.xxh3_128()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)

    @property
    def digest(self) -> str:
        """The xxh3-128 of what was written, as hexadecimal digits."""
        return self._hash.hexdigest()

    def write(self, data: Bytes) -> None:
        """Append all of `data`."""
        view = memoryview(data).cast("B")
        self.num_bytes += len(view)
        while len(view):
            written = os.write(self._descriptor, view[:BLOCK])
            self._hash.update(view[:written])
            view = view[written:]
            self._pending += written
            if self._pending >= BLOCK:
                self._begin_to_sync()

    def _begin_to_sync(self) -> None:
        """Let the system write to the disk what it has, while more is coming: 0.85 of the time until all is synced."""
        self._pending = 0
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def digest_of(path: Path) -> str:
    """Return the xxh3-128 of a file, as `NewFile` reckons it."""
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hashed.update(block)
    return hashed.hexdigest()


def sync_folder(folder: Path) -> None:
    """Let a folder's names survive a loss of power."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it there, so that it is never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with NewFile(partial) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole."""
    write_atomically(path, json.dumps(values, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is none or it can't be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def new_folder(path: Path, last: Callable[[], None] | None = None) -> Iterator[Path]:
    """Make a folder beside its place, to be filled; at the end it is synced and takes the place of `path`.

    `last` is called when it is there. If anything fails on the way, what was at `path` is there again. Of a link, the
    folder that it leads to is replaced. Without `last`, there is a whole folder at `path` at any moment where the
    system can exchange two names at once; where it can't, `restore_folder` mends what a kill leaves.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    restore_folder(path)
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    placed = False
    try:
        os.makedirs(partial)
        yield partial
        sync_folder(partial)
        if last is None and path.exists() and exchange(partial, path):
            shutil.rmtree(partial, ignore_errors=True)  # the one before
        else:
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
            placed = True
        sync_folder(path.parent)
        if last is not None:
            last()
    except BaseException:
        shutil.rmtree(path if placed else partial, ignore_errors=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False, and nothing has changed, where the system or its disk can't."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # no Linux, or a C library before glibc 2.28
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def restore_folder(path: Path) -> None:
    """Put a folder back into its place whose process was killed between the two renames of `new_folder`."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        with suppress(OSError):  # a read-only disk: what looks for the folder says that it is not there
            os.rename(old, path)


def sync_files(folder: Path) -> None:
    """Sync every file below a folder that libraries have written, with the mode that new files get here.

    The safetensors library gives its files to their owner alone (0600): others could not read a shared run folder.
    """
    mode = new_file_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


def new_file_mode(folder: Path) -> int:
    """Return the mode of a file that is made in a folder: by the umask, which only a new file tells, or its ACL."""
    probe = folder / ".mode.partial"
    try:
        with NewFile(probe):
            return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Append a line as a whole: one that can't be written to its end is taken back. Raises OSError."""
    data = text.encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        if before and os.pread(descriptor, 1, before - 1) != b"\n":  # a line that a loss of power has torn
            data = b"\n" + data
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError:
            torn = os.pread(descriptor, len(data), before)
            if torn and data.startswith(torn):  # nobody has written after it
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, without lines that were torn; an empty list if there is no file."""
    if not path.exists():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                values.append(value)
    return values


def try_to_write(work: Callable[[], object], failed: Callable[[BaseException], None]) -> bool:
    """Do what writes files; where the disk does not take them, tell `failed` and return False."""
    from safetensors import SafetensorError

    try:
        work()
    except (OSError, SafetensorError) as error:
        failed(error)
        return False
    return True


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no data of the user's: .DS_Store, ._0.jpg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith((".", "__"))


def reason(error: BaseException) -> str:
    """Return why a file could not be written, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
