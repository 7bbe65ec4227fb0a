"""Runs that began when data were read by the rules of older versions: their rows, found again by the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fasttrain.data.source.dataset import Source
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.data.source.inventory import short_path
from hf_fasttrain.from_recipe.source_from import limit_images, open_source
from hf_fasttrain.recipe.load import with_values
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.errors import DataError, RunError, UserError
from hf_fasttrain.utils.format import format_count

SHOWN = 10  # files in a message
OLD = {"data.inventory": "old"}


def older_source(recipe: Recipe, began_with: Any) -> Source | None:
    """Return the recipe's data by the rules of older versions, if a run with this fingerprint began with them."""
    if recipe.data.inventory == "old" or not isinstance(began_with, str):
        return None
    try:
        source = limit_images(open_source(with_values(recipe, OLD)), recipe)
        return source if fingerprint(source) == began_with else None
    except UserError:
        return None


def source_of_run(recipe: Recipe, began_with: Any, **options: Any) -> tuple[Source, list[str]]:
    """Return the recipe's data as a run began with them, of which the fingerprint is known, and notes for the user.

    `options` are those of `open_source`.
    """
    refused = None
    try:
        source = open_source(recipe, **options)
        if not isinstance(began_with, str) or fingerprint(limit_images(source, recipe)) == began_with:
            return source, []
    except DataError as error:
        refused = error
    if older_source(recipe, began_with) is not None:
        note = f"{recipe.data.dataset}: read by the rules of older versions, with which this run began"
        return open_source(with_values(recipe, OLD), **options), [note]
    if refused is not None:
        raise refused
    return source, []


def refuse_new_rows(recipe: Recipe, learnt: Mapping[str, Any], source: Source | UserError) -> None:
    """Raise RunError if the data of a run that is resumed have other rows only because of the rules for reading them.

    `learnt` are the settings of its checkpoint, `source` is its data by the present rules, or why they refuse it.
    """
    began_with = learnt.get("data set")
    if began_with is None:
        return
    if isinstance(source, Source) and fingerprint(source) == began_with:
        return
    old = older_source(recipe, began_with)
    if old is None:
        return
    before = f"{_number(old):,} images by the rules of older versions"
    on = "data.inventory=old continues with the same images, in the same order"
    if isinstance(source, UserError):
        raise RunError(f"can't resume: this run began with {before}. By the present ones: {source}\n{on}") from None
    had, has = _paths(old), _paths(source)
    changes = {"new": sorted(has - had), "no longer read": sorted(had - has)}
    listed = "".join(
        f"\n{format_count(len(paths), 'file')} {what}:" + "".join(f"\n  {short_path(path)}" for path in paths[:SHOWN])
        for what, paths in changes.items()
        if paths
    )
    if not listed:
        listed = "\nThey are the same files in other splits, or without rows that repeat one (see the notes of check)."
    raise RunError(
        f"can't resume: this run began with {before}; the present ones (docs/data.md) find {_number(source):,}.{listed}"
        f"\n{on}; to train on what is found now, start a new run in another output_dir"
    )


def _number(source: Source) -> int:
    return len(source.train) + len(source.evaluation)


def _paths(source: Source) -> set[str]:
    splits = (source.train, source.evaluation)
    records = [record for split in splits for record in split.records(range(len(split)))]
    return {record["path"] for record in records if record["path"] is not None}
