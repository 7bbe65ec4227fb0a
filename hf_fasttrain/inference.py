"""Inference with a finished run: evaluation on a split, predictions for image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fasttrain.data.pixels.bad_images import BadImages
from hf_fasttrain.data.source.dataset import Split, note_on_test_split
from hf_fasttrain.data.source.evaluation_split import EvaluationSplit, load_evaluation_split, with_model_classes
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.data.source.image_files import TRAIN_NAMES
from hf_fasttrain.data.source.label_table_columns import TableKeys
from hf_fasttrain.from_recipe.accelerator import build_accelerator, use_cudnn_benchmark
from hf_fasttrain.from_recipe.auto import resolve_machine
from hf_fasttrain.from_recipe.loaders import Loaders
from hf_fasttrain.from_recipe.memory import decide_evaluation_batch, evaluation_memory
from hf_fasttrain.from_recipe.older_rows import source_of_run
from hf_fasttrain.from_recipe.source_from import limit_images, open_source
from hf_fasttrain.from_recipe.trainer import build_evaluator
from hf_fasttrain.from_recipe.tunings import Presets
from hf_fasttrain.from_recipe.value_range import KEY as VALUE_RANGE
from hf_fasttrain.from_recipe.value_range import resolve_value_range
from hf_fasttrain.models.model import ModelSpec
from hf_fasttrain.models.saved import load_model, model_folder, open_run
from hf_fasttrain.models.user_model import ModelArgument, load_user_model
from hf_fasttrain.prediction import Predictions, Row, image_files, preprocessing_of
from hf_fasttrain.recipe.load import load_recipe, origin_of, parse_recipe, with_values
from hf_fasttrain.recipe.messages import joined
from hf_fasttrain.recipe.resolved import ResolvedSettings, read_settings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import is_allowed
from hf_fasttrain.run_folder.calibration import Calibration, calibration_of_weights, require_classes
from hf_fasttrain.run_folder.checkpoint import checkpoint_step
from hf_fasttrain.run_folder.file_names import MODEL_FOLDER, RECIPE_FILE, RESULT_FILE
from hf_fasttrain.run_folder.kept_weights import find_checkpoint, load_checkpoint_weights, step_in_model
from hf_fasttrain.run_folder.result import TUNED_METRICS
from hf_fasttrain.run_folder.schemas import ResultFile, read_if_sound
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.utils.errors import DataError, RunError, UserError, shortened
from hf_fasttrain.utils.files import existing_path
from hf_fasttrain.utils.remote import is_hub_url

NO_RECIPE = "model: {name: own}\ntrain: {duration: 1 epoch, batch_size: 1}\n"  # of a run of own objects
EVALUATED_KEYS = ("data.", "accelerate.", "evaluate.")
NOT_OF_OTHER_DATA = ("train_split", "test_split", "eval_fraction", "folds", "fold", "multi_label")


def evaluate_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    weights: str | None = None,
    model: ModelArgument | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate a run's model; return its metrics by name with `dataset`, `split`, `num_images`, `weights` and `step`.

    `run` is a folder or hf://OWNER/NAME. By default its evaluation split is measured, or another `split` of its data
    set. `overrides` change the run's recipe: data.dataset=FOLDER measures other images, those of its validation split,
    or all of them if it has no splits. Classes are matched to the model's by name; the model must know all of them.
    `weights`: last, best (of the best evaluation), average or step_N; by default those in RUN/model. `model`: of a run
    that no recipe has made (see `open_user_model`), measured on the data.dataset of the overrides. `note` is called
    with messages, such as on bad images and on classes without images. If bad images were replaced by others, the
    result has their number as `bad_images`.
    """
    opened = open_run(run)
    user_model = load_user_model(opened, model, weights)
    folder = opened if user_model is not None else model_folder(opened, pushed=is_hub_url(str(run)))
    if user_model is None and not (opened / RECIPE_FILE).exists():
        raise RunError(f"{run}: contains no recipe.yaml; evaluate needs a run folder")
    for override in overrides:
        if not override.startswith(EVALUATED_KEYS) or override.startswith("data.image_size"):
            raise RunError(
                f"override '{override}': an evaluation takes keys that begin with {joined(EVALUATED_KEYS)}, without "
                "data.image_size, such as data.dataset=FOLDER"
            )
        if split is not None and override.startswith("data.eval_split"):
            raise RunError(f"--split {split} and override '{override}' set the same thing; leave one out")
    checkpoint = find_checkpoint(opened, weights, str(run))
    source = str(run) if is_hub_url(str(run)) else opened / RECIPE_FILE
    has_recipe = user_model is None or (opened / RECIPE_FILE).exists()
    loaded = load_recipe(source, overrides, metrics=None) if has_recipe else _recipe_of_own(run, overrides)
    is_same_data = has_recipe and _is_same_data(
        loaded, load_recipe(source, [text for text in overrides if not text.startswith("data.")], metrics=None)
    )
    settings = ResolvedSettings(loaded)
    recipe = resolve_machine(loaded, settings, Presets())
    accelerator = build_accelerator(recipe, settings)
    network, spec = _load(folder, checkpoint) if user_model is None else (user_model.model, user_model.spec)
    network = on_device(network, accelerator.device, channels_last=recipe.accelerate.channels_last is True)
    if user_model is None or user_model.has_names:
        began_with = _began_with(opened) if is_same_data else None
        measured = _measured_split(recipe, spec, split, began_with, is_same_data=is_same_data)
    else:
        measured = _by_number(_other_split(recipe, spec, split), spec, recipe.data.dataset)
    for text in measured.notes:
        note(text)
    if not is_same_data and _was_trained_on(recipe, measured.split, opened):
        note(
            f"{recipe.data.dataset}, split '{measured.split.name}': these are the images that the run was trained on; "
            "to measure the held-out ones, omit data.dataset or give the recipe's"
        )
    pre = preprocessing_of(spec)
    if origin_of(recipe, VALUE_RANGE) == "override":
        pre = replace(pre, value_range=resolve_value_range(settings, measured.split))
    bad_images = BadImages(None, recipe.data.max_bad_fraction, note)
    loaders = Loaders(recipe, settings, accelerator, pre, bad_images)
    memory = partial(
        evaluation_memory,
        network,
        spec.image_size,
        accelerator.device,
        workers=loaders.workers,
        autocast=accelerator.autocast,
    )
    size = decide_evaluation_batch(settings, _trained_micro_batch(opened, recipe), memory)
    loader = loaders.eval_loader(measured.split, size)
    evaluator = build_evaluator(recipe, accelerator, spec.multi_label, spec.class_names)
    _use_thresholds(evaluator, _described(opened, folder), checkpoint, spec, note)
    metrics = evaluator(network, loader)
    for text in (*evaluator.new_notes(), *_notes_on_users_functions(opened)):
        note(text)
    context: dict[str, Any] = {
        "dataset": recipe.data.dataset,
        "split": measured.split.name,
        "num_images": len(measured.split),
    }
    context |= _weights_used(opened, weights, checkpoint)
    replaced = {"bad_images": bad_images.count} if bad_images.count else {}
    return {**metrics, **context, **replaced}


def _use_thresholds(
    evaluator: Evaluator, folder: Path, checkpoint: Path | None, spec: ModelSpec, note: Callable[[str], None]
) -> None:
    """Measure at the thresholds that were tuned for the weights in training: on other images these metrics are fair."""
    if not evaluator.calibrator.tunes:
        return
    calibration = calibration_of_weights(folder, checkpoint)
    require_classes(calibration, spec.num_classes, folder)
    evaluator.calibrator.use(calibration)
    if evaluator.calibrator.thresholds is None:
        note(
            f"no tuned thresholds are stored with these weights, so {', '.join(TUNED_METRICS)} are not measured: a "
            "training with evaluate.thresholds=tuned stores them"
        )


def _notes_on_users_functions(run: Path) -> list[str]:
    """Return notes on what evaluated the run while it was trained, and is the user's own code."""
    result = read_if_sound(run / RESULT_FILE, ResultFile)
    names, predict = result.get("own_metrics"), result.get("predict")
    notes = []
    if isinstance(names, list) and names:
        notes.append(
            f"{', '.join(map(str, names))}: functions of your own that the run was trained with (metrics=); they are "
            "not in the run folder, so not computed here: result.json and metrics.jsonl have their values"
        )
    if predict:
        notes.append(
            f"while training, {predict} gave the logits (predict=); it is not in the run folder: here they are the "
            "model's own output, and metrics may differ from those in result.json"
        )
    return notes


def _recipe_of_own(run: str | Path, overrides: Sequence[str]) -> Recipe:
    """Return what stands for a recipe when a run that has none is evaluated."""
    if not any(override.startswith("data.dataset=") for override in overrides):
        raise RunError(f"{run}: no recipe says what to evaluate on; give data.dataset=FOLDER, or a name on the Hub")
    return parse_recipe(NO_RECIPE, overrides, where=f"{run}, without a recipe", name="own")


def _by_number(measured: EvaluationSplit, spec: ModelSpec, where: str) -> EvaluationSplit:
    """Return a split for a model whose classes are not named: those of the data, in their order."""
    if len(measured.class_names) != spec.num_classes:
        raise DataError(
            f"{where} has {len(measured.class_names)} classes ({shortened(measured.class_names)}), and the model has "
            f"{spec.num_classes} outputs; give the model's class_names, to which they are matched"
        )
    note = f"the model's outputs count as {shortened(measured.class_names, 20)}, in the order of the data"
    return replace(measured, notes=[*measured.notes, note])


def _trained_micro_batch(run: Path, recipe: Recipe) -> int:
    """Return the micro-batch of the run's training, 0 if it is unknown."""
    current = recipe.accelerate.micro_batch_size
    recorded = read_settings(run).get("accelerate.micro_batch_size")
    value = current if current or recorded is None else recorded.value
    return value if isinstance(value, int) and is_allowed("accelerate.micro_batch_size", value) else 0


def _weights_used(run: Path, weights: str | None, checkpoint: Path | None) -> dict[str, Any]:
    """Return name and step of the weights that were measured, as far as they are known."""
    if checkpoint is not None:
        return {"weights": weights, "step": checkpoint_step(checkpoint)}
    result = read_if_sound(run / RESULT_FILE, ResultFile)
    model = result.get("model")
    used = {"weights": model.get("weights") if isinstance(model, dict) else None, "step": step_in_model(result)}
    return {name: value for name, value in used.items() if value is not None}


def _is_same_data(recipe: Recipe, trained: Recipe) -> bool:
    """Return whether two recipes have the same dataset, even if its path is written differently."""
    ours, theirs = recipe.data, trained.data
    paths = [os.path.realpath(existing_path(data.dataset) or data.dataset) for data in (ours, theirs)]
    same_source = ours.dataset == theirs.dataset or paths[0] == paths[1]
    return same_source and (ours.config, ours.revision) == (theirs.config, theirs.revision)


def _began_with(run: Path) -> Any:
    """Return the fingerprint of the data that a run began with, None if it is unknown."""
    saved = read_settings(run).get("data.fingerprint")
    return None if saved is None else saved.value


def _was_trained_on(recipe: Recipe, split: Split, run: Path) -> bool:
    """Return whether a split is the run's own training split at another path."""
    began_with = _began_with(run)
    if began_with is None or split.name not in TRAIN_NAMES:
        return False
    try:
        return fingerprint(limit_images(open_source(recipe), recipe)) == began_with
    except UserError:  # without the recipe's splits or columns
        return False


def _measured_split(
    recipe: Recipe, spec: ModelSpec, split: str | None, began_with: Any, *, is_same_data: bool
) -> EvaluationSplit:
    """Return the split to measure, with labels in the model's numbering: as in training, or other data as a whole."""
    measured = _run_split(recipe, spec, split, began_with) if is_same_data else _other_split(recipe, spec, split)
    return with_model_classes(measured, spec.class_names, recipe.data.dataset)


def _run_split(recipe: Recipe, spec: ModelSpec, split: str | None, began_with: Any) -> EvaluationSplit:
    labelled = with_values(recipe, {"data.multi_label": spec.multi_label})
    source, older = source_of_run(labelled, began_with, test_split=split, test_key="--split")
    chosen = source.test if split and source.test else source.evaluation
    if not len(chosen):
        raise RunError(
            "this run was trained on all images (data.eval_fraction=0), and held out none to measure; give other "
            "images: data.dataset=FOLDER"
        )
    used = {chosen.name, source.train.name}
    notes = note_on_test_split(source.split_names, used, recipe.data.dataset, "--split {} measures it")
    left_out = source.inventory.note() if source.inventory else []
    return EvaluationSplit(chosen, source.class_names, [*older, *left_out, *notes])


def _other_split(recipe: Recipe, spec: ModelSpec, split: str | None) -> EvaluationSplit:
    """Return a split of other data; the recipe's split and columns are used if they exist there."""
    data = recipe.data

    def overridden(key: str) -> bool:
        return origin_of(recipe, f"data.{key}") == "override"

    for key in NOT_OF_OTHER_DATA:
        if overridden(key):
            raise RunError(
                f"override data.{key} has no effect on other data, which are measured as a whole; use --split"
            )
    same_name = not overridden("dataset")
    split = data.eval_split if overridden("eval_split") else split
    columns = [getattr(data, f"{kind}_column") for kind in ("image", "label", "split") if overridden(f"{kind}_column")]
    required = [name for value in columns for name in ([value] if isinstance(value, str) else value or ())]
    root = data.image_root if same_name or overridden("image_root") else None
    return load_evaluation_split(
        data.dataset,
        multi_label=spec.multi_label,
        config=data.config if same_name or overridden("config") else None,
        revision=data.revision if same_name or overridden("revision") else None,
        split=split,
        preferred_split=data.eval_split,
        keys=TableKeys(
            data.image_column, data.label_column, data.label_separator, root, data.split_column, required=required
        ),
        model_classes=spec.class_names,
        inventory=data.inventory,
        max_bad_fraction=data.max_bad_fraction,
    )


def _load(folder: Path, checkpoint: Path | None) -> tuple[nn.Module, ModelSpec]:
    """Return the model of a folder, with the weights of a checkpoint if there is one."""
    model, spec = load_model(folder)
    if checkpoint is not None:
        load_checkpoint_weights(model, checkpoint)
    return model, spec


def choose_device(name: str) -> torch.device:
    """Return the device of auto, cpu, cuda or cuda:N. Raises RunError if it does not exist."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu", *(["cuda"] if number else []), *(f"cuda:{index}" for index in range(number))]
    if name == "auto":
        return torch.device(*(("cuda", torch.cuda.current_device()) if number else ("cpu",)))
    if name not in available:
        raise RunError(f"device '{name}': there is no such device here; allowed are auto, {', '.join(available)}")
    return torch.device(name)


def on_device(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Move a model to a device, in the memory layout of its images."""
    use_cudnn_benchmark(device)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def predict_images(
    run: str | Path,
    images: Sequence[str],
    *,
    top: int = 5,
    weights: str | None = None,
    model: ModelArgument | None = None,
    device: str = "auto",
    workers: int | None = None,
    on_bad_image: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
    calibrated: bool = False,
) -> list[Row]:
    """Return for each image file its `top` classes with scores, as `open_predictions` gives them one by one."""
    return list(
        open_predictions(
            run,
            images,
            top=top,
            weights=weights,
            model=model,
            device=device,
            workers=workers,
            on_bad_image=on_bad_image,
            note=note,
            calibrated=calibrated,
        )
    )


def open_predictions(
    run: str | Path,
    images: Sequence[str],
    *,
    top: int = 5,
    weights: str | None = None,
    model: ModelArgument | None = None,
    device: str = "auto",
    workers: int | None = None,
    on_bad_image: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
    calibrated: bool = False,
) -> Predictions:
    """Return an iterable over the `top` classes of image files with scores: softmax, or for multi-label models sigmoid.

    `device`: auto (a GPU if there is one), cpu, cuda or cuda:1. `weights`: last, best (of the best evaluation), average
    or step_N; by default those in RUN/model. `model`: of a run that no recipe has made (see `open_user_model`).
    `workers`: processes that decode, by default as many as in training for a long list. Folders stand for all image
    files below them, as in training; `note` is called with what is left out. Images that can't be decoded are skipped,
    and `on_bad_image` is called with the reason. Raises DataError without it, and at once for a path that does not
    exist. `calibrated`: scores with the temperature that was fitted to these weights on the evaluation split; RunError
    if there is none. If the run has tuned thresholds, rows name the classes that reach theirs: `predicted`.
    """
    opened = open_run(run)
    user_model = load_user_model(opened, model, weights)
    folder = opened if user_model is not None else model_folder(opened, pushed=is_hub_url(str(run)))
    checkpoint = find_checkpoint(opened, weights, str(run))
    files = image_files(images, note)
    torch_device = choose_device(device)
    network, spec = _load(folder, checkpoint) if user_model is None else (user_model.model, user_model.spec)
    network = on_device(network, torch_device, channels_last=True)
    calibration = None
    if calibrated or spec.multi_label:
        calibration = calibration_of_weights(_described(opened, folder), checkpoint)
        require_classes(calibration, spec.num_classes, run)
    return Predictions(
        network,
        spec,
        files,
        torch_device,
        top=top,
        workers=workers,
        on_bad_image=on_bad_image,
        note=note,
        temperature=_temperature(calibration, run, note) if calibrated else 1.0,
        thresholds=calibration.thresholds if calibration is not None and spec.multi_label else None,
    )


def _described(run: Path, folder: Path) -> Path:
    """Return the folder of the weights that `folder` describes: RUN/model of a run that needs the user's model."""
    return run / MODEL_FOLDER if folder == run and (run / MODEL_FOLDER).is_dir() else folder


def _temperature(calibration: Calibration | None, run: str | Path, note: Callable[[str], None]) -> float:
    if calibration is None or calibration.temperature is None:
        reason = "" if calibration is None else f" ({calibration.remark.rstrip('.')})"
        raise RunError(
            f"{run}: no temperature is stored with these weights{reason}; it is fitted when a training evaluates them "
            "on an evaluation split, not by older versions: leave --calibrated out, or train again"
        )
    if calibration.remark:
        note(calibration.remark)
    return calibration.temperature
