"""A finished run put to use: evaluated on a split, asked about images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.pixels.decode import Pixels, read_pixels
from hf_fasttrain.data.pixels.images import BadImages
from hf_fasttrain.data.source.dataset import IMAGE_SUFFIXES, TRAIN_NAMES, Split, is_image_file, note_on_test_split
from hf_fasttrain.data.source.evaluation_split import Measured, load_measured, with_model_classes
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.from_recipe.accelerator import build_accelerator, use_cudnn_benchmark
from hf_fasttrain.from_recipe.auto import evaluation_batch_size, resolve_machine
from hf_fasttrain.from_recipe.loaders import Loaders, eval_transform
from hf_fasttrain.from_recipe.memory import decide_evaluation_batch, evaluation_memory
from hf_fasttrain.from_recipe.source_from import open_source
from hf_fasttrain.from_recipe.trainer import build_evaluator
from hf_fasttrain.from_recipe.tunings import Presets
from hf_fasttrain.models.model import ModelSpec, Preprocessing
from hf_fasttrain.models.saved import SPEC_FILE, load_model
from hf_fasttrain.recipe.load import load_recipe, origin_of, with_values
from hf_fasttrain.recipe.resolved import ResolvedSettings, read_settings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.checkpoint import checkpoint_step
from hf_fasttrain.run_folder.kept_weights import RESULT_FILE, find_checkpoint, load_checkpoint_weights, step_in_model
from hf_fasttrain.utils.errors import DataError, RunError, UserError
from hf_fasttrain.utils.files import read_json, restore_folder
from hf_fasttrain.utils.remote import download_run, is_hub_url

EVALUATED_KEYS = ("data.", "accelerate.", "evaluate.")
NOT_OF_OTHER_DATA = ("train_split", "test_split", "eval_fraction", "multi_label")


def open_run(place: str | Path) -> Path:
    """Return the folder of a run: a local one, or hf://OWNER/NAME[@REVISION] brought here.

    Raises RunError for a pushed model that runs Python code of its own.
    """
    if not is_hub_url(str(place)):
        return Path(place).expanduser()
    folder = download_run(str(place))
    if not (folder / SPEC_FILE).is_file():
        raise RunError(
            f"{place}: has no model of hf_fasttrain's in it ({SPEC_FILE}); give a repository that it pushed to"
        )
    if read_json(folder / SPEC_FILE).get("trust_remote_code"):
        raise RunError(
            f"{place}: its model runs Python code that it brings along; `hf download` it to a folder, read that code, "
            "then give the folder"
        )
    return folder


def model_folder(run: Path, *, pushed: bool = False) -> Path:
    """Return the model folder of a run folder, or the folder itself if it is one, as a `pushed` run's always is."""
    restore_folder(run / "model")
    for folder in (run,) if pushed else (run / "model", run):
        if (folder / SPEC_FILE).exists():
            return folder
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give a run folder")
    raise RunError(f"{run}: no model in it; give a run folder whose training has ended")


def evaluate_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    weights: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the metrics of a run's model by name, with `dataset`, `split`, `num_images`, `weights` and their `step`.

    `bad_images`, if there are any, is how many of them were counted by another image in their place.

    `run` is a folder or hf://OWNER/NAME. Measured are its evaluation split or another `split` of its data set.
    `overrides` change the run's recipe: data.dataset=FOLDER measures other images, all of its validation split, or of
    the folder where it has no splits. Their classes are matched to the model's by name; the model must know all of
    them. `weights`: last, best (of the best evaluation) or step_N; by default those in RUN/model. `note` is told what
    should be said: bad images, which others stand in for, and classes without images.
    """
    opened = open_run(run)
    folder = model_folder(opened, pushed=is_hub_url(str(run)))
    if not (opened / "recipe.yaml").exists():
        raise RunError(f"{run}: no recipe.yaml in it; evaluate needs a run folder")
    for override in overrides:
        if not override.startswith(EVALUATED_KEYS) or override.startswith("data.image_size"):
            raise RunError(f"override '{override}' has no effect on an evaluation; allowed are {EVALUATED_KEYS}")
        if split is not None and override.startswith("data.eval_split"):
            raise RunError(f"--split {split} and override '{override}' say the same thing twice; leave one out")
    checkpoint = find_checkpoint(opened, weights, str(run))
    place = str(run) if is_hub_url(str(run)) else opened / "recipe.yaml"
    asked = load_recipe(place, overrides)
    own_data = _same_data(asked, load_recipe(place, [text for text in overrides if not text.startswith("data.")]))
    settings = ResolvedSettings(asked)
    recipe = resolve_machine(asked, settings, Presets())
    accelerator = build_accelerator(recipe, settings)
    model, spec = _load(folder, checkpoint)
    model = on_device(model, accelerator.device, channels_last=recipe.accelerate.channels_last is True)
    measured = _measured_split(recipe, spec, split, own_data=own_data)
    for text in measured.notes:
        note(text)
    if not own_data and _was_trained_on(recipe, measured.split, opened):
        note(
            f"{recipe.data.dataset}, split '{measured.split.name}': these are the images that the run was trained on; "
            "to measure those that were held out, leave data.dataset out or give the recipe's"
        )
    pre = _preprocessing(spec)
    bad_images = BadImages(None, recipe.data.max_bad_fraction, note)
    loaders = Loaders(recipe, settings, accelerator, pre, bad_images)
    memory = partial(
        evaluation_memory,
        model,
        spec.image_size,
        accelerator.device,
        workers=loaders.workers,
        autocast=accelerator.autocast,
    )
    size = decide_evaluation_batch(settings, _trained_micro_batch(opened, recipe), memory)
    loader = loaders.eval_loader(measured.split, size)
    evaluator = build_evaluator(recipe, accelerator, spec.multi_label, spec.num_classes)
    metrics = evaluator(model, loader)
    for failure in evaluator.external.take_failures():
        note(failure)
    about = {"dataset": recipe.data.dataset, "split": measured.split.name, "num_images": len(measured.split)}
    about |= _which_weights(opened, weights, checkpoint)
    replaced = {"bad_images": bad_images.count} if bad_images.count else {}
    return {**metrics, **about, **replaced}


def _trained_micro_batch(run: Path, recipe: Recipe) -> int:
    """Return how many images the run's training had in a forward, 0 if nothing says it."""
    given = recipe.accelerate.micro_batch_size
    trained = read_settings(run).get("accelerate.micro_batch_size")
    value = given if given or trained is None else trained.value
    return value if isinstance(value, int) else 0


def _which_weights(run: Path, asked: str | None, checkpoint: Path | None) -> dict[str, Any]:
    """Return what is known of the weights that were measured: which ones they are, and after which step."""
    if checkpoint is not None:
        return {"weights": asked, "step": checkpoint_step(checkpoint)}
    result = read_json(run / RESULT_FILE)
    model = result.get("model")
    found = {"weights": model.get("weights") if isinstance(model, dict) else None, "step": step_in_model(result)}
    return {name: value for name, value in found.items() if value is not None}


def _same_data(recipe: Recipe, trained: Recipe) -> bool:
    """Return whether two recipes have the same data set, however its path is written."""
    ours, theirs = recipe.data, trained.data
    paths = [Path(data.dataset).expanduser().resolve() for data in (ours, theirs)]
    same_place = ours.dataset == theirs.dataset or paths[0] == paths[1]
    return same_place and (ours.config, ours.revision) == (theirs.config, theirs.revision)


def _was_trained_on(recipe: Recipe, split: Split, run: Path) -> bool:
    """Return whether a training split is the run's own, which has moved."""
    saved = read_settings(run).get("data.fingerprint")
    if saved is None or split.name not in TRAIN_NAMES:
        return False
    try:
        return fingerprint(open_source(recipe)) == saved.value
    except UserError:  # the recipe's splits or columns are not there
        return False


def _measured_split(recipe: Recipe, spec: ModelSpec, split: str | None, *, own_data: bool) -> Measured:
    """Return the split to measure in the model's numbering: as in training, or of other data whole."""
    found = _own_split(recipe, spec, split) if own_data else _other_split(recipe, spec, split)
    return with_model_classes(found, spec.class_names, recipe.data.dataset)


def _own_split(recipe: Recipe, spec: ModelSpec, split: str | None) -> Measured:
    asked = with_values(recipe, {"data.multi_label": spec.multi_label})
    source = open_source(asked, test_split=split, test_key="--split")
    chosen = source.test if split and source.test else source.evaluation
    used = {chosen.name, source.train.name}
    notes = note_on_test_split(source.split_names, used, recipe.data.dataset, "--split {} measures it")
    return Measured(chosen, source.class_names, notes)


def _other_split(recipe: Recipe, spec: ModelSpec, split: str | None) -> Measured:
    """Return a split of data that the recipe was not written for: its split and columns count where they are there."""
    data = recipe.data

    def overridden(key: str) -> bool:
        return origin_of(recipe, f"data.{key}") == "override"

    for key in NOT_OF_OTHER_DATA:
        if overridden(key):
            raise RunError(f"override data.{key} has no effect on other data, which are measured whole; use --split")
    same_name = not overridden("dataset")
    split = data.eval_split if overridden("eval_split") else split
    return load_measured(
        data.dataset,
        multi_label=spec.multi_label,
        config=data.config if same_name or overridden("config") else None,
        revision=data.revision if same_name or overridden("revision") else None,
        split=split,
        preferred_split=data.eval_split,
        image_column=data.image_column,
        label_column=data.label_column,
        required_columns=[getattr(data, key) for key in ("image_column", "label_column") if overridden(key)],
    )


def _load(folder: Path, checkpoint: Path | None) -> tuple[nn.Module, ModelSpec]:
    """Return the model of a folder, with the weights of a checkpoint if there is one."""
    model, spec = load_model(folder)
    if checkpoint is not None:
        load_checkpoint_weights(model, checkpoint)
    return model, spec


def choose_device(wish: str) -> torch.device:
    """Return the device that auto, cpu, cuda or cuda:N stands for. Raises RunError for one that is not there."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda"] if number else []), *(f"cuda:{index}" for index in range(number))]
    if wish == "auto":
        return torch.device(*(("cuda", torch.cuda.current_device()) if number else ("cpu",)))
    if wish not in there:
        raise RunError(f"device '{wish}': there is no such device here; allowed are auto, {', '.join(there)}")
    return torch.device(wish)


def on_device(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Return a model on a device, in the memory layout that its images will have."""
    use_cudnn_benchmark(device)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _preprocessing(spec: ModelSpec) -> Preprocessing:
    return spec.preprocessing or Preprocessing(spec.image_size)


def predict_images(
    run: str | Path,
    images: Sequence[str],
    *,
    top: int = 5,
    weights: str | None = None,
    device: str = "auto",
    bad: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Return for each image file its `top` classes with scores: softmax, or for multi-label models sigmoid.

    `device`: auto (a GPU if there is one), cpu, cuda or cuda:1.
    `weights`: last, best (of the best evaluation) or step_N; by default those in RUN/model. Folders stand for all image
    files below them. Images that can't be decoded are left out, and `bad` is told why; without it, and for a path that
    is not there, DataError.
    """
    opened = open_run(run)
    folder = model_folder(opened, pushed=is_hub_url(str(run)))
    checkpoint = find_checkpoint(opened, weights, str(run))
    files = [file for image in images for file in _image_files(image)]
    place = choose_device(device)
    model, spec = _load(folder, checkpoint)
    model = on_device(model, place, channels_last=True)
    pre = _preprocessing(spec)
    transform = eval_transform(pre)
    normalize = Normalize(pre.mean, pre.std, place, channels_last=True)
    rows: list[dict[str, Any]] = []
    size = evaluation_batch_size(micro_batch_size=0, **evaluation_memory(model, spec.image_size, place)).value
    for start in range(0, len(files), size):
        batch = files[start : start + size]
        readable = [(file, pixels) for file in batch if (pixels := _pixels_of(file, bad)) is not None]
        if not readable:
            continue
        pixels = np.stack([transform(pixels) for _, pixels in readable])
        with torch.inference_mode():
            logits = model(normalize(torch.from_numpy(pixels).to(place))).cpu()
        scores = logits.sigmoid() if spec.multi_label else logits.softmax(1)
        best = scores.topk(min(top, spec.num_classes), dim=1)
        for (file, _), values, classes in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
            named = [{"class": spec.class_names[c], "score": v} for c, v in zip(classes, values, strict=True)]
            rows.append({"image": str(file), "classes": named})
    return rows


def _pixels_of(file: Path, bad: Callable[[str], None] | None) -> Pixels | None:
    """Return an image's pixels; None if it can't be decoded and `bad` has been told so."""
    try:
        return read_pixels(str(file))
    except DataError as error:
        if bad is None:
            raise
        bad(str(error))
        return None


def _image_files(image: str) -> list[Path]:
    path = Path(image).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{image}: no such file or folder")
    found = sorted(file for file in path.rglob("*") if is_image_file(file))
    if not found:
        raise DataError(f"{image}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found
