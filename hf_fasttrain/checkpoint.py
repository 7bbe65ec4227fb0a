"""Checkpoints: folders that are either whole or not there, read without pickle's dangers."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fasttrain.errors import RunError

MARKER = "COMPLETE"
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    path: Path
    state: dict[str, Any]  # step, updates, best, ... : plain JSON
    weights: dict[str, dict[str, Tensor]]  # "model", "ema"
    tensors: dict[str, Any]  # "optimizer", "scaler"


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], weights: dict[str, dict[str, Tensor]], tensors: dict[str, Any]
) -> Path:
    """Write a checkpoint beside its place, then rename it there; the marker of completeness is written last."""
    from safetensors.torch import save_file

    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in weights.items():
        save_file({key: value.detach().contiguous() for key, value in values.items()}, partial / f"{name}.safetensors")
    torch.save(tensors, partial / "training.pt")
    (partial / "state.json").write_text(json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8")
    (partial / MARKER).write_text("", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"{PREFIX}*/{MARKER}"))


def newest_checkpoint(folder: Path, device: torch.device) -> Checkpoint | None:
    """Return the newest complete checkpoint of a folder on a device, None if there is none."""
    found = complete_checkpoints(folder)
    return load_checkpoint(found[-1], device) if found else None


def require_same(saved: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Raise RunError if a setting that decides what is learnt differs from the checkpoint's."""
    changed = [key for key in sorted(saved.keys() | asked.keys()) if saved.get(key) != asked.get(key)]
    if changed:
        listed = "\n".join(f"  {key}: {saved.get(key)!r} in the run, {asked.get(key)!r} asked for" for key in changed)
        raise RunError(
            f"can't resume {path}: these settings decide what is learnt and have changed:\n{listed}\n"
            "Put them back, or train in another output_dir with model.pretrained set to the run's model folder"
        )


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Return a checkpoint's contents on a device; RunError if it can't be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights = {file.stem: load_file(file, device=str(device)) for file in path.glob("*.safetensors")}
        tensors = torch.load(path / "training.pt", map_location=device, weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(
            f"checkpoint {path} can't be read: {str(error).splitlines()[0]}; move it away to resume from an older one"
        ) from None
    return Checkpoint(path, state, weights, tensors)


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all complete checkpoints but the newest `keep` and the best."""
    for path in complete_checkpoints(folder)[:-keep]:
        if best_step is None or path.name != f"{PREFIX}{best_step:08d}":
            shutil.rmtree(path, ignore_errors=True)
