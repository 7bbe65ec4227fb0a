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
    """Raise DataError, which names the argument, for a leaf that can't be cut into `number` images.

    Its length is that number or a multiple of it: several rows belong to each image then, one after the other.
    """
    for name, tree in trees.items():
        for leaf in leaves(tree):
            if leaf is None or (isinstance(leaf, Tensor | list | tuple) and _is_multiple(_length(leaf), number)):
                continue
            what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else _described(leaf)
            raise DataError(
                f"train_loader: the {name} of a batch of {number} images hold {what}; each of them needs {number} (the "
                "length of the images' first tensor), or a multiple of that, along its first dimension: tensors, in "
                f"tuples, lists or dicts, and lists of strings{_hint(trees.get('images'))}"
            )


def cut(tree: Tree, sizes: Sequence[int]) -> Sequence[Tree]:
    """Return the parts of a tree with `sizes` images each; a leaf with several rows for each image is cut likewise."""
    number = sum(sizes)
    if isinstance(tree, Tensor):
        each = _multiple(tree, number)
        return tree.split_with_sizes(sizes if each == 1 else [each * size for size in sizes])
    ends = list(itertools.accumulate(sizes))
    return [rows(tree, slice(end - size, end), number) for end, size in zip(ends, sizes, strict=True)]


def rows(tree: Tree, chosen: slice | list[int], number: int | None = None) -> Tree:
    """Return some images of a tree of `number`; all rows of each, where a leaf has several for an image."""

    def of_leaf(leaf: Any) -> Any:
        each = 1 if leaf is None or number is None else _multiple(leaf, number)
        if leaf is None or each == 1:
            return leaf if leaf is None else _rows(leaf, chosen)
        indices = range(number or 0)[chosen] if isinstance(chosen, slice) else [i % (number or 1) for i in chosen]
        return _rows(leaf, [each * index + row for index in indices for row in range(each)])

    return of_leaf(tree) if isinstance(tree, Tensor) else map_leaves(of_leaf, tree)


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


def _rows(leaf: Any, chosen: slice | list[int]) -> Any:
    if isinstance(leaf, Tensor) or isinstance(chosen, slice):
        return leaf[chosen]
    return [leaf[index] for index in chosen]


def _is_multiple(length: int, number: int) -> bool:
    return length == number or (number > 0 and length > 0 and length % number == 0)


def _multiple(leaf: Any, number: int) -> int:
    """Return how many rows of a leaf belong to each of `number` images."""
    length = len(leaf)
    return length // number if length != number and _is_multiple(length, number) else 1


def _hint(images: Tree) -> str:
    """Return what to do with images that are a list of one tensor each."""
    if not isinstance(images, tuple | list) or not all(isinstance(each, Tensor) and each.ndim == 3 for each in images):
        return ""
    return "; a list with a tensor for each image has to be stacked to one tensor (B, 3, H, W), in one size"


def _is_strings(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(each, str) for each in value)


def _length(leaf: Tensor | Sequence[Any]) -> int:
    return len(leaf) if not isinstance(leaf, Tensor) or leaf.ndim else -1


def _described(leaf: Any) -> str:
    number = f" of {len(leaf)} strings" if isinstance(leaf, list | tuple) else ""
    return f"{type(leaf).__name__}{number}"
