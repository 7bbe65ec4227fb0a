"""Forecast of the memory of a training, measured by forward passes of two and three images before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.models.model import batch_norms, set_train_mode
from hf_fasttrain.models.side_effects import preserved_state, seeded_random_states

# An operation's inputs and outputs count twice: backward has their gradients, oneDNN and the heap copies of them.
# With this the forecast came within 15 % of the peaks of ten models (benchmarks/memory_forecast.py).
WORKSPACES = 2
IMAGES_AT_224 = 64  # images of 224 px: larger micro-batches are not faster on a CPU
WORKER_BYTES = 150 << 20  # private memory of a loader process

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward pass needs in addition to parameters and buffers."""

    fixed: int  # kept for backward for any number of images, such as autocast's copies of weights
    per_image: int  # kept for backward
    workspace_per_image: int  # while the largest operation runs

    def of(self, images: int) -> int:
        """Return the bytes of a forward and backward pass with a number of images."""
        return self.fixed + images * (self.per_image + self.workspace_per_image)

    def after(self, evaluation_bytes: int) -> Activations:
        """Return the bytes if each image goes through another model first, in evaluation: the larger peak counts."""
        return replace(self, workspace_per_image=max(self.workspace_per_image, evaluation_bytes - self.per_image))

    def of_views(self, number: int) -> Activations:
        """Return the bytes if each image goes through the model in a number of views."""
        return Activations(self.fixed, number * self.per_image, number * self.workspace_per_image)


@dataclass(frozen=True)
class Forecast:
    """Forecast of a training process's memory, in bytes."""

    resident: int  # used already: libraries, data, weights and buffers
    weights: int  # and buffers; part of `resident`, unless they are on a GPU
    gradients: int
    optimizer: int
    average: int  # the moving average
    activations: Activations
    batch_per_image: int  # the images of a micro-batch on their way through the loader and the normalisation
    workers: int  # loader processes of this process
    device: str = "cpu"

    def additional(self, images: int) -> int:
        """Return the bytes that this process will still allocate, with micro-batches of `images`."""
        state = self.gradients + self.optimizer + self.average
        return state + self.activations.of(images) + images * self.batch_per_image

    def needed(self, images: int) -> int:
        """Return the bytes that this process and its loader processes will still allocate."""
        return self.additional(images) + self.workers * WORKER_BYTES

    def peak(self, images: int) -> int:
        """Return the peak memory of this process."""
        return self.resident + self.additional(images)

    def largest(self, budget: int) -> int:
        """Return the largest number of images that fit into `budget`, 0 if not even one does."""
        per_image = self.needed(1) - self.needed(0)
        return max(0, (budget - self.needed(0)) // max(1, per_image))

    def rows(self, images: int) -> list[tuple[str, int]]:
        """Return (description, bytes) of each part of the peak with micro-batches of `images`."""
        on_host = self.device == "cpu"
        return [
            ("libraries, data and other memory in use now", self.resident - (self.weights if on_host else 0)),
            ("weights and buffers", self.weights),
            ("gradients", self.gradients),
            ("state of the optimizer", self.optimizer),
            *([("moving average", self.average)] if self.average else []),
            (
                f"activations kept for backward, {images:,} images",
                self.activations.fixed + images * self.activations.per_image,
            ),
            ("the largest operation's workspace", images * self.activations.workspace_per_image),
            ("batches of the loader", images * self.batch_per_image),
        ]


def measure_activations(
    model: nn.Module,
    image_size: int,
    num_classes: int,
    *,
    device: torch.device,
    autocast: Autocast,
    channels_last: bool = False,
) -> Activations:
    """Return the model's activation memory, from forward passes of two and three noise images in training mode.

    Their difference is the part of one image; the rest is constant. Modes, buffers, attributes and random states are
    restored, nothing is compiled, and no gradient is computed.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    meters = []
    with seeded_random_states(device, seed=0), preserved_state(model):
        set_train_mode(model, batch_norms(model))
        for number in (2, 3):
            images = torch.randn(number, 3, image_size, image_size, device=device).contiguous(memory_format=layout)
            targets = torch.full((number, num_classes), 1 / num_classes, device=device)
            with _ActivationMeter(model) as meter:
                with autocast():
                    output = model.forward(images)
                loss = F.cross_entropy(output.float(), targets) if _are_logits(output, targets) else None
            meters.append(meter)
            del output, loss
    two, three = (meter.kept_bytes for meter in meters)
    per_image = max(0, three - two)
    workspace = WORKSPACES * max(meters[0].largest, meters[0].segment) // 2
    return Activations(max(0, two - 2 * per_image), per_image, workspace)


def evaluation_bytes(model: nn.Module, image_size: int, device: torch.device, autocast: Autocast = nullcontext) -> int:
    """Return the bytes per image of a forward pass without backward: the workspace of the largest operation.

    Modes, buffers and attributes of the model are restored, and nothing is compiled.
    """
    meter = _ActivationMeter(model)
    with preserved_state(model), torch.inference_mode(), autocast(), meter:
        model.eval()
        model.forward(torch.zeros(1, 3, image_size, image_size, device=device))
    return WORKSPACES * meter.largest


def _are_logits(output: Any, targets: Tensor) -> bool:
    """Return whether a model's output is logits; with a custom loss, a model may return anything."""
    return isinstance(output, Tensor) and output.shape == targets.shape


class _ActivationMeter:
    """Adds up the storages that autograd saves in a forward pass, each once, and records the largest operation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.largest = 0  # bytes of inputs and outputs of a module without children
        self.segment = 0  # bytes computed in a row with nothing saved, as checkpointed layers do
        self._unsaved = 0
        self._kept: dict[int, int] = {}
        self._model_storages = {
            tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
        }

    @property
    def kept_bytes(self) -> int:
        return sum(self._kept.values())

    def __enter__(self) -> _ActivationMeter:
        leaves = [module for module in self.model.modules() if next(module.children(), None) is None]
        self._hooks = [leaf.register_forward_hook(self._record_outputs, with_kwargs=True) for leaf in leaves]
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._record_saved, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._saving.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _record_saved(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._unsaved = 0
        if storage.data_ptr() not in self._model_storages:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a tensor with its graph would be a reference cycle

    def _record_outputs(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs = _tensors([output])
        sizes = _nbytes(outputs)
        self.largest = max(self.largest, _nbytes(_tensors([args, kwargs])) + sizes)
        if any(tensor.requires_grad for tensor in outputs):
            self._unsaved += sizes
            self.segment = max(self.segment, self._unsaved)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(list(value.values()))
    return found


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def images_that_fill_cpu(image_size: int) -> int:
    """Return the even number of images that fill a CPU: 64 of 224 px, or as many pixels of another size."""
    return max(2, 2 * round(IMAGES_AT_224 * (224 / image_size) ** 2 / 2))


def equal_micro_batch_size(images: int, largest: int) -> int:
    """Return the even size of the fewest equal micro-batches of a step's images with at most `largest` images each.

    Mixing pairs neighbours, so sizes are even; the last micro-batch may have one image less, and is shorter if no
    number of equal ones below twice the fewest exists (254 images are 127 pairs, a prime).
    """
    pairs = (images + 1) // 2
    fewest = -(-pairs // max(1, largest // 2))
    number = next((number for number in range(fewest, min(2 * fewest, pairs + 1)) if pairs % number == 0), fewest)
    return 2 * -(-pairs // number)
