"""Exports a finished run's model for timm, transformers and onnxruntime, and verifies it by opening it with them.

A new form is written in `_verify`, and opened in a function like `timm_logits`. Programs for model cards: snippets.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.export.onnx_file import TOLERANCE, difference, quiet, require_onnx, scale_of, write_onnx
from hf_fasttrain.models.model import ModelSpec, Preprocessing, model_preprocessing
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.models.user_model import ModelArgument, UserModel, load_user_model
from hf_fasttrain.run_folder.calibration import (
    Calibration,
    calibration_of_weights,
    require_classes,
    write_calibration,
)
from hf_fasttrain.run_folder.file_names import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    MODEL_FILES,
    MODEL_FOLDER,
    ONNX_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
)
from hf_fasttrain.run_folder.finished import FinishedRun, read_run
from hf_fasttrain.run_folder.kept_weights import find_checkpoint, load_checkpoint_weights
from hf_fasttrain.run_folder.schemas import ConfigFile, SpecFile, read_file, read_if_sound
from hf_fasttrain.utils.errors import RunError, first_lines
from hf_fasttrain.utils.files import expand_user, new_folder, reason, sync_files

EXPORTED_FILES = re.compile(  # names of the files that `save_model` and this module write
    rf"{re.escape(SPEC_FILE)}|{CONFIG_FILE}|{re.escape(CALIBRATION_FILE)}|(generation_|preprocessor_)?config\.json|{re.escape(ONNX_FILE)}"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


@dataclass(frozen=True)
class ExportResult:
    """The result of `export_run`."""

    folder: Path
    forms: list[str]  # libraries that open it: timm, transformers, onnx, hf_fasttrain
    notes: list[str]  # libraries that can't, and why
    onnx_difference: float | None  # of logits, between onnxruntime and torch


def export_run(
    run: Path,
    output: Path | None = None,
    *,
    onnx: bool = False,
    weights: str | None = None,
    model: ModelArgument | None = None,
) -> ExportResult:
    """Write a finished run's model folder for timm, transformers and, with `onnx`, onnxruntime.

    `weights`: last, best (of the best evaluation), average or step_N, the moving average where the run has one; by
    default those in RUN/model. Others come from the run's checkpoints. `output` is RUN/model unless given. Each form is
    opened as its users would, and must give the logits of evaluation to 1e-4 (relative to the largest one if that is
    above 1); libraries that can't open it are in the notes. `model`: of a run that no recipe has made (see
    `open_user_model`): its weights are written for torch. Raises RunError and keeps an earlier folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give the run folder of a training that has ended")
    user_model = load_user_model(run, model, weights)
    finished = read_run(run) if user_model is None else None
    checkpoint = find_checkpoint(run, weights)
    calibration = calibration_of_weights(run / MODEL_FOLDER, checkpoint)
    folder = _target(run, output, None if checkpoint is None else str(weights))
    if onnx:
        require_onnx()
    had_onnx = (folder / ONNX_FILE).exists()
    try:
        with new_folder(folder, marks=MODEL_FILES) as partial:
            if user_model is not None:
                require_classes(calibration, user_model.spec.num_classes, run)
                exported = _export_user_model(user_model, run / MODEL_FOLDER, partial, calibration, onnx=onnx)
            else:
                assert finished is not None
                loaded, spec = _load(finished, checkpoint)
                require_classes(calibration, spec.num_classes, run)
                exported = _write(loaded, spec, partial, calibration, onnx=onnx)
            sync_files(partial)
    except OSError as error:
        raise RunError(f"{folder}: can't be written: {reason(error)}; choose another output") from None
    notes = exported.notes
    if had_onnx and not onnx:
        notes = [*notes, f"{ONNX_FILE} of an earlier export was removed; --onnx writes it again"]
    return replace(exported, folder=folder, notes=notes)


def _write(
    model: nn.Module, spec: ModelSpec, folder: Path, calibration: Calibration | None, *, onnx: bool
) -> ExportResult:
    """Write a recipe's model, and open it as its users would."""
    spec = replace(spec, preprocessing=spec.preprocessing or model_preprocessing(model, spec))
    with quiet():
        save_model(model, spec, folder)
    write_calibration(folder, calibration)
    return _verify(model, spec, folder, calibration, onnx=onnx)


def _export_user_model(
    user_model: UserModel, described: Path, folder: Path, calibration: Calibration | None, *, onnx: bool
) -> ExportResult:
    """Write the weights of a user's model, its ONNX file, and its description if the folder `described` has one."""
    copyfile(user_model.weights, folder / WEIGHTS_FILE)
    if (described / SPEC_FILE).is_file():  # of a recipe's run
        copyfile(described / SPEC_FILE, folder / SPEC_FILE)
    write_calibration(folder, calibration)
    if not onnx:
        return ExportResult(folder, ["torch (load_state_dict)"], [], None)
    pre = user_model.spec.preprocessing
    assert pre is not None
    images = preprocess(sample_photos(pre), pre)
    difference = write_onnx(user_model.model, user_model.spec, pre, images, folder / ONNX_FILE, calibration)
    return ExportResult(folder, ["torch (load_state_dict)", "onnx"], [], difference)


def _target(run: Path, output: Path | None, weights: str | None) -> Path:
    """Return the folder to write; RunError if it holds other files, or if `weights` would replace those of the run."""
    model = run / MODEL_FOLDER
    folder = model if output is None else expand_user(output).absolute()
    if weights is not None and folder.resolve() == model.resolve():
        raise RunError(
            f"{model} holds the weights that result.json describes; give another folder for weights={weights} "
            "(--output FOLDER)"
        )
    if not folder.exists():
        return folder
    if folder.resolve() == Path.cwd().resolve():
        raise RunError(f"{folder}: is the current directory and would be overwritten; give a subfolder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    is_given = {WEIGHTS_FILE} <= set(names) <= {WEIGHTS_FILE, ONNX_FILE, CALIBRATION_FILE}  # of a run without a recipe
    if not folder.is_dir() or (names and SPEC_FILE not in names and not is_given):
        raise RunError(f"{folder} exists and is not a model folder of hf_fasttrain; give another output")
    code_suffix = (
        ".py" if read_if_sound(folder / SPEC_FILE, SpecFile).get("trust_remote_code") else None
    )  # of a model with remote code
    others = [name for name in names if not EXPORTED_FILES.fullmatch(name) and Path(name).suffix != code_suffix]
    if others:
        raise RunError(
            f"{folder} would be overwritten, but holds files that export did not write ({', '.join(others)}); move "
            "them, or give another output"
        )
    return folder


def _load(run: FinishedRun, checkpoint: Path | None) -> tuple[nn.Module, ModelSpec]:
    """Return the run's model, with the weights of a checkpoint if there is one."""
    with quiet():
        model, spec = load_model(run.folder / MODEL_FOLDER)
    if checkpoint is not None:
        load_checkpoint_weights(model, checkpoint)
    return model, spec


def _verify(
    model: nn.Module, spec: ModelSpec, folder: Path, calibration: Calibration | None, *, onnx: bool
) -> ExportResult:
    """Return which libraries open the folder; removes a config that would be misread, and adds the ONNX file."""
    pre = spec.preprocessing
    assert pre is not None
    photos = sample_photos(pre)
    images = preprocess(photos, pre)
    with torch.no_grad():
        expected = model(images)
    forms, notes = _try_openers(spec, folder, photos, expected)
    onnx_difference = None
    if onnx:
        onnx_difference = write_onnx(model, spec, pre, images, folder / ONNX_FILE, calibration)
        forms.append("onnx")
    return ExportResult(folder, [*forms, "hf_fasttrain"], notes, onnx_difference)


def _try_openers(
    spec: ModelSpec, folder: Path, photos: list[Image.Image], expected: Tensor
) -> tuple[list[str], list[str]]:
    config = read_file(folder / CONFIG_FILE, ConfigFile) if (folder / CONFIG_FILE).is_file() else {}
    if not config:
        return [], ["timm and transformers can't build this model's small-image stem; hf_fasttrain and ONNX can"]
    if "auto_map" in config:
        return [], ["transformers opens this model with trust_remote_code=True only: it runs Python code of its own"]
    openers: dict[str, Callable[[Path, list[Image.Image]], Tensor]] = {"transformers": transformers_logits}
    if not spec.is_transformers:
        openers = {"timm": timm_logits, **openers}
    forms, notes = [], []
    for name, logits_of in openers.items():
        problem = _problem(logits_of, folder, photos, expected)
        if problem is None:
            forms.append(name)
        else:
            notes.append(f"{name} {problem}; hf_fasttrain opens it")
    if not forms and not spec.is_transformers:  # opening it would give a different model
        (folder / CONFIG_FILE).unlink()
    return forms, notes


def _problem(
    logits_of: Callable[[Path, list[Image.Image]], Tensor], folder: Path, photos: list[Image.Image], expected: Tensor
) -> str | None:
    try:
        with quiet(), torch.no_grad():
            gap = difference(logits_of(folder, photos), expected)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError) as error:
        return f"can't open it ({first_lines(error)})"
    return None if gap <= TOLERANCE * scale_of(expected) else f"gives different logits (by up to {gap:.2g})"


def timm_logits(folder: Path, photos: list[Image.Image]) -> Tensor:
    """Return the logits (B, K) of photos as computed by timm."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model(torch.stack([transform(photo) for photo in photos]))


def transformers_logits(folder: Path, photos: list[Image.Image]) -> Tensor:
    """Return the logits (B, K) of photos as computed by transformers' pipeline."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return model(pixel_values=processor(photos, return_tensors="pt")["pixel_values"]).logits


def sample_photos(pre: Preprocessing) -> list[Image.Image]:
    """Return three images of odd shapes that look like photos as far as resizing and cropping go.

    The first two lose 4 n + 3 pixels by cropping after the resize, so that a different rounding crops other pixels.
    """
    rng, short = np.random.default_rng(0), math.floor(pre.image_size / pre.crop_pct)
    long = short + 4 + (pre.image_size + 3 - short) % 4
    shapes = [(2 * long, 2 * short), (3 * short, 3 * long), (pre.image_size * 3 // 2 | 1, pre.image_size | 1)]
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in shapes]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(coarse, shapes, strict=True)]


def preprocess(photos: list[Image.Image], pre: Preprocessing) -> Tensor:
    """Return photos preprocessed as in evaluation, (B, 3, S, S)."""
    transform = EvalTransform(pre.image_size, pre.interpolation, pre.crop_pct, pre.crop_mode)
    normalize = Normalize(pre.mean, pre.std, torch.device("cpu"), channels_last=False)
    return normalize(torch.from_numpy(np.stack([transform(np.asarray(photo)) for photo in photos])))
