"""Checkpoints: folders that are either complete or absent; safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.run_folder.file_names import CUSTOM, STATE_FILE
from hf_fasttrain.run_folder.schemas import MarkerFile, StateFile, require
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import NewFile, digest_of, new_folder, read_object, reason, sync_folder, write_json
from hf_fasttrain.utils.tensor_tree import pack, unpack

MARKER = "COMPLETE"
PREFIX = "step_"
NAME = re.compile(rf"{PREFIX}[0-9]{{8}}|{PREFIX}[1-9][0-9]{{8,15}}")  # as `checkpoint_path` writes it
LEFTOVER = re.compile(rf"\.(?:{NAME.pattern})\.(?:partial|old)")  # of a process that was killed
REPLACED = re.compile(rf"\.(?:{NAME.pattern})\.old")
FORMAT = 1  # increased when `State` or the layout changes: checkpoints of other versions are refused, not misread
MAY_CHANGE = ("class_names", "early_stopping")  # they do not change what a step learns
TRAINING = "training"  # the tensors of `Checkpoint.training`

SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    path: Path
    state: dict[str, Any]  # step, updates, best, learnt, recipe, ...: plain JSON
    weights: dict[str, dict[str, Tensor]]  # "model", "ema"; on the CPU
    training: dict[str, Any]  # "optimizer", "scaler", and the "own" state of each process


class Snapshot:
    """The content of a checkpoint to be written; its tensors are the live ones until `to_host` copies them.

    Raises RunError for a value that can't be saved.
    """

    def __init__(
        self,
        step: int,
        state: dict[str, Any],
        weights: Mapping[str, Mapping[str, Tensor]],
        training: dict[str, Any],
    ) -> None:
        tensors: dict[str, Tensor] = {}
        packed = pack(training, tensors)
        self.step, self.state = step, {**state, "step": step, TRAINING: packed}
        self.tensors: dict[str, Mapping[str, Tensor]] = {**weights, TRAINING: tensors}
        unknown = {str(tensor.dtype) for tensor in self._all_tensors() if tensor.dtype not in SAFETENSORS_TYPES}
        if unknown:
            raise RunError(f"can't save tensors of type {', '.join(sorted(unknown))}: safetensors does not have it")

    def _all_tensors(self) -> Iterator[Tensor]:
        for named in self.tensors.values():
            yield from named.values()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._all_tensors())

    def to_host(self, *, copy: bool = True) -> Snapshot:
        """Move the tensors to the host, contiguous, and return self; a `copy` is not changed by further training."""
        for file, named in self.tensors.items():
            self.tensors[file] = {
                name: tensor.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format)
                for name, tensor in named.items()
            }
        return self

    def is_finite(self) -> bool:
        """Return whether every weight is finite."""
        weights = (tensor for file, named in self.tensors.items() if file != TRAINING for tensor in named.values())
        return all(_is_finite(tensor) for tensor in weights if tensor.is_floating_point() and tensor.numel())


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, using one thread: this runs beside training."""
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    values = tensor.numpy()
    return bool(np.isfinite(values.max()) and np.isfinite(values.min()))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"{PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix(PREFIX))


def _checkpoint_folders(folder: Path, form: re.Pattern[str]) -> list[Path]:
    """Return the folders whose names have a form of ours, by step. Others, links and files are somebody else's."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if form.fullmatch(path.name) and _is_own_folder(path))


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint under a temporary name, sync and rename it, then write its marker of completeness.

    Its tensors are on the host. The marker lists size and xxh3-128 of every file. Raises OSError; an older checkpoint
    of the same step is then still there.
    """
    path = checkpoint_path(folder, snapshot.step)
    files: dict[str, dict[str, Any]] = {}
    marker = {"format": FORMAT, "files": files}
    with new_folder(path, last=lambda: write_json(path / MARKER, marker), marks=[MARKER]) as partial:
        for name, tensors in snapshot.tensors.items():
            with NewFile(partial / f"{name}.safetensors") as file:
                write_safetensors(file, tensors)
            files[f"{name}.safetensors"] = {"bytes": file.num_bytes, "xxh3": file.digest}
        with NewFile(partial / STATE_FILE) as file:
            file.write(json.dumps(snapshot.state).encode())
        files[STATE_FILE] = {"bytes": file.num_bytes, "xxh3": file.digest}
    return path


def write_safetensors(file: NewFile, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous CPU tensors in the safetensors format.

    The library's own writer takes a path or returns a copy as bytes; this one hashes while it writes, and tests can
    make every write fail. The library reads the result.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each aligned to its element size
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        shape, kind = list(tensor.shape), SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        if tensors[name].nbytes:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def prune_checkpoints(
    folder: Path, keep: int, best_step: int | None, step: int, resumable: Collection[int] | None = None
) -> None:
    """Remove all checkpoints up to `step` but the newest `keep`, the best one and the newest `resumable` one.

    Checkpoints of later steps are corrupt ones that a resume has skipped: they are not counted, and stay.
    """
    complete = [path for path in complete_checkpoints(folder) if checkpoint_step(path) <= step]
    can_resume = [path for path in complete if resumable is None or checkpoint_step(path) in resumable]
    kept = {*can_resume[-1:], *([checkpoint_path(folder, best_step)] if best_step is not None else [])}
    for path in complete[:-keep]:
        if path not in kept:
            os.unlink(path / MARKER)
            shutil.rmtree(path, ignore_errors=True)
    incomplete = [path for path in _checkpoint_folders(folder, NAME) if not (path / MARKER).exists()]
    for path in [*incomplete, *_checkpoint_folders(folder, LEFTOVER)]:  # left by a killed process
        shutil.rmtree(path, ignore_errors=True)
    sync_folder(folder)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    return sorted(filter(_is_complete, _checkpoint_folders(folder, NAME)), key=checkpoint_step)


def _is_complete(path: Path) -> bool:
    return (path / MARKER).is_file()


def newest_checkpoint(
    folder: Path,
    note: Callable[[str], None],
    reason_to_skip: Callable[[Checkpoint], str | None] = lambda _: None,
    before: int | None = None,
) -> Checkpoint | None:
    """Return the newest complete checkpoint of a folder that can be used, None if there is no complete one.

    `before`: consider only earlier steps. `note` is called for each newer one that is incomplete, corrupt, or not to
    be used (`reason_to_skip` says why). Raises RunError if none can be read.
    """
    restore_replaced(folder)
    found = sorted(_checkpoint_folders(folder, NAME), key=checkpoint_step, reverse=True)
    corrupt = []
    for path in (path for path in found if before is None or checkpoint_step(path) < before):
        if not _is_complete(path):
            note(f"checkpoint {path} is incomplete: skipped")
            continue
        try:
            checkpoint = load_checkpoint(path, to_resume=True)
        except RunError as error:
            corrupt.append(str(error))
            note(f"{error}: skipped")
            continue
        reason_against = reason_to_skip(checkpoint)
        if reason_against is None:
            return checkpoint
        note(f"checkpoint {path} {reason_against}: skipped")
    if corrupt:
        raise RunError(
            "can't resume, no checkpoint can be read:\n  " + "\n  ".join(corrupt) + "\nrepair the disk or restore a "
            f"copy of one; to start from scratch, choose another output_dir or move {folder} away"
        )
    return None


def restore_replaced(folder: Path) -> None:
    """Restore checkpoints that were being replaced when the process was killed."""
    for old in _checkpoint_folders(folder, REPLACED):
        path = folder / old.name[1:].removesuffix(".old")
        if not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)
            os.rename(old, path)


def load_checkpoint(path: Path, *, to_resume: bool = False) -> Checkpoint:
    """Return a checkpoint's contents on the CPU. Raises RunError if a single byte has changed since it was written.

    `to_resume`: it must have all that a training is resumed from, rather than weights alone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        listed = _verify(path)
        state = _state_in(path)
        names = [name for name in listed if name.endswith(".safetensors")]
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in names}
        if not {"model", TRAINING} <= tensors.keys():
            raise ValueError(f"{MARKER} does not list model.safetensors and {TRAINING}.safetensors")
        training = unpack(state[TRAINING], tensors.pop(TRAINING))
        if to_resume:
            _require_training(state, training)
    except MemoryError:
        raise
    except (Exception, SafetensorError) as error:  # noqa: BLE001 - whatever was changed in it, it is passed over
        raise RunError(f"checkpoint {path} is corrupt ({reason(error)})") from None
    return Checkpoint(path, {key: state[key] for key in state if key != TRAINING}, tensors, training)


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's plain values without its tensors; an empty dict if files are corrupt or missing.

    Of the tensors' files only the sizes are checked.
    """
    try:
        _verify(path, only=STATE_FILE)
        return _state_in(path)
    except (OSError, ValueError):
        return {}


def _state_in(path: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint. Raises OSError; ValueError for others than a training writes."""
    state: dict[str, Any] = require(StateFile, read_object(path / STATE_FILE))
    inner = state.get("state") or state
    if not checkpoint_step(path) == state["step"] == inner["step"]:
        raise ValueError(f"{STATE_FILE} is of step {state['step']}")
    return state


def _require_training(state: dict[str, Any], training: Any) -> None:
    """Raise ValueError unless there are the parts that every training has."""
    if state.get("state") is None:
        raise ValueError(f"{STATE_FILE} has no state of a training")
    parts = training if isinstance(training, dict) else {}
    own = parts.get("own")
    if not isinstance(parts.get("optimizer"), dict) or "scaler" not in parts:
        raise ValueError("it has no state of an optimizer")
    if not isinstance(own, list) or not own or not all(isinstance(each, dict) and "loader" in each for each in own):
        raise ValueError("it has no state of the loader")


def _verify(path: Path, *, only: str | None = None) -> list[str]:
    """Return the names of a checkpoint's files. Raises ValueError if one has changed since it was written.

    `only` names the one file whose bytes are checked, by default all; sizes are checked for every file.
    """
    marker = read_object(path / MARKER)
    if marker.get("format", FORMAT) != FORMAT:
        raise ValueError(f"format {marker['format']} of another version of hf_fasttrain")
    listed: dict[str, dict[str, Any]] = require(MarkerFile, marker)["files"]
    for name, entry in listed.items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is outside of its folder")
        if (path / name).is_symlink() or not (path / name).is_file():
            raise ValueError(f"{name} is not a regular file")
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size:,} of {entry['bytes']:,} bytes")
        if only in (None, name) and digest_of(path / name) != entry["xxh3"]:
            raise ValueError(f"{name} has changed since it was written")
    return list(listed)


def _is_same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)  # augment.flip: true is half of the time, not 1


def differing_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, sorted; a missing one is None."""
    return [key for key in sorted(saved.keys() | current.keys()) if not _is_same(saved.get(key), current.get(key))]


def require_same_settings(
    saved: dict[str, Any], current: dict[str, Any], path: Path, new_run: str | None = None
) -> None:
    """Raise RunError if a setting that changes what is learned differs from the checkpoint's.

    `new_run` says how a new run is started from its weights; by default as a recipe does it.
    """
    require_same_parts(saved, current, path)
    if saved.get("schedule.warmup") in ("0 epochs", "0 steps"):  # written by older versions for the schedule's default
        saved = {**saved, "schedule.warmup": "auto"}
    if "model.head" in current:
        saved = {"model.head": "auto", **saved}  # older runs have none
    changed = [key for key in differing_settings(saved, current) if key.split(".")[0] not in MAY_CHANGE]
    if changed:
        listed = "\n".join(f"  {key}: {saved.get(key)!r} in the run, {current.get(key)!r} now" for key in changed)
        raise RunError(
            f"can't resume {path}: these settings change what is learned, and differ:\n{listed}\n"
            "Restore them, or start a new run from these weights: "
            + (new_run or f"another output_dir and model.pretrained={path}")
        )


def require_same_parts(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raise RunError if other parts are passed to `Trainer.from_recipe` than when the run began."""
    keys = sorted(key for key in saved.keys() | current.keys() if key.startswith(CUSTOM))
    changed = [key for key in keys if saved.get(key) != current.get(key)]
    if not changed:
        return
    names = {key: key.removeprefix(CUSTOM) for key in keys}
    listed = [
        f"  {names[key]}: {saved.get(key, 'not passed')} in the run, {current.get(key, 'not passed')} now"
        for key in changed
    ]
    passed = ", ".join(f"{names[key]}=..." for key in keys if key in saved)
    advice = f"Continue it in Python, with the same parts: Trainer.from_recipe(..., resume=True, {passed})"
    if not passed:
        advice = f"Leave {' and '.join(names[key] for key in changed)} out, or choose another output_dir"
    raise RunError(
        f"can't resume {path}: parts that are passed in Python change what is learned, and differ:\n"
        + "\n".join([*listed, advice])
    )
