"""Random numbers that are the same for all images of a batch: dropout masks, noise and the like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fasttrain.utils.private_apis import argument_names, intercepted_operations


class CannotShare(Exception):
    """The random numbers of a computation can't be made the same for all images."""


class Draw(NamedTuple):
    """A call that draws random numbers: the operation with its numbers, and the shape of what it returns."""

    operation: str
    shape: tuple[int, ...]


Dimensions = tuple[int, ...]


def batch_dimensions(draws: Sequence[Draw], others: Sequence[Draw]) -> list[Dimensions]:
    """Return for each of `draws` the dimensions whose length differs in `others`, those of fewer images.

    Raises CannotShare if `others` are not the same calls.
    """
    if len(draws) != len(others):
        raise CannotShare
    return [_different(*pair) for pair in zip(draws, others, strict=True)]


def _different(draw: Draw, other: Draw) -> Dimensions:
    if draw.operation != other.operation or len(draw.shape) != len(other.shape):
        raise CannotShare
    return tuple(d for d, (a, b) in enumerate(zip(draw.shape, other.shape, strict=True)) if a != b)


@contextmanager
def recorded_draws(draws: list[Draw]) -> Iterator[None]:
    """Append to `draws` the calls within the block that draw from torch's generators."""

    def record(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        drawn = operation(*args, **kwargs)
        if _is_random(operation, args, kwargs):
            draws.append(_draw(operation, args, drawn))
        return drawn

    with intercepted_operations(record):
        yield


@contextmanager
def shared_draws(draws: Sequence[Draw], dimensions: Sequence[Dimensions], device: torch.device) -> Iterator[None]:
    """Repeat recorded `draws` so that each gives one value to all indices along its batch `dimensions`.

    What an image is given then depends neither on its place in the batch nor on the others. A permutation of the images
    becomes the identity. The n-th call draws the same numbers in every such block. Raises CannotShare for calls that
    were not recorded, and for those that draw by the values of a tensor.
    """
    number = 0

    def share(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal number
        if not _is_random(operation, args, kwargs):
            return operation(*args, **kwargs)
        if number == len(draws):
            raise CannotShare
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.manual_seed(number)
        drawn = _shared(operation, args, kwargs, dimensions[number])
        if not set(_different(_draw(operation, args, drawn), draws[number])) <= set(dimensions[number]):
            raise CannotShare
        number += 1
        return drawn

    with intercepted_operations(share):
        yield
    if number != len(draws):
        raise CannotShare


def _is_random(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    names = argument_names(operation)
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p"))  # of fused attention, which has masks of its own


def _name(operation: Any) -> str:
    return str(operation.overloadpacket).rpartition(".")[2]


def _draw(operation: Any, args: tuple[Any, ...], drawn: Any) -> Draw:
    first = drawn if isinstance(drawn, Tensor) else next(each for each in drawn if isinstance(each, Tensor))
    numbers = [each for each in args if isinstance(each, int | float)] if _name(operation) != "randperm" else []
    return Draw(f"{operation}{numbers}", tuple(first.shape))


def _shared(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], along: Dimensions) -> Any:
    """Return what an operation draws, the same along some dimensions, from torch's default generator."""
    args = tuple(None if isinstance(each, torch.Generator) else each for each in args)
    kwargs = kwargs | ({"generator": None} if "generator" in kwargs else {})
    if not along:
        return operation(*args, **kwargs)
    name, names = _name(operation), argument_names(operation)
    if name == "randperm":
        return torch.arange(args[0], **{key: value for key, value in kwargs.items() if key != "generator"})
    if "size" in names:
        position = names.index("size")
        size = [1 if d in along else length for d, length in enumerate(args[position])]
        return operation(*args[:position], size, *args[position + 1 :], **kwargs).expand(args[position]).clone()
    given, rest = args[0], args[1:]
    if any(isinstance(each, Tensor) for each in rest):
        raise CannotShare
    one = given.detach()
    for dimension in along:
        one = one.narrow(dimension, 0, 1)
    if name == "native_dropout":
        p = rest[0] if rest[1] is not False else 0.0
        mask = torch.empty_like(one, dtype=torch.bool).bernoulli_(1 - p).expand(given.shape).clone()
        return given * mask * (0.0 if p == 1 else 1 / (1 - p)), mask
    if name.endswith("_like"):
        return operation(one, *rest, **kwargs).expand(given.shape).clone()
    if name.endswith("_"):
        return given.copy_(operation(one.clone(), *rest, **kwargs))
    raise CannotShare
