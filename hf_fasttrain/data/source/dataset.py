"""A data set ready for training: its splits, columns and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_fasttrain.data.source.array_records import ArrayRecords
from hf_fasttrain.data.source.classes import names_without_images
from hf_fasttrain.data.source.columns import Columns, Kind, find_columns, forms_of, require_columns
from hf_fasttrain.data.source.file_split import FileSplit, Groups
from hf_fasttrain.data.source.folds import fold_numbers
from hf_fasttrain.data.source.groups import held_out_groups, notes_on_groups, read_groups
from hf_fasttrain.data.source.image_files import EVAL_NAMES, TEST_NAMES, TRAIN_NAMES
from hf_fasttrain.data.source.inventory import Inventory
from hf_fasttrain.data.source.label_table_columns import TableKeys
from hf_fasttrain.data.source.labels import read_labels
from hf_fasttrain.data.source.multi_label import LabelArray
from hf_fasttrain.data.source.opening import open_splits
from hf_fasttrain.data.source.records import ImageRecords, Record, Records, require_paths
from hf_fasttrain.utils.errors import DataError, first_line, nearest, shortened


@dataclass(frozen=True)
class Split:
    """Images of one split: rows of a data set, and their labels."""

    name: str
    images: ImageRecords  # of the whole dataset that the split is a part of
    labels: LabelArray  # (N,) int64; MultiLabels if an image may have several classes
    rows: np.ndarray | None = None  # (N,) rows of `images` that belong to the split; None: all
    groups: Groups | None = None  # of each row of `images` (data.group_column)

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
    inventory: Inventory | None = None  # of a folder: what is left out


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
    label_column: str | Sequence[str] = "auto",
    label_separator: str | None = None,
    image_root: str | None = None,
    split_column: str | None = "auto",
    group_column: str | None = None,
    multi_label: bool | None = None,
    eval_fraction: float = 0.1,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    inventory: str = "full",
    max_bad_fraction: float = 1.0,
) -> Source:
    """Return the splits of a dataset given by name or path, or passed as a `Dataset` or `DatasetDict`.

    `test_key` is the name of `test_split` in messages, `inventory` that of `open_splits`. Raises DataError if the
    dataset does not exist, or lacks the requested splits, columns or labels, or if more than `max_bad_fraction` of a
    folder's images are left out.
    """
    keys = TableKeys(image_column, label_column, label_separator, image_root, split_column, group_column)
    splits = open_splits(dataset, config=config, revision=revision, inventory=inventory, keys=keys)
    where = dataset if isinstance(dataset, str) else "the dataset passed in"
    train_name = _choose_train(splits, train_split, where)
    eval_name = _choose_eval(splits, eval_split, train_name, where)
    if test_split is not None:
        require_split(splits, test_split, test_key, where)
    used = {name for name in (train_name, eval_name, test_split) if name is not None}
    splits.use(used)
    columns = splits.columns or _columns(splits[train_name], keys, f"{where}, split '{train_name}'")
    for name in used:
        require_columns(splits[name], columns, where=str(where), split=name, train=train_name)
        if not len(splits[name]):
            raise DataError(f"{where}: split '{name}' has no images")
    used_splits = {name: splits[name] for name in splits if name in used}
    _require_no_transform(used_splits)
    labels = read_labels(used_splits, columns.label, where=str(where), train=train_name, multi_label=multi_label)
    images = {name: image_records(splits[name], columns.image, str(where)) for name in used}
    groups = {name: read_groups(splits[name], keys.group_column, str(where)) for name in used if keys.group_column}
    by_name = {name: Split(name, images[name], labels.by_split[name], groups=groups.get(name)) for name in used}
    train = by_name[train_name]
    if folds is not None:
        if eval_name is not None:
            raise DataError(
                f"data.folds={folds}: {where} has a split '{eval_name}' to evaluate on already; leave data.folds out, "
                "or give a data set of the training images alone"
            )
        train, evaluation = with_fold(train, folds, fold, seed)
    elif eval_name is None:
        train, evaluation = hold_out(train, eval_fraction, seed, groups.get(train_name))
    else:
        evaluation = by_name[eval_name]
    test = by_name[test_split] if test_split else None
    notes = [*splits.notes_on(used, max_bad_fraction), *labels.notes]
    notes += notes_on_groups(groups, str(keys.group_column), train_name) if groups else []
    notes += [*_notes_on_classes([train, evaluation, *([test] if test else [])], labels.class_names)]
    notes += _notes_on_columns(used_splits[train_name], columns, keys.group_column, where)
    notes += note_on_test_split(splits, used, str(where), "data.test_split={} measures it once, at the end")
    unused = [name for name in splits if name not in {*used, *TEST_NAMES}]
    if unused:
        notes.append(f"{where} has other splits, which are not used: {shortened(unused)}")
    rest: dict[str, Any] = {"held_out": eval_name is None, "split_names": list(splits), "notes": notes}
    rest["inventory"] = splits.inventory
    return Source(train, evaluation, test, labels.class_names, labels.multi_label, columns, **rest)


def _notes_on_classes(splits: Sequence[Split], class_names: Sequence[str]) -> list[str]:
    """Return a note for each split in which a class has no images."""
    missing = {split.name: names_without_images(split.labels, class_names) for split in splits if len(split)}
    return [f"split '{name}' has no image of {shortened(names)}" for name, names in missing.items() if names]


def _columns(dataset: Any, keys: TableKeys, where: str) -> Columns:
    """Return the columns of a split. Raises DataError for keys that only tables of paths and labels have."""
    for key in ("label_separator", "image_root", "split_column"):
        if getattr(keys, key) not in (None, "auto"):
            raise DataError(
                f"data.{key}: has an effect on tables of paths and labels (.csv, .tsv, .jsonl, .parquet) only, and "
                f"{where} is none; leave it out"
            )
    if not isinstance(keys.label_column, str):
        raise DataError(
            f"data.label_column: a list of columns is for tables of paths and labels (.csv, .tsv, .jsonl, .parquet), "
            f"and {where} is none; give one column, which may have lists or 0/1 vectors"
        )
    return find_columns(dataset, keys.image_column, keys.label_column, where=where)


def _notes_on_columns(dataset: Any, columns: Columns, group: str | None, where: Any) -> list[str]:
    """Return a note if a dataset has columns that are not used."""
    rest = [name for name in forms_of(dataset) if name not in (columns.image, columns.label, group)]
    if not rest:
        return []
    return [
        f"{where}: not used: column{'s' * (len(rest) > 1)} {shortened(rest)} (images: {columns.image}, labels: "
        f"{columns.label})"
    ]


def _require_no_transform(splits: Mapping[str, Any]) -> None:
    """Raise DataError for a dataset with a transform of its own, which would not be called."""
    for name, split in splits.items():
        if not isinstance(split, FileSplit) and split.format["type"] == "custom":
            raise DataError(
                f"split '{name}' of the dataset passed in has a transform (set_transform or with_transform), which "
                "would not be called: images are read as they are stored. Pass it as Trainer.from_recipe(..., "
                "transform=f), where f(pixels, rng) returns pixels (docs/python-api.md), and take it off with "
                "reset_format()"
            )


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


def hold_out(split: Split, fraction: float, seed: int, groups: Groups | None = None) -> tuple[Split, Split]:
    """Split off a random `fraction` of the images, stratified by class; return (rest, held-out part).

    Multi-label images are drawn regardless of their labels. With fraction 0 the held-out part is empty. With `groups`,
    whole ones are held out.
    """
    if not fraction:
        none = np.arange(0)
        return split, part_of(split, none, f"none held out of {split.name}")
    if groups is None:
        held_rows = _drawn(split, fraction, seed)
    else:
        held_rows = held_out_groups(split.labels, groups, fraction, seed)
    is_held = np.zeros(len(split), bool)
    is_held[held_rows] = True
    rest = np.flatnonzero(~is_held)
    return part_of(split, rest), part_of(split, held_rows, f"held-out {fraction:.0%} of {split.name}")


def with_fold(split: Split, folds: int, fold: int, seed: int) -> tuple[Split, Split]:
    """Return the images outside of a fold, and those of the fold."""
    is_held = fold_numbers(split.labels, folds, seed, split.groups) == fold
    name = f"fold {fold} of {folds} of {split.name}"
    return part_of(split, np.flatnonzero(~is_held)), part_of(split, np.flatnonzero(is_held), name)


def part_of(split: Split, indices: np.ndarray, name: str | None = None) -> Split:
    """Return the images of a split at `indices`."""
    return replace(split, name=name or split.name, labels=split.labels[indices], rows=split.rows_of(indices))


def _drawn(split: Split, fraction: float, seed: int) -> np.ndarray:
    """Return a random `fraction` of the images' indices, ascending, stratified by class."""
    rng = np.random.default_rng([seed, len(split)])
    if split.labels.ndim == 1:
        by_class = np.argsort(split.labels, kind="stable")
        _, counts = np.unique(split.labels, return_counts=True)
        groups = np.split(by_class, np.cumsum(counts)[:-1])
    else:
        groups = [np.arange(len(split))]
    # Round the running count, not each class's share: with many small classes the total is still right.
    drawn: list[np.ndarray] = []
    total = num_held = 0
    for group in groups:
        total += len(group)
        number = min(round(total * fraction) - num_held, len(group) - 1)
        drawn.append(rng.permutation(group)[: max(0, number)])
        num_held += len(drawn[-1])
    held_rows = np.sort(np.concatenate(drawn))
    if not len(held_rows):
        raise DataError(
            f"data.eval_fraction={fraction} of {len(split)} images holds out none; raise it or name data.eval_split"
        )
    return held_rows


def subset(split: Split, max_images: int, seed: int) -> Split:
    """Return at most so many images of a split: the first of a shuffle by the seed that keeps the classes' shares.

    More images contain the fewer ones. Images with several labels are shuffled regardless of them.
    """
    if max_images >= len(split):
        return split
    order = np.random.default_rng([seed, len(split), 1]).permutation(len(split))
    if split.labels.ndim == 1:
        labels = split.labels[order]
        by_class = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
        position = np.empty(len(labels))  # of an image among those of its class, from 0 to 1
        position[by_class] = (rank + 0.5) / np.repeat(counts, counts)
        order = order[np.argsort(position, kind="stable")]
    rows = np.sort(order[:max_images])
    return part_of(split, rows)


def image_records(dataset: Any, column: str, where: str) -> ImageRecords:
    """Return the undecoded images of a split's column. Raises DataError if it holds no images."""
    if isinstance(dataset, FileSplit):
        return dataset.images[column]
    kind = forms_of(dataset)[column].kind
    if kind is Kind.ARRAY:
        return ArrayRecords(dataset, column, where)
    import datasets
    import pyarrow as pa

    images = dataset.select_columns([column]).with_format(None)
    try:
        images = images.cast_column(column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{where}: column '{column}' can't be read as images: {first_line(error)}") from None
    records = Records(images if column == "image" else images.rename_column(column, "image"))
    require_paths(records, f"{where}: column '{column}'")
    return records


def note_on_test_split(splits: Iterable[str], used: Iterable[str], where: str, key: str) -> list[str]:
    """Return a note for each test split that is not used; `key` says how to use it, with {} for its name."""
    unused = [name for name in TEST_NAMES if name in set(splits) - set(used)]
    return [f"{where} has a split '{name}' too, which is not used; {key.format(name)}" for name in unused]
