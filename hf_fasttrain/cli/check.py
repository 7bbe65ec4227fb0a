"""The command `check`: every value of a recipe with its origin, a memory forecast, and optionally all images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.utils.errors import UserError


def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Decode every image first: corrupt files, class balance, duplicates, sizes."),
    ] = False,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="With --images: write all corrupt images to this file, as JSON lines.")
    ] = None,
) -> None:
    """Resolve and validate everything and print each value with its origin, without training."""
    from hf_fasttrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _require_list_file(list_file, images=images)
    from hf_fasttrain.cli.check_images import check_images, print_left_out
    from hf_fasttrain.cli.memory_table import memory_table
    from hf_fasttrain.data.source.inventory import TooManyLeftOut
    from hf_fasttrain.from_recipe.early_checks import require_no_early_mistakes
    from hf_fasttrain.from_recipe.parts import build_parts
    from hf_fasttrain.from_recipe.trainer import build_trainer_without_folder
    from hf_fasttrain.recipe.load import output_dir
    from hf_fasttrain.run_folder.folder import how_to_resume_run, is_unsaved, run_files_in
    from hf_fasttrain.utils.format import format_count
    from hf_fasttrain.utils.terminal import build_table, wide_terminal

    folder = Path(output_dir(loaded))
    require_no_early_mistakes(loaded, folder, resume=True)
    terminal = wide_terminal()
    try:
        parts = build_parts(loaded)
    except TooManyLeftOut as error:
        print_left_out(terminal, error.inventory)
        raise
    build_trainer_without_folder(parts, keep_pixels=False)
    title = f"{recipe}: every value, where it came from, and what it decides"
    settings = parts.settings.all()
    rows = [(key, json.dumps(setting.value), setting.origin, setting.tag) for key, setting in settings.items()]
    terminal.print(build_table(("key", "value", "origin", "tag"), rows, title=title))
    title, header, parts_of_memory = memory_table(parts)
    terminal.print(build_table(header, parts_of_memory, title=title))
    if run_files_in(folder) and not is_unsaved(folder):
        how = how_to_resume_run(folder)
        parts.settings.note(f"output_dir {folder} contains a run already: {how} continues it, a new one is refused")
    for note in [*parts.settings.notes, *parts.settings.weight_notes]:
        terminal.print_line(f"note: {note}")
    if parts.source.inventory is not None:
        print_left_out(terminal, parts.source.inventory)
    if images:
        value_range = parts.spec.preprocessing.value_range if parts.spec.preprocessing else None
        check_images(terminal, loaded, parts.source, list_file, value_range)
    terminal.print(f"{recipe} is valid: {format_count(parts.sampling_plan.steps_per_epoch, 'step')} per epoch")


def _require_list_file(path: Path | None, *, images: bool) -> None:
    """Raise UserError if --list can't be written, before all images are decoded."""
    if path is None:
        return
    if not images:
        raise UserError("--list writes what --images finds; give both")
    if path.exists():
        raise UserError(f"{path} exists already; give another file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: can't be written: {path.parent} is not a folder")
