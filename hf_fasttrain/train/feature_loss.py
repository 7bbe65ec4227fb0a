"""The step loss of a model whose last layer alone is trained, from features instead of images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from hf_fasttrain.data.loading.trees import Tree
from hf_fasttrain.train.loss import Loss
from hf_fasttrain.train.step_loss import LossOfLogits


class LossOfFeatures(LossOfLogits):
    """A loss of logits that are computed by `layer(model, features)` where a batch is features (B, C), not images.

    DistributedDataParallel wraps the model and this together: the model itself is not called then.
    """

    wraps_model = True

    def __init__(
        self,
        loss: Loss,
        layer: Callable[[nn.Module, Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__(loss)
        self.layer, self.autocast = layer, autocast

    def outputs(self, model: nn.Module, images: Tree) -> Any:
        """Return the logits for features, and what the model returns for images."""
        if not isinstance(images, Tensor) or images.ndim != 2:
            return super().outputs(model, images)
        with self.autocast():
            return self.layer(model, images).float()  # as Accelerate does with what the model returns
