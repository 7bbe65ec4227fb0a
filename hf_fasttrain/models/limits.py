"""What the description of a model may ask for: no code from elsewhere, and no more size than there is room for.

A description is a recipe's model.args, a run's hf_fasttrain.json, or a config.json; a stranger may have written it.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hf_fasttrain.utils.clean import cut, one_line
from hf_fasttrain.utils.environment import free_memory_bytes
from hf_fasttrain.utils.errors import ModelError, UserError, first_line, is_on_command_line, shown
from hf_fasttrain.utils.files import reason, require_regular
from hf_fasttrain.utils.format import format_bytes
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.process_memory import limited_memory

MAX_NUMBER = 2_000_000  # of an integer in a description: the longest list that is made of it takes seconds
MAX_TENSORS = 100_000  # of a model
# What transformers computes itself. It downloads what has a "/" in its name, deepgemm and sonicmoe, and a kernel for
# FlashAttention if the package is not installed.
OWN_ATTENTION = {"eager", "sdpa", "flex_attention", "paged|eager", "paged|sdpa"}
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
OWN_EXPERTS = {"eager", "batched_mm", "grouped_mm"}
# Arguments that would load weights or run code from elsewhere, or write files.
NOT_IN_ARGS = {
    "_configuration_file", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name", "allow_all_kernels",
    "cache_dir", "checkpoint_path", "code_revision", "config", "device_map", "device_mesh", "distributed_config",
    "force_download", "generation_config", "gguf_file", "ignore_mismatched_sizes", "kernel_config", "key_mapping",
    "local_files_only", "max_memory", "offload_buffers", "offload_folder", "output_loading_info", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_strict", "proxies",
    "quantization_config", "revision", "state_dict", "subfolder", "token", "tp_plan", "tp_size", "tqdm_class",
    "trust_remote_code", "use_kernels", "use_safetensors", "variant", "weights_only",
}  # fmt: skip
_ARGUMENTS_OF_TIMM = ("model_args", "backbone_kwargs")  # in config.json


def require_plain_args(args: dict[str, Any], *, trusted: bool) -> None:
    """Raise ModelError for arguments that do not belong to the architecture; kernels are allowed if `trusted`."""
    wrong = sorted(set(args) & NOT_IN_ARGS)
    if not trusted:
        wrong += [key for key, _ in _fetched(args)]
    if wrong:
        raise ModelError(
            f"model.args: {', '.join(wrong)} would load something other than the recipe says; remove it "
            "(weights: model.pretrained; a model's own code and kernels: model.trust_remote_code)"
        )
    _require_modest_numbers(args, "model.args")


def require_plain_config(config: dict[str, Any], name: str, *, trusted: bool) -> None:
    """Raise ModelError for a transformers configuration that names kernels to be downloaded, unless it is `trusted`."""
    _require_modest_numbers(config, f"model {name}: config.json")
    if trusted:
        return
    fetched = [f"{key}: {value}" for key, value in _fetched(config)]
    if fetched:
        raise ModelError(
            f"model {name}: its config.json names code that would be downloaded and run ({', '.join(fetched[:3])}), "
            "which is done only if the recipe sets model.trust_remote_code: true; read that code first"
        )


def _fetched(values: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings, at any depth, with which transformers or timm would load code or files from elsewhere."""
    for key, value in _settings(values):
        if "attn_implementation" in key:
            yield from ((key, shown(each)) for each in _texts(value) if not _is_own_attention(each))
        elif "experts_implementation" in key:
            yield from ((key, shown(each)) for each in _texts(value) if each not in OWN_EXPERTS)
        elif (key in ("quantization_config", "kernel_config") and value) or (key == "use_kernels" and value):
            yield key, shown(value)
        elif key in _ARGUMENTS_OF_TIMM and isinstance(value, dict):
            yield from ((f"{key}.{name}", shown(value[name])) for name in sorted(value.keys() & NOT_IN_ARGS))


def _is_own_attention(name: str) -> bool:
    package = FLASH_PACKAGES.get(name)
    return name in OWN_ATTENTION or (package is not None and importlib.util.find_spec(package) is not None)


def _settings(values: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of all mappings in a tree."""
    waiting = [values]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from ((str(key), value) for key, value in node.items())
            waiting += node.values()
        elif isinstance(node, list | tuple):
            waiting += node


def _texts(value: Any) -> list[str]:
    """Return a setting's texts: itself, or those of each part of the model. What is not a text counts as one."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    return [] if value is None else [str(value)]


def _require_modest_numbers(values: Any, where: str) -> None:
    """Raise ModelError for an integer that no model has as a size: lists as long as it would be made."""
    waiting = [("", values)]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, dict):
            waiting += [(f"{key}.{name}", value) for name, value in node.items()]
        elif isinstance(node, list | tuple):
            waiting += [(key, value) for value in node]
        elif isinstance(node, int) and abs(node) > MAX_NUMBER:
            name = one_line(cut(key.lstrip("."), 100))
            raise ModelError(f"{where}: {name} is {shown(node)}; allowed are numbers up to {MAX_NUMBER:,}")


@contextmanager
def limited_size(what: str, weights: list[Path] | None = None) -> Iterator[None]:
    """Raise ModelError as soon as a model that this thread builds is larger than it may be.

    It may have as many tensors and bytes as the files of its `weights`, with room for types of other widths and for
    buffers that are not saved; without weights, as many bytes as are free. On the command line, a temporary tensor of
    more than the free memory fails too, instead of the process being killed.
    """
    free = free_memory_bytes()
    most_tensors, most_bytes = MAX_TENSORS, free
    if weights is not None:
        most_tensors = 2 * sum(map(_num_tensors, weights)) + 1000
        most_bytes = min(free, 8 * sum(path.stat().st_size for path in weights) + (512 << 20))
    seen = {"tensors": 0, "bytes": 0}
    thread = threading.get_ident()

    def look(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        seen["tensors"] += 1
        seen["bytes"] += tensor.numel() * tensor.element_size()
        if seen["tensors"] > most_tensors:
            raise ModelError(
                f"{what} has more than {most_tensors:,} tensors: choose a smaller one, or copy its files again"
            )
        if seen["bytes"] > most_bytes:
            raise ModelError(
                f"{what} takes more than {format_bytes(most_bytes)}: choose a smaller one, or copy its files again"
            )

    hooks = [
        torch_module.register_module_parameter_registration_hook(look),
        torch_module.register_module_buffer_registration_hook(look),
    ]
    try:
        with limited_memory(free) if is_on_command_line() and not torch.cuda.is_available() else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _num_tensors(path: Path) -> int:
    """Return the number of tensors in a .safetensors file. Raises ModelError if it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            return len(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: can't be read as safetensors: {reason(error)}") from None


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it builds a model into a ModelError with one message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries meet a stranger's values in their own ways
        if is_out_of_memory(error):
            raise ModelError(
                f"{what} needs more memory than is free ({first_line(error)}); choose a smaller one"
            ) from None
        raise ModelError(f"{what} can't be built: {type(error).__name__}: {cut(first_line(error), 300)}") from None
