"""Reads a label column as distinct values and codes; errors name the first bad row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_fasttrain.data.source.columns import element_of
from hf_fasttrain.data.source.file_split import FileSplit
from hf_fasttrain.utils.errors import DataError, first_line, shortened, shown


@dataclass(frozen=True)
class LabelColumn:
    """The labels of a split: distinct values, and a code into them for each row."""

    where: str  # dataset, split and column, for messages
    values: list[Any]  # distinct: all int, all bool or all str
    codes: np.ndarray  # (M,) int64 into `values`: of the rows, or of the entries of all rows' lists
    lengths: np.ndarray | None  # (N,) entries of each row's list; None: no lists
    names: list[str] | None  # of a ClassLabel, whose values are indices into it

    def __len__(self) -> int:
        return len(self.codes) if self.lengths is None else len(self.lengths)

    @property
    def is_list(self) -> bool:
        """Whether a row has a list of labels."""
        return self.lengths is not None

    @property
    def texts(self) -> list[str]:
        """The class name that each distinct value stands for."""
        if self.names is not None:
            return [self.names[value] for value in self.values]
        return [str(value) for value in self.values]

    @property
    def rows(self) -> np.ndarray:
        """(M,) the row of each entry of `codes`."""
        return np.arange(len(self)) if self.lengths is None else np.repeat(np.arange(len(self)), self.lengths)

    def row_of(self, value: int) -> int:
        """Return the first row that has a value, by its index in `values`."""
        return int(self.rows[np.argmax(self.codes == value)])

    def count_in(self, row: int) -> int:
        """Return the number of labels of a row."""
        return 1 if self.lengths is None else int(self.lengths[row])

    @property
    def row_without_one(self) -> int | None:
        """The first row that has no label or several."""
        if self.lengths is None or (self.lengths == 1).all():
            return None
        return int(np.argmax(self.lengths != 1))

    @property
    def has_one_each(self) -> bool:
        """Whether every row has exactly one label."""
        return self.row_without_one is None

    def require_one_each(self) -> None:
        """Raise DataError for a row that has no label or several."""
        row = self.row_without_one
        if row is not None:
            raise DataError(
                f"{self.where}: row {row} has {self.count_in(row)} labels, where one for each image is needed; remove "
                "such rows, or train on the lists with data.multi_label=true"
            )


def read_column(dataset: Any, column: str, where: str) -> LabelColumn:
    """Return the label column of an HF dataset.

    Raises DataError with the row for labels that are missing or out of a ClassLabel's range, and for labels that
    are neither integers, strings nor booleans. Whole floats count as integers, because pandas turns an integer column
    with missing values into floats.
    """
    if isinstance(dataset, FileSplit) and isinstance(dataset.columns.get(column), np.ndarray):
        numbers, codes = np.unique(dataset.columns[column], return_inverse=True)
        return LabelColumn(where, numbers.tolist(), codes.astype(np.int64), None, dataset.class_names)
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _array(dataset, column, where)
    _require_none_missing(array, where, None)
    lengths = None
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
        array = array.flatten()
        _require_none_missing(array, where, lengths)
    if isinstance(dataset, FileSplit):
        names = dataset.class_names
    else:
        names = getattr(element_of(dataset.features[column]), "names", None)
    values, codes = _distinct(array, where)
    read = LabelColumn(where, values, codes, lengths, None if names is None else list(names))
    return _checked(read)


def _array(dataset: Any, column: str, where: str) -> Any:
    """Return a column as an Arrow array of plain types."""
    import pyarrow as pa

    if isinstance(dataset, FileSplit):
        if column not in dataset.columns:
            raise DataError(f"{where}: holds images, not labels; name data.label_column")
        return dataset.columns[column]
    array = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    return array.storage if isinstance(array, pa.ExtensionArray) else array  # datasets' Array2D and others


def _require_none_missing(array: Any, where: str, lengths: np.ndarray | None) -> None:
    if not array.null_count:
        return
    entry = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
    row = entry if lengths is None else int(np.searchsorted(np.cumsum(lengths), entry, side="right"))
    raise _missing(row, where)


def _missing(row: int, where: str) -> DataError:
    return DataError(f"{where}: row {row} has no label; remove such rows")


def _distinct(array: Any, where: str) -> tuple[list[Any], np.ndarray]:
    """Return the distinct values of an Arrow array, and for each entry the index of its value."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
    elif pa.types.is_float16(kind):
        array = array.cast(pa.float32())
    elif pa.types.is_nested(kind):
        raise _no_class(_listed(array[:3], where), where)
    encoded = array.dictionary_encode()
    return _listed(encoded.dictionary, where), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _listed(array: Any, where: str) -> list[Any]:
    try:
        values: list[Any] = array.to_pylist()
    except (ValueError, OverflowError) as error:  # of a damaged file: texts that are not UTF-8, dates beyond Python's
        raise DataError(f"{where}: its values can't be read as {array.type}: {first_line(error)}") from None
    return values


def _no_class(values: Sequence[Any], where: str) -> DataError:
    message = f"{where}: labels must be integers or texts; got {shortened(map(shown, values), 3)}"
    if values and all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        message += "; shares of classes (soft labels) can't be trained on: give the class with the largest share"
    return DataError(message)


def _checked(read: LabelColumn) -> LabelColumn:
    """Return the column with whole floats as integers. Raises DataError for values that can't be classes."""
    values = read.values
    for index, value in enumerate(values):
        if value != value or (isinstance(value, str) and not value.strip()):  # nan, and empty cells
            raise _missing(read.row_of(index), read.where)
    if values and all(isinstance(value, float) and value.is_integer() and abs(value) < 2**53 for value in values):
        values = [int(value) for value in values]
    if not (all(isinstance(value, int) for value in values) or all(isinstance(value, str) for value in values)):
        raise _no_class(values, read.where)
    for index, value in enumerate(values if read.names is not None else ()):
        if not 0 <= value < len(read.names or ()):
            unlabelled = ", which means unlabelled; remove such rows" if value == -1 else ""
            raise DataError(
                f"{read.where}: row {read.row_of(index)} has label {value!r}{unlabelled}; allowed are 0 to "
                f"{len(read.names or ()) - 1} ({shortened(read.names or (), 6)})"
            )
    return LabelColumn(read.where, values, read.codes, read.lengths, read.names)


def are_vectors(columns: Sequence[LabelColumn]) -> bool:
    """Return whether lists are 0/1 vectors: all of one length of at least 2, and only values 0 and 1.

    As lists of classes they would name a class twice, or give both of two classes to every image. Vectors of a
    ClassLabel are as long as it has names, at least 3: with two, they may be lists of both classes.
    """
    lists = [read for read in columns if read.is_list]
    lengths = {int(length) for read in lists if read.lengths is not None for length in np.unique(read.lengths)}
    if len(lengths) != 1 or (width := lengths.pop()) < 2:
        return False
    return all({*read.values} <= {0, 1} and (read.names is None or len(read.names) == width > 2) for read in lists)


def vector_classes(read: LabelColumn) -> LabelColumn:
    """Return a column of 0/1 vectors as lists of class numbers, with a class for each position."""
    assert read.lengths is not None
    width = int(read.lengths[0]) if len(read) else 0
    hot = np.array([bool(value) for value in read.values], dtype=bool)[read.codes].reshape(len(read), width)
    names = read.names or [str(i) for i in range(width)]
    return LabelColumn(read.where, list(range(width)), np.nonzero(hot)[1], hot.sum(1).astype(np.int64), names)
