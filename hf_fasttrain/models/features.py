"""What a classifier's head is given for an image, its features, and heads of given weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from hf_fasttrain.models.head import output_layers
from hf_fasttrain.models.model import batch_norms, head_names, set_train_mode
from hf_fasttrain.models.side_effects import random_states, undisturbed
from hf_fasttrain.models.weights import update_digest
from hf_fasttrain.utils.errors import ModelError

TOLERANCE = 1e-3  # of the largest logit, in fp32, between a head's logits and those of its weights


class LinearHead(NamedTuple):
    """A linear classifier of features: logits are features @ weight.T + bias."""

    weight: np.ndarray  # (K, C) float32
    bias: np.ndarray  # (K,) float32


class Head:
    """The layers that compute a model's logits. Raises ModelError if they are not linear, or are not found."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        self.model, self.num_classes = model, num_classes
        self.names = output_layers(model, head_names(model, num_classes), num_classes)
        self.layers: list[Any] = [model.get_submodule(name) for name in self.names]
        if not self.layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in self.layers):
            raise ModelError(
                f"features: {type(model).__name__} has no linear layer with {num_classes} outputs at its end; train "
                "it without train.probe_first"
            )

    @property
    def has_bias(self) -> bool:
        """Whether the layers add a bias."""
        return all(layer.bias is not None for layer in self.layers)

    @property
    def num_features(self) -> int:
        """Number of features of an image, C."""
        return sum(layer.weight[0].numel() for layer in self.layers)

    @contextmanager
    def captured(self) -> Iterator[Callable[[int], Tensor]]:
        """Capture the features of the forward passes within the block.

        The function that is yielded returns those of the last `number` images, (number, C) float32, and forgets the
        others: a pass that failed has left some.
        """
        inputs: list[list[Tensor]] = [[] for _ in self.layers]

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[[layer is each for each in self.layers].index(True)].append(args[0].detach())

        def take(number: int) -> Tensor:
            parts = [
                torch.cat(self._vectors(layer, each))[-number:] for layer, each in zip(self.layers, inputs, strict=True)
            ]
            for each in inputs:
                each.clear()
            return torch.cat(parts, dim=1)

        handles = [layer.register_forward_pre_hook(hook) for layer in self.layers]
        try:
            yield take
        finally:
            for handle in handles:
                handle.remove()

    def _vectors(self, layer: Any, given: list[Tensor]) -> list[Tensor]:
        """Return what a layer was given as vectors (B, C). Raises ModelError if it sees several for an image."""
        vectors = [part.flatten(1).float() for part in given]
        if not vectors or vectors[-1].shape[1] != layer.weight[0].numel():
            shape = tuple(given[-1].shape[1:]) if given else "nothing"
            raise ModelError(
                f"features: the last layer of {type(self.model).__name__} is given {shape} of an image instead of one "
                "vector; train it without train.probe_first"
            )
        return vectors

    @torch.no_grad()
    def set(self, head: LinearHead, *, scale: float = 1.0) -> None:
        """Set the layers' weights. Two layers, whose logits the model averages or adds, share the features."""
        widths = [layer.weight[0].numel() for layer in self.layers]
        parts = torch.from_numpy(head.weight).split(widths, dim=1)
        for layer, weight in zip(self.layers, parts, strict=True):
            layer.weight.copy_(scale * weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(torch.from_numpy(head.bias) * scale / len(self.layers))

    @torch.no_grad()
    def set_exactly(self, head: LinearHead, images: Tensor) -> None:
        """Set the layers' weights so that the model's logits are those of `head`, which `images` (B, 3, H, W) show.

        The model is in evaluation mode. Raises ModelError if it changes the logits of its last layer in another way
        than by a factor.
        """
        for scale in dict.fromkeys((1.0, float(len(self.layers)))):
            self.set(head, scale=scale)
            with self.captured() as features_of:
                logits = self.model.forward(images)
                features = features_of(len(images)).double().cpu()
            expected = features @ torch.from_numpy(head.weight).double().T + torch.from_numpy(head.bias).double()
            error = (logits.double().cpu() - expected).abs().max()
            if error <= TOLERANCE * max(1.0, float(expected.abs().max())):
                return
        raise ModelError(
            f"features: {type(self.model).__name__} changes the logits of its last layer ({', '.join(self.names)}) by "
            f"up to {float(error):.2g}, so it can't hold a linear classifier; train it without train.probe_first"
        )


def backbone_digest(model: nn.Module, head_layers: Sequence[str]) -> str:
    """Return a checksum of a model's weights and buffers without those of its head's layers."""
    hashed = xxhash.xxh3_128()
    tensors = sorted(model.state_dict().items())
    backbone = ((name, tensor) for name, tensor in tensors if name.rpartition(".")[0] not in head_layers)
    update_digest(hashed, ((f"{name} {tensor.dtype} {tuple(tensor.shape)}\n", tensor) for name, tensor in backbone))
    return hashed.hexdigest()


@dataclass(frozen=True)
class OutputLayer:
    """A model's last layer, which computes its logits from features, after a dropout of them in training."""

    name: str
    dropout: float = 0.0

    def __call__(self, model: nn.Module, features: Tensor) -> Tensor:
        """Return the logits (B, K) of a model with this layer for features (B, C)."""
        if self.dropout:
            features = F.dropout(features, self.dropout, training=model.training)
        logits: Tensor = model.get_submodule(self.name)(features)
        return logits


@torch.no_grad()
def constant_features(head: Head, trained: Collection[str], images: Tensor) -> OutputLayer | None:
    """Return the layer that is trained, if what it is given is the same in each step for the same images; else None.

    `trained` are the names of the trained parameters. The model is tried on `images` (B, 3, H, W): in training mode
    its forward must be bitwise that of evaluation up to the layer, without a random number but for a dropout just
    before it, and must change no buffer. The layer has random weights for it, as a head of zeros would show nothing.
    """
    model, layer = head.model, head.layers[0]
    if len(head.layers) > 1 or not isinstance(layer, nn.Linear) or not trained:
        return None
    if not {*trained} <= {f"{head.names[0]}.{name}" for name, _ in layer.named_parameters()}:
        return None
    rates = [getattr(model, "drop_rate", 0.0), *(m.p for m in model.modules() if isinstance(m, nn.Dropout))]
    candidates = [OutputLayer(head.names[0], rate) for rate in dict.fromkeys([0.0, *filter(_is_rate, rates)])]
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with undisturbed(model), _random_weights(layer):
        try:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            return next((each for each in candidates if _computes_logits(each, head, images)), None)
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(required[name])


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and 0.0 < value < 1.0


@contextmanager
def _random_weights(layer: nn.Module) -> Iterator[None]:
    """Fill a layer's parameters with noise within the block."""
    values = [parameter.clone() for parameter in layer.parameters()]
    try:
        for parameter in layer.parameters():
            parameter.normal_()
        yield
    finally:
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(value)


def _computes_logits(layer: OutputLayer, head: Head, images: Tensor) -> bool:
    """Return whether a layer gives a model's logits bitwise, in both modes, from its features in evaluation."""
    model = head.model
    model.eval()
    with head.captured() as features_of:
        logits = model.forward(images)
        try:
            features = features_of(len(images))
        except ModelError:  # several vectors for an image
            return False
    if not isinstance(logits, Tensor) or not torch.equal(layer(model, features), logits):
        return False
    set_train_mode(model, batch_norms(model))
    buffers = [buffer.clone() for buffer in model.buffers()]
    expected, state = _seeded(lambda: model.forward(images))
    if not all(map(torch.equal, buffers, model.buffers())):
        return False
    actual, own_state = _seeded(lambda: layer(model, features))
    return torch.equal(actual, expected) and state == own_state


def _seeded(function: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """Return what a function returns after seeding, and the random states that it leaves."""
    torch.manual_seed(0)
    output = function()
    return output, random_states(output.device)
