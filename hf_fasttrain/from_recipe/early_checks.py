"""Mistakes of a recipe that are found without its data and its model: cheap checks, reported in one message."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.opening import open_splits
from hf_fasttrain.from_recipe.accelerator import require_trackers
from hf_fasttrain.from_recipe.custom import NO_CUSTOM_PARTS, CustomParts
from hf_fasttrain.from_recipe.source_from import require_fold
from hf_fasttrain.models.lora import require_peft
from hf_fasttrain.models.model import timm_name
from hf_fasttrain.models.teacher import require_teacher
from hf_fasttrain.models.weights import weights_file
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.folder import require_free
from hf_fasttrain.run_folder.result import BUILT_IN_METRICS, is_built_in
from hf_fasttrain.train.checkpointing import not_writable
from hf_fasttrain.train.optim import require_optimizer
from hf_fasttrain.utils.errors import RecipeError, UserError, nearest
from hf_fasttrain.utils.files import existing_path
from hf_fasttrain.utils.format import format_count
from hf_fasttrain.utils.remote import is_dataset_name, is_hub_url


def require_no_early_mistakes(
    recipe: Recipe,
    folder: Path | None = None,
    *,
    resume: bool = False,
    dataset: Any = None,
    custom: CustomParts = NO_CUSTOM_PARTS,
) -> None:
    """Raise the UserError of a mistake that needs neither data nor model to be found, or a RecipeError of several.

    The Hub is asked for nothing. `folder` is the run folder that the recipe would be trained in.
    """
    found: list[UserError] = []
    for check in _checks(recipe, folder, resume, dataset, custom):
        try:
            check()
        except UserError as error:
            found.append(error)
    if found and (unknown := _unknown_metric(recipe)):  # alone it is first looked for on the Hub
        found.append(RecipeError(unknown))
    if len(found) == 1:
        raise found[0]
    if found:
        listed = "\n".join(f"  {error}" for error in found)
        where = recipe.source.argument or recipe.source.name
        raise RecipeError(f"{where} has {format_count(len(found), 'mistake')}:\n{listed}")


def _checks(
    recipe: Recipe, folder: Path | None, resume: bool, dataset: Any, custom: CustomParts
) -> Iterator[Callable[[], object]]:
    if folder is not None:
        yield lambda: _require_folder(folder, resume)
    yield lambda: require_fold(recipe)
    if dataset is None and _is_missing(recipe.data.dataset):
        yield lambda: open_splits(recipe.data.dataset)
    model, optimizer = recipe.model, recipe.optimizer
    if custom.model is None:
        if not model.name.startswith("transformers:"):
            yield lambda: timm_name(model.name)
        if isinstance(model.pretrained, str) and not is_hub_url(location := model.pretrained):
            yield lambda: weights_file(location)
    if recipe.lora is not None:
        yield require_peft
    if (distill := recipe.distill) is not None:
        yield lambda: require_teacher(distill.teacher)
    if custom.optimizer is None:
        yield lambda: require_optimizer(optimizer.name, optimizer.args)
    yield lambda: require_trackers(recipe.log.trackers)


def _is_missing(dataset: str) -> bool:
    """Return whether a data set is a path, and not a Hub name, that does not exist."""
    return existing_path(dataset) is None and not is_dataset_name(dataset)


def _unknown_metric(recipe: Recipe) -> str | None:
    names = [] if isinstance(recipe.evaluate.metrics, str) else recipe.evaluate.metrics
    for name in names:
        known = is_built_in(name) or os.path.exists(name)
        if not known and (hint := nearest(name, BUILT_IN_METRICS)):
            return f"evaluate.metrics: '{name}' is not built in ({', '.join(BUILT_IN_METRICS)}).{hint}"
    return None


def _require_folder(folder: Path, resume: bool) -> None:
    require_free(folder, resume=resume)
    require_writable(folder)


def require_writable(folder: Path) -> None:
    """Raise RunError if a folder can't be created or written to, as far as its path and permissions tell."""
    try:
        exists = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise not_writable(folder, error) from None
    number = 0 if exists.is_dir() else errno.ENOTDIR
    if not number and not os.access(exists, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(exists).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise not_writable(folder, OSError(number, os.strerror(number)))
