"""Parquet and Arrow files: which can be read together because their columns have the same types and class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.columns import element_of
from hf_fasttrain.utils.errors import DataError, shortened


def group_by_features(files: Mapping[str, Sequence[Path]]) -> list[list[str]]:
    """Return the splits in groups whose files have the same columns.

    `load_dataset` gives all files the types and class names of the first one: 007 of another split would become 7, and
    cats would become dogs if another split numbers dogs first. Raises DataError if files of one split name their
    classes differently.
    """
    features = {split: [_features_of(file) for file in group] for split, group in files.items()}
    for split, group in files.items():
        _require_same_classes(split, group, features[split])
    groups: list[list[str]] = []
    for split in files:
        same = next((group for group in groups if features[group[0]][0] == features[split][0]), None)
        if same is None:
            groups.append([split])
        else:
            same.append(split)
    return groups


def _features_of(file: Path) -> Any:
    """Return the columns of a file with their types and class names, None if it can't be read."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file) if file.suffix == ".parquet" else _arrow_schema(file)
        return datasets.Features.from_arrow_schema(schema)
    except (OSError, ValueError, pa.ArrowException):  # reading the whole file will raise the error
        return None


def _arrow_schema(file: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(file)) as opened:
        try:
            return pa.ipc.open_stream(opened).schema
        except pa.ArrowInvalid:
            return pa.ipc.open_file(opened).schema


def _require_same_classes(split: str, files: Sequence[Path], features: Sequence[Any]) -> None:
    first = _class_names(features[0])
    for file, names in zip(files, map(_class_names, features), strict=True):
        for column in first.keys() & names.keys():
            if names[column] != first[column]:
                raise DataError(
                    f"split '{split}', column '{column}': {files[0].name} numbers its classes as "
                    f"{shortened(first[column], 6)}, {file.name} as {shortened(names[column], 6)}; give all files of a "
                    "split the same class names"
                )


def _class_names(features: Any) -> dict[str, list[str]]:
    found = {name: getattr(element_of(feature), "names", None) for name, feature in (features or {}).items()}
    return {name: list(names) for name, names in found.items() if names is not None}
