"""Likely label errors of a recipe's images: features, folds, and what is written for people to look at and correct."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hf_fasttrain.data.source.dataset import Source, Split
from hf_fasttrain.data.source.multi_label import MultiLabels
from hf_fasttrain.from_recipe.loaders import eval_preparation
from hf_fasttrain.from_recipe.parts import Parts, build_parts
from hf_fasttrain.from_recipe.probe import HeadProbe, probe_recipe, require_memory
from hf_fasttrain.from_recipe.report_pictures import picture_name, pixels_as_evaluated
from hf_fasttrain.from_recipe.trainer import build_trainer_without_folder
from hf_fasttrain.models.model import Preprocessing
from hf_fasttrain.recipe.load import flatten
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.report.label_errors import write_label_error_page
from hf_fasttrain.run_folder.file_names import LABEL_ERRORS_FILE
from hf_fasttrain.run_folder.gallery import Gallery, Picture
from hf_fasttrain.train.label_errors import LabelErrors, find_label_errors, out_of_sample
from hf_fasttrain.train.linear_probe import Vectors
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.errors import DataError, RunError, shortened
from hf_fasttrain.utils.files import reason, write_atomically
from hf_fasttrain.utils.format import format_count, format_percent

HELD_OUT = "validation"  # name of a held-out part in the table, so that a training on it holds out the same images
COLUMNS = (
    "path", "label", "split", "row", "flagged", "given_label", "suggested_label", "given_probability",
    "suggested_probability", "margin", "loss",
)  # fmt: skip
GROUP = "group"  # one more column with data.group_column
REPLACED = ("data.dataset", "output_dir")
# Keys that say how another data set is read, and their values for the table.
READ_AS = {
    "data.config": None, "data.revision": None, "data.image_column": "path", "data.label_column": "label",
    "data.label_separator": None, "data.image_root": None, "data.split_column": "split", "data.folds": None,
    "data.fold": None,
}  # fmt: skip


@dataclass
class Found:
    """The likely label errors of a recipe's images, and where each image is."""

    errors: LabelErrors
    class_names: list[str]
    splits: list[Split]
    of_split: np.ndarray  # (N,) number of the split in `splits`
    indices: np.ndarray  # (N,) index in that split
    num_features: int
    num_folds: int
    strength: float
    left_out: int  # images that could not be read
    held_out: Split | None  # a part of the training split that the recipe holds out

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, image: int) -> str | None:
        """Return the absolute path of an image, None if it is in the dataset itself."""
        path = self._split(image).records([int(self.indices[image])])[0]["path"]
        return os.path.abspath(path) if path and os.path.exists(path) else None

    @cached_property
    def has_paths(self) -> bool:
        """Whether every image is a file, so that the table is a dataset."""
        return all(self.path(image) is not None for image in range(len(self)))

    @property
    def has_groups(self) -> bool:
        """Whether the images belong to groups, which are a column of the table then."""
        return self.splits[0].groups is not None

    def group(self, image: int) -> str:
        """Return the group of an image; empty: none."""
        groups = self._split(image).groups
        code = -1 if groups is None else int(groups.codes[self.row(image)])
        return groups.names[code] if groups is not None and code >= 0 else ""

    @property
    def split_names(self) -> list[str]:
        """The splits as the table calls them: a held-out part is `validation`, or rows of the split it comes from."""
        held_out = HELD_OUT if self.has_paths else self.splits[0].name
        return [held_out if split is self.held_out else split.name for split in self.splits]

    def row(self, image: int) -> int:
        """Return the row of an image in the split of the dataset that it comes from."""
        return int(self._split(image).rows_of(np.array([self.indices[image]]))[0])

    def name(self, image: int) -> str:
        """Return what an image is called: class/file, or its row."""
        return picture_name(self._split(image), int(self.indices[image]))

    def _split(self, image: int) -> Split:
        return self.splits[int(self.of_split[image])]

    @property
    def num_flagged(self) -> int:
        """How many labels are probably wrong."""
        return int(self.errors.flagged.sum())

    def subtitle(self) -> str:
        """Return what was found, in a line."""
        splits = ", ".join(dict.fromkeys(self.split_names))
        share = format_percent(self.num_flagged / len(self))
        return f"{self.num_flagged:,} of {format_count(len(self), 'image')} ({share}) of {splits}"

    def most_confused(self) -> list[tuple[str, str, int]]:
        """Return (given label, suggested label, number of flagged images), the most frequent first."""
        flagged = self.errors.flagged
        pairs = Counter(zip(self.errors.labels[flagged].tolist(), self.errors.suggested[flagged].tolist(), strict=True))
        return [(self.class_names[a], self.class_names[b], number) for (a, b), number in pairs.most_common()]


def find_in_recipe(recipe: Recipe, num_folds: int) -> tuple[Found | None, Preprocessing]:
    """Return the likely label errors among a recipe's images, on the main process (else None), and the preprocessing.

    Called by all processes. Raises UserError; Stopped after a signal.
    """
    parts = build_parts(probe_recipe(recipe))
    _require_single_labels(parts.source)
    trainer = build_trainer_without_folder(parts, keep_pixels=False)
    probe, trainer.probe = trainer.probe, None
    assert isinstance(probe, HeadProbe)
    for text in (*parts.settings.notes, *parts.settings.weight_notes):
        if not text.startswith("data.cache"):  # pixels are read once here, and not kept
            trainer.log.note(text)
    if not recipe.model.pretrained:
        trainer.log.note("model.pretrained=false: these are features of random weights; set it to published ones")
    pre = parts.spec.preprocessing
    assert pre is not None
    splits = [split for split in (parts.source.train, parts.source.evaluation, parts.source.test) if split]
    with trainer.running():
        found = _features_of(trainer, probe, splits)
    if found is None:
        return None, pre
    return _found(parts, probe, splits, found, num_folds), pre


def _require_single_labels(source: Source) -> None:
    if source.multi_label:
        raise DataError(
            "likely label errors: the images have several labels each, and confident learning compares one label with "
            "the others; run it for one class at a time, on a table with a column of that class's yes and no "
            "(data.label_column)"
        )


def _features_of(trainer: Trainer, probe: HeadProbe, splits: list[Split]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Return indices and features of the images of each split that could be read; None on other processes."""
    trainer.raw_model.eval()
    results: list[tuple[np.ndarray, np.ndarray]] = []
    for split in splits:
        indices, features, _ = probe.features_on_main(trainer, split)
        if indices is not None and features is not None:
            results.append((indices.numpy(), features.numpy()))
    return results if trainer.processes.is_main else None


def _found(
    parts: Parts,
    probe: HeadProbe,
    splits: list[Split],
    found: list[tuple[np.ndarray, np.ndarray]],
    num_folds: int,
) -> Found:
    features = np.concatenate([each for _, each in found])
    indices = np.concatenate([each for each, _ in found])
    of_split = np.repeat(np.arange(len(found)), [len(each) for each, _ in found])
    labels = np.concatenate([_labels(split)[each] for split, (each, _) in zip(splits, found, strict=True)])
    require_judgeable(labels, features, parts.source.class_names)
    require_memory(features, "likely label errors")
    data = Vectors(features, labels, parts.spec.num_classes)
    seed, wished = parts.recipe.seed, parts.recipe.probe.strength
    probabilities, strength = out_of_sample(
        data, num_folds, strength=None if wished == "auto" else wished, has_bias=probe.head.has_bias, seed=seed
    )
    return Found(
        find_label_errors(probabilities, labels),
        parts.source.class_names,
        splits,
        of_split,
        indices,
        features.shape[-1],
        num_folds,
        strength,
        sum(map(len, splits)) - len(indices),
        parts.source.evaluation if parts.source.held_out else None,
    )


def _labels(split: Split) -> np.ndarray:
    assert not isinstance(split.labels, MultiLabels)
    return np.asarray(split.labels)


def require_judgeable(labels: np.ndarray, features: np.ndarray, class_names: list[str]) -> None:
    """Raise DataError unless there are two classes that can be compared; RunError for features that are no numbers."""
    _, counts = np.unique(labels, return_counts=True)
    if (counts > 1).sum() < 2:
        raise DataError(
            f"likely label errors: {len(labels):,} readable images of {shortened(class_names, 3)}; at least two "
            "classes must have two images or more, so that images of a class can be compared with others"
        )
    if not np.isfinite(features).all():
        raise RunError(
            "likely label errors: the model's features have NaN or inf; give other weights, model.pretrained"
        )


def write(found: Found, pre: Preprocessing, folder: Path, num_pictures: int) -> None:
    """Write the table, the pictures and the page into a folder. Raises RunError if they can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / LABEL_ERRORS_FILE, table_of(found))
        _write_pictures(found, pre, folder, num_pictures)
        write_label_error_page(folder, found.subtitle(), found.most_confused())
    except OSError as error:
        raise RunError(f"{folder}: can't be written: {reason(error)}; choose another --output") from None


def require_uncorrected(folder: Path) -> None:
    """Raise RunError if a folder has a table that somebody has corrected, or another table, which would be replaced."""
    path = folder / LABEL_ERRORS_FILE
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            is_own = tuple(reader.fieldnames or ()) in (COLUMNS, (*COLUMNS, GROUP)) and all(
                r["label"] == r["given_label"] for r in reader
            )
    except (OSError, csv.Error):
        is_own = False
    if not is_own:
        raise RunError(f"{path}: has corrected labels, and would be replaced; move it, or give another --output")


def table_of(found: Found) -> bytes:
    """Return the CSV of all images, most likely errors first; `label` is the column to correct."""
    errors, splits, text = found.errors, found.split_names, io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, GROUP] if found.has_groups else COLUMNS)
    given, suggested = errors.probability_of_given(), errors.probability_of_suggested()
    margins, losses, names = errors.margins, errors.losses, found.class_names
    for image in errors.ranked.tolist():
        label, other = names[errors.labels[image]], names[errors.suggested[image]]
        numbers = (given[image], suggested[image], margins[image], losses[image])
        cells = [f"{number:.6g}" for number in numbers] if errors.judged[image] else [""] * 4
        writer.writerow(
            [
                found.path(image) or "" if found.has_paths else "",
                label,
                splits[int(found.of_split[image])],
                found.row(image),
                "yes" if errors.flagged[image] else "no",
                label,
                other,
                *cells,
                *([found.group(image)] if found.has_groups else []),
            ]
        )
    return text.getvalue().encode("utf-8", "surrogateescape")


def overrides_for_table(recipe: Recipe, table: Path) -> list[str]:
    """Return the overrides with which a recipe trains on the table: the user's, but for the data, and the table's."""
    values = flatten(recipe)
    columns = {**READ_AS, "data.group_column": GROUP if values["data.group_column"] is not None else None}
    kept = [text for text in recipe.source.overrides if text.partition("=")[0].strip() not in {*columns, *REPLACED}]
    own = [
        f"{key}={'null' if value is None else value}"
        for key, value in columns.items()
        if values[key] not in ("auto", value)
    ]
    return [*kept, f"data.dataset={table}", *own, "output_dir=FOLDER"]


def _write_pictures(found: Found, pre: Preprocessing, folder: Path, number: int) -> None:
    """Store the first flagged images for the page and for the report."""
    errors, pixels, pictures = found.errors, dict[str, np.ndarray](), list[Picture]()
    given, suggested, losses = errors.probability_of_given(), errors.probability_of_suggested(), errors.losses
    names, preparation = found.class_names, eval_preparation(pre)
    shown = [image for image in errors.ranked.tolist() if errors.flagged[image]][:number]
    for position, image in enumerate(shown):
        split, file = found.splits[int(found.of_split[image])], f"label_{position:03d}.jpg"
        pixels[file], _ = pixels_as_evaluated(split, preparation, int(found.indices[image]))
        truth = {names[errors.labels[image]]: float(given[image])}
        predicted: dict[str, float | None] = {names[errors.suggested[image]]: float(suggested[image])}
        pictures.append(Picture(file, found.name(image), truth, predicted, float(losses[image])))
    splits = ", ".join(dict.fromkeys(found.split_names))
    Gallery(names, mistakes=pictures, mistakes_split=splits).save(folder, pixels)
