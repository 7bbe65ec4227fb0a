"""Atomic writes: files and folders are written under a temporary name, synced, and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from hf_fasttrain.utils.errors import RunError, shown
from hf_fasttrain.utils.standard_folders import has_home

Bytes = bytes | memoryview
NO_LINK = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)  # flags of `os.open` for what is written
BLOCK = 32 << 20  # bytes per write
LARGEST_FILE = 1 << 30  # bytes of a file that is read as a whole, such as an image
MAX_JSON_BYTES, MAX_JSON_DEPTH = 32 << 20, 100  # of a file that is read back
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes the halves of a character


class NewFile:
    """A new file, hashed while it is written and synced when it is closed.

    Raises OSError if the disk is full or fails, and for a link: in a stranger's folder it could lead to any file.
    Partial writes are continued.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = self._pending = 0
        self._hash = xxhash.xxh3_128()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o666)

    @property
    def digest(self) -> str:
        """The xxh3-128 of the bytes written so far, in hexadecimal."""
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
                self._start_sync()

    def _start_sync(self) -> None:
        """Make the kernel write back what it has while more is written: 0.85 of the time until everything is synced."""
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


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Return an existing regular file with something in it, opened for reading bytes.

    Raises OSError, before anything is opened, for a folder, a FIFO (which would wait for a writer), a device (which may
    never end) and a file of 0 bytes (those of /proc claim to have none, and some of them wait) or of more than
    LARGEST_FILE (such as /proc/kcore).
    """
    if not _readable_size(path):
        raise OSError("0 bytes")
    return open(path, "rb")


def read_regular(path: str | os.PathLike[str], most: int = LARGEST_FILE) -> bytes:
    """Return the bytes of a regular file, which may be empty. Raises OSError for others, as `open_regular` does."""
    size = _readable_size(path, most)
    if not size:
        return b""
    with open(path, "rb") as file:
        return file.read(size)  # no more: what is read while somebody writes to it might not end


def _readable_size(path: str | os.PathLike[str], most: int = LARGEST_FILE) -> int:
    size = require_regular(path)
    if size > most:
        raise OSError(f"{size:,} bytes, too large to be read as a whole")
    return size


def require_regular(path: str | os.PathLike[str]) -> int:
    """Return the size of a regular file in bytes. Raises OSError for a folder, a FIFO or a device."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{kind_of_file(status.st_mode)}, not a regular file")
    return status.st_size


def existing_path(name: str) -> str | None:
    """Return the path as it is on disk, None if there is none.

    A path that exists as it is written comes first, also one that begins with ~; then ~ is the user's folder, and an
    accent may be encoded in another way.
    """
    expanded = _expanded(name)
    spelled = [unicodedata.normalize(form, expanded) for form in ("NFC", "NFD")]
    return next((path for path in (name, expanded, *spelled) if os.path.lexists(path)), None)


def kind_of_file(mode: int) -> str:
    """Return what `st_mode` is the mode of, for messages: "a FIFO", "a device"."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def digest_of(path: Path) -> str:
    """Return the xxh3-128 of a file, as `NewFile.digest` does."""
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hashed.update(block)
    return hashed.hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries, so that new and renamed files survive a power loss."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody sees it half-written. Raises OSError."""
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
    """Write a JSON file atomically. Raises OSError."""
    write_atomically(path, json.dumps(values, indent=2, default=str) + "\n")


def read_text(path: Path, most: int = MAX_JSON_BYTES) -> str:
    """Return the text of a regular file of at most `most` bytes. Raises OSError; ValueError if it is not UTF-8."""
    return read_regular(path, most).decode("utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError, and ValueError for anything else than a sound object."""
    try:
        value = loads(read_text(path))
    except RecursionError:
        value = None
    else:
        if not isinstance(value, dict):
            raise ValueError("is not a JSON object")
    if value is None or not _is_shallow(value):
        raise ValueError(f"is nested more than {MAX_JSON_DEPTH} levels deep")
    return value


def _is_shallow(value: dict[str, Any]) -> bool:
    """Return whether no list or object is more than MAX_JSON_DEPTH levels deep."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = (node.values() if isinstance(node, dict) else node for node in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return True
    return False


def loads(text: str) -> Any:
    """Return the value of a JSON text; half a character, which could not be printed or written, becomes U+FFFD."""
    value = json.loads(text)
    return whole_characters(value) if "\\u" in text and _SURROGATE.search(text) else value


def whole_characters(value: Any) -> Any:
    """Return a tree of JSON in which half a character is U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [whole_characters(each) for each in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(each) for key, each in value.items()}
    return value


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a .safetensors file. Raises OSError, and ValueError if it has none of at most 100 MB."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        try:
            header = json.loads(file.read(size))
        except RecursionError:
            raise ValueError("a header that is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("a header that is not a JSON object")
    return header


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty dict if the file is missing or can't be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


@contextmanager
def new_folder(path: Path, last: Callable[[], None] | None = None, *, marks: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end it is synced and replaces `path` atomically.

    `last` is called once the folder is at `path`. If anything fails before it returns, the old content of `path` is
    restored. If `path` is a symbolic link, its target is replaced, but only a folder that is empty or has a file named
    in `marks`: a stranger's link may lead to anybody's folder (OSError). Without `last`, `path` is a complete folder at
    any moment if the system can exchange two names (see `exchange`); if not, `restore_folder` repairs what a kill
    leaves.
    """
    if path.is_symlink():
        path = _target_of(path, marks)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    restore_folder(path)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    renamed = False
    try:
        os.makedirs(partial)
        yield partial
        sync_folder(partial)
        if last is None and path.exists() and exchange(partial, path):
            shutil.rmtree(partial, ignore_errors=True)  # the old folder
        else:
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
            renamed = True
        sync_folder(path.parent)
        if last is not None:
            last()
    except BaseException:
        shutil.rmtree(path if renamed else partial, ignore_errors=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _target_of(link: Path, marks: Collection[str]) -> Path:
    """Return the folder that a link leads to. Raises OSError if it may hold something else than what is written."""
    target = Path(os.path.realpath(link))
    names = set(os.listdir(target)) if os.path.lexists(target) else set()
    if names and names.isdisjoint(marks):
        raise OSError(f"it is a link to {target}, which holds other files")
    return target


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names atomically. Returns False, with nothing changed, if the system or file system can't."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # not Linux, or older than glibc 2.28
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def restore_folder(path: Path) -> None:
    """Restore the old folder if a process was killed between the two renames of `new_folder`."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        with suppress(OSError):  # a read-only disk: the caller reports the missing folder
            os.rename(old, path)


def sync_files(folder: Path) -> None:
    """Sync every file below a folder that libraries wrote, and give it the mode of a new file.

    The safetensors library writes its files with mode 0600: others could not read a shared run folder.
    """
    mode = new_file_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


def new_file_mode(folder: Path) -> int:
    """Return the mode that a new file in a folder gets from the umask or an ACL; found by creating one."""
    probe = folder / ".mode.partial"
    try:
        with NewFile(probe):
            return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def try_to_write(write: Callable[[], object], on_error: Callable[[BaseException], None]) -> bool:
    """Call `write`, which writes files; if it fails, pass the error to `on_error` and return False."""
    from safetensors import SafetensorError

    try:
        write()
    except (OSError, SafetensorError) as error:
        on_error(error)
        return False
    return True


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder for `~`. Raises RunError for a user without one, unless the path exists."""
    text = os.fspath(path)
    expanded = _expanded(text)
    if expanded.startswith("~") and not os.path.lexists(Path(expanded).parts[0]):
        raise RunError(f"{shown(text)}: there is no such user, or no home folder; write the path out")
    return Path(expanded)


def _expanded(path: str) -> str:
    return path if path.split("/")[0] == "~" and not has_home() else os.path.expanduser(path)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not the user's data: .DS_Store, ._0.jpg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith((".", "__"))


def reason(error: BaseException) -> str:
    """Return in a few words why a file could not be read or written."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
