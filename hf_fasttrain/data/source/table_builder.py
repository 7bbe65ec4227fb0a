"""Converts tables into the cache of `datasets`. Imports `datasets`, so it is imported when it is needed.

`load_dataset` takes a path for a pattern or an address ("photos [v2]", "a::b"), and refuses tables with a column whose
type it does not know.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from hf_fasttrain.data.source.image_files import suffix_of
from hf_fasttrain.data.source.table_files import arrow_reader, open_table
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, first_line


def features_of(schema: pa.Schema, file: str) -> datasets.Features:
    """Return the features of the columns of a file's schema, without those of types that `datasets` does not know.

    Raises DataError if the metadata that `datasets` wrote into the file are damaged, or of another version.
    """
    known: dict[str, Any] = {}
    for column in schema:
        found, error = _features_of(column, schema.metadata)
        if error is not None and _features_of(column, None)[1] is None:
            raise DataError(
                f"{one_line(file)}: its features can't be read ({first_line(error)}); update `datasets`, or write the "
                "file again"
            )
        known |= found
    return datasets.Features(known)


def _features_of(column: pa.Field, metadata: Any) -> tuple[dict[str, Any], Exception | None]:
    """Return the feature of a column by its name, or why there is none."""
    failed: Exception | None = None
    for kind in (_plain(column.type), column.type):
        try:
            alone = pa.schema([pa.field(column.name, kind)], metadata=metadata)
            return datasets.Features.from_arrow_schema(alone), None
        except Exception as error:  # noqa: BLE001 - `datasets` takes metadata that anybody may have written as sound
            failed = error
    return {}, failed


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type that holds the same values, for those that few functions of Arrow take."""
    views = {"string_view": pa.string(), "binary_view": pa.large_binary()}
    if pa.types.is_dictionary(kind) or str(kind).startswith("run_end_encoded"):
        return _plain(kind.value_type)
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return views.get(str(kind), kind)


@dataclass
class TablesConfig(datasets.BuilderConfig):
    """All that a converted file depends on; datasets hashes it into the name of the file."""

    files: Sequence[tuple[str, str, int, int]] = ()  # path, folder of its relative paths, size, time
    columns: Sequence[str] = ()
    paths: Sequence[str] = ()  # columns of paths of images, which become absolute
    features: datasets.Features | None = field(default=None)


class Tables(datasets.ArrowBasedBuilder):
    """The rows of parquet or Arrow files, in their order."""

    BUILDER_CONFIG_CLASS = TablesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": list(self.config.files)})]

    def _generate_tables(self, files: Sequence[tuple[str, str, int, int]]) -> Iterator[tuple[Any, pa.Table]]:
        for number, (file, folder, *_) in enumerate(files):
            for index, batch in enumerate(_batches(file, self.config.columns)):
                columns = {name: _with_values(batch.column(name)) for name in self.config.columns}
                for name in self.config.paths:
                    columns[name] = _absolute(columns[name], folder)
                yield (number, index), table_cast(pa.table(columns), self.info.features.arrow_schema)


def _batches(file: str, columns: Sequence[str]) -> Iterator[Any]:
    with open_table(file) as opened:
        if suffix_of(file) == ".parquet":
            table = pq.ParquetFile(opened)
            first = table.metadata.row_group(0).num_rows if table.num_row_groups else 1
            yield from table.iter_batches(max(1, first), columns=list(columns))
            return
        reader = arrow_reader(opened)
        numbers = range(getattr(reader, "num_record_batches", 0))
        for batch in map(reader.get_batch, numbers) if numbers else reader:
            batch.validate(full=True)
            yield batch


def _with_values(column: pa.Array) -> pa.Array:
    kind = _plain(column.type)
    return column if kind == column.type else column.cast(kind)


def _absolute(column: pa.Array, folder: str) -> pa.Array:
    """Return a column of paths, or of structs of bytes and path, in which relative paths begin with `folder`.

    Beside bytes, a path is only a name, and stays.
    """
    if not pa.types.is_struct(column.type):
        return pa.array(_joined(folder, column.to_pylist()), column.type)
    fields = {name.name: column.field(index) for index, name in enumerate(column.type)}
    has_bytes = fields["bytes"].is_valid().to_pylist()
    if all(has_bytes) or fields["path"].null_count == len(column):
        return column
    paths = fields["path"].to_pylist()
    joined = _joined(folder, [None if has else path for has, path in zip(has_bytes, paths, strict=True)])
    both = [path if has else new for has, path, new in zip(has_bytes, paths, joined, strict=True)]
    fields["path"] = pa.array(both, pa.string())
    return pa.StructArray.from_arrays(list(fields.values()), list(fields), mask=column.is_null())


def _joined(folder: str, paths: Sequence[str | None]) -> list[str | None]:
    return [path and (path if "://" in path else os.path.join(folder, path)) for path in paths]
