"""Folders of images with metadata.csv, .jsonl or .parquet: cells are read without conversions.

`load_dataset("imagefolder")` reads CSV by pandas, which turns NA into a missing value and 007 into 7, and JSON by
Arrow, which turns strings into dates; it also drops images whose names contain the word test.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_fasttrain.utils.errors import DataError, shortened, shown
from hf_fasttrain.utils.files import is_hidden

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_INTEGER = re.compile(r"\s*-?(0|[1-9]\d{0,17})\s*", re.ASCII)
_FILE_COLUMN = "file_name"

Table = dict[str, list[Any]]  # column -> values, all equally many


def read_metadata_folder(root: Path, split_of: Mapping[str, str]) -> dict[str, Any]:
    """Return split -> HF dataset of the images that the metadata files at and below a folder list.

    Column `file_name` becomes `image`, and `x_file_name` the image column `x`. The split is
    `split_of` of the first folder (in lower case) of an image's path below `root`, else train. Columns of a CSV whose
    cells are all integers, written as `str` does, are integers; other cells are strings, empty ones are missing.
    Raises DataError, with file and row, for files that can't be read and paths that lead out of the file's folder.
    """
    splits: dict[str, Table] = {}
    image_columns: dict[str, None] = {}
    for file in _metadata_files(root):
        table, images = _with_paths(_read(file), file)
        image_columns |= dict.fromkeys(images)
        for split, part in _by_split(table, images[0], os.path.abspath(root), split_of).items():
            splits[split] = _joined(splits.get(split, {}), part)
    return {name: _dataset(table, list(image_columns)) for name, table in sorted(splits.items())}


def _metadata_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        present = [name for name in METADATA_FILES if name in names]
        if len(present) > 1:
            raise DataError(f"{folder}: has {' and '.join(present)}; keep one of them")
        found += [Path(folder, name) for name in present]
    return found


def _with_paths(table: Table, file: Path) -> tuple[Table, list[str]]:
    """Return the table with columns of file names replaced by image columns of absolute paths, and their names."""
    folder, images, resolved = os.path.abspath(file.parent), [], Table()
    for name, values in table.items():
        if name == _FILE_COLUMN or name.endswith("_" + _FILE_COLUMN):
            images.append(name.removesuffix(_FILE_COLUMN).removesuffix("_") or "image")
            resolved[images[-1]] = [_path(value, folder, f"{file}: row {row}") for row, value in enumerate(values)]
        else:
            resolved.setdefault(name, values)
    if not images:
        raise DataError(f"{file}: no column {_FILE_COLUMN}, which names the images; it has {shortened(table)}")
    return resolved, images


def _path(value: Any, folder: str, where: str) -> str:
    parts = str(value).replace("\\", "/").split("/")
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in parts or "://" in value:
        raise DataError(f"{where} has {_FILE_COLUMN} {shown(value)}; give an image's path below {folder}")
    return os.path.normpath(os.path.join(folder, *parts))


def _by_split(table: Table, image: str, root: str, split_of: Mapping[str, str]) -> dict[str, Table]:
    start = len(os.path.join(root, ""))
    firsts = [path[start:].split(os.sep, 1)[0].lower() for path in table[image]]
    splits = [split_of.get(first, "train") for first in firsts]
    return {
        split: {
            name: [v for v, split_of_row in zip(values, splits, strict=True) if split_of_row == split]
            for name, values in table.items()
        }
        for split in dict.fromkeys(splits)
    }


def _joined(first: Table, second: Table) -> Table:
    """Return the rows of both tables; a column that one lacks is None in its rows."""
    counts = [len(next(iter(table.values()), [])) for table in (first, second)]
    names = dict.fromkeys([*first, *second])
    return {name: first.get(name, [None] * counts[0]) + second.get(name, [None] * counts[1]) for name in names}


def _dataset(table: Table, image_columns: Sequence[str]) -> Any:
    import datasets
    import pyarrow as pa

    columns = {name: _arrow(values) for name, values in table.items()}
    features = datasets.Features.from_arrow_schema(pa.table(columns).schema)
    features |= {name: datasets.Image() for name in image_columns if name in columns}
    return datasets.Dataset.from_dict({name: column.to_pylist() for name, column in columns.items()}, features=features)


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
    import pyarrow.parquet as pq

    readers = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": lambda path: pq.read_table(path).to_pydict()}
    try:
        return readers[file.suffix](file)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{file}: can't be read as {file.suffix.removeprefix('.')}: {error}") from None


def _read_csv(file: Path) -> Table:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, strict=True)
        header = next(reader, [])
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
    with open(file, encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                rows.append(_json_object(line, f"{file}, line {number}"))
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object with {_FILE_COLUMN}; got {shown(row)}")
    return row
