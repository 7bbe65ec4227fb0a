"""Reads a table of paths and labels (.csv, .tsv, .jsonl, .parquet): cells of text files stay as they are written.

pandas and Arrow guess types: they turn NA into a missing value, 007 into 7 and true into True.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_fasttrain.data.source.columns import IMAGE_NAMES
from hf_fasttrain.data.source.image_files import suffix_of
from hf_fasttrain.data.source.table_files import is_record, open_table, read_schema, unreadable
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, first_line, shortened, shown
from hf_fasttrain.utils.files import read_regular, reason, whole_characters

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl")
LABEL_TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
_HEAD = 1_000_000  # bytes in which the first line is looked for
_BLOCK = 64_000_000  # bytes that are parsed at once: no cell may be larger


@dataclass(frozen=True)
class LabelFile:
    """The columns of a table's file."""

    file: str
    columns: dict[str, Any]  # name -> Arrow array; of text files: strings, or lists of strings in JSON lines
    notes: list[str] = field(default_factory=list)
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # column -> names of its class numbers

    @property
    def is_text(self) -> bool:
        """Whether cells have no types of their own."""
        return suffix_of(self.file) in TEXT_SUFFIXES

    @property
    def where(self) -> str:
        """The file, for messages."""
        return one_line(self.file)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def is_label_table(file: str, image_column: str = "auto") -> bool:
    """Return whether a file is a table of paths and labels: a text file, or a parquet file without encoded images."""
    if suffix_of(file) in TEXT_SUFFIXES:
        return True
    if suffix_of(file) != ".parquet":
        return False
    schema = read_schema(file)
    if image_column in schema.names:
        return _is_text(schema.field(image_column).type)
    texts = [column.name for column in schema if _is_text(column.type)]
    others = [column for column in schema if column.name not in texts]
    return bool(texts) and not any(
        is_record(column.type) or "binary" in str(column.type) or column.name in IMAGE_NAMES for column in others
    )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"


def read_label_table(file: str) -> LabelFile:
    """Return the columns of a table's file. Raises DataError if it can't be read, or names a column twice."""
    kind = suffix_of(file)
    try:
        if kind == ".parquet":
            return _read_parquet(file)
        text = _utf8(read_regular(file), file)
    except OSError as error:
        raise DataError(f"{one_line(file)}: can't be read as {kind[1:]}: {reason(error)}") from None
    return _read_json_lines(file, text) if kind == ".jsonl" else _read_delimited(file, text)


def _utf8(data: bytes, file: str) -> bytes:
    """Return the text of a file as UTF-8, without a byte order mark and empty lines at its beginning."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Excel saves "Unicode text"
        try:
            data = data.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise DataError(f"{one_line(file)}: is not sound UTF-16 ({error.reason}); save it as UTF-8") from None
    data = data.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")
    if not data.strip():
        raise DataError(f"{one_line(file)}: is empty; its first line has the names of the columns, such as image,label")
    return data


def _read_delimited(file: str, data: bytes) -> LabelFile:
    """Return the columns of a file of lines, all of them text."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    delimiter, data, notes = _delimiter(file, data)
    try:
        head = io.StringIO(data[:_HEAD].decode("utf-8", "replace"), newline="")
        types = {f"f{index}": pa.string() for index in range(len(next(csv.reader(head, delimiter=delimiter))))}
        table = arrow_csv.read_csv(
            pa.BufferReader(data),
            # The first line is read as a row, so that every cell is text by its place, whatever a column is called.
            arrow_csv.ReadOptions(block_size=_BLOCK, use_threads=False, autogenerate_column_names=True),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow_csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except (csv.Error, pa.ArrowException) as error:
        raise _not_read(file, data, delimiter, error) from None
    arrays = [column.combine_chunks() for column in table.columns]
    if any(not pa.types.is_string(array.type) for array in arrays):
        raise _not_read(file, data, delimiter, ValueError("its first line can't be read"))
    names = [array[0].as_py().strip() for array in arrays]
    _require_once(names, one_line(file))
    return LabelFile(file, {name: array[1:] for name, array in zip(names, arrays, strict=True)}, notes)


def _delimiter(file: str, data: bytes) -> tuple[str, bytes, list[str]]:
    """Return what separates cells by the first line, the lines from there on, and a note if it is not the usual one."""
    usual = "\t" if suffix_of(file) == ".tsv" else ","
    first, _, rest = data.partition(b"\n")
    declared = first.strip().lower()
    if declared.startswith(b"sep=") and len(declared) == 5:  # for Excel
        delimiter, data = declared[4:].decode("ascii", "replace"), rest
    else:
        line = "".join(first[:_HEAD].decode("utf-8", "replace").split('"')[::2])  # without quoted parts
        delimiter = max(DELIMITERS, key=lambda sign: (line.count(sign), sign == usual))
    if delimiter == usual:
        return delimiter, data, []
    name = DELIMITERS.get(delimiter, shown(delimiter))
    return delimiter, data, [f"{one_line(file)}: cells are separated by {name}, by its first line"]


def _not_read(file: str, data: bytes, delimiter: str, error: Exception) -> DataError:
    where = f"{one_line(file)}: can't be read as {suffix_of(file)[1:]}"
    try:
        data.decode()
    except UnicodeDecodeError as broken:
        return DataError(
            f"{where}: it is not UTF-8 (byte {data[broken.start]:#04x} at {broken.start:,}); save it as UTF-8"
        )
    quote = f"; put cells that hold {shown(delimiter)} or a line break into double quotes"
    return DataError(f"{where}: {one_line(first_line(error))}{quote}")


def _require_once(names: Sequence[str], where: str) -> None:
    """Raise DataError if two columns have the same name: one of them would be dropped."""
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise DataError(f"{where}: has column {shortened(map(shown, twice))} twice; rename one")


def _read_json_lines(file: str, data: bytes) -> LabelFile:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            rows.append(_json_object(line, f"{one_line(file)}, line {number}"))
    names = dict.fromkeys(name for row in rows for name in row)
    return LabelFile(file, {name: _json_column([row.get(name) for row in rows]) for name in names})


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    """Return a line's object; numbers stay as they are written."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_once([name for name, _ in pairs], where)
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=once, parse_int=str, parse_float=str, parse_constant=str)
        if b"\\u" in line:
            row = whole_characters(row)  # half a character could not be printed or written
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON in UTF-8: {first_line(error)}") from None
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: must be a JSON object, such as {{"image": "a.jpg", "label": "cat"}}; got {shown(row)}'
        )
    return row


def _json_column(values: list[Any]) -> Any:
    """Return an Arrow array of texts; of lists of texts if a row has a list."""
    import pyarrow as pa

    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) or value is None else [value] for value in values]
        return pa.array(
            [None if row is None else [_json_text(entry) for entry in row] for row in lists], pa.list_(pa.string())
        )
    return pa.array([_json_text(value) for value in values], pa.string())


def _json_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _read_parquet(file: str) -> LabelFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hf_fasttrain.data.source.table_builder import features_of
    from hf_fasttrain.data.source.tables import class_names_of

    schema = read_schema(file)
    names = {column.name: found for column in schema if (found := _names_in(column.metadata or {}))}
    names |= class_names_of(features_of(schema, file))
    try:
        with open_table(file) as opened:
            table = pq.read_table(opened)
    except (ValueError, pa.ArrowException) as error:
        raise unreadable([file], error) from None
    columns = {}
    for column in schema:
        array = table.column(column.name).combine_chunks()
        columns[column.name] = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    return LabelFile(file, columns, class_names=names)


def _names_in(metadata: Mapping[bytes, bytes]) -> list[str]:
    """Return the names of classes that stand in a column's metadata as a JSON list."""
    for key in (b"class_names", b"names", b"classes", b"labels"):
        try:
            names = json.loads(metadata.get(key, b""))
        except (ValueError, RecursionError):
            continue
        if isinstance(names, list) and names and all(isinstance(name, str) and name for name in names):
            return names if len(set(names)) == len(names) else []
    return []


def as_text(array: Any) -> Any:
    """Return an Arrow array of texts, in which missing values are empty. Raises ArrowException for nested types."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = array if pa.types.is_string(array.type) else array.cast(pa.string())
    return pc.fill_null(text, "") if text.null_count else text


def encoded(array: Any) -> tuple[list[str], np.ndarray]:
    """Return the distinct texts of an Arrow array and the number of each row's, a missing one being empty.

    Through the buffer: `to_numpy` imports pandas, which takes as long as a million rows. Raises ArrowException for
    nested types.
    """
    dictionary = as_text(array).dictionary_encode()
    indices = dictionary.indices
    numbers = np.frombuffer(indices.buffers()[1], np.int32)[indices.offset : indices.offset + len(indices)]
    return dictionary.dictionary.to_pylist(), numbers


def folder_of(file: str) -> str:
    """Return the absolute path of a file's folder."""
    return os.path.dirname(os.path.abspath(file))
