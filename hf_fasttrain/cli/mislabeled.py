"""The command `mislabeled`: images whose label is probably wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.utils.printing import echo

if TYPE_CHECKING:
    from hf_fasttrain.from_recipe.label_errors import Found
    from hf_fasttrain.recipe.schema import Recipe

SHOWN = 10  # on the terminal


def mislabeled(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder for labels.csv, page and pictures; by default OUTPUT_DIR/mislabeled.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, max=100, help="Parts of the images, each judged by the others.")] = 5,
    pictures: Annotated[int, typer.Option(min=1, max=1000, help="Pictures on the page, at most.")] = 100,
) -> None:
    """List the images whose label is probably wrong, with the likelier one; nothing is trained.

    Logistic regressions of features by the recipe's published weights judge the images they were not fitted to
    (confident learning). The table's column `label` is to be corrected; then it is a dataset.
    """
    import sys

    from hf_fasttrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # before anything heavy is imported
    from hf_fasttrain.from_recipe.label_errors import find_in_recipe, require_uncorrected, write
    from hf_fasttrain.recipe.load import output_dir
    from hf_fasttrain.run_folder.file_names import LABEL_ERRORS_FOLDER
    from hf_fasttrain.utils.errors import Stopped

    run = Path(output_dir(loaded))
    folder = output or run / LABEL_ERRORS_FOLDER
    require_uncorrected(folder)
    try:
        found, pre = find_in_recipe(loaded, folds)
    except Stopped as stopped:
        sys.exit(stopped.status)
    if found is None:  # not the main process
        return
    write(found, pre, folder, pictures)
    echo(_summary(found, folder, loaded))
    if output is None:
        _update_report(run)


def _update_report(run: Path) -> None:
    """Write the report of a finished run anew, which then has a section of likely label errors."""
    from hf_fasttrain.report.report import write_report
    from hf_fasttrain.run_folder.file_names import REPORT_FILE

    if (run / REPORT_FILE).is_file():
        echo(f"{write_report([run])}    has a section of them now")


def _summary(found: Found, folder: Path, recipe: Recipe) -> str:
    from hf_fasttrain.run_folder.file_names import LABEL_ERRORS_FILE, LABEL_ERRORS_PAGE

    lines = [f"likely label errors: {found.subtitle()}", *_first(found)]
    unjudged = int((~found.errors.judged).sum())
    if unjudged:
        lines.append(f"not judged: {unjudged:,}, each the only image of its class")
    if found.left_out:
        lines.append(f"left out: {found.left_out:,} that could not be read")
    table = folder / LABEL_ERRORS_FILE
    lines.append(f"{folder / LABEL_ERRORS_PAGE}    pictures of the likeliest")
    lines.append(f"{table}    all images, the likeliest errors first; correct its column label")
    return "\n".join([*lines, _next(found, table, recipe)])


def _first(found: Found) -> list[str]:
    """Return a line for each of the first flagged images."""
    errors, names = found.errors, found.class_names
    given, suggested = errors.probability_of_given(), errors.probability_of_suggested()
    flagged = [image for image in errors.ranked.tolist() if errors.flagged[image]]
    lines = [
        f"  {names[errors.labels[image]]} {given[image]:.1%} -> {names[errors.suggested[image]]} {suggested[image]:.1%}"
        f"  {found.name(image)}"
        for image in flagged[:SHOWN]
    ]
    return lines + ([f"  ... and {len(flagged) - SHOWN:,} more"] if len(flagged) > SHOWN else [])


def _next(found: Found, table: Path, recipe: Recipe) -> str:
    """Return the command that trains with the corrected labels, or why there is none."""
    from hf_fasttrain.from_recipe.label_errors import overrides_for_table
    from hf_fasttrain.utils.format import format_command

    if not found.has_paths:
        return (
            "the images are in the dataset itself, not in files: correct the rows there (columns split and row of the "
            "table; docs/data.md has a program)"
        )
    command = format_command("train", recipe.source.argument, *overrides_for_table(recipe, table))
    return f"then: {command}"
