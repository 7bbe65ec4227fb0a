"""The labels of a table: one text in a cell, several of them, columns of 0 and 1, or values of a parquet file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from hf_fasttrain.data.source.label_table_columns import ZERO_ONE, TableColumns, TableKeys
from hf_fasttrain.data.source.label_table_files import LabelFile, encoded
from hf_fasttrain.utils.errors import DataError, shortened, shown


class TableLabels(Protocol):
    """The labels of all rows."""

    missing: np.ndarray  # (N,) bool: rows without a label
    notes: list[str]

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the labels of rows as they are shown in messages; equal for equal labels."""

    def select(self, rows: np.ndarray) -> tuple[Any, list[str] | None]:
        """Return the values of rows for a FileSplit, and its class names."""


def table_labels(table: LabelFile, columns: TableColumns, keys: TableKeys) -> TableLabels:
    """Return the labels of a table. Raises DataError for cells that can't be read as the recipe asks for."""
    import pyarrow as pa

    if columns.are_classes:
        return ClassColumns(table, columns)
    name = columns.labels[0]
    array = table.columns[name]
    is_list = pa.types.is_list(array.type)
    if keys.label_separator is not None:
        if is_list or not (table.is_text or "string" in str(array.type)):
            raise DataError(
                f"{table.where}: column '{name}' ({array.type}) is not text, so data.label_separator has no effect; "
                "leave it out"
            )
        return ListedLabels(*_split_cells(array, keys.label_separator, f"{table.where}: column '{name}'"))
    if not table.is_text:
        return ValueLabels(array, table.class_names.get(name))
    return ValueLabels(_with_integers(array), None) if is_list else TextLabels(array)


def in_order(names: Sequence[str]) -> list[str]:
    """Return class names sorted: numbers by their value if all are written as Python writes them, else as texts."""
    return sorted(names, key=int) if _are_integers(names) else sorted(names)


def _are_integers(texts: Iterable[str]) -> bool:
    """Return whether all texts are 64-bit integers as Python writes them."""
    return all(text.removeprefix("-").isdecimal() and len(text) < 19 and str(int(text)) == text for text in texts)


class TextLabels:
    """One label in each cell, as it is written."""

    def __init__(self, array: Any) -> None:
        self.names, self.codes = encoded(array)
        self.missing = np.array([not name.strip() for name in self.names])[self.codes]
        self.notes: list[str] = []

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the labels of rows."""
        return [self.names[code] for code in self.codes[rows].tolist()]

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return class numbers (N,), and the names of the classes that these rows have."""
        return _numbered(self.codes[rows], self.names)


def _numbered(codes: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the codes (M,) as numbers of the names that occur among them, and these, in order."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(names))).tolist()
    ordered = in_order([names[code] for code in used])
    number_of = {name: number for number, name in enumerate(ordered)}
    lookup = np.zeros(len(names), np.int64)
    lookup[used] = [number_of[names[code]] for code in used]
    return lookup[codes], ordered


def _split_cells(array: Any, separator: str, where: str) -> tuple[np.ndarray, list[list[str]], list[str]]:
    """Return for each row the number of its cell among the distinct ones, the labels of these, and notes."""
    texts, codes = encoded(array)
    cells, twice = list[list[str]](), list[str]()
    for text in texts:
        labels = [label for part in text.split(separator) if (label := part.strip())]
        cells.append(list(dict.fromkeys(labels)))
        if len(cells[-1]) < len(labels):
            twice.append(text)
    notes = (
        [f"{where}: cells that name a label twice count it once: {shortened(map(shown, twice), 3)}"] if twice else []
    )
    return codes, cells, notes


class ListedLabels:
    """Several labels in each cell: `codes` (N,) are numbers of distinct `cells`."""

    def __init__(self, codes: np.ndarray, cells: Sequence[Sequence[str]], notes: list[str]) -> None:
        self.codes, self.cells, self.notes = codes, cells, notes
        self.names = list(dict.fromkeys(label for cell in cells for label in cell))
        number_of = {name: number for number, name in enumerate(self.names)}
        self._lengths = np.array([len(cell) for cell in cells], np.int64)
        self._entries = np.array([number_of[label] for cell in cells for label in cell], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.missing = (self._lengths == 0)[codes]

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the labels of rows, sorted."""
        return [", ".join(sorted(self.cells[code])) for code in self.codes[rows].tolist()]

    def select(self, rows: np.ndarray) -> tuple[Any, list[str]]:
        """Return an Arrow array of lists of class numbers, and the names of the classes that these rows have."""
        codes = self.codes[rows]
        lengths = self._lengths[codes]
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) + np.repeat(self._starts[codes] - (ends - lengths), lengths)
        numbers, names = _numbered(self._entries[places], self.names)
        return _lists(lengths, numbers), names


def _lists(lengths: np.ndarray, values: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), pa.array(values, pa.int32()))


class ClassColumns:
    """Columns that are one class each: 1 in the rows of its images, 0 in others."""

    def __init__(self, table: LabelFile, columns: TableColumns) -> None:
        self.names, self.notes = list(columns.labels), list[str]()
        self.hot = np.zeros((len(table), len(self.names)), bool)
        self.missing = np.zeros(len(table), bool)
        for index, name in enumerate(self.names):
            self.hot[:, index], empty = _zero_one(table, name)
            self.missing |= empty

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the classes of rows."""
        return [", ".join(self.names[index] for index in np.flatnonzero(row)) or "none" for row in self.hot[rows]]

    def select(self, rows: np.ndarray) -> tuple[Any, list[str]]:
        """Return an Arrow array of lists of class numbers, and the names of all classes."""
        hot = self.hot[rows]
        return _lists(hot.sum(1), np.nonzero(hot)[1]), self.names


def _zero_one(table: LabelFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells of a column as booleans, and which are empty. Raises DataError for other values."""
    import pyarrow as pa

    meaning = {**ZERO_ONE, "true": True, "false": False, "True": True, "False": False, "": False}
    try:
        written, codes = encoded(table.columns[name])
    except pa.ArrowException:
        raise DataError(
            f"{table.where}: column '{name}' ({table.columns[name].type}) is no column of 0 and 1"
        ) from None
    texts = [text.strip() for text in written]
    others = [text for text in texts if text not in meaning]
    if others:
        raise DataError(
            f"{table.where}: column '{name}' has {shortened(map(shown, others), 3)}; in a list of data.label_column, "
            "each column is a class, with 0 or 1 for every image"
        )
    empty = np.array([not text for text in texts], bool)
    return np.array([meaning[text] for text in texts], bool)[codes], empty[codes]


def _with_integers(lists: Any) -> Any:
    """Return lists of texts as lists of integers if all are: those of JSON lines may be 0/1 vectors."""
    import pyarrow as pa

    is_integer = _are_integers(lists.flatten().unique().to_pylist())
    return lists.cast(pa.list_(pa.int64())) if is_integer else lists


class ValueLabels:
    """Values with types of their own, as in parquet files; they mean what they mean in a dataset."""

    def __init__(self, array: Any, class_names: list[str] | None) -> None:
        import pyarrow as pa

        self.array, self.class_names = array, class_names
        self.notes: list[str] = []
        self.missing = array.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            texts, codes = encoded(array)
            self.missing = np.array([not text.strip() for text in texts], bool)[codes]

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the labels of rows."""
        return [str(value) for value in self.array.take(rows).to_pylist()]

    def select(self, rows: np.ndarray) -> tuple[Any, list[str] | None]:
        """Return an Arrow array, and the names of its class numbers if the file has them."""
        return self.array.take(rows), self.class_names
