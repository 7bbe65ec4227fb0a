"""The command `probe`: a classifier on the features of published weights, without training them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.utils.errors import RecipeError, RunError, UserError
from hf_fasttrain.utils.printing import echo

if TYPE_CHECKING:
    from hf_fasttrain.recipe.schema import Recipe
    from hf_fasttrain.run_folder.result import Result


def probe(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    models: Annotated[
        str | None,
        typer.Option(help="Names of models, separated by commas: a run for each in OUTPUT_DIR/MODEL, and a table."),
    ] = None,
) -> None:
    """Fit the head alone, to features of each image that are computed once: minutes instead of epochs.

    The run folder is like that of a training; RUN --resume then trains all of it.
    """
    from hf_fasttrain.recipe.load import load_recipe

    chosen = [name.strip() for name in models.split(",") if name.strip()] if models is not None else []
    if models is not None and (not chosen or len(set(chosen)) < len(chosen)):
        raise RecipeError(f"--models is '{models}'; give different names, such as resnet50,efficientnet_b0")
    loaded = load_recipe(recipe, overrides or [])  # before anything heavy is imported
    from hf_fasttrain.from_recipe.probe import probe_recipe
    from hf_fasttrain.recipe.load import output_dir

    if not chosen:
        row, log = _probe(probe_recipe(loaded))
        log(_summary(row))
        return
    folder = Path(output_dir(loaded))
    recipes = {}
    for name in chosen:
        own = [f"model.name={name}", f"output_dir={folder / name.replace('/', '_').replace(':', '_')}"]
        recipes[name] = probe_recipe(load_recipe(recipe, [*(overrides or []), *own]))
    _probe_all(recipes)


@dataclass(frozen=True)
class Probed:
    """A row of the table of models."""

    model: str
    folder: Path
    metrics: dict[str, float]
    probe: dict[str, Any]
    parameters: int
    seconds: float  # of everything

    def value(self, name: str) -> float:
        """Return a metric of the logistic regression, -1 if it is missing."""
        return self.metrics.get(name, -1.0)


def _probe(recipe: Recipe) -> tuple[Probed, Callable[[str], None]]:
    """Fit the head, evaluate and save the run; return its row, and what prints on the main process."""
    from hf_fasttrain.cli.train import carry_out
    from hf_fasttrain.from_recipe.trainer import build_trainer
    from hf_fasttrain.recipe.load import output_dir

    start, folder = time.perf_counter(), Path(output_dir(recipe))
    trainer = build_trainer(recipe, takes_steps=False)
    trainer.log.print(f"probing {recipe.model.name} on {recipe.data.dataset}, run folder {folder}")

    def finish() -> Result:
        with trainer.running():
            return trainer.finish()

    result = carry_out(trainer, finish)
    parameters = sum(parameter.numel() for parameter in trainer.raw_model.parameters())
    seconds = time.perf_counter() - start
    row = Probed(recipe.model.name, folder, result.metrics, result.probe or {}, parameters, seconds)
    return row, trainer.log.print


def _summary(row: Probed) -> str:
    from hf_fasttrain.run_folder.file_names import REPORT_FILE
    from hf_fasttrain.utils.format import format_command, format_duration

    folder = row.folder
    values = "".join(f"  {name} {value:.4f}" for name, value in row.metrics.items())
    page = folder / REPORT_FILE
    commands = [
        f"{format_command(folder, '--resume')}    trains all of it from here",
        format_command("predict", folder, "IMAGE..."),
        format_command("export", folder, "--onnx"),
    ]
    return (
        f"done in {format_duration(row.seconds)}{':' if values else ''}{values}\n"
        f"  {folder}/model          the classifier: the backbone as it was, and the new head\n"
        + (f"  {page}    classes, mistakes; opens in a browser\n" if page.exists() else "")
        + "  try next:\n"
        + "\n".join(f"    {command}" for command in commands)
    )


def _probe_all(recipes: dict[str, Recipe]) -> None:
    """Probe one model after the other, and print the table; a model that fails is left out, with exit status 2."""
    from hf_fasttrain.from_recipe.early_checks import require_no_early_mistakes
    from hf_fasttrain.recipe.load import output_dir

    for recipe in recipes.values():  # before the first one takes its time
        require_no_early_mistakes(recipe, Path(output_dir(recipe)))
    rows: list[Probed] = []
    failed: list[str] = []
    log: Callable[[str], None] = echo
    for name, recipe in recipes.items():
        try:
            row, log = _probe(recipe)
            rows.append(row)
        except UserError as error:
            failed.append(f"{name}: {error}")
    if rows:
        log(_table(rows))
    if failed:
        raise RunError("not probed:\n" + "\n".join(f"  {text}" for text in failed))


def _table(rows: list[Probed]) -> str:
    """Return the models' table, the best first, and the command that trains the best one further."""
    from hf_fasttrain.utils.format import format_command, format_duration

    metric = next((name for name in ("accuracy", *rows[0].metrics) if name in rows[0].metrics), "")
    ordered = sorted(rows, key=lambda row: -row.value(metric))
    width = max(len("model"), *(len(row.model) for row in rows))
    lines = [
        f"{'model':<{width}}  {'parameters':>10}  {metric:>10}  {'neighbours':>10}  {'features':>10}  {'in all':>10}"
    ]
    for row in ordered:
        near = row.probe.get("neighbors_metrics", {}).get(metric)
        values = [row.metrics.get(metric), near]
        cells = [f"{row.parameters / 1e6:.1f} M", *("-" if value is None else f"{value:.4f}" for value in values)]
        cells += [format_duration(row.probe.get("feature_seconds", 0.0)), format_duration(row.seconds)]
        lines.append("  ".join([f"{row.model:<{width}}", *(f"{cell:>10}" for cell in cells)]))
    best = format_command(ordered[0].folder, "--resume")
    return "\n".join([*lines, f"{best}    trains all of {ordered[0].model} from its head"])
