"""Weights on disk: .safetensors files, the only format that is safe to load."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.run_folder.checkpoint import write_safetensors
from hf_fasttrain.run_folder.file_names import CONFIG_FILE, MODEL_FOLDER, SPEC_FILE, STATE_FILE, WEIGHTS_FILE
from hf_fasttrain.utils.errors import ModelError, RunError, shortened
from hf_fasttrain.utils.files import NewFile, expand_user, read_json, reason, require_regular
from hf_fasttrain.utils.private_apis import timm_weights_filter
from hf_fasttrain.utils.remote import download_file, is_hub_url


def weights_file(location: str) -> Path:
    """Return the .safetensors file of a location: a file, model folder, run, checkpoints, or hf:// URL."""
    if is_hub_url(location):
        return download_file(location, WEIGHTS_FILE)
    path = expand_user(location)
    if path.is_dir():
        files = [path / name for name in (WEIGHTS_FILE, f"{MODEL_FOLDER}/{WEIGHTS_FILE}") if (path / name).exists()]
        files += sorted(path.glob("step_*/model.safetensors"))[-1:]  # the newest of a run's checkpoints
        if not files:
            raise ModelError(f"model.pretrained: no model.safetensors in folder {location}")
        return files[0]
    if not path.exists():
        raise ModelError(
            f"model.pretrained: no file or folder {location}; allowed are true, false, local weights and hf://OWNER/NAME"
        )
    if path.suffix != ".safetensors":
        raise ModelError(
            f"model.pretrained: {location} is not a .safetensors file, the only format that is safe to load"
        )
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_regular(path)  # opening a FIFO would wait for a writer
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: can't be read as safetensors: {reason(error)}") from None


def update_digest(hashed: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add descriptions and values of tensors to an xxhash object."""
    for description, tensor in tensors:
        hashed.update(description.encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the .safetensors file of a finished run into its model, strictly."""
    load_fitting(model, convert(read_weights(path), model), str(path))


def load_fitting(
    model: nn.Module,
    weights: dict[str, Tensor],
    origin: str,
    may_lack: Sequence[str] = (),
    *,
    architecture: str | None = None,
) -> None:
    """Load tensors into a model. Raises ModelError if any are unknown, of another shape, or missing from `weights`.

    Those in `may_lack` may be missing.

    `architecture` is that of the weights, if known, for the message.
    """
    state = model.state_dict()
    loaded = {_memory(state[name]) for name in state if name in weights}  # a shared tensor counts by any of its names
    missing = [
        name for name in state if name not in weights and name not in may_lack and _memory(state[name]) not in loaded
    ]
    unknown = [name for name in weights if name not in state]
    misshapen = [name for name in weights if name in state and weights[name].shape != state[name].shape]
    if missing or unknown or misshapen:
        kinds = {"missing": missing, "unknown": unknown, "of other shape": misshapen}
        misfits = ", ".join(
            f"{len(names)} tensors {kind} ({shortened(names, 3)})" for kind, names in kinds.items() if names
        )
        hint = f" (these are of {architecture})" if architecture else ""
        raise ModelError(
            f"{origin}: weights of another model: {misfits}; give weights of the same model.name and model.args{hint}"
        )
    model.load_state_dict(weights, strict=False)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return a key of a tensor's memory, the same for all names of a shared tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device


def without_wrapper(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights under the model's names if they have those of our wrapper (`model.`)."""
    if not weights.keys() & model.state_dict().keys() and all(name.startswith("model.") for name in weights):
        return {name.removeprefix("model."): value for name, value in weights.items()}
    return weights


def convert(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with a timm model's names and sizes: converts old names, resizes position embeddings."""
    weights = without_wrapper(weights, model)
    convert = timm_weights_filter(model)
    if convert is None or len(inspect.signature(convert).parameters) < 2:
        return dict(weights)
    try:
        return dict(convert(dict(weights), model))
    except (KeyError, AttributeError, RuntimeError, ValueError):
        return dict(weights)  # weights of another model: `load_fitting` reports the misfits


def class_names_of(location: str, path: Path) -> list[str] | None:
    """Return the class names of weights from the files next to them, None if there are none.

    `location` is the recipe's value, `path` the weights' file: in a model folder, a run, a checkpoint, or alone.
    """
    descriptions = map(read_json, _descriptions(location, path))
    return next(filter(None, map(names_in, descriptions)), None)


def architecture_of(location: str, path: Path) -> str | None:
    """Return the name of the weights' model from the files next to them, None if there is none."""
    for description in map(read_json, _descriptions(location, path)):
        for key in ("name", "architecture", "model_type"):
            if isinstance(name := description.get(key), str):
                return name
    return None


def _descriptions(location: str, path: Path) -> Iterator[Path]:
    names = (SPEC_FILE, CONFIG_FILE)
    if is_hub_url(location):
        for name in names:
            with suppress(RunError):
                yield download_file(location, name)
        return
    yield from (path.parent / name for name in (*names, STATE_FILE))


def names_in(description: Mapping[str, Any]) -> list[str] | None:
    """Return the class names in a model's description: of this package, timm, transformers or a checkpoint."""
    for values in (description, description.get("pretrained_cfg"), description.get("learnt")):
        for key in ("class_names", "label_names", "id2label"):
            names = _names(values.get(key)) if isinstance(values, Mapping) else None
            if names:
                return names
    return None


def _names(value: object) -> list[str] | None:
    """Return class names from a list or a numbered dict; None for transformers' default LABEL_0, LABEL_1, ..."""
    if isinstance(value, Mapping):
        try:
            value = [name for _, name in sorted((int(number), name) for number, name in value.items())]
        except (TypeError, ValueError):
            return None
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    names = list(value)
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def is_within(name: str, prefixes: Sequence[str]) -> bool:
    """Return whether a parameter belongs to a module in `prefixes`."""
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's weights as `model.safetensors`, a shared tensor under each of its names.

    timm loads a model folder strictly and needs all names. The safetensors library refuses shared tensors, and writes
    files with mode 0600.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with NewFile(folder / WEIGHTS_FILE) as file:
        write_safetensors(file, weights)


def without_sharing(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict with shared tensors copied, as safetensors requires."""
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        memory = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return weights
