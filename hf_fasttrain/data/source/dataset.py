"""Opens a dataset by name, folder or file, and finds its splits, columns and labels."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hf_fasttrain.data.source.classes import names_without_images
from hf_fasttrain.data.source.columns import Columns, find_columns, require_columns
from hf_fasttrain.data.source.image_files import (
    EVAL_NAMES,
    SPLIT_FOLDERS,
    SPLIT_OF,
    TEST_NAMES,
    TRAIN_NAMES,
    scan_image_folder,
)
from hf_fasttrain.data.source.labels import read_labels
from hf_fasttrain.data.source.metadata import METADATA_FILES, read_metadata_folder
from hf_fasttrain.data.source.records import Record, Records
from hf_fasttrain.data.source.tables import group_by_features
from hf_fasttrain.utils.errors import DataError, nearest, shortened


@dataclass(frozen=True)
class Split:
    """Images of one split: rows of an HF dataset, and their labels."""

    name: str
    images: Records  # of the whole dataset that the split is a part of
    labels: np.ndarray  # (N,) int64, or (N, K) float32 of 0 and 1 for multi-label
    rows: np.ndarray | None = None  # (N,) rows of `images` that belong to the split; None: all

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows in the dataset of images of the split."""
        return np.asarray(indices) if self.rows is None else self.rows[indices]

    def records(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """Return the undecoded images of the split at `indices`."""
        return [self.images[row] for row in self.rows_of(np.asarray(indices)).tolist()]


@dataclass(frozen=True)
class Source:
    """A dataset ready for training: its splits, columns and class names."""

    train: Split
    evaluation: Split
    test: Split | None
    class_names: list[str]
    multi_label: bool
    columns: Columns
    held_out: bool  # whether `evaluation` was held out from the train split
    split_names: list[str] = field(default_factory=list)  # all that the dataset has
    notes: list[str] = field(default_factory=list)  # for the user, before training


def load_source(
    dataset: Any,
    *,
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "auto",
    eval_split: str = "auto",
    test_split: str | None = None,
    test_key: str = "data.test_split",
    image_column: str = "auto",
    label_column: str = "auto",
    multi_label: bool | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> Source:
    """Return the splits of a dataset given by name or path, or passed as a `Dataset` or `DatasetDict`.

    `test_key` is the name of `test_split` in messages. Raises DataError if the dataset does not exist, or lacks the
    requested splits, columns or labels.
    """
    splits = open_splits(dataset, config=config, revision=revision)
    where = dataset if isinstance(dataset, str) else "the dataset passed in"
    train_name = _choose_train(splits, train_split, where)
    eval_name = _choose_eval(splits, eval_split, train_name, where)
    columns = find_columns(splits[train_name], image_column, label_column, where=f"{where}, split '{train_name}'")
    wanted = {name for name in (train_name, eval_name, test_split) if name is not None}
    if test_split is not None:
        require_split(splits, test_split, test_key, where)
    for name in wanted:
        require_columns(splits[name], columns, where=str(where), split=name, train=train_name)
    opened = {name: splits[name] for name in splits if name in wanted}
    _require_no_transform(opened)
    read = read_labels(opened, columns.label, where=str(where), train=train_name, multi_label=multi_label)
    by_name = {name: Split(name, image_records(splits[name], columns.image), read.labels[name]) for name in wanted}
    train = by_name[train_name]
    if eval_name is None:
        train, evaluation = hold_out(train, eval_fraction, seed)
    else:
        evaluation = by_name[eval_name]
    test = by_name[test_split] if test_split else None
    for split in (train, evaluation, test):
        if split is not None and not len(split):
            raise DataError(f"{where}: split '{split.name}' has no images")
    notes = [*read.notes, *_notes_on_classes([train, evaluation, *([test] if test else [])], read.class_names)]
    notes += _notes_on_columns(opened[train_name], columns, where)
    notes += note_on_test_split(splits, wanted, str(where), "data.test_split={} measures it once, at the end")
    held_out, names = eval_name is None, list(splits)
    return Source(train, evaluation, test, read.class_names, read.multi_label, columns, held_out, names, notes)


def _notes_on_classes(splits: Sequence[Split], class_names: Sequence[str]) -> list[str]:
    """Return a note for each split in which a class has no images."""
    missing = {split.name: names_without_images(split.labels, class_names) for split in splits}
    return [f"split '{name}' has no image of {shortened(names)}" for name, names in missing.items() if names]


def _notes_on_columns(dataset: Any, columns: Columns, where: Any) -> list[str]:
    """Return a note if a dataset has columns that are not used."""
    rest = [name for name in dataset.features if name not in (columns.image, columns.label)]
    if not rest:
        return []
    return [
        f"{where}: not used: column{'s' * (len(rest) > 1)} {shortened(rest)} (images: {columns.image}, labels: "
        f"{columns.label})"
    ]


def _require_no_transform(splits: Mapping[str, Any]) -> None:
    """Raise DataError for a dataset with a transform of its own, which would not be called."""
    for name, split in splits.items():
        if split.format["type"] == "custom":
            raise DataError(
                f"split '{name}' of the dataset passed in has a transform (set_transform or with_transform), which "
                "would not be called: images are read as they are stored. Pass it as Trainer.from_recipe(..., "
                "transform=f), where f(pixels, rng) returns pixels (docs/python-api.md), and take it off with "
                "reset_format()"
            )


def open_splits(
    dataset: Any, *, config: str | None = None, revision: str | None = None, empty_classes: bool = False
) -> dict[str, Any]:
    """Return split name -> HF dataset, of a `Dataset`, a `DatasetDict`, a path, ``digits`` or a Hub name.

    A class folder without images is a DataError, unless `empty_classes`.
    """
    if not isinstance(dataset, str | os.PathLike):
        return _splits_of_object(dataset)
    if str(dataset) == "digits":
        return {"train": digits_dataset()}
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _open_folder(path, empty_classes)
    if path.suffix in (".parquet", ".arrow"):
        return _open_files({"train": [path]})
    if path.exists():
        raise DataError(f"{dataset}: is a file; allowed are .parquet and .arrow files, folders and Hub names")
    if str(dataset).startswith((".", "/", "~")):
        raise DataError(f"{dataset}: no such file or folder{_siblings(path)}")
    return _open_hub(str(dataset), config, revision)


def _splits_of_object(dataset: Any) -> dict[str, Any]:
    import datasets

    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    for split in splits.values():
        if not isinstance(split, datasets.Dataset):
            raise DataError(
                f"the dataset passed in holds a {type(split).__name__}; allowed are datasets.Dataset and "
                "DatasetDict (streaming datasets are not supported)"
            )
    return splits


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist either"
    return f" in {path.parent}.{nearest(path.name, [p.name for p in path.parent.iterdir()])}"


def _open_folder(path: Path, empty_classes: bool) -> dict[str, Any]:
    import datasets

    names = {entry.name for entry in os.scandir(path)}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, Mapping) else {"train": saved}
    near = [p for pattern in ("*", "*/*") for p in path.glob(pattern)]  # deeper ones belong to classes
    files = sorted(p for p in near if p.suffix in (".parquet", ".arrow") and p.name not in METADATA_FILES)
    if files:
        return _open_files(_files_by_split(files, path))
    if any(p.name in METADATA_FILES for p in near):
        if any(p.suffix == ".zip" for p in near):  # images in archives
            return _load("imagefolder", str(path), data_dir=str(path))
        return read_metadata_folder(path, SPLIT_OF)
    return scan_image_folder(path, empty_classes=empty_classes)


def _files_by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Sort files like ``train-00000-of-00001.parquet`` or ``test/0.parquet`` by the split in their name."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = "-".join(file.relative_to(root).with_suffix("").parts).lower().replace("_", "-").split("-")
        split = next((word for word in words if word in SPLIT_FOLDERS), "train")
        splits.setdefault(split, []).append(file)
    return splits


def _open_files(files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    kind = next(iter(files.values()))[0].suffix.removeprefix(".")
    opened: dict[str, Any] = {}
    for group in group_by_features(files):
        names = {split: [str(file) for file in files[split]] for split in group}
        where = shortened([name for some in names.values() for name in some], 3)
        opened |= _load(kind, where, data_files=names)
    return {split: opened[split] for split in files}


def _load(kind: str, where: str, **options: Any) -> dict[str, Any]:
    """Return the splits of local files by `load_dataset`, with its log silenced and its errors raised as DataError."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return dict(datasets.load_dataset(kind, **options))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"{where}: can't be read as {kind}: {error.__cause__ or error}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _open_hub(name: str, config: str | None, revision: str | None) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return dict(datasets.load_dataset(name, config, revision=revision))
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"data.dataset: '{name}' is not a local file or folder, and could not be downloaded from the Hub: "
            f"{str(error).splitlines()[0]} Give a path (./{name}), digits, or check name, data.config and network"
        ) from None


def digits_dataset() -> Any:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels, as an HF dataset (they ship with scikit-learn)."""
    import datasets

    images, labels, names = _digits_as_png()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


@cache  # a process that opens several runs encodes them once
def _digits_as_png() -> tuple[list[bytes], list[int], list[str]]:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for pixels in np.round(digits.images * (255 / 16)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images, digits.target.tolist(), [str(name) for name in digits.target_names]


def require_split(splits: Mapping[str, Any], name: str, key: str, where: Any) -> str:
    if name not in splits:
        raise DataError(
            f"{key}: '{name}' is not a split of {where}; it has {shortened(splits)}.{nearest(name, splits)}"
        )
    return name


def _choose_train(splits: Mapping[str, Any], name: str, where: Any) -> str:
    if name != "auto":
        return require_split(splits, name, "data.train_split", where)
    for candidate in TRAIN_NAMES:
        if candidate in splits:
            return candidate
    if len(splits) == 1:
        return next(iter(splits))
    raise DataError(f"data.train_split: {where} has no split 'train'; choose one of {shortened(splits)}")


def _choose_eval(splits: Mapping[str, Any], name: str, train: str, where: Any) -> str | None:
    if name != "auto":
        return require_split(splits, name, "data.eval_split", where)
    return next((known for known in EVAL_NAMES if known in splits and known != train), None)


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split off a random `fraction` of the images, stratified by class; return (rest, held-out part).

    Multi-label images are drawn regardless of their labels.
    """
    rng = np.random.default_rng([seed, len(split)])
    if split.labels.ndim == 1:
        groups = [np.flatnonzero(split.labels == label) for label in np.unique(split.labels)]
    else:
        groups = [np.arange(len(split))]
    # Round the running count, not each class's share: with many small classes the total is still right.
    drawn: list[np.ndarray] = []
    seen = chosen = 0
    for group in groups:
        seen += len(group)
        number = min(round(seen * fraction) - chosen, len(group) - 1)
        drawn.append(rng.permutation(group)[: max(0, number)])
        chosen += len(drawn[-1])
    held_rows = np.sort(np.concatenate(drawn))
    if not len(held_rows):
        raise DataError(
            f"data.eval_fraction={fraction} of {len(split)} images holds out none; raise it or name data.eval_split"
        )
    rest = np.setdiff1d(np.arange(len(split)), held_rows)

    def part(name: str, rows: np.ndarray) -> Split:
        return Split(name, split.images, split.labels[rows], split.rows_of(rows))

    return part(split.name, rest), part(f"held-out {fraction:.0%} of {split.name}", held_rows)


def part_of(split: Split, most: int, seed: int) -> Split:
    """Return at most so many images of a split: the first of a shuffle by the seed that keeps the classes' shares.

    More images contain the fewer ones. Images with several labels are shuffled regardless of them.
    """
    if most >= len(split):
        return split
    order = np.random.default_rng([seed, len(split), 1]).permutation(len(split))
    if split.labels.ndim == 1:
        labels = split.labels[order]
        by_class = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
        place = np.empty(len(labels))  # of an image among those of its class, from 0 to 1
        place[by_class] = (rank + 0.5) / np.repeat(counts, counts)
        order = order[np.argsort(place, kind="stable")]
    rows = np.sort(order[:most])
    return Split(split.name, split.images, split.labels[rows], split.rows_of(rows))


def image_records(dataset: Any, column: str) -> Records:
    """Return the undecoded images of a dataset's column."""
    import datasets

    images = dataset.select_columns([column]).with_format(None)
    images = images.cast_column(column, datasets.Image(decode=False))
    return Records(images if column == "image" else images.rename_column(column, "image"))


def note_on_test_split(splits: Iterable[str], used: Iterable[str], where: str, key: str) -> list[str]:
    """Return a note for each test split that is not used; `key` says how to use it, with {} for its name."""
    unused = [name for name in TEST_NAMES if name in set(splits) - set(used)]
    return [f"{where} has a split '{name}' too, which is not used; {key.format(name)}" for name in unused]
