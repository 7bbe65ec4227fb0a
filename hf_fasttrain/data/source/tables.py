"""Parquet and Arrow files: opened by their paths as they are, whatever columns they have beside images and labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.columns import IMAGE_NAMES, element_of
from hf_fasttrain.data.source.image_files import SPLIT_FOLDERS, suffix_of
from hf_fasttrain.data.source.table_files import arrow_reader, is_record, open_table, read_schema, unreadable
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, shortened

SAMPLED = 100  # paths that are looked for


def open_tables(files: Sequence[str], image_column: str = "auto") -> Any:
    """Return the HF dataset of the rows of files, in their order; converted once, into the cache of `datasets`.

    Relative paths of images are those beside their file, or those below the working folder if more are found there.
    Raises DataError for files that can't be read, or whose columns or class names differ.
    """
    import datasets

    from hf_fasttrain.data.source.table_builder import Tables, features_of

    schemas = [read_schema(file) for file in files]
    features = [features_of(schema, file) for schema, file in zip(schemas, files, strict=True)]
    _require_same_columns(files, features)
    _require_same_classes(files, features)
    paths = [name for name in schemas[0].names if _may_be_path(schemas[0].field(name), image_column)]
    folders = [_folder_of_paths(file, schema, paths) for file, schema in zip(files, schemas, strict=True)]
    stamps = [(file, folder, *_stamp(file)) for file, folder in zip(files, folders, strict=True)]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = Tables(files=stamps, columns=list(features[0]), paths=paths, features=features[0])
        builder.download_and_prepare()
        is_empty = not builder.info.splits["train"].num_examples
        dataset: Any = (
            datasets.Dataset.from_dict({name: [] for name in features[0]}, features=features[0])
            if is_empty
            else builder.as_dataset(split="train")
        )
        dataset.unread_columns = {field.name: str(field.type) for field in schemas[0] if field.name not in features[0]}
        return dataset
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise unreadable(files, error) from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def may_hold_images(file: str, image_column: str) -> bool:
    """Return whether a column of a table may hold images, by its type or its name; True if it can't be read."""
    try:
        schema = read_schema(file)
    except DataError:  # which is raised again when it is opened
        return True
    return any(
        field.name in (image_column, *IMAGE_NAMES) or is_record(field.type) or "binary" in str(field.type)
        for field in schema
    )


def _may_be_path(field: Any, image_column: str) -> bool:
    """Return whether the paths of a column are those of images."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"
    return is_record(kind) or (is_text and field.name in (image_column, *IMAGE_NAMES))


def _folder_of_paths(file: str, schema: Any, columns: Sequence[str]) -> str:
    """Return the folder below which the relative paths of a file are: its own, or the working folder.

    The working folder, where `datasets` looks for them, if more of the first ones are found there.
    """
    own, working = os.path.dirname(os.path.abspath(file)), os.getcwd()
    relative = [path for path in _first_paths(file, schema, columns) if not os.path.isabs(path)]
    found = [sum(os.path.exists(os.path.join(folder, path)) for path in relative) for folder in (own, working)]
    return working if found[1] > found[0] else own


def _first_paths(file: str, schema: Any, columns: Sequence[str]) -> list[str]:
    """Return the first paths of images in a file, those beside bytes, too."""
    import pyarrow.parquet as pq

    if not columns:
        return []
    with open_table(file) as opened:
        if suffix_of(file) == ".parquet":
            names = [f"{name}.path" if is_record(schema.field(name).type) else name for name in columns]
            batch = next(pq.ParquetFile(opened).iter_batches(SAMPLED, columns=names), None)
        else:
            reader = arrow_reader(opened)
            is_file = hasattr(reader, "num_record_batches")
            batch = next(map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader), None)
    if batch is None:
        return []
    values = [batch.column(name).slice(0, SAMPLED).to_pylist() for name in columns if name in batch.schema.names]
    flat = [value["path"] if isinstance(value, dict) else value for column in values for value in column]
    return [path for path in flat if isinstance(path, str)]


def files_by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Sort files like ``train-00000-of-00001.parquet`` or ``test/0.parquet`` by the split in their path."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = os.path.splitext(file)[0].replace("/", "-").lower().replace("_", "-").split("-")
        split = next((word for word in words if word in SPLIT_FOLDERS), "train")
        splits.setdefault(split, []).append(file)
    return splits


def _require_same_columns(files: Sequence[str], features: Sequence[Any]) -> None:
    for file, other in zip(files, features, strict=True):
        missing = [name for name in features[0] if name not in other]
        if missing:
            raise DataError(
                f"{one_line(file)}: lacks column {shortened(missing)}, which {Path(files[0]).name} has; give all files "
                "of a split the same columns"
            )


def _require_same_classes(files: Sequence[str], features: Sequence[Any]) -> None:
    """Raise DataError if files name their classes differently: numbers would mean other classes."""
    first = class_names_of(features[0])
    for file, names in zip(files, map(class_names_of, features), strict=True):
        for column in first.keys() & names.keys():
            if names[column] != first[column]:
                raise DataError(
                    f"column '{column}': {Path(files[0]).name} numbers its classes as {shortened(first[column], 6)}, "
                    f"{Path(file).name} as {shortened(names[column], 6)}; give all files of a split the same names"
                )


def class_names_of(features: Any) -> dict[str, list[str]]:
    found = {name: getattr(element_of(feature), "names", None) for name, feature in features.items()}
    return {name: list(names) for name, names in found.items() if names is not None}
