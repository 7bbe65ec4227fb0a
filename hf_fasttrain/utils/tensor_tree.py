"""Nested states (of optimizers, scalers, loaders) as JSON and tensors: saved and read without pickle."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.utils.errors import RunError


def pack(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Return a tree as JSON values; its tensors are put into `tensors` under their path in the tree.

    The tree may hold dicts, lists, tuples, sets, numbers, strings, bytes, None, tensors and numpy arrays.
    Raises RunError for anything else: only pickle could save it, and loading pickle runs arbitrary code.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    while name in tensors:  # "a.b" in one dict, and "b" in another's "a"
        name += "'"
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        tensors[name] = torch.from_numpy(np.ascontiguousarray(tree)).view(tree.shape)
        return {"array": name, "dtype": str(tree.dtype)}
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, bytes):
        return {"bytes": base64.b64encode(tree).decode()}
    if isinstance(tree, Mapping):
        return {"dict": [[pack(k, tensors, f"{name}.key"), pack(v, tensors, f"{name}.{k}")] for k, v in tree.items()]}
    if isinstance(tree, list | tuple | set | frozenset):
        kind = "list" if isinstance(tree, list) else "tuple" if isinstance(tree, tuple) else "set"
        return {kind: [pack(value, tensors, f"{name}.{number}") for number, value in enumerate(tree)]}
    raise RunError(f"can't save {name or 'a state'} of type {type(tree).__name__}; keep plain values and tensors in it")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `pack` turned into JSON values. Raises KeyError or ValueError for other values."""
    if not isinstance(packed, dict):
        if packed is None or isinstance(packed, bool | int | float | str):
            return packed
        raise ValueError(f"a {type(packed).__name__} is not a packed value")
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "array" in packed:
        dtype = np.dtype(packed["dtype"])
        if dtype.kind not in "biuf":  # others take memory, or hold objects, whatever the array is
            raise ValueError(f"an array of {dtype}")
        return tensors[packed["array"]].numpy().astype(dtype, copy=False)
    ((kind, value),) = packed.items()
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "dict":
        return {unpack(key, tensors): unpack(inner, tensors) for key, inner in value}
    return {"list": list, "tuple": tuple, "set": set}[kind](unpack(inner, tensors) for inner in value)
