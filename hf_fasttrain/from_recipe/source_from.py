"""Opens and checks the data of a recipe, and records its splits, columns and classes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from hf_fasttrain.data.source.classes import names_without_images
from hf_fasttrain.data.source.dataset import Source, load_source, subset
from hf_fasttrain.from_recipe.auto import decide, split
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.errors import DataError, RecipeError, shortened
from hf_fasttrain.utils.files import existing_path


def source_from(recipe: Recipe, dataset: Any, settings: ResolvedSettings) -> Source:
    """Return the data of a recipe, or `dataset` read with its settings, and record splits, columns and classes.

    Raises DataError, also for a split with two uses.
    """
    require_fold(recipe)
    full = open_source(recipe, dataset)
    _require_unused_splits(full)
    source = limit_images(full, recipe)
    _note_subsets(recipe, full, source, settings)
    if dataset is not None:
        settings.record("data.dataset", "passed as a Python object")
    for key, part in (("data.train_split", source.train), ("data.eval_split", source.evaluation)):
        settings.record(key, *split(name=part.name, images=len(part)))
    columns = source.columns
    decide(settings, "data.image_column", name=columns.image)
    decide(settings, "data.label_column", name=list(columns.listed) or columns.label)
    if columns.split is not None:
        decide(settings, "data.split_column", name=columns.split)
    settings.record("classes", len(source.class_names), "of the label column")
    for note in source.notes:
        settings.note(note)
    if source.held_out:
        how = f"in whole groups of '{recipe.data.group_column}'" if recipe.data.group_column else "stratified by class"
        if recipe.data.folds is not None:
            settings.note(_note_fold(full, how))
        else:
            settings.note(_note_held_out(full, how, is_evaluated=recipe.evaluate.every != "never"))
    return source


def require_fold(recipe: Recipe) -> None:
    """Raise RecipeError if a recipe has folds, and does not say which one to evaluate on."""
    if (folds := recipe.data.folds) is not None and recipe.data.fold is None:
        raise RecipeError(
            f"data.folds={folds} needs data.fold, from 0 to {folds - 1}, for one training; `hf-fasttrain crossval` "
            "trains all of them"
        )


def _note_fold(source: Source, how: str) -> str:
    number = len(source.train) + len(source.evaluation)
    held_out = f"{len(source.evaluation):,} of {number:,} images"
    return f"{source.evaluation.name}: evaluated on {held_out}, {how} (data.folds)"


def _note_held_out(source: Source, how: str, *, is_evaluated: bool) -> str:
    """Return the note on what is held out. Raises DataError if that is nothing, and there are evaluations."""
    held_out, number = len(source.evaluation), len(source.train) + len(source.evaluation)
    if is_evaluated and not held_out:
        raise DataError(
            "data.eval_fraction is 0, and there is no validation split: nothing to evaluate on. Set "
            "evaluate.every=never to train without evaluations, or data.eval_fraction above 0"
        )
    if is_evaluated:
        what = f"{held_out:,} of {number:,} training images are held out, {how} (data.eval_fraction)"
    elif held_out:
        what = (
            f"{held_out:,} of {number:,} training images are held out, though evaluate.every is never: they are not "
            "trained on; data.eval_fraction=0 trains on all"
        )
    else:
        what = f"all {number:,} images are trained on (data.eval_fraction=0)"
    return f"no validation split: {what}"


def limit_images(source: Source, recipe: Recipe) -> Source:
    """Return the data with no more training and evaluation images than the recipe's max_images."""
    train, evaluation = recipe.train.max_images, recipe.evaluate.max_images
    return replace(
        source,
        train=source.train if train is None else subset(source.train, train, recipe.seed),
        evaluation=source.evaluation if evaluation is None else subset(source.evaluation, evaluation, recipe.seed),
    )


def _note_subsets(recipe: Recipe, full: Source, source: Source, settings: ResolvedSettings) -> None:
    """Note how many images of a split are used, and which classes lose all of theirs."""
    limits = {"train.max_images": recipe.train.max_images, "evaluate.max_images": recipe.evaluate.max_images}
    splits = ((full.train, source.train), (full.evaluation, source.evaluation))
    for (key, limit), (full_split, part) in zip(limits.items(), splits, strict=True):
        if limit is None:
            continue
        if part is full_split:
            settings.note(f"{key}={limit:,} has no effect: split '{part.name}' has {len(part):,} images")
            continue
        before, after = (set(names_without_images(s.labels, source.class_names)) for s in (full_split, part))
        lost_classes = f", none of {shortened(sorted(after - before))}" if after - before else ""
        settings.note(f"{key}: {limit:,} of the {len(full_split):,} images of split '{part.name}'{lost_classes}")


def _require_unused_splits(source: Source) -> None:
    """Raise DataError for a split with two uses: a test split must not be trained on or choose the best checkpoint."""
    used = [source.train.name] if source.held_out else [source.train.name, source.evaluation.name]
    if source.test is not None and source.test.name in used:
        raise DataError(f"data.test_split: '{source.test.name}' is trained or evaluated on already; choose another")
    if not source.held_out and source.train.name == source.evaluation.name:
        raise DataError(f"data.eval_split: '{source.evaluation.name}' is trained on already; choose another")


def open_source(
    recipe: Recipe, dataset: Any = None, *, test_split: str | None = None, test_key: str = "data.test_split"
) -> Source:
    """Return the recipe's data set, or `dataset` read with its settings; `test_split` replaces the recipe's.

    Messages call its setting `test_key`.
    """
    data = recipe.data
    return load_source(
        data.dataset if dataset is None else dataset,
        config=data.config,
        revision=data.revision,
        train_split=data.train_split,
        eval_split=data.eval_split,
        test_split=test_split or data.test_split,
        test_key=test_key,
        image_column=data.image_column,
        label_column=data.label_column,
        label_separator=data.label_separator,
        image_root=data.image_root,
        split_column=data.split_column,
        group_column=data.group_column,
        multi_label=data.multi_label,
        eval_fraction=data.eval_fraction,
        folds=data.folds,
        fold=data.fold or 0,
        seed=recipe.seed,
        inventory=data.inventory,
        max_bad_fraction=data.max_bad_fraction,
    )


def local_settings(recipe: Recipe, dataset: Any) -> list[str]:
    """Return the keys whose values are paths or objects of this machine: meaningless elsewhere, and private."""
    model, data = recipe.model, recipe.data
    name = model.name.removeprefix("transformers:")
    paths = {"model.name": name, "model.pretrained": model.pretrained, "data.dataset": data.dataset}
    root = os.path.expanduser(data.image_root or "")
    paths |= {"data.image_root": root} if os.path.isabs(root) else {}
    paths |= {"distill.teacher": recipe.distill.teacher} if recipe.distill else {}
    keys = [key for key, value in paths.items() if isinstance(value, str) and existing_path(value) is not None]
    if data.dataset == "digits":
        keys = [key for key in keys if key != "data.dataset"]
    return sorted({*keys, *(["data.dataset"] if dataset is not None else [])})
