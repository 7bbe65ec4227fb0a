"""One pass of a model over a split, counted exactly over any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_fasttrain.metrics import ExternalMetrics, Metrics


class Evaluator:
    """Measures metrics of a model; made once, used for every evaluation of a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        num_classes: int,
        *,
        multi_label: bool = False,
        metrics: Sequence[str] | None = None,
        external: Sequence[str] = (),
    ) -> None:
        self.accelerator, self.num_classes, self.multi_label = accelerator, num_classes, multi_label
        self.metrics = None if metrics is None else list(metrics)
        self.external = ExternalMetrics(external)

    @torch.no_grad()
    def __call__(self, model: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return metric name -> value over all processes' batches of `images` and `labels`.

        `model` maps images to logits and is in evaluation mode. No process waits for another before the end, so
        their shares may differ in size or be empty.
        """
        counts = Metrics(self.num_classes, self.accelerator.device, multi_label=self.multi_label)
        for images, labels in loader:
            with self.accelerator.autocast():
                logits = model(images)
            counts.update(logits, labels)
            self.external.update(logits, labels)
        measured = counts.compute(self._add)
        wanted = {name: measured[name] for name in self.metrics or measured}
        return {**wanted, **self.external.compute(self._gather)}

    def _add(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _gather(self, rows: list[Any]) -> list[Any]:
        return gather_object(rows) if self.accelerator.num_processes > 1 else rows


def average_batch_norm(norms: Sequence[nn.Module], accelerator: Accelerator) -> None:
    """Give every process the mean of all processes' running statistics."""
    if accelerator.num_processes == 1:
        return
    for norm in norms:
        for buffer in (norm.running_mean, norm.running_var):
            if isinstance(buffer, Tensor):
                buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
