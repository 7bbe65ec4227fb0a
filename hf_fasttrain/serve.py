"""A finished run put to use: evaluated on a split, asked about images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_fasttrain.assemble import build_evaluator, open_source
from hf_fasttrain.data.batch import Normalize
from hf_fasttrain.data.decode import read_pixels
from hf_fasttrain.data.images import BadImages
from hf_fasttrain.data.source import IMAGE_SUFFIXES, Split, is_image_file
from hf_fasttrain.errors import DataError, RunError, shortened
from hf_fasttrain.facts import Facts
from hf_fasttrain.files import read_json
from hf_fasttrain.launch import build_accelerator
from hf_fasttrain.loading import Loaders, eval_transform
from hf_fasttrain.machine import resolve_machine
from hf_fasttrain.model import ModelSpec, Preprocessing
from hf_fasttrain.model_folder import SPEC_FILE, load_model
from hf_fasttrain.recipe_file import load_recipe
from hf_fasttrain.remote import fetch_run, is_remote
from hf_fasttrain.tunings import Tuned

EVALUATED_KEYS = ("data.", "accelerate.", "evaluate.")


def open_run(place: str | Path) -> Path:
    """Return the folder of a run: a local one, or hf://OWNER/NAME[@REVISION] brought here.

    Raises RunError for a pushed model that runs Python code of its own.
    """
    if not is_remote(str(place)):
        return Path(place).expanduser()
    folder = fetch_run(str(place))
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
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Return the metrics of a run's model on its evaluation split, or on another split of its data set.

    `run` is a folder or hf://OWNER/NAME.
    `overrides` change the run's recipe: data.dataset=FOLDER measures on other images. Their classes must be those
    that the model was trained on, in the same order. `note` is told of bad images, which others stand in for.
    """
    opened = open_run(run)
    folder = model_folder(opened, pushed=is_remote(str(run)))
    if not (opened / "recipe.yaml").exists():
        raise RunError(f"{run}: no recipe.yaml in it; evaluate needs a run folder")
    for override in overrides:
        if not override.startswith(EVALUATED_KEYS) or override.startswith("data.image_size"):
            raise RunError(f"override '{override}' has no effect on an evaluation; allowed are {EVALUATED_KEYS}")
    asked = load_recipe(str(run) if is_remote(str(run)) else opened / "recipe.yaml", overrides)
    facts = Facts(asked)
    recipe = resolve_machine(asked, facts, Tuned())
    accelerator = build_accelerator(recipe, facts)
    model, spec = load_model(folder)
    chosen = _evaluation_split(recipe, spec, split)
    pre = _preprocessing(spec)
    loaders = Loaders(recipe, facts, accelerator, pre, BadImages(None, recipe.data.max_bad_fraction, note))
    size = recipe.evaluate.batch_size
    loader = loaders.evaluating(chosen, 64 if size == "auto" else size)
    evaluator = build_evaluator(recipe, accelerator, spec.multi_label, spec.num_classes)
    return evaluator(model.to(accelerator.device), loader)


def _evaluation_split(recipe: Any, spec: ModelSpec, split: str | None) -> Split:
    source = open_source(recipe, test_split=split)
    if source.class_names != spec.class_names:
        raise DataError(
            f"{recipe.data.dataset}: its classes ({shortened(source.class_names)}) are not the model's "
            f"({shortened(spec.class_names)}); evaluate on data with the same classes"
        )
    return source.test if split and source.test else source.evaluation


def _preprocessing(spec: ModelSpec) -> Preprocessing:
    return spec.preprocessing or Preprocessing(spec.image_size)


def predict_images(run: str | Path, images: Sequence[str], *, top: int = 5) -> list[dict[str, Any]]:
    """Return for each image file its `top` classes with scores: softmax, or for multi-label models sigmoid.

    Folders stand for all image files below them. Raises DataError for a path or image that can't be read.
    """
    folder = model_folder(open_run(run), pushed=is_remote(str(run)))
    files = [file for image in images for file in _image_files(image)]
    model, spec = load_model(folder)
    pre = _preprocessing(spec)
    transform = eval_transform(pre)
    normalize = Normalize(pre.mean, pre.std, torch.device("cpu"), channels_last=True)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), 32):
        batch = files[start : start + 32]
        pixels = np.stack([transform(read_pixels(str(file))) for file in batch])
        with torch.inference_mode():
            logits = model(normalize(torch.from_numpy(pixels)))
        scores = logits.sigmoid() if spec.multi_label else logits.softmax(1)
        best = scores.topk(min(top, spec.num_classes), dim=1)
        for file, values, classes in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            named = [{"class": spec.class_names[c], "score": v} for c, v in zip(classes, values, strict=True)]
            rows.append({"image": str(file), "classes": named})
    return rows


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
