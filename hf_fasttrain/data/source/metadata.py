"""Folders of images with metadata.csv, .jsonl or .parquet: cells are read without conversions.

`load_dataset("imagefolder")` reads CSV by pandas, which turns NA into a missing value and 007 into 7, and JSON by
Arrow, which turns strings into dates; it also drops images whose names contain the word test.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from hf_fasttrain.data.source.file_split import FileSplit
from hf_fasttrain.data.source.inventory import (
    PERMISSION_SAMPLE,
    Folder,
    LeftOut,
    Reason,
    images_below,
    short_path,
    split_by_permission,
)
from hf_fasttrain.data.source.records import FileRecords
from hf_fasttrain.data.source.table_files import open_table, read_schema
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, shortened, shown
from hf_fasttrain.utils.files import open_regular, whole_characters

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_INTEGER = re.compile(r"\s*-?(0|[1-9]\d{0,17})\s*", re.ASCII)
_OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:[/\\]|\.\.(/|$)|.*://")
_FILE_COLUMN = "file_name"

Table = dict[str, list[Any]]  # column -> values, all equally many


def names_images(path: str) -> bool:
    """Return whether a metadata file may list images: whether the word file_name is in it."""
    try:
        with open_regular(path) as file:
            return _FILE_COLUMN.encode() in file.read()
    except OSError:
        return True  # reading it will say why


class Metadata:
    """Metadata files (`files` below `root`, of which `tree` is the listing), and the images that they list.

    Column `file_name` becomes `image`, and `x_file_name` the image column `x`. The split is `split_of` of the first
    folder (in lower case) of an image's path, else train. Columns of a CSV whose cells are all integers, written as
    `str` does, are integers; other cells are strings, empty ones are missing.
    """

    def __init__(self, root: str, tree: Folder, files: list[str], split_of: Mapping[str, str]) -> None:
        self.root, self.tree, self.files, self.split_of = root, tree, files, split_of
        self.notes: list[str] = []
        self._tables: dict[str, tuple[Table, list[str]]] = {}
        self._names = _Names(tree, root)

    @property
    def where(self) -> str:
        """The root, for messages."""
        return one_line(self.root)

    def splits(self) -> list[str]:
        """Return the splits that the files have rows of, sorted. Raises DataError if there are no rows."""
        tables = [self._table(file) for file in self.files]
        found = sorted({split for table, images in tables for split in map(self._split, table[images[0]])})
        if not found:
            raise DataError(f"{os.path.join(self.where, self.files[0])}: lists no images")
        return found

    def open(self, split: str, more: Sequence[str] = ()) -> tuple[FileSplit, list[LeftOut]]:
        """Return the rows of a split, also of `more` files, and what is left out: images that are not listed or gone.

        Raises DataError, with file and row, for files that can't be read and paths that lead out of the file's folder.
        """
        rows: Table = {}
        image_columns: dict[str, None] = {}
        files = sorted([*self.files, *more], key=lambda name: name.split("/")[:-1])
        self._require_one_in_a_folder(files)
        for file in files:
            table, images = self._table(file)
            image_columns |= dict.fromkeys(images)
            chosen = [row for row, name in enumerate(table[images[0]]) if self._split(name) == split]
            rows = _joined(rows, {name: [values[row] for row in chosen] for name, values in table.items()})
        paths = {name: [path or "" for path in rows.pop(name)] for name in image_columns if name in rows}
        listed = {name for names in paths.values() for name in names if name}
        self._look_at(next(iter(paths.values()), []), files)
        columns = {name: _arrow(values) for name, values in rows.items()}
        opened = FileSplit({name: FileRecords(self.root, names) for name, names in paths.items()}, columns)
        return opened, self._left_out(split, listed, set(files))

    def _look_at(self, names: Sequence[str], files: Sequence[str]) -> None:
        """Note images that are listed more than once. Raises DataError if none is there."""
        if names and not any(map(self._names.has, names)):
            raise DataError(
                f"{os.path.join(self.where, files[0])}: none of the {len(names):,} images that it lists is there, such "
                f"as {short_path(names[0])}; correct column {_FILE_COLUMN}, or rename it if it is about something else"
            )
        twice = [name for name, number in Counter(names).items() if number > 1]
        if twice:
            self.notes.append(f"{self.where}: {len(twice):,} images are listed more than once ({short_path(twice[0])})")

    def _require_one_in_a_folder(self, files: Sequence[str]) -> None:
        for one, other in itertools.pairwise(files):
            folder = posixpath.dirname(one)
            if folder == posixpath.dirname(other):
                names = f"{posixpath.basename(one)} and {posixpath.basename(other)}"
                raise DataError(f"{os.path.join(self.where, folder)}: has {names}; keep one of them")

    def _split(self, name: str) -> str:
        return self.split_of.get(name.split("/", 1)[0].lower(), "train")

    def _left_out(self, split: str, listed: set[str], files: set[str]) -> list[LeftOut]:
        found, left_out = images_below(self.tree)
        others = [replace(entry, is_image=False) for entry in left_out if entry.path not in files | listed]
        others += [LeftOut(name, Reason.UNLISTED) for name in found if name not in listed]
        missing = [LeftOut(name, Reason.MISSING, is_image=True) for name in sorted(listed) if not self._names.has(name)]
        _, denied = split_by_permission(self.root, sorted(filter(self._names.has, listed)), PERMISSION_SAMPLE)
        return [*missing, *denied, *(entry for entry in others if self._split(entry.path) == split)]

    def _table(self, file: str) -> tuple[Table, list[str]]:
        """Return a file's table, with columns of paths below the root for those of file names; and their names."""
        if file not in self._tables:
            self._tables[file] = self._with_paths(_read(Path(self.root, file)), file)
        return self._tables[file]

    def _with_paths(self, table: Table, file: str) -> tuple[Table, list[str]]:
        where, images, resolved = one_line(os.path.join(self.root, file)), list[str](), Table()
        for name, values in table.items():
            if name == _FILE_COLUMN or name.endswith("_" + _FILE_COLUMN):
                images.append(name.removesuffix(_FILE_COLUMN).removesuffix("_") or "image")
                folder = posixpath.dirname(file)
                resolved[images[-1]] = [self._path(value, folder, where, row) for row, value in enumerate(values)]
            else:
                resolved.setdefault(name, values)
        if not images:
            raise DataError(f"{where}: no column {_FILE_COLUMN}, which names the images; it has {shortened(table)}")
        return resolved, images

    def _path(self, value: Any, folder: str, where: str, row: int) -> str:
        """Return the path below the root of an image that a file in `folder` lists, as it is spelled on disk."""
        plain = posixpath.normpath(value) if isinstance(value, str) and _is_name(value) else ""
        if not plain or _OUTSIDE.match(value) or plain.startswith("../") or plain in ("..", "."):
            raise DataError(
                f"{where}: row {row} has {_FILE_COLUMN} {shown(value)}; give an image's path below "
                f"{os.path.join(self.where, folder)}"
            )
        written = [plain, posixpath.normpath(value.replace("\\", "/"))]  # Windows writes backslashes
        paths = [posixpath.join(folder, path) for path in dict.fromkeys(written)]
        found = [path for path in paths if self._names.has(path)]
        found = found or [path for path in map(self._names.spelled, paths) if path]
        return found[0] if found else paths[-1]


def _is_name(value: str) -> bool:
    """Return whether a text can be a path."""
    try:
        return bool(value) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


class _Names:
    """Finds files by their paths in a listing."""

    def __init__(self, tree: Folder, root: str) -> None:
        self.tree, self.root = tree, root
        self._files: dict[str, set[str]] = {}  # folder -> its files
        self._spellings: dict[int, dict[str, str | None]] = {}  # of a Folder: composed name -> name; None: several

    def has(self, path: str) -> bool:
        """Return whether there is a file."""
        folder, _, name = path.rpartition("/")
        if folder not in self._files:
            found = self._find(folder)
            self._files[folder] = {*found.images, *found.files} if found else set()
        return name in self._files[folder] or self._is_file(path)

    def _find(self, path: str) -> Folder | None:
        folder: Folder | None = self.tree
        for name in path.split("/") if path else ():
            folder = folder.subfolders.get(name) if folder else None
        return folder

    def _is_file(self, path: str) -> bool:
        """Return whether there is a file that is not listed: hidden, or of a format that is not read."""
        try:
            return stat.S_ISREG(os.stat(os.path.join(self.root, path)).st_mode)
        except (OSError, ValueError):
            return False

    def spelled(self, path: str) -> str | None:
        """Return the path of the file whose name differs only in how accents are encoded, None if there is none."""
        folder: Folder | None = self.tree
        parts: list[str] = []
        for part in path.split("/"):
            name = self._spellings_in(folder).get(_composed(part)) if folder else None
            if name is None:
                return None
            parts.append(name)
            folder = folder.subfolders.get(name) if folder else None
        return "/".join(parts)

    def _spellings_in(self, folder: Folder) -> dict[str, str | None]:
        if id(folder) not in self._spellings:
            known: dict[str, str | None] = {}
            for name in [*folder.subfolders, *folder.images, *folder.files]:
                composed = _composed(name)
                known[composed] = None if composed in known else name
            self._spellings[id(folder)] = known
        return self._spellings[id(folder)]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _joined(first: Table, second: Table) -> Table:
    """Return the rows of both tables; a column that one lacks is None in its rows."""
    counts = [len(next(iter(table.values()), [])) for table in (first, second)]
    names = dict.fromkeys([*first, *second])
    return {name: first.get(name, [None] * counts[0]) + second.get(name, [None] * counts[1]) for name in names}


def _arrow(values: list[Any]) -> Any:
    """Return an Arrow array; values of mixed types are converted to strings."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def _read(file: Path) -> Table:
    """Return the columns of a metadata file. Raises DataError if it can't be read."""
    import pyarrow as pa

    readers = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    kind = file.suffix.removeprefix(".")
    try:
        return readers[file.suffix](file)
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at {error.start:,}"
        raise DataError(f"{file}: can't be read as {kind}: it is not UTF-8 ({where}); save it as UTF-8") from None
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{file}: can't be read as {kind}: {error}") from None


@contextmanager
def _open_text(file: Path) -> Iterator[TextIO]:
    """Open a regular file: a link may lead to anything, such as the variables of this process in /proc."""
    with open_regular(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
        yield text


def _read_parquet(file: Path) -> Table:
    import pyarrow.parquet as pq

    read_schema(str(file))
    with open_table(str(file)) as opened:
        columns: Table = pq.read_table(opened).to_pydict()
    return columns


def _require_once(names: Sequence[str], where: str) -> None:
    """Raise DataError if two columns have the same name: one of them would be dropped."""
    twice = [name for name, number in Counter(names).items() if number > 1 and name]
    if twice:
        raise DataError(f"{where}: has column {shortened(map(shown, twice))} twice; rename one")


def _read_csv(file: Path) -> Table:
    with _open_text(file) as opened:
        reader = csv.reader(opened, strict=True)
        header = next(reader, [])
        _require_once(header, str(file))
        columns: list[list[str | None]] = [[] for _ in header]
        for line in reader:
            if len(line) > len(header):
                raise DataError(
                    f"{file}, line {reader.line_num}: has {len(line)} cells, the header {len(header)}; quote cells "
                    "that hold commas"
                )
            for index, column in enumerate(columns if line else ()):
                column.append((line[index] if index < len(line) else "") or None)
    return {name: _integers_if_all_are(cells) for name, cells in zip(header, columns, strict=True)}


def _integers_if_all_are(cells: list[str | None]) -> list[Any]:
    """Return cells as integers if each is written as `str` writes it: 007 stays a string."""
    if not all(cell is None or _INTEGER.fullmatch(cell) for cell in cells):
        return cells
    return [None if cell is None else int(cell) for cell in cells]


def _read_json_lines(file: Path) -> Table:
    rows: list[dict[str, Any]] = []
    with _open_text(file) as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                rows.append(_json_object(line, f"{file}, line {number}"))
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _json_object(line: str, where: str) -> dict[str, Any]:
    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_once([name for name, _ in pairs], where)
        return {
            name: value if name.endswith(_FILE_COLUMN) else whole_characters(value)  # names need not be UTF-8
            for name, value in ((whole_characters(name), value) for name, value in pairs)
        }

    try:
        row = json.loads(line, object_pairs_hook=whole)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object with {_FILE_COLUMN}; got {shown(row)}")
    return row
