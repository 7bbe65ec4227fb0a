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
        for child in tree.values():
            yield from leaves(child)
    elif isinstance(tree, tuple | list) and not _is_strings(tree):
        for child in tree:
            yield from leaves(child)
    else:
        yield tree


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return a tree of the same form whose leaves are `function(leaf)`; a mapping becomes a dict."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, child) for key, child in tree.items()}
    if isinstance(tree, tuple | list) and not _is_strings(tree):
        parts = [map_leaves(function, child) for child in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)


def first_leaf(tree: Tree) -> Tensor:
    """Return the first tensor of a tree. Raises DataError if there is none."""
    for leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            return leaf
    raise DataError(f"a batch has {type(tree).__name__} without a tensor; return tensors, in tuples, lists or dicts")


def num_images(tree: Tree) -> int:
    """Return how many images a tree has: the length of its first tensor."""
    return len(tree) if isinstance(tree, Tensor) else len(first_leaf(tree))


def require_equal_lengths(number: int, **trees: Tree) -> None:
    """Raise DataError, which names the argument, for a leaf that can't be split into `number` images.

    Its length must be that number or a multiple of it, with the rows of each image next to each other.
    """
    for name, tree in trees.items():
        for leaf in leaves(tree):
            if leaf is None or (isinstance(leaf, Tensor | list | tuple) and _is_multiple(_length(leaf), number)):
                continue
            description = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else _describe(leaf)
            raise DataError(
                f"train_loader: the {name} of a batch of {number} images have {description}; the first dimension must "
                f"be {number} (the length of the images' first tensor) or a multiple of it. Allowed are tensors, in "
                f"tuples, lists or dicts, and lists of strings{_hint(trees.get('images'))}"
            )


def cut(tree: Tree, sizes: Sequence[int]) -> Sequence[Tree]:
    """Return the parts of a tree with `sizes` images each, keeping all rows of an image together."""
    number = sum(sizes)
    if isinstance(tree, Tensor):
        multiple = _multiple(tree, number)
        return tree.split_with_sizes(sizes if multiple == 1 else [multiple * size for size in sizes])
    ends = list(itertools.accumulate(sizes))
    return [rows(tree, slice(end - size, end), number) for end, size in zip(ends, sizes, strict=True)]


def rows(tree: Tree, selection: slice | list[int], number: int | None = None) -> Tree:
    """Return some of a tree's `number` images, with all rows of each image."""

    def rows_of_leaf(leaf: Any) -> Any:
        multiple = 1 if leaf is None or number is None else _multiple(leaf, number)
        if leaf is None or multiple == 1:
            return leaf if leaf is None else _rows(leaf, selection)
        indices = (
            range(number or 0)[selection] if isinstance(selection, slice) else [i % (number or 1) for i in selection]
        )
        return _rows(leaf, [multiple * index + row for index in indices for row in range(multiple)])

    return rows_of_leaf(tree) if isinstance(tree, Tensor) else map_leaves(rows_of_leaf, tree)


def zeros_like(tree: Tree, number: int) -> Tree:
    """Return a tree of the same form with `number` images of zeros; lists repeat their first element."""

    def zeros(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.new_zeros(number, *leaf.shape[1:])
        return None if leaf is None else [*leaf[:1]] * number

    return map_leaves(zeros, tree)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Return a tree with its tensors on a device; numpy arrays become tensors."""
    if isinstance(tree, Tensor):
        return tree if tree.device == device else tree.to(device, non_blocking=True)
    return map_leaves(lambda leaf: _to_device(leaf, device), tree)


def _to_device(leaf: Any, device: torch.device) -> Any:
    if hasattr(leaf, "__array_interface__"):
        leaf = torch.as_tensor(leaf)
    return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf


def _rows(leaf: Any, selection: slice | list[int]) -> Any:
    if isinstance(leaf, Tensor) or isinstance(selection, slice):
        return leaf[selection]
    return [leaf[index] for index in selection]


def _is_multiple(length: int, number: int) -> bool:
    return length == number or (number > 0 and length > 0 and length % number == 0)


def _multiple(leaf: Any, number: int) -> int:
    """Return how many rows of a leaf belong to each of `number` images."""
    length = len(leaf)
    return length // number if length != number and _is_multiple(length, number) else 1


def _hint(images: Tree) -> str:
    """Return advice for images that are a list of tensors, one per image."""
    if not isinstance(images, tuple | list) or not all(
        isinstance(image, Tensor) and image.ndim == 3 for image in images
    ):
        return ""
    return "; stack a list of tensors, one per image, to one tensor (B, 3, H, W) of one size"


def _is_strings(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(item, str) for item in value)


def _length(leaf: Tensor | Sequence[Any]) -> int:
    return len(leaf) if not isinstance(leaf, Tensor) or leaf.ndim else -1


def _describe(leaf: Any) -> str:
    number = f" of {len(leaf)} strings" if isinstance(leaf, list | tuple) else ""
    return f"{type(leaf).__name__}{number}"
