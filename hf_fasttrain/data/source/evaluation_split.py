"""Loads a split to evaluate a trained model on, with labels numbered as the model's classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_fasttrain.data.source.classes import match_names, names_without_images
from hf_fasttrain.data.source.columns import Columns, find_columns, forms_of
from hf_fasttrain.data.source.dataset import Split, image_records, note_on_test_split, require_split
from hf_fasttrain.data.source.image_files import EVAL_NAMES, TRAIN_NAMES
from hf_fasttrain.data.source.label_table_columns import NO_KEYS, TableKeys
from hf_fasttrain.data.source.labels import read_labels, renumber
from hf_fasttrain.data.source.multi_label import LabelArray
from hf_fasttrain.data.source.opening import open_splits
from hf_fasttrain.utils.errors import DataError, shortened


@dataclass(frozen=True)
class EvaluationSplit:
    """A split to evaluate, and notes for the user."""

    split: Split
    class_names: list[str]  # of the split's labels
    notes: list[str]


def load_evaluation_split(
    dataset: Any,
    *,
    multi_label: bool,
    config: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    preferred_split: str = "auto",
    keys: TableKeys = NO_KEYS,
    model_classes: Collection[str] = (),
    inventory: str = "full",
    max_bad_fraction: float = 1.0,
) -> EvaluationSplit:
    """Return one split of a dataset, without holding anything out.

    It is `split` if given, else `preferred_split` if it exists, else the validation split, the only one, or train.
    Column names that the split lacks count as auto, unless they are in `keys.required`. Class folders may be empty;
    those called like one of `model_classes` are class folders. Raises DataError as `load_source` does.
    """
    splits = open_splits(
        dataset,
        config=config,
        revision=revision,
        empty_classes=True,
        known_classes=model_classes,
        inventory=inventory,
        keys=keys,
    )
    name = _choose(splits, split, preferred_split, dataset)
    splits.use([name])
    where = f"{dataset}, split '{name}'"
    columns = splits.columns or _columns(splits[name], keys, where)
    labels = read_labels(
        {name: splits[name]}, columns.label, where=str(dataset), train=name, multi_label=multi_label, trains=False
    )
    images = image_records(splits[name], columns.image, str(dataset))
    if not len(images):
        raise DataError(f"{where} has no images")
    notes = note_on_test_split(splits, {name}, str(dataset), "--split {} measures it")
    return EvaluationSplit(
        Split(name, images, labels.by_split[name]),
        labels.class_names,
        [*splits.notes_on([name], max_bad_fraction), *labels.notes, *notes],
    )


def _columns(dataset: Any, keys: TableKeys, where: str) -> Columns:
    valid = {*forms_of(dataset), *(keys.required or ())}
    names = (keys.image_column, keys.label_column)
    found = [name if isinstance(name, str) and name in valid else "auto" for name in names]
    return find_columns(dataset, *found, where=where)


def _choose(splits: Mapping[str, Any], name: str | None, preferred: str, where: Any) -> str:
    if name is not None:
        return require_split(splits, name, "--split", where)
    if preferred in splits:
        return preferred
    if len(splits) == 1:
        return next(iter(splits))
    default = next((known for known in (*EVAL_NAMES, *TRAIN_NAMES) if known in splits), None)
    if default is None:
        raise DataError(f"{where} has several splits; choose one of {shortened(splits)} by --split")
    return default


def with_model_classes(evaluation: EvaluationSplit, model_classes: Sequence[str], where: str) -> EvaluationSplit:
    """Return the split with its labels renumbered to the model's classes, matched by name.

    Raises DataError if images have a class that the model does not know; classes without images are noted.
    """
    names, labels = evaluation.class_names, evaluation.split.labels
    absent = set(names_without_images(labels, names))
    used = [name for name in names if name not in absent]
    matched = match_names(used, model_classes)
    if matched.unknown:
        raise DataError(
            f"{where}: its classes ({shortened(names)}) are not the model's ({shortened(model_classes)}): "
            f"{shortened(matched.unknown, 6)} can't be matched; evaluate on data with the same classes"
        )
    numbers = {number: matched.numbers[name] for number, name in enumerate(names) if name in matched.numbers}
    numbered = renumber(labels, numbers, len(model_classes))
    notes = list(evaluation.notes)
    if matched.renamed:
        notes.append(f"{where}: classes are matched to the model's: {matched.describe()}")
    missing = names_without_images(numbered, model_classes)
    if missing:
        notes.append(
            _note_on_missing(missing, len(model_classes), f"{where}, split '{evaluation.split.name}'", numbered)
        )
    return EvaluationSplit(replace(evaluation.split, labels=numbered), list(model_classes), notes)


def _note_on_missing(missing: list[str], num_classes: int, where: str, labels: LabelArray) -> str:
    counted = "every class that occurs or is predicted" if labels.ndim == 1 else "all of the model's classes"
    return (
        f"{where}: has no image of {shortened(missing, 6)}, {len(missing)} of the model's {num_classes} classes; it is "
        f"measured with the others (f1_macro is the mean over {counted})"
    )
