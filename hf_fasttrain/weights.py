"""Weights on disk: .safetensors files, the one form that is safe to load."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from hf_fasttrain.errors import ModelError, shortened
from hf_fasttrain.remote import fetch_file, is_remote


def weights_file(place: str) -> Path:
    """Return the .safetensors file of a place: a file, a model folder, a run, a checkpoint or a folder of them, or hf://."""
    if is_remote(place):
        return fetch_file(place, "model.safetensors")
    path = Path(place).expanduser()
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "model/model.safetensors") if (path / name).exists()]
        found += sorted(path.glob("step_*/model.safetensors"))[-1:]  # the newest of a run's checkpoints
        if not found:
            raise ModelError(f"model.pretrained: no model.safetensors in folder {place}")
        return found[0]
    if not path.exists():
        raise ModelError(
            f"model.pretrained: no file or folder {place}; allowed are true, false, local weights and hf://OWNER/NAME"
        )
    if path.suffix != ".safetensors":
        raise ModelError(f"model.pretrained: {place} is not a .safetensors file, the one form that is safe to load")
    return path


def load_weights(model: nn.Module, path: Path, head: Sequence[str] = ()) -> None:
    """Load a .safetensors file into a model; a head (prefixes) of other shape in the file is left as it is.

    timm's own converters run first (old names, position embeddings of another image size).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: can't be read as safetensors: {error}") from None
    own = model.state_dict()
    if not weights.keys() & own.keys() and all(name.startswith("model.") for name in weights):
        weights = {
            name.removeprefix("model."): value for name, value in weights.items()
        }  # a checkpoint has a wrapper's
    weights = _convert(weights, model)
    other = [
        name for name in weights if name in own and weights[name].shape != own[name].shape and is_within(name, head)
    ]
    for name in other:
        del weights[name]
    missing = [name for name in own if name not in weights and name not in other and not is_within(name, head)]
    unknown = [name for name in weights if name not in own and not is_within(name, head)]
    misshapen = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    if missing or unknown or misshapen:
        raise ModelError(
            f"{path}: weights of another model: {len(missing)} tensors missing ({shortened(missing, 3)}), "
            f"{len(unknown)} unknown ({shortened(unknown, 3)}), {len(misshapen)} of other shape "
            f"({shortened(misshapen, 3)}); give weights of the same model.name and model.args"
        )
    model.load_state_dict(weights, strict=False)


def _convert(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or len(inspect.signature(convert).parameters) < 2:
        return weights
    try:
        return convert(dict(weights), model)
    except (KeyError, AttributeError, RuntimeError, ValueError):
        return weights  # not this model's; `load_weights` says how


def is_within(name: str, prefixes: Sequence[str]) -> bool:
    """Return whether a parameter belongs to one of the modules named."""
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's weights as `model.safetensors`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
