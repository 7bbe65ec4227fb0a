"""Cross-validation: which trainings there are, and what has to stay the same when one is continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.from_recipe.source_from import open_source
from hf_fasttrain.recipe.load import default_values, flatten, load_recipe, origin_of, output_dir, tag_of
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.crossval import (
    FINAL,
    CrossvalFile,
    fold_folder,
    plain,
    read_crossval,
)
from hf_fasttrain.run_folder.folder import holds_run, is_begun, run_files_in
from hf_fasttrain.train.launcher import num_processes
from hf_fasttrain.utils.errors import RecipeError, RunError, resume_option

DEFAULT_FOLDS = 5
HELD_OUT = "data.eval_fraction"
# Each image is predicted for the figures of all images together; the model to share is the final one.
OF_FOLDS = ("log.report=true", "hub=null")
# There is nothing to evaluate on, so nothing that depends on it.
OF_FINAL = (
    "data.folds=null", "data.eval_fraction=0", "evaluate.every=never", "early_stopping=null", "checkpoint.final=last",
)  # fmt: skip
SUFFIX = "_crossval"  # behind the folder of the recipe's ordinary runs
CHANGES_FOLDS = ("data.folds", "data.fold")


@dataclass(frozen=True)
class CrossvalPlan:
    """The trainings of a cross-validation, by the name of their folders below `folder`."""

    folder: Path
    runs: dict[str, Recipe]
    about: CrossvalFile
    notes: list[str]


def plan_crossval(recipe: str, overrides: Sequence[str], *, with_final: bool) -> CrossvalPlan:
    """Return what is trained. Every mistake of the recipe is found here, and the data are opened once.

    Raises UserError.
    """
    loaded = load_recipe(recipe, overrides, without=[HELD_OUT])
    folds = _require_folds(loaded)
    folder, notes = Path(output_dir(loaded) + ("" if origin_of(loaded, "output_dir") == "override" else SUFFIX)), []
    if loaded.data.folds is None:
        notes.append(f"data.folds is not set: {folds}")
    if origin_of(load_recipe(recipe, []), HELD_OUT) == "recipe":
        notes.append(f"{HELD_OUT} of the recipe is not used: each fold is held out once")

    def load(name: str, *values: str) -> Recipe:
        own = [*overrides, *values, f"output_dir={folder / name}"]
        return load_recipe(recipe, own, without=[HELD_OUT])

    runs = {
        fold_folder(fold): load(fold_folder(fold), f"data.folds={folds}", f"data.fold={fold}", *OF_FOLDS)
        for fold in range(folds)
    }
    first = next(iter(runs.values()))
    if with_final:
        runs[FINAL] = _load_final(load)
    settings = {key: value for key, value in flatten(first).items() if tag_of(key) == "result"}
    about = CrossvalFile(
        recipe=loaded.source.name,
        folds=folds,
        seed=loaded.seed,
        final=with_final,
        data=fingerprint(open_source(first)),
        settings=plain({key: value for key, value in settings.items() if key not in CHANGES_FOLDS}),
    )
    return CrossvalPlan(folder, runs, about, notes)


def _require_folds(recipe: Recipe) -> int:
    """Return the number of folds. Raises RecipeError for what makes no cross-validation, RunError for a launcher."""
    if num_processes() > 1:
        raise RunError(
            "crossval trains in one process; start it without a launcher, as hf-fasttrain crossval, or train each fold "
            "with the launcher: data.folds=5 data.fold=0 output_dir=..."
        )
    if recipe.data.fold is not None:
        raise RecipeError(f"data.fold is {recipe.data.fold}, and crossval trains every fold; leave data.fold out")
    if recipe.evaluate.every == "never":
        raise RecipeError("evaluate.every is never, and crossval measures every fold; leave it out, or set 1 epoch")
    return recipe.data.folds or DEFAULT_FOLDS


def _load_final(load: Callable[..., Recipe]) -> Recipe:
    try:
        return load(FINAL, *OF_FINAL)
    except RecipeError as error:
        raise RecipeError(
            f"the last training of a cross-validation is on all images, without evaluations ({' '.join(OF_FINAL)}), "
            f"which this recipe does not allow; --no-final leaves it out. {error}"
        ) from None


def begin(plan: CrossvalPlan, *, resume: bool) -> CrossvalFile:
    """Return what is done already in the output folder. Raises RunError if it is taken, or holds something else."""
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output_dir {folder}: is a file; choose another output_dir")
    earlier = read_crossval(folder)
    if earlier is not None and not earlier.done and not any(map(is_begun, _runs_in(folder))):
        return plan.about  # it ended before it saved anything: a mistake was found, say
    if earlier is None:
        if run_files_in(folder):
            raise holds_run(folder)
        taken = [name for name in plan.runs if (folder / name).exists()]
        if taken:
            raise RunError(
                f"output_dir {folder}: holds {', '.join(taken)}, but no crossval.json; choose another output_dir"
            )
        return plan.about
    if not resume:
        raise RunError(
            f"output_dir {folder}: holds a cross-validation already; add {resume_option()} to continue it, or choose "
            "another output_dir"
        )
    plan.about.require_same(earlier, folder, plain(default_values()))
    return plan.about.model_copy(
        update={"done": [name for name in earlier.done if name in plan.runs and (folder / name).exists()]}
    )


def _runs_in(folder: Path) -> list[Path]:
    return [folder / FINAL, *folder.glob(fold_folder("*"))]
