"""Random access to encoded images: of an HF dataset (bytes from its memory map, or paths), of files, or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from hf_fasttrain.utils.errors import DataError, shown
from hf_fasttrain.utils.private_apis import dataset_fingerprint, dataset_indices

Record = dict[str, Any]  # {"bytes": memoryview | None, "path": str | None}, as HF's undecoded images


Stamp = tuple[int, int, int]
SAMPLED = 16  # paths that are looked for
MAX_CHUNKS = 2000  # of an Arrow column whose buffers are kept open


class ImageRecords(Protocol):
    """The undecoded images of a data set, by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Record:
        """Return the record of a row."""

    @property
    def fingerprint(self) -> str:
        """A text that changes with the rows; it need not cover files behind paths, which `stamp` does."""

    def stamp(self, row: int) -> Stamp:
        """Return values that change with the image of a row."""


class Records:
    """The undecoded `image` column of an HF dataset. Without copying or decoding.

    `dataset[rows]` makes Python objects of whole batches; reading Arrow's own buffers costs 2 us an image.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._column: Any = None  # opened on first use, in the process that reads
        self._numbers = np.zeros(0, np.int64)  # of the chunks that have rows
        self._chunks: dict[int, _Chunk] = {}  # those that were read last, by number
        self._starts = np.zeros(0, np.int64)
        self._indices: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["dataset"])  # type: ignore[misc]

    def __getitem__(self, row: int) -> Record:
        """Return the record of a row."""
        if self._column is None:
            self._open()
        if self._indices is not None:
            row = int(self._indices[row])
        position = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._chunk(int(self._numbers[position])).record(row - int(self._starts[position]))

    def _chunk(self, number: int) -> _Chunk:
        """Return a chunk of the column. Few are kept: `datasets` makes one of every 100 rows, of 4 kB each."""
        found = self._chunks.get(number)
        if found is None:
            if len(self._chunks) >= MAX_CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            found = self._chunks[number] = _Chunk(self._column.chunk(number))
        return found

    @property
    def fingerprint(self) -> str:
        """HF datasets' fingerprint of the dataset; it does not cover files behind paths, which `stamp` does."""
        return dataset_fingerprint(self.dataset)

    def stamp(self, row: int) -> Stamp:
        """Return values that change with the image of a row: times and size of its file, or the number of bytes."""
        record = self[row]
        if record["bytes"] is not None:
            return 0, 0, len(record["bytes"])
        return _stamp(record["path"])

    def _open(self) -> None:
        column = self._column = self.dataset.data.column("image")
        # A dataset that was filtered, shuffled or selected from has an index into its table.
        indices = dataset_indices(self.dataset)
        self._indices = None if indices is None else indices.column(0).to_numpy()
        lengths = np.array([len(chunk) for chunk in column.chunks], np.int64)
        self._numbers = np.flatnonzero(lengths)
        self._starts = np.cumsum([0, *lengths[self._numbers]])[:-1]


def _stamp(path: Any) -> Stamp:
    try:
        status = os.stat(path)
    except (OSError, TypeError, ValueError):
        return -1, 0, 0
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


class _Chunk:
    """A chunk of the column: structs of bytes and path."""

    def __init__(self, chunk: Any) -> None:
        self.images, self.paths = _Binary(chunk.field("bytes")), _Binary(chunk.field("path"))
        self.missing = chunk.is_null().to_numpy(zero_copy_only=False) if chunk.null_count else None

    def record(self, row: int) -> Record:
        if self.missing is not None and self.missing[row]:
            return {"bytes": None, "path": None}
        path = self.paths[row]
        return {"bytes": self.images[row], "path": None if path is None else str(path, "utf-8")}


class _Binary:
    """An Arrow array of bytes or text, read through its buffers."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.missing = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
        self.offsets: np.ndarray | None = None
        if array.null_count == len(array):
            return
        wide = str(array.type).startswith("large")
        _, offsets, data = array.buffers()
        every = np.frombuffer(offsets, np.int64 if wide else np.int32)
        self.offsets = every[array.offset : array.offset + len(array) + 1]
        self.data = memoryview(data).cast("B") if data is not None else memoryview(b"")  # Arrow's are signed

    def __getitem__(self, row: int) -> memoryview | None:
        if self.offsets is None or (self.missing is not None and self.missing[row]):
            return None
        return self.data[self.offsets[row] : self.offsets[row + 1]]


def require_paths(records: ImageRecords, where: str) -> None:
    """Raise DataError if images are paths, and none of a sample of them exists: addresses, texts of another meaning."""
    sampled = np.unique(np.linspace(0, max(0, len(records) - 1), min(len(records), SAMPLED), dtype=np.int64))
    found = [records[row] for row in sampled.tolist()]
    paths = [record["path"] for record in found if record["bytes"] is None and record["path"] is not None]
    if not paths or any(map(os.path.exists, paths)):
        return
    is_address = "://" in paths[0]
    why = "addresses, which are not downloaded" if is_address else f"no paths of files: none of {len(paths)} exists"
    raise DataError(
        f"{where} holds {why}, such as {shown(paths[0])}; give encoded images, or paths, absolute or relative to the "
        "table's folder"
    )


class FileRecords:
    """The paths of image files below `root`, in order; an empty name is a missing image.

    As compact as their names, and made without `datasets`. Names need not be UTF-8, as texts of Arrow must be.
    """

    def __init__(self, root: str, names: Iterable[str]) -> None:
        self.root = root
        self._names = os.fsencode("\0".join([*names, ""]))  # no name holds a \0
        self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Record:
        """Return the record of a row."""
        start = int(self._ends[row - 1]) + 1 if row else 0
        name = os.fsdecode(self._names[start : self._ends[row]])
        return {"bytes": None, "path": os.path.join(self.root, name) if name else None}

    def names_of(self, rows: Iterable[int]) -> list[bytes]:
        """Return the paths below `root` of rows."""
        starts = np.concatenate([[0], self._ends + 1])
        return [self._names[starts[row] : self._ends[row]] for row in rows]

    @property
    def fingerprint(self) -> str:
        """A fingerprint of all paths; it does not cover the files, which `stamp` does."""
        hashed = xxhash.xxh3_128(os.fsencode(self.root) + b"\0")
        hashed.update(self._names)
        return hashed.hexdigest()

    def stamp(self, row: int) -> Stamp:
        """Return values that change with the image of a row: times and size of its file."""
        return _stamp(self[row]["path"])


class EncodedRecords:
    """Encoded images in memory, in order."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Record:
        """Return the record of a row."""
        return {"bytes": memoryview(self._images[row]), "path": None}

    @property
    def fingerprint(self) -> str:
        """A fingerprint of all images and their sizes."""
        hashed = xxhash.xxh3_128(np.array([len(image) for image in self._images], np.int64).tobytes())
        for image in self._images:
            hashed.update(image)
        return hashed.hexdigest()

    def stamp(self, row: int) -> Stamp:
        """Return values that change with the image of a row: the number of its bytes."""
        return 0, 0, len(self._images[row])
