"""How much memory training will take: forecast from forwards of two and three images, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.models.model import batch_norms, set_train_mode
from hf_fasttrain.models.side_effects import random_states_kept, unchanged

# An operation's inputs and outputs count twice: backward has their gradients, oneDNN and the heap copies of them.
# With this the forecast came within 15 % of the peaks of ten models (benchmarks/memory_forecast.py).
WORKSPACES = 2
IMAGES_AT_224 = 64  # images of 224 px that fill a CPU: larger micro-batches are no faster
WORKER_BYTES = 150 << 20  # of its own that a loader process takes, beside what it shares with training

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward need beside parameters and buffers."""

    fixed: int  # kept for backward whatever the number of images, such as autocast's copies of weights
    per_image: int  # kept for backward
    workspace_per_image: int  # while the largest operation runs

    def of(self, images: int) -> int:
        """Return the bytes that a forward and backward of so many images take at once."""
        return self.fixed + images * (self.per_image + self.workspace_per_image)


@dataclass(frozen=True)
class Forecast:
    """What a training process will have in memory at most, beside what it has already; all in bytes."""

    resident: int  # what the process has now: libraries, data, weights and buffers
    weights: int  # and buffers; in `resident`, unless they are on a GPU
    gradients: int
    optimizer: int
    average: int  # the moving average
    activations: Activations
    batch_per_image: int  # the images of a micro-batch on their way through the loader and the normalisation
    workers: int  # loader processes of this process
    device: str = "cpu"

    def to_come(self, images: int) -> int:
        """Return what this process takes yet, with micro-batches of so many images."""
        state = self.gradients + self.optimizer + self.average
        return state + self.activations.of(images) + images * self.batch_per_image

    def needed(self, images: int) -> int:
        """Return what this process and its loader processes take yet."""
        return self.to_come(images) + self.workers * WORKER_BYTES

    def peak(self, images: int) -> int:
        """Return the most that this process will have."""
        return self.resident + self.to_come(images)

    def largest(self, budget: int) -> int:
        """Return the largest number of images for which `budget` is enough, 0 if it is not even for one."""
        per_image = self.needed(1) - self.needed(0)
        return max(0, (budget - self.needed(0)) // max(1, per_image))

    def rows(self, images: int) -> list[tuple[str, int]]:
        """Return the parts of the peak with micro-batches of so many images: what, bytes."""
        on_host = self.device == "cpu"
        return [
            ("libraries, data and what else is there now", self.resident - (self.weights if on_host else 0)),
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


# --- measuring ---------------------------------------------------------------------------------------------


def measure_activations(
    model: nn.Module,
    image_size: int,
    num_classes: int,
    *,
    device: torch.device,
    autocast: Autocast,
    channels_last: bool = False,
) -> Activations:
    """Return what the model keeps for backward, by forwards of two and of three noise images in training mode.

    The difference of the two is an image's part; what is left over does not grow. Modes, buffers, attributes and random
    states are put back, nothing is compiled, and no gradient is computed.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = []
    with random_states_kept(device, seed=0), unchanged(model):
        set_train_mode(model, batch_norms(model))
        for number in (2, 3):
            images = torch.randn(number, 3, image_size, image_size, device=device).contiguous(memory_format=layout)
            targets = torch.full((number, num_classes), 1 / num_classes, device=device)
            with _Tally(model) as tally:
                with autocast():
                    logits = model.forward(images)
                loss = F.cross_entropy(logits.float(), targets)
            found.append(tally)
            del logits, loss
    two, three = (tally.kept_bytes for tally in found)
    per_image = max(0, three - two)
    workspace = WORKSPACES * max(found[0].largest, found[0].segment) // 2
    return Activations(max(0, two - 2 * per_image), per_image, workspace)


def evaluation_bytes(model: nn.Module, image_size: int, device: torch.device, autocast: Autocast = nullcontext) -> int:
    """Return the bytes that an image takes in a forward without backward: the largest operation's workspace.

    Modes, buffers and attributes of the model are put back, and nothing is compiled.
    """
    tally = _Tally(model)
    with unchanged(model), torch.inference_mode(), autocast(), tally:
        model.eval()
        model.forward(torch.zeros(1, 3, image_size, image_size, device=device))
    return WORKSPACES * tally.largest


class _Tally:
    """Adds up the storages that autograd keeps in a forward, each once, and notes the largest operation's tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.largest = 0  # bytes of inputs and outputs of a module without children
        self.segment = 0  # bytes computed at a stretch without anything being kept, as checkpointed layers do
        self._at_a_stretch = 0
        self._kept: dict[int, int] = {}
        self._own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    @property
    def kept_bytes(self) -> int:
        return sum(self._kept.values())

    def __enter__(self) -> _Tally:
        leaves = [module for module in self.model.modules() if next(module.children(), None) is None]
        self._hooks = [leaf.register_forward_hook(self._look, with_kwargs=True) for leaf in leaves]
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._saving.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._at_a_stretch = 0
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would hold the graph that holds it

    def _look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs = _tensors([output])
        sizes = _nbytes(outputs)
        self.largest = max(self.largest, _nbytes(_tensors([args, kwargs])) + sizes)
        if any(tensor.requires_grad for tensor in outputs):
            self._at_a_stretch += sizes
            self.segment = max(self.segment, self._at_a_stretch)


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


# --- the rule ----------------------------------------------------------------------------------------------


def most_images(image_size: int) -> int:
    """Return the even number of images that fill a CPU: 64 of 224 px, as many pixels of another size."""
    return max(2, 2 * round(IMAGES_AT_224 * (224 / image_size) ** 2 / 2))


def equal_pieces(images: int, largest: int) -> int:
    """Return the even size of the fewest equal pieces of a step's images that hold at most `largest` each.

    Mixing pairs neighbours, so that pieces are even; the last one may have an image less, and where no number of
    equal pieces below twice the fewest is to be had (of 254 images, 127 pairs), it is shorter.
    """
    pairs = (images + 1) // 2
    fewest = -(-pairs // max(1, largest // 2))
    number = next((number for number in range(fewest, min(2 * fewest, pairs + 1)) if pairs % number == 0), fewest)
    return 2 * -(-pairs // number)
