"""Evaluation of a model on a split, exact for any number of processes, and the evaluations of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fasttrain.data.loading.loader import EvalLoader
from hf_fasttrain.data.loading.trees import cut, num_images
from hf_fasttrain.data.loading.user_loader import UserEvalLoader
from hf_fasttrain.data.loading.waiting import WaitCutShort
from hf_fasttrain.data.source.identity import with_images
from hf_fasttrain.models.side_effects import undisturbed
from hf_fasttrain.run_folder.intervals import Intervals
from hf_fasttrain.run_folder.predictions import Collector, Predictions
from hf_fasttrain.run_folder.result import PER_CLASS, SCORE_METRICS, TUNED_METRICS, Watch
from hf_fasttrain.train.bootstrap import intervals_of
from hf_fasttrain.train.calibrator import Calibrator
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.early_stopping import record_of
from hf_fasttrain.train.gathered_predictions import gather_predictions
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.loss import logits_of
from hf_fasttrain.train.metrics import (
    CALIBRATION,
    MULTI_LABEL,
    SINGLE_LABEL,
    ExternalMetrics,
    Metrics,
    built_in_metrics,
    describe_error,
)
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.train.score_metrics import ScoreMetrics
from hf_fasttrain.train.throughput import Throughput
from hf_fasttrain.train.user_metrics import Metric, Predict, UserMetrics, require_logits
from hf_fasttrain.utils.errors import RunError, shown
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.process_memory import relax_memory_limit

SAMPLE_SIZE = 8  # before the first step


class Evaluator:
    """Computes the metrics of a model; used for all evaluations of a run.

    `num_classes` and `multi_label` default to what the logits (N, K) and labels, (N,) or multi-hot (N, K), show. `own`
    are the user's metrics by name, and `predict` returns the logits of `model` for `images`; see `Trainer`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        num_classes: int | None = None,
        *,
        multi_label: bool | None = None,
        metrics: Sequence[str] | None = None,
        external: Sequence[str] = (),
        own: Mapping[str, Metric] | None = None,
        predict: Predict | None = None,
        class_names: Sequence[str] = (),
        tunes_thresholds: bool = False,
    ) -> None:
        self.class_names = class_names
        self.accelerator, self.num_classes, self.multi_label = accelerator, num_classes, multi_label
        self.metrics = None if metrics is None else list(metrics)
        self.external, self.own, self.predict = ExternalMetrics(external), UserMetrics(own), predict
        self.scores, self.calibrator = ScoreMetrics(), Calibrator(tunes=tunes_thresholds)
        if num_classes is not None:  # fail before training
            self.external.try_out(num_classes, multi_label=bool(multi_label))
        self.of_features: Predict | None = None  # a model's logits for features (B, C), where a loader yields these
        self.max_images: int | None = None  # per forward, after memory ran out
        self.watched: Sequence[str] = ()  # metrics that are measured even where they say little
        self.collects = False  # whether to store predictions for `predictions`
        self._columns: tuple[Tensor, ...] | None = None  # of the last complete pass, on the CPU
        self._num_classes = 0  # of that pass

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        loader: Iterable[tuple[Any, Tensor]],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Return metric name -> value over all processes' batches of `images` and `labels`.

        `model` must be in evaluation mode. Processes wait for each other only at the end, so their shares may differ in
        size or be empty. Returns an empty dict if `should_stop` was true on any process. If a batch does not fit into
        memory, it and all later ones are split.
        """
        counts: Metrics | None = None
        interrupted = torch.zeros((), device=self.accelerator.device)
        rows = getattr(loader, "rows", None)
        self.scores.choose(self.metrics or self.watched)
        self.calibrator.start(rows, self.accelerator.device)
        collector = Collector(len(rows) if rows is not None else 0) if self.collects else None
        try:
            for images, labels in loader:
                if should_stop():
                    interrupted += 1
                    break
                logits = self.logits(model, images)
                if counts is None:
                    counts = self._counts(logits.shape[1], multi_label=labels.ndim == 2)
                counts.update(logits, labels)
                self.external.update(logits, labels)
                self.own.update(logits, labels)
                self.scores.update(logits, labels)
                self.calibrator.update(logits, labels, self.processes.index)
                if collector is not None:
                    collector.add(logits, labels)
        except WaitCutShort:
            interrupted += 1
        if self.processes.reduce_sum(interrupted):
            for kept in (self.external, self.own, self.scores, self.calibrator):
                kept.clear()
            return {}
        counts = self._counts_or_empty(counts)
        values = counts.compute(self.processes.reduce_sum)  # waits for the device
        self._columns, self._num_classes = collector.columns() if collector is not None else None, counts.num_classes
        names = built_in_metrics(counts.num_classes, multi_label=counts.multi_label, watched=self.watched)
        user_values = self.own.compute(self.processes, rows)
        values |= self.scores.compute(self.processes, rows)
        tuned = self.calibrator.compute(self.processes)
        chosen, classes = self.metrics or names, self._names_of_classes(counts)
        values |= {name: counts.of_class(name, classes) for name in chosen if name.startswith(PER_CLASS)}
        built_in = {name: values[name] for name in chosen if name in values}
        return {**built_in, **tuned, **self.external.compute(self.processes.gather), **user_values}

    def _names_of_classes(self, counts: Metrics) -> Sequence[str]:
        return self.class_names or [str(number) for number in range(counts.num_classes)]

    def _counts(self, num_classes: int, *, multi_label: bool) -> Metrics:
        classes = num_classes if self.num_classes is None else self.num_classes
        is_multi_label = multi_label if self.multi_label is None else self.multi_label
        calibration = not {*(self.metrics or self.watched)}.isdisjoint(CALIBRATION)
        return Metrics(classes, self.accelerator.device, multi_label=is_multi_label, calibration=calibration)

    def _counts_or_empty(self, counts: Metrics | None) -> Metrics:
        """Return `counts`, or zero counts for a process without images, with the other processes' number of classes."""
        if self.num_classes is not None and self.multi_label is not None:
            return counts or self._counts(self.num_classes, multi_label=self.multi_label)
        own_counts = (0, False) if counts is None else (counts.num_classes, counts.multi_label)
        num_classes, multi_label = self.processes.largest(*own_counts)
        return counts or self._counts(num_classes, multi_label=bool(multi_label))

    def names(self, *, multi_label: bool) -> list[str]:
        """Return the names of all metrics."""
        built_in = self.metrics or (MULTI_LABEL if multi_label else SINGLE_LABEL)
        tuned = TUNED_METRICS if self.calibrator.tunes else ()
        return [*built_in, *tuned, *self.external.modules, *self.own.functions]

    @torch.no_grad()
    def require_valid(self, model: nn.Module, images: Any, labels: Any) -> None:
        """Raise RunError if the user's metrics, `predict` or the labels fail or are invalid for a few images."""
        try:
            logits = self.logits(model, images)
        except Exception as error:
            if self.predict is None or isinstance(error, RunError):
                raise
            raise RunError(
                f"predict fails on {len(images)} images of the evaluation split: {describe_error(error)}"
            ) from error
        if not isinstance(labels, Tensor):
            raise RunError(f"the evaluation split has labels {shown(labels)}; return one tensor, (B,) or (B, K)")
        counts = self._counts(logits.shape[1], multi_label=labels.ndim == 2)
        counts.update(logits, labels)
        counts.compute()
        message = self.own.error_on_batch(logits, labels)
        if message is not None:
            raise RunError(message)

    @property
    def has_user_functions(self) -> bool:
        """Whether the user has passed metrics or `predict`."""
        return bool(self.own.functions) or self.predict is not None

    def user_function_names(self) -> dict[str, Any]:
        """Return the fields of a `Result` that name the user's functions."""
        predict = None
        if self.predict is not None:
            predict = getattr(self.predict, "__qualname__", type(self.predict).__qualname__)
        return {"own_metrics": list(self.own.functions), "predict": predict}

    def may_be_missing(self, name: str) -> bool:
        """Return whether a metric may be missing from an evaluation because it could not be computed."""
        return name in self.external.modules or name in self.own.functions or name in (*SCORE_METRICS, *TUNED_METRICS)

    def new_notes(self) -> list[str]:
        """Return a sentence for each metric that failed for the first time in the last pass."""
        failed = (self.external.failed, self.own.failed, self.scores.failed)
        return [note for each in failed for note in each.new_notes()]

    def predictions(self, step: int, split: str, rows: Sequence[int] | None) -> Predictions | None:
        """Return the predictions of the last pass if they were stored, see `gather_predictions`."""
        local, self._columns = self._columns, None
        counts = {"step": step, "num_classes": self._num_classes}
        return gather_predictions(self.processes, local, rows, split=split, **counts)

    def logits(self, model: nn.Module, images: Any) -> Tensor:
        """Return the logits (B, K) of a model for a tree of B images. Raises RunError for outputs of another shape."""
        number = num_images(images)
        while True:
            try:
                with self.accelerator.autocast():
                    size = min(self.max_images or number, number)
                    sizes = [min(size, number - start) for start in range(0, number, max(1, size))] or [0]
                    return torch.cat([self._logits_of(model, part) for part in cut(images, sizes)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            size = min(self.max_images or number, number)  # outside of the handler, which keeps tensors alive
            free_cached_memory(self.accelerator.device)
            if size == 1:
                local_error = RunError(
                    "out of memory: a single image does not fit in evaluation; lower data.image_size"
                )
                local_error.on_every_process = False
                raise local_error
            self.max_images = size // 2

    def _logits_of(self, model: nn.Module, images: Any) -> Tensor:
        if self.of_features is not None and isinstance(images, Tensor) and images.ndim == 2:
            logits = self.of_features(model, images).float()
        elif self.predict is None:
            logits = logits_of(model(images))
        else:
            logits = self.predict(model, images)
        return require_logits(logits, num_images(images), by_predict=self.predict is not None)

    @property
    def processes(self) -> Processes:
        """The processes that share the images."""
        return Processes(self.accelerator)


Evaluate = Callable[[Any], dict[str, float]]  # loader -> metrics of the current model; empty if interrupted


class Evaluation:
    """The evaluations of a run: metrics, the best one, and early stopping."""

    def __init__(
        self,
        evaluator: Evaluator,
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
        self.evaluator, self.eval_loader = evaluator, eval_loader
        self.state, self.log, self.throughput, self.steps_per_epoch = state, log, throughput, steps_per_epoch
        self.best, self.early_stopping, self.keeps_predictions = best, early_stopping, keeps_predictions
        evaluator.watched = [watch.metric for watch in (best, early_stopping) if watch is not None]
        self.start = 0  # the first step after which there may be an evaluation
        self.test_loader: Any = None  # evaluated once, with the final weights
        self.test_metrics: dict[str, float] | None = None
        self.predictions: Predictions | None = None  # of the evaluation split, once the run is finished
        self.intervals: dict[str, Intervals] = {}  # of the final metrics, by the field of `Result`
        self.seconds = 0.0  # of the last evaluation
        self._has_tried = False
        self._columns_step = -1  # step whose predictions the evaluator has

    @property
    def loaders(self) -> tuple[Any, Any]:
        """The loaders of evaluation and test split, or None."""
        return self.eval_loader, self.test_loader

    @property
    def has_started(self) -> bool:
        """Whether evaluations have started by this step."""
        return self.state.step >= self.start

    @property
    def is_due(self) -> bool:
        """Whether there is an evaluation split that was not evaluated after this step."""
        return self.eval_loader is not None and self.state.evaluated_at != self.state.step

    def try_out(self, model: nn.Module) -> None:
        """Check the user's functions for evaluation on a few images of the split, before the first step.

        Called by all processes. Model, random states and loader do not change. Raises RunError on all processes.
        """
        loader, evaluator = self.eval_loader, self.evaluator
        if self._has_tried or loader is None or type(evaluator) is not Evaluator:
            return
        self._has_tried = True
        if isinstance(loader, EvalLoader) and not evaluator.has_user_functions:
            return
        if isinstance(loader, UserEvalLoader) and loader.is_consumed_once:
            self.log.note(
                f"the {loader.name} is an iterator, which yields its images once: metrics are not tried on it"
            )
            return
        own_error: RunError | None = None
        with self.throughput.stopped(), undisturbed(model):
            model.eval()
            sample = loader.sample(SAMPLE_SIZE)
            try:
                if sample is not None:
                    evaluator.require_valid(model, *sample)
                    self._require_watched(evaluator.names(multi_label=sample[1].ndim == 2))
            except RunError as error:
                own_error = error
        messages = [text for text in evaluator.processes.gather([own_error and str(own_error)]) if text]
        if messages:
            raise own_error or RunError(messages[0])

    def _require_watched(self, names: Sequence[str]) -> None:
        for watch in (self.best, self.early_stopping):
            if watch is not None and watch.metric not in names:
                raise RunError(
                    f"'{watch.metric}' is watched, but the evaluation measures only {', '.join(names)}; watch one of "
                    "these"
                )

    def measure(self, evaluate: Evaluate, loader: Any, *, is_last: bool) -> dict[str, float]:
        """Evaluate the current model on a loader and log it, while the training clock is stopped.

        Stores predictions if this may be the last evaluation. Returns an empty dict if interrupted by a signal.
        """
        last = is_last or self.early_stopping is not None  # which may make it the last
        kept = (self.eval_loader, self.test_loader) if last else ()
        self.evaluator.collects = self.keeps_predictions and loader in kept
        name = getattr(loader, "name", "evaluation split")
        relax_memory_limit()  # steps may have used all memory up to the limit, and oneDNN compiles new kernels here
        with self.throughput.stopped():
            start_time, max_images = time.perf_counter(), self.evaluator.max_images
            with self.log.activity(f"evaluating: {name}"):
                metrics = self._calibrating(evaluate, loader, self.state.step)
            if self.evaluator.max_images != max_images:
                self.log.note(
                    f"out of memory while evaluating: batches of {self.evaluator.max_images} images from now on"
                )
            for note in self.evaluator.new_notes():
                self.log.note(note)
            if metrics:
                self.seconds, epoch = time.perf_counter() - start_time, self.state.step / self.steps_per_epoch
                self.log.eval_line(self.state.step, epoch, name, metrics, self.seconds, self.throughput.train_seconds)
        return metrics

    def _calibrating(self, evaluate: Evaluate, loader: Any, step: int) -> dict[str, float]:
        with self.evaluator.calibrator.fitting(loader if loader is self.eval_loader else None, step):
            return evaluate(loader)

    def compare(self, metrics: dict[str, float]) -> bool:
        """Record an evaluation after the current step, and return whether it is the best so far."""
        state = self.state
        state.metrics, state.evaluated_at = metrics, state.step
        state.calibration = self.evaluator.calibrator.state()
        if self.evaluator.collects:
            self._columns_step = state.step
        if self.early_stopping and self._improves(self.early_stopping, state.watched):
            state.watched = record_of(self.early_stopping, state)
        if not self._improves(self.best, state.best):
            return False
        value = metrics[self.best.metric]
        state.best = {"metric": self.best.metric, "value": value, "step": state.step, "metrics": metrics}
        return True

    def _improves(self, watch: Watch, record: dict[str, Any] | None) -> bool:
        if watch.metric not in self.state.metrics:
            if self.evaluator.may_be_missing(watch.metric):
                self.log.note(f"'{watch.metric}' is watched; evaluations without it are not compared with the best")
                return False
            self._require_watched(list(self.state.metrics))
        return watch.is_better(self.state.metrics[watch.metric], record["value"] if record else None)

    def final_metrics(self, evaluate: Evaluate, step: int, previous: dict[str, float] | None) -> dict[str, float]:
        """Return the metrics of the final weights, those after `step`, and store their predictions.

        They are computed unless both are known already (`previous`). Returns an empty dict if interrupted by a signal.
        """
        metrics = previous or {}
        self.evaluator.collects = self.keeps_predictions
        if not metrics or (self.keeps_predictions and self._columns_step != step):
            metrics = self._calibrating(evaluate, self.eval_loader, step)
        self.evaluator.collects = False
        if metrics and self.keeps_predictions:
            self.predictions = self._keep("intervals", step, self.eval_loader, metrics)
            self._columns_step = -1  # they are not stored twice
        return metrics

    def measure_test(self, evaluate: Evaluate, step: int) -> bool:
        """Evaluate the final weights, those after `step`, on the test split; False if a signal interrupts it."""
        if (metrics := self.measure(evaluate, self.test_loader, is_last=True)) and self.keeps_predictions:
            self._keep("test_intervals", step, self.test_loader, metrics)
        self.test_metrics, self.evaluator.collects = metrics, False
        return bool(metrics)

    def _keep(self, field: str, step: int, loader: Any, metrics: dict[str, float]) -> Predictions | None:
        """Return the predictions of the last pass, from which the intervals of a field of `Result` are computed."""
        name, rows = getattr(loader, "name", "evaluation split"), getattr(loader, "rows", None)
        if (predictions := self.evaluator.predictions(step, name, rows)) is not None:
            predictions = with_images(predictions, getattr(loader, "split", None))
            self.intervals[field] = intervals_of(predictions, metrics, self.evaluator.class_names)
        return predictions
