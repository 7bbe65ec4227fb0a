"""One pass of a model over a split, counted exactly over any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fasttrain.models.model import batch_norms
from hf_fasttrain.run_folder.predictions import Collector, Predictions
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.metrics import ExternalMetrics, Metrics
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.library_errors import is_out_of_memory


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
        self.external.try_out(num_classes, multi_label=multi_label)  # before anything is trained
        self.most: int | None = None  # images for which memory is enough, where it ran out
        self.collects = False  # whether a pass's predictions are kept for `predictions`
        self._collected: tuple[Tensor, ...] | None = None  # of the last whole pass, on the CPU

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        loader: Iterable[tuple[Tensor, Tensor]],
        leave: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Return metric name -> value over all processes' batches of `images` and `labels`.

        `model` maps images to logits and is in evaluation mode. No process waits for another before the end, so
        their shares may differ in size or be empty. An empty dict comes back if `leave` told any process to break off.
        A batch that memory is too short for is made in smaller pieces, and so are all after it.
        """
        counts = Metrics(self.num_classes, self.accelerator.device, multi_label=self.multi_label)
        left = torch.zeros((), device=self.accelerator.device)
        collector = Collector() if self.collects else None
        for images, labels in loader:
            if leave():
                left += 1
                break
            logits = self._logits(model, images)
            counts.update(logits, labels)
            self.external.update(logits, labels)
            if collector is not None:
                collector.add(logits, labels)
        if self.processes.add_up(left):
            self.external.clear()
            return {}
        measured = counts.compute(self.processes.add_up)  # waits for the device
        self._collected = collector.columns() if collector is not None else None
        wanted = {name: measured[name] for name in self.metrics or measured}
        return {**wanted, **self.external.compute(self.processes.gather)}

    def predictions(self, step: int, split: str, rows: Sequence[int] | None) -> Predictions | None:
        """Return what the last pass said of each image, of all processes; None if it was not kept.

        `rows`: which images of the split this process's share has, in its order. Called by all processes.
        """
        own, self._collected = self._collected, None
        parts = [part for part in self.processes.gather([own]) if part is not None and len(part)]
        if not parts:
            return None
        number = len(own[0]) if own else 0
        known = rows if rows is not None and len(rows) == number else None
        every = [part for part in self.processes.gather([None if known is None else list(known)]) if part is not None]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        number = len(columns[0])
        places = torch.tensor([row for part in every for row in part] or [-1] * number)
        return Predictions(step, split, places if len(places) == number else torch.full((number,), -1), *columns)

    def _logits(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        while True:
            try:
                with self.accelerator.autocast():
                    return torch.cat([model(piece) for piece in images.split(self.most or max(1, len(images)))])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            size = min(self.most or len(images), len(images))  # outside of the handler, which holds what it failed on
            free_cached_memory(self.accelerator.device)
            if size == 1:
                alone = RunError("out of memory: a single image does not fit in evaluation; lower data.image_size")
                alone.on_every_process = False
                raise alone
            self.most = size // 2

    @property
    def processes(self) -> Processes:
        """The processes that share the images; looked up where all of them are."""
        return Processes(self.accelerator)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> running mean or variance of a model's batch norms, by all names; each process has its own."""
    norms = {id(norm) for norm in batch_norms(model)}
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) in norms
        for name in ("running_mean", "running_var")
        if isinstance(buffer := getattr(module, name), Tensor)
    }


def averaged_statistics(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return the means of all processes' running statistics, the model's own left as they are; nothing if alone."""
    if not processes.is_distributed:
        return {}
    return {name: processes.mean(own) for name, own in running_statistics(model).items()}


def average_batch_norm(model: nn.Module, processes: Processes) -> None:
    """Give every process the mean of all processes' running statistics."""
    own = running_statistics(model)
    for name, mean in averaged_statistics(model, processes).items():
        own[name].copy_(mean)
