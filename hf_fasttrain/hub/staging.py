"""Stages a checkpoint as a run folder, so that it can be pushed while training continues."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fasttrain.run_folder.calibration import calibration_of_weights, write_calibration
from hf_fasttrain.run_folder.file_names import (
    EMA_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    RESOLVED_FILE,
    RESULT_FILE,
    SPEC_FILE,
    STAGING_FOLDER,
    WEIGHTS_FILE,
)
from hf_fasttrain.run_folder.finished import metrics_of
from hf_fasttrain.run_folder.kept_weights import find_checkpoint
from hf_fasttrain.run_folder.metrics_file import evaluation_at
from hf_fasttrain.run_folder.schemas import ResultFile, read_if_sound
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason, safetensors_header, write_json

if TYPE_CHECKING:
    from hf_fasttrain.models.model import ModelSpec

COPIED = (RECIPE_FILE, RESOLVED_FILE, METRICS_FILE)
COPIED_STATE = ("images", "train_seconds", "wait_seconds", "best")  # of a checkpoint's state


def stage(
    run: Path,
    checkpoint: Path,
    folder: Path,
    describe: Callable[[Path], None],
    result: Mapping[str, Any],
) -> None:
    """Fill `folder` as a run folder whose model has the weights of a checkpoint, and whose result is `result`.

    `describe` writes a model folder without its weights, whose calibration the checkpoint has. Weights are hard-linked
    if the file system can, so that the checkpoint may be pruned meanwhile. Raises OSError.
    """
    model = folder / MODEL_FOLDER
    model.mkdir(parents=True)
    describe(model)
    if checkpoint != run / MODEL_FOLDER:  # whose calibration `describe` has copied
        write_calibration(model, calibration_of_weights(run / MODEL_FOLDER, checkpoint))
    weights = checkpoint / EMA_FILE
    link_weights(weights if weights.exists() else checkpoint / WEIGHTS_FILE, model / WEIGHTS_FILE)
    for name in COPIED:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    write_json(folder / RESULT_FILE, result)


@contextmanager
def staged(run: Path, weights: str | None, spec: ModelSpec | None = None) -> Iterator[Path]:
    """Yield a run folder whose model has the requested weights: a staged one, or the run itself if RUN/model has them.

    `weights`: best, last, average or step_N; None: those in RUN/model. `spec` describes the model where the run does
    not. Raises RunError if the weights no longer exist.
    """
    checkpoint = find_checkpoint(run, weights)
    if checkpoint is None and spec is None:
        yield run
        return

    def describe(model: Path) -> None:
        _copy_description(run / MODEL_FOLDER, model)
        if spec is not None:
            write_json(model / SPEC_FILE, asdict(spec))

    folder: Path | None = None
    try:
        (run / STAGING_FOLDER).mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="chosen_", dir=run / STAGING_FOLDER))
        result = (
            read_if_sound(run / RESULT_FILE, ResultFile)
            if checkpoint is None
            else result_with_weights(run, checkpoint, str(weights))
        )
        stage(run, checkpoint or run / MODEL_FOLDER, folder, describe, result)
    except OSError as error:
        _remove(folder)
        raise RunError(f"{run}: weights={weights} could not be prepared: {reason(error)}") from None
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path | None) -> None:
    """Remove a staged run, and its parent folder if that is empty."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


def _copy_description(model: Path, folder: Path) -> None:
    for path in model.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".onnx"):
            shutil.copyfile(path, folder / path.name)


def result_with_weights(run: Path, checkpoint: Path, weights: str) -> dict[str, Any]:
    """Return a finished run's result as if the weights of a checkpoint were in RUN/model."""
    step, metrics = _step_and_metrics(run, _state_of(checkpoint))
    result = read_if_sound(run / RESULT_FILE, ResultFile)
    model = {**(result.get("model") or {}), "weights": weights, "step": step}
    return {**result, "metrics": metrics, "test_metrics": None, "model": model}


def result_while_training(run: Path, checkpoint: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result.json of a checkpoint while training continues.

    `environment` describes the machine; `num_steps` marks the run as unfinished.
    """
    state = _state_of(checkpoint)
    step, metrics = _step_and_metrics(run, state)
    seconds = max(float(state.get("train_seconds", 0.0)), 1e-9)
    return {
        **environment,
        **{key: state.get(key) for key in COPIED_STATE},
        "metrics": metrics,
        "steps": step,
        "num_steps": state.get("num_steps"),
        "weights_of_step": step,
        "images_per_second": state.get("images", 0) / seconds,
        "data_wait_fraction": min(1.0, state.get("wait_seconds", 0.0) / seconds),
    }


def _state_of(checkpoint: Path) -> dict[str, Any]:
    from hf_fasttrain.run_folder.checkpoint import read_state

    return dict(read_state(checkpoint).get("state", {}))


def _step_and_metrics(run: Path, state: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the step of a checkpoint's state and the metrics of an evaluation after it, if there was one."""
    step = int(state.get("step", 0))
    if state.get("evaluated_at") == step:
        return step, dict(state.get("metrics", {}))
    return step, metrics_of(evaluation_at(run / METRICS_FILE, step) or {})


def link_weights(source: Path, target: Path) -> None:
    """Link a checkpoint's weights into a model folder; rewrite the file if its tensors have a wrapper's prefix."""
    try:
        is_wrapped = _is_wrapped(source)
    except ValueError as error:
        raise OSError(f"{source} is damaged: {error}") from None
    if is_wrapped:
        _unwrap(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _is_wrapped(path: Path) -> bool:
    names = safetensors_header(path).keys() - {"__metadata__"}
    return bool(names) and all(name.startswith("model.") for name in names)


def _unwrap(source: Path, target: Path) -> None:
    """Write the tensors under their names without the prefix of `TransformersClassifier`."""
    with source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        text = json.dumps({name.removeprefix("model."): value for name, value in header.items()}).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 1 << 22)
