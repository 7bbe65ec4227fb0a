"""Evaluates a model on a split, exactly for any number of processes; and manages the evaluations of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_fasttrain.run_folder.predictions import Collector, Predictions
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.early_stopping import record_of
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.metrics import ExternalMetrics, Metrics
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.train.throughput import Throughput
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.process_memory import relax_memory_limit


class Evaluator:
    """Computes the metrics of a model; used for all evaluations of a run."""

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
        self.external.try_out(num_classes, multi_label=multi_label)  # fail before training
        self.max_images: int | None = None  # per forward, after memory ran out
        self.collects = False  # whether to store predictions for `predictions`
        self._collected: tuple[Tensor, ...] | None = None  # of the last complete pass, on the CPU

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        loader: Iterable[tuple[Tensor, Tensor]],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Return metric name -> value over all processes' batches of `images` and `labels`.

        `model` maps images to logits and is in evaluation mode. Processes wait for each other at the end only, so
        their shares may differ in size or be empty. Returns an empty dict if `should_stop` was true on any process.
        A batch that does not fit into memory is split, and so are all later ones.
        """
        counts = Metrics(self.num_classes, self.accelerator.device, multi_label=self.multi_label)
        interrupted = torch.zeros((), device=self.accelerator.device)
        collector = Collector() if self.collects else None
        for images, labels in loader:
            if should_stop():
                interrupted += 1
                break
            logits = self._logits(model, images)
            counts.update(logits, labels)
            self.external.update(logits, labels)
            if collector is not None:
                collector.add(logits, labels)
        if self.processes.add_up(interrupted):
            self.external.clear()
            return {}
        values = counts.compute(self.processes.add_up)  # waits for the device
        self._collected = collector.columns() if collector is not None else None
        built_in = {name: values[name] for name in self.metrics or values}
        return {**built_in, **self.external.compute(self.processes.gather)}

    def predictions(self, step: int, split: str, rows: Sequence[int] | None) -> Predictions | None:
        """Return the predictions of the last pass, of all processes; None if they were not stored.

        `rows`: indices of this process's images in the split. Called by all processes.
        """
        local, self._collected = self._collected, None
        parts = [part for part in self.processes.gather([local]) if part is not None and len(part)]
        if not parts:
            return None
        number = len(local[0]) if local else 0
        local_rows = rows if rows is not None and len(rows) == number else None
        every = [
            part
            for part in self.processes.gather([None if local_rows is None else list(local_rows)])
            if part is not None
        ]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        number = len(columns[0])
        indices = torch.tensor([row for part in every for row in part] or [-1] * number)
        return Predictions(step, split, indices if len(indices) == number else torch.full((number,), -1), *columns)

    def _logits(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        while True:
            try:
                with self.accelerator.autocast():
                    return torch.cat([model(part) for part in images.split(self.max_images or max(1, len(images)))])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            size = min(self.max_images or len(images), len(images))  # outside of the handler, which keeps tensors alive
            free_cached_memory(self.accelerator.device)
            if size == 1:
                local_error = RunError(
                    "out of memory: a single image does not fit in evaluation; lower data.image_size"
                )
                local_error.on_every_process = False
                raise local_error
            self.max_images = size // 2

    @property
    def processes(self) -> Processes:
        """The processes that share the images."""
        return Processes(self.accelerator)


Evaluate = Callable[[Any], dict[str, float]]  # loader -> metrics of the current model; empty if interrupted


class Evaluation:
    """The evaluations of a run: metrics, the best one, and early stopping."""

    def __init__(
        self,
        evaluator: Evaluator | None,
        eval_loader: Any,
        *,
        state: State,
        log: RunLog,
        throughput: Throughput,
        steps_per_epoch: int,
        best: Watch,
        early_stopping: Watch | None,
        keeps_predictions: bool,
    ) -> None:
        if evaluator is None and eval_loader is not None:
            raise RunError("nothing to evaluate with: give Trainer num_classes or an evaluator beside the eval_loader")
        self.evaluator, self.eval_loader = evaluator, eval_loader
        self.state, self.log, self.throughput, self.steps_per_epoch = state, log, throughput, steps_per_epoch
        self.best, self.early_stopping, self.keeps_predictions = best, early_stopping, keeps_predictions
        self.test_loader: Any = None  # evaluated once, with the final weights
        self.test_metrics: dict[str, float] | None = None
        self.predictions: Predictions | None = None  # of the evaluation split, once the run is finished
        self.seconds = 0.0  # of the last evaluation
        self._collected_at = -1  # step whose predictions the evaluator has

    @property
    def loaders(self) -> tuple[Any, Any]:
        """The loaders of evaluation and test split, or None."""
        return self.eval_loader, self.test_loader

    @property
    def is_due(self) -> bool:
        """Whether there is an evaluation split that was not evaluated after this step."""
        return self.eval_loader is not None and self.state.evaluated_at != self.state.step

    def measure(self, evaluate: Evaluate, loader: Any, *, is_last: bool) -> dict[str, float]:
        """Evaluate the current model on a loader and log it, while the training clock is stopped.

        Stores predictions if this may be the last evaluation. Returns an empty dict if interrupted by a signal.
        """
        assert self.evaluator is not None
        last = is_last or self.early_stopping is not None  # or may be
        self.evaluator.collects = self.keeps_predictions and last and loader is self.eval_loader
        name = getattr(loader, "name", "evaluation split")
        relax_memory_limit()  # steps may have used all memory up to the limit, and oneDNN compiles new kernels here
        with self.throughput.stopped():
            start_time, max_images = time.perf_counter(), self.evaluator.max_images
            with self.log.doing(f"evaluating: {name}"):
                metrics = evaluate(loader)
            if self.evaluator.max_images != max_images:
                self.log.note(
                    f"out of memory while evaluating: batches of {self.evaluator.max_images} images from now on"
                )
            for failure in self.evaluator.external.take_failures():
                self.log.note(failure)
            if metrics:
                self.seconds, epoch = time.perf_counter() - start_time, self.state.step / self.steps_per_epoch
                self.log.eval_line(self.state.step, epoch, name, metrics, self.seconds, self.throughput.train_seconds)
        return metrics

    def compare(self, metrics: dict[str, float]) -> bool:
        """Record an evaluation after the current step, and return whether it is the best so far."""
        state = self.state
        state.metrics, state.evaluated_at = metrics, state.step
        if self.evaluator is not None and self.evaluator.collects:
            self._collected_at = state.step
        if self.early_stopping and self._improves(self.early_stopping, state.watched):
            state.watched = record_of(self.early_stopping, state)
        if not self._improves(self.best, state.best):
            return False
        value = metrics[self.best.metric]
        state.best = {"metric": self.best.metric, "value": value, "step": state.step, "metrics": metrics}
        return True

    def _improves(self, watch: Watch, record: dict[str, Any] | None) -> bool:
        if watch.metric not in self.state.metrics:
            if self.evaluator is not None and watch.metric in self.evaluator.external.modules:
                self.log.note(f"'{watch.metric}' is watched; evaluations without it are not compared with the best")
                return False
            known = ", ".join(self.state.metrics)
            raise RunError(f"'{watch.metric}' is watched, but the evaluation measures only {known}; watch one of them")
        return watch.is_better(self.state.metrics[watch.metric], record["value"] if record else None)

    def final_metrics(self, evaluate: Evaluate, step: int, known: dict[str, float] | None) -> dict[str, float]:
        """Return the metrics of the final weights, those after `step`, and store their predictions.

        They are computed unless both are known already. Returns an empty dict if interrupted by a signal.
        """
        assert self.evaluator is not None
        metrics = known or {}
        self.evaluator.collects = self.keeps_predictions
        if not metrics or (self.keeps_predictions and self._collected_at != step):
            metrics = evaluate(self.eval_loader)
        self.evaluator.collects = False
        if metrics and self.keeps_predictions:
            name, rows = getattr(self.eval_loader, "name", "evaluation split"), getattr(self.eval_loader, "rows", None)
            self.predictions = self.evaluator.predictions(step, name, rows)
            self._collected_at = -1  # they are not stored twice
        return metrics
