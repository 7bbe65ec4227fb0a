"""The command `crossval`: trains a recipe once for each fold, reports all of them, and trains on all images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.cli.terminal import print_note
from hf_fasttrain.utils.errors import Stopped
from hf_fasttrain.utils.printing import echo

if TYPE_CHECKING:
    from hf_fasttrain.recipe.schema import Recipe
    from hf_fasttrain.run_folder.crossval import CrossvalFile


def crossval(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where it was stopped.")] = False,
    final: Annotated[bool, typer.Option(help="At the end, train on all images.")] = True,
) -> None:
    """Train once for each fold (data.folds), report all folds, and train on all images at the end.

    Each training is a run folder in OUTPUT_DIR_crossval, or in an output_dir that you give: fold_0, ..., final.
    """
    from hf_fasttrain.recipe.load import load_recipe

    load_recipe(recipe, overrides or [], without=["data.eval_fraction"])  # before anything heavy is imported
    from hf_fasttrain.run_folder.crossval import keep_only_model
    from hf_fasttrain.study.crossval import begin, plan_crossval

    plan = plan_crossval(recipe, overrides or [], with_final=final)
    state = begin(plan, resume=resume)
    for note in plan.notes:
        print_note(note)
    _write(plan.folder, state)
    for number, (name, loaded) in enumerate(plan.runs.items()):
        run = plan.folder / name
        if name not in state.done:
            echo(f"{name}, training {number + 1} of {len(plan.runs)}: run folder {run}")
            _train(loaded, run)
            state.done.append(name)
            _write(plan.folder, state)
        if name.startswith("fold"):
            keep_only_model(run)
        if number == state.folds - 1:
            state = _report(plan.folder, state)
    _print_end(plan.folder, state)


def _train(recipe: Recipe, run: Path) -> None:
    """Train in a run folder, or continue there; ends the command if a signal stops it, or if files can't be written."""
    import gc

    from hf_fasttrain.cli.train import carry_out, expected_results
    from hf_fasttrain.from_recipe.trainer import build_trainer
    from hf_fasttrain.run_folder.folder import is_begun
    from hf_fasttrain.run_folder.missing import missing_results
    from hf_fasttrain.train.out_of_memory import free_cached_memory

    trainer = build_trainer(recipe, resume=is_begun(run))
    if not trainer.is_finished or missing_results(run, trainer.state.step, **expected_results(trainer)):
        result = carry_out(trainer, trainer.fit)
        metrics = "".join(f"  {name} {value:.4f}" for name, value in result.metrics.items())  # none of all images
        trainer.log.print(f"{run.name} done{metrics and f':{metrics}'}")
    device = trainer.device
    del trainer
    gc.collect()  # the model, before the next one is built
    free_cached_memory(device)


def _write(folder: Path, state: CrossvalFile) -> None:
    """Write crossval.json; ends the command with status 74 if that fails."""
    from hf_fasttrain.run_folder.crossval import write_crossval
    from hf_fasttrain.utils.files import reason

    try:
        write_crossval(folder, state)
    except OSError as error:
        echo(f"error: {folder}/crossval.json could not be written: {reason(error)}; then --resume continues", err=True)
        sys.exit(Stopped.NOT_WRITTEN)


def _report(folder: Path, state: CrossvalFile) -> CrossvalFile:
    """Compute the figures of all folds, write crossval.json and report.html, and print them."""
    from hf_fasttrain.report.crossval import summary, with_figures, write_crossval_page
    from hf_fasttrain.utils.files import reason

    try:
        state = with_figures(folder, state)
        _write(folder, state)
        write_crossval_page(folder, state)
    except OSError as error:
        echo(f"error: {folder}: the report could not be written: {reason(error)}; --resume writes it", err=True)
        sys.exit(Stopped.NOT_WRITTEN)
    echo("\n".join([f"{state.folds} folds:", *(f"  {line}" for line in summary(state))]))
    return state


def _print_end(folder: Path, state: CrossvalFile) -> None:
    from hf_fasttrain.utils.format import format_command

    lines = [f"done: {folder}/report.html, {folder}/crossval.json"]
    if state.final:
        lines += [
            f"  {folder}/final/model    trained on all images; the folds say what to expect of it",
            f"  try next: {format_command('predict', folder / 'final', 'IMAGE...')}",
        ]
    echo("\n".join(lines))
