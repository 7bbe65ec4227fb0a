"""Parquet and Arrow files, opened by their paths as they are: pyarrow takes a path such as a:b for an address."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.image_files import suffix_of
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, first_line, shortened
from hf_fasttrain.utils.files import reason, require_regular


@contextmanager
def open_table(file: str) -> Iterator[Any]:
    """Open a table's file, by its path as it is. Raises OSError for what is not a regular file."""
    import pyarrow as pa

    require_regular(file)
    path = os.fsencode(file)
    with pa.OSFile(path) if suffix_of(file) == ".parquet" else pa.memory_map(path) as opened:
        yield opened


def arrow_reader(opened: Any) -> Any:
    """Return the reader of an Arrow stream or file."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(opened)


def read_schema(file: str) -> Any:
    """Return the schema of a file. Raises DataError if it can't be read, or names a column twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_table(file) as opened:
            schema = pq.read_schema(opened) if suffix_of(file) == ".parquet" else arrow_reader(opened).schema
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable([file], error) from None
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{one_line(file)}: has column {shortened(map(repr, twice))} twice; rename one")
    return schema


def is_record(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def cache_error(error: BaseException) -> DataError | None:
    """Return the message for an error of the cache of `datasets`, full or not writable; None for others."""
    import datasets

    if not isinstance(error, OSError):
        return None
    cache, path = Path(datasets.config.HF_DATASETS_CACHE), Path(os.fsdecode(error.filename or "."))
    is_of_cache = path.is_absolute() and (path.is_relative_to(cache.parent) or cache.is_relative_to(path))
    if not is_of_cache and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DataError(
        f"{one_line(str(cache))}: the cache of `datasets`, into which tables are converted, can't be written "
        f"({reason(error)}); set HF_DATASETS_CACHE to a folder that can be"
    )


def unreadable(files: Sequence[str], error: Exception) -> DataError:
    cause = error.__cause__ or error
    if (of_cache := cache_error(cause)) is not None:
        return of_cache
    kind = suffix_of(files[0]).removeprefix(".")
    return DataError(f"{shortened(map(one_line, files), 3)}: can't be read as {kind}: {first_line(cause)}")
