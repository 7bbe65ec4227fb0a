"""The cache of decoded pixels: one file of pixels and one index, filled and read by any number of processes.

It can hold features of images instead of pixels. The index entry of a row is written after its pixels. It has a
checksum over the pixels, their offset, the row and the stamp of the source image. An entry with a wrong checksum counts
as missing, be it from a process killed half-way, a full disk, a power cut or a changed file. So nothing ever needs
repair, and no lock is held while pixels are written; only reserving space in the file is locked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hf_fasttrain.data.pixels.cache_locks import ABOUT_FILE, OpenFiles, fcntl, lock_shared
from hf_fasttrain.data.pixels.decode import Pixels, decode
from hf_fasttrain.run_folder.schemas import CacheFile, read_if_sound
from hf_fasttrain.utils.errors import DataError, shortened
from hf_fasttrain.utils.format import format_bytes
from hf_fasttrain.utils.standard_folders import home_folder

FORMAT = 1
MAGIC = b"hfftpix1"
HEADER_BYTES = 64  # magic, number of rows, end of the pixels
INDEX_FILE, PIXELS_FILE = "index", "pixels"
ENTRY = np.dtype(
    [("offset", "<u8"), ("check", "<u8"), ("length", "<u4"), ("height", "<u2"), ("width", "<u2"), ("form", "<u8")]
)
RAW, JPEG, FEATURES = 1, 2, 3
ON_DISK = fcntl is not None and hasattr(os, "pread")  # supported by this operating system
IN_MEMORY = ON_DISK and hasattr(os, "memfd_create")
Stamp = tuple[int, int, int]
LOCK_TRIES = 3  # a cache may be deleted between its creation and its lock
UNFINISHED = ".hf_fasttrain-new-"  # prefix of the folder of a cache that is being created


@dataclass
class StoredPixels:
    """Pixels to be written to the cache."""

    row: int
    stamp: Stamp
    pixels: Pixels
    jpeg: bytes | None = None  # the encoded form, if the cache stores JPEGs

    @property
    def form(self) -> int:
        """RAW or JPEG."""
        return RAW if self.jpeg is None else JPEG

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def content(self) -> bytes:
        """Return the bytes to be written."""
        return self.pixels.tobytes() if self.jpeg is None else self.jpeg


@dataclass
class StoredFeatures:
    """Features of an image to be written to a cache of features."""

    row: int
    stamp: Stamp
    features: np.ndarray  # (V, C) float32: C features of each of V views

    form = FEATURES

    @property
    def shape(self) -> tuple[int, int]:
        """(V, C)."""
        return self.features.shape[0], self.features.shape[1]

    def content(self) -> bytes:
        """Return the bytes to be written."""
        return self.features.astype("<f4").tobytes()


class PixelCache:
    """The cached pixels of a dataset's rows; opened by `open_cache` or `memory_cache`.

    `read` yields what is cached, `add` caches more until `budget` bytes are used. After the first failed write,
    `problem` has the reason and nothing more is added.
    """

    def __init__(self, index: str, pixels: str, num_rows: int, budget: int) -> None:
        self.index_path, self.pixels_path, self.num_rows, self.budget = index, pixels, num_rows, budget
        self.problem: str | None = None
        self.memory_files: OpenFiles | None = None  # keeps a cache in memory alive
        self.lock: OpenFiles | None = None  # of a cache on disk, which others leave alone while it is open
        self._files: tuple[int, int] | None = None
        self._open_files: OpenFiles | None = None
        self._owner = 0
        self._index = np.zeros(0, ENTRY)
        self._verified = np.zeros(0, np.uint64)

    def __getstate__(self) -> dict[str, Any]:
        closed = PixelCache(self.index_path, self.pixels_path, self.num_rows, self.budget)
        return {**closed.__dict__, "problem": self.problem}

    def _open(self) -> tuple[int, int]:
        """Return the file descriptors of index and pixels, opened by this process: record locks belong to a process."""
        if self._files is None or self._owner != os.getpid():
            entries = np.memmap(self.index_path, ENTRY, "r", offset=HEADER_BYTES, shape=(self.num_rows,))
            flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
            index_file = os.open(self.index_path, flags)
            try:
                self._files = index_file, os.open(self.pixels_path, flags)
            except OSError:
                os.close(index_file)
                raise
            self._owner, self._open_files = os.getpid(), OpenFiles(*self._files)
            self._index = entries.view(np.ndarray)
            self._verified = np.zeros(self.num_rows, np.uint64)  # (N,) checksums that this process has verified
        return self._files

    def read(self, rows: np.ndarray, stamp_of: Callable[[int], Stamp]) -> Iterator[np.ndarray | None]:
        """Yield the pixels (H, W, 3) or features (V, C) of each row, None if not cached.

        `stamp_of` returns the stamp of a row.
        """
        try:
            pixels_file = self._open()[1]
        except (OSError, ValueError) as error:  # deleted or truncated before this process opened it
            self._files, self.problem = None, f"can't be opened: {error}"
            yield from [None] * len(rows)
            return
        entries = self._index[rows]
        verified = (entries["check"] == self._verified[rows]).tolist()
        columns = (entries[name].tolist() for name in ENTRY.names or ())
        for row, is_verified, offset, check, length, height, width, form in zip(
            rows.tolist(), verified, *columns, strict=True
        ):
            if not length:
                yield None
                continue
            data = _pread(pixels_file, length, offset)
            if len(data) != length:
                yield None
                continue
            if not is_verified:
                if check != checksum(data, row, offset, form, height, width, stamp_of(row)):
                    yield None
                    continue
                self._verified[row] = check
            yield _decoded(data, form, height, width)

    def add(self, items: Sequence[StoredPixels | StoredFeatures]) -> None:
        """Write pixels or features to the cache until the budget is used up."""
        if self.problem is not None or not items:
            return
        try:
            self._add(items)
        except OSError as error:
            self.problem = f"can't write to it: {error.strerror}"

    def _add(self, items: Sequence[StoredPixels | StoredFeatures]) -> None:
        index_file, pixels_file = self._open()
        data = [item.content() for item in items]
        offset, room = self._reserve(index_file, sum(map(len, data)))
        for item, content in zip(items, data, strict=True):
            height, width = item.shape
            if len(content) > room:
                self.problem = f"its {format_bytes(self.budget)} are used up (data.cache_gb, hf-fasttrain cache clean)"
                return
            if height > 0xFFFF or width > 0xFFFF:
                continue
            _write(pixels_file, content, offset)
            check = checksum(content, item.row, offset, item.form, height, width, item.stamp)
            entry = np.array([(offset, check, len(content), height, width, item.form)], ENTRY)
            _write(index_file, entry.tobytes(), HEADER_BYTES + item.row * ENTRY.itemsize)
            offset, room = offset + len(content), room - len(content)

    def _reserve(self, index_file: int, size: int) -> tuple[int, int]:
        """Reserve up to `size` bytes; return their offset and how many the budget allows."""
        with _locked(index_file):
            end = int.from_bytes(os.pread(index_file, 8, 16), "little")
            room = min(size, max(0, self.budget - end))
            _write(index_file, (end + room).to_bytes(8, "little"), 16)
        return end, room

    def used_bytes(self) -> int:
        """Return how many bytes of the pixel file have been reserved."""
        return int.from_bytes(os.pread(self._open()[0], 8, 16), "little")


def checksum(data: bytes, row: int, offset: int, form: int, height: int, width: int, stamp: Stamp) -> int:
    """Return a 64-bit checksum over pixels and the fields of their index entry."""
    seed = xxhash.xxh3_64_intdigest(np.array([row, offset, form, height, width, *stamp], np.int64).tobytes())
    return xxhash.xxh3_64_intdigest(data, seed)


def _decoded(data: bytes, form: int, height: int, width: int) -> np.ndarray:
    """Return what an entry of the cache holds."""
    if form == FEATURES:
        return np.frombuffer(data, "<f4").reshape(height, width)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if form == RAW else decode(data)


def _pread(file: int, length: int, offset: int) -> bytes:
    """Return up to `length` bytes at an offset; none for an invalid one."""
    try:
        return os.pread(file, length, offset)
    except (OSError, OverflowError):
        return b""


def _write(file: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset; on a full disk, pwrite may write a part of them without an error."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


@contextmanager
def _locked(file: int) -> Any:
    fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN)


def cache_key(content: dict[str, Any]) -> str:
    """Return a short hash of everything that determines the cached pixels."""
    text = json.dumps({**content, "format": FORMAT}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def open_cache(folder: Path, num_rows: int, budget: int, about: dict[str, Any]) -> PixelCache:
    """Open the cache in `folder`, or create it; several processes may do so at once.

    An invalid cache is replaced. Raises DataError if the folder can't be written to.
    """
    if not ON_DISK:
        raise DataError("data.cache=disk needs Linux or macOS; use none")
    cache = PixelCache(str(folder / INDEX_FILE), str(folder / PIXELS_FILE), num_rows, budget)
    try:
        for _ in range(LOCK_TRIES):
            if not _is_valid(folder / INDEX_FILE, num_rows) or not (folder / PIXELS_FILE).exists():
                _create(folder, num_rows, about)
            cache.lock = lock_shared(folder)
            if cache.lock is None or (folder / PIXELS_FILE).exists():  # else it was deleted just before
                break
        with suppress(FileNotFoundError):
            os.utime(folder / ABOUT_FILE)  # last use
    except OSError as error:
        raise DataError(
            f"data.cache_dir {folder.parent}: can't be written: {error.strerror}; choose another, or data.cache=none"
        ) from None
    return cache


def _is_valid(index: Path, num_rows: int) -> bool:
    try:
        with index.open("rb") as file:
            head = file.read(HEADER_BYTES)
        size = index.stat().st_size
    except OSError:
        return False
    return head[:16] == MAGIC + num_rows.to_bytes(8, "little") and size == _index_bytes(num_rows)


def _index_bytes(num_rows: int) -> int:
    return HEADER_BYTES + num_rows * ENTRY.itemsize


def _fill_header(file: int, num_rows: int) -> None:
    _write(file, MAGIC + num_rows.to_bytes(8, "little"), 0)
    # Write real zeros: reading a hole of a memory-mapped file would kill the process once the disk is full.
    blank = bytes(1 << 20)
    for offset in range(24, _index_bytes(num_rows), len(blank)):
        _write(file, blank[: _index_bytes(num_rows) - offset], offset)


def _create(folder: Path, num_rows: int, about: dict[str, Any]) -> None:
    """Create an empty cache under another name, then rename it; a process that comes second uses the first one's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f"{UNFINISHED}{uuid.uuid4().hex}"  # not mkdtemp: other users may read a shared cache
    partial.mkdir()
    try:
        file = os.open(partial / INDEX_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _fill_header(file, num_rows)
        finally:
            os.close(file)
        (partial / PIXELS_FILE).touch()
        description = {**about, "format": FORMAT, "num_rows": num_rows, "made": time.strftime("%Y-%m-%d %H:%M:%S")}
        (partial / ABOUT_FILE).write_text(json.dumps(description, indent=2, default=str) + "\n", encoding="utf-8")
        if folder.exists() and not _is_valid(folder / INDEX_FILE, num_rows):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(FileExistsError, NotADirectoryError):
            partial.rename(folder)
    except OSError as error:
        if not _is_valid(folder / INDEX_FILE, num_rows):
            raise error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def memory_cache(num_rows: int, budget: int) -> PixelCache:
    """Return a cache in memory that all processes of this user can open by path; it is freed with this process.

    Linux only (memfd): unlike /dev/shm it has no size limit of its own in containers, and a killed process leaves
    nothing behind. Raises DataError elsewhere.
    """
    if not IN_MEMORY:
        raise DataError("data.cache=memory needs Linux; use disk or none")
    index, pixels = os.memfd_create("hf_fasttrain-index"), os.memfd_create("hf_fasttrain-pixels")
    _fill_header(index, num_rows)
    folder = f"/proc/{os.getpid()}/fd"
    cache = PixelCache(f"{folder}/{index}", f"{folder}/{pixels}", num_rows, budget)
    cache.memory_files = OpenFiles(index, pixels)
    return cache


@dataclass(frozen=True)
class CacheEntry:
    """One cache on disk, as `hf-fasttrain cache` lists it."""

    path: Path
    num_bytes: int  # on disk
    last_used: float  # seconds since 1970
    about: dict[str, Any]

    @property
    def dataset(self) -> str:
        """Dataset and split, or "incomplete"."""
        if not self.about:
            return "incomplete"
        return f"{self.about.get('dataset')} ({self.about.get('split')}, {self.about.get('num_rows', 0):,} images)"

    @property
    def settings(self) -> str:
        """How the images were prepared, and of which model these are the features, in a few words."""
        center = self.about.get("center") or {}
        cut = f"{center.get('crop_mode')} cut to {center.get('image_size')} px" if center else None
        short = self.about.get("short_side")
        quality = self.about.get("stored_quality")
        features = f"features of {self.about['features']}" if self.about.get("features") else None
        parts = (
            features,
            f"short side {short}" if short else None,
            cut,
            f"JPEG quality {quality}" if quality else None,
        )
        return ", ".join(part for part in parts if part) or "whole images"

    @property
    def last_used_text(self) -> str:
        """When it was last used."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_used))


def default_cache_dir() -> Path:
    """Return the default folder of caches: $HF_FASTTRAIN_CACHE, else in the user's cache folder."""
    folder = os.environ.get("HF_FASTTRAIN_CACHE")
    if folder:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache"
    return Path(base) / "hf_fasttrain" / "pixels"


def list_caches(folder: Path) -> list[CacheEntry]:
    """Return the caches in a folder, last used first; includes unfinished ones and those of other versions."""
    entries = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        about = read_if_sound(path / ABOUT_FILE, CacheFile)
        if not (about or (path.is_dir() and path.name.startswith(UNFINISHED))):
            continue
        try:
            files = [file.lstat() for file in path.iterdir()]
        except FileNotFoundError:  # another process is deleting it
            continue
        used = max((file.st_mtime for file in files), default=0.0)
        entries.append(CacheEntry(path, sum(file.st_blocks * 512 for file in files), used, about))
    return sorted(entries, key=lambda entry: -entry.last_used)


def select_caches(folder: Path, names: Sequence[str], everything: bool, unused_days: float | None) -> list[CacheEntry]:
    """Return the caches to delete; DataError if none is selected or a name is unknown."""
    entries = list_caches(folder)
    if not names and not everything and unused_days is None:
        raise DataError("no cache selected: give names as `hf-fasttrain cache` lists them, --unused-days or --all")
    known = [entry.path.name for entry in entries]
    for name in names:
        if name not in known:
            raise DataError(f"no cache '{name}' in {folder}; there are {shortened(known) or 'none'}")
    since = time.time() - (unused_days or 0) * 86400
    chosen = [entry for entry in entries if not names or entry.path.name in names]
    return [entry for entry in chosen if unused_days is None or entry.last_used <= since]


def remove_cache(entry: CacheEntry) -> None:
    """Delete a cache; a run that has it open can still use it. DataError if it can't be deleted."""
    try:
        shutil.rmtree(entry.path)
    except OSError as error:
        raise DataError(f"{entry.path}: can't be deleted: {error.strerror}; delete it manually") from None
