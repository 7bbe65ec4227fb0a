"""Batches as trees: tensors in tuples, lists and mappings, with the images along the first dimension of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fasttrain.utils.errors import DataError

Tree = Any  # a tensor, or a tuple, list or mapping of trees; a list of strings counts as one leaf


def leaves(tree: Tree) -> Iterator[Any]:
    """Yield the leaves of a tree in order."""
    if isinstance(tree, Mapping):
        for each in tree.values():
            yield from leaves(each)
    elif isinstance(tree, tuple | list) and not _is_strings(tree):
        for each in tree:
            yield from leaves(each)
    else:
        yield tree


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return a tree of the same form whose leaves are `function(leaf)`; a mapping becomes a dict."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, each) for key, each in tree.items()}
    if isinstance(tree, tuple | list) and not _is_strings(tree):
        parts = [map_leaves(function, each) for each in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)


def first_leaf(tree: Tree) -> Tensor:
    """Return the first tensor of a tree. Raises DataError if there is none."""
    for leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            return leaf
    raise DataError(f"a batch holds {type(tree).__name__} without a tensor; give tensors, in tuples, lists or dicts")


def num_images(tree: Tree) -> int:
    """Return how many images a tree has: the length of its first tensor."""
    return len(tree) if isinstance(tree, Tensor) else len(first_leaf(tree))


def require_equal_lengths(number: int, **trees: Tree) -> None:
    """Raise DataError, which names the argument, for a leaf that can't be cut into `number` images."""
    for name, tree in trees.items():
        for leaf in leaves(tree):
            if leaf is None or (isinstance(leaf, Tensor | list | tuple) and _length(leaf) == number):
                continue
            what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else _described(leaf)
            raise DataError(
                f"train_loader: the {name} of a batch of {number} images hold {what}; each of them needs {number} "
                "along its first dimension: tensors, in tuples, lists or dicts, and lists of strings"
            )


def cut(tree: Tree, sizes: Sequence[int]) -> Sequence[Tree]:
    """Return the parts of a tree with `sizes` images each."""
    if isinstance(tree, Tensor):
        return tree.split_with_sizes(sizes)
    ends = list(itertools.accumulate(sizes))
    return [rows(tree, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def rows(tree: Tree, chosen: slice | list[int]) -> Tree:
    """Return some images of a tree."""
    if isinstance(tree, Tensor):
        return tree[chosen]
    if isinstance(chosen, list):
        return map_leaves(lambda leaf: _rows(leaf, chosen), tree)
    return map_leaves(lambda leaf: None if leaf is None else leaf[chosen], tree)


def join(parts: Sequence[Tree]) -> Tree:
    """Return one tree of the images of several."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list) and not _is_strings(first):
        joined = [join(column) for column in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    return None if first is None else [each for part in parts for each in part]


def zeros_like(tree: Tree, number: int) -> Tree:
    """Return a tree of the same form with `number` images of zeros; what is no tensor becomes as many of its first."""

    def zeros(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.new_zeros(number, *leaf.shape[1:])
        return None if leaf is None else [*leaf[:1]] * number

    return map_leaves(zeros, tree)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Return a tree whose tensors lie on a device; numpy arrays become tensors."""
    if isinstance(tree, Tensor):
        return tree if tree.device == device else tree.to(device, non_blocking=True)
    return map_leaves(lambda leaf: _moved(leaf, device), tree)


def _moved(leaf: Any, device: torch.device) -> Any:
    if hasattr(leaf, "__array_interface__"):
        leaf = torch.as_tensor(leaf)
    return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf


def _rows(leaf: Any, chosen: list[int]) -> Any:
    if leaf is None or isinstance(leaf, Tensor):
        return leaf if leaf is None else leaf[chosen]
    return [leaf[index] for index in chosen]


def _is_strings(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(each, str) for each in value)


def _length(leaf: Tensor | Sequence[Any]) -> int:
    return len(leaf) if not isinstance(leaf, Tensor) or leaf.ndim else -1


def _described(leaf: Any) -> str:
    number = f" of {len(leaf)} strings" if isinstance(leaf, list | tuple) else ""
    return f"{type(leaf).__name__}{number}"
