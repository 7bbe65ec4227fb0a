"""The user's metrics: functions of the logits and labels of all images of a split, called once, on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.run_folder.result import MAIN_METRICS
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.metrics import FailedMetrics, describe_error
from hf_fasttrain.utils.errors import RunError, shown

Metric = Callable[[Tensor, Tensor], float]  # logits (N, K) float32, labels (N,) or (N, K); on the CPU
Predict = Callable[[nn.Module, Any], Tensor]  # model, images (B, ...) -> logits (B, K)

MAX_SYNTHETIC_VALUES = 50_000_000  # in the synthetic logits that metrics are tried on: 200 MB
RESERVED_NAMES = ("kind", "step", "epoch", "split", "train_seconds")  # other keys of lines in metrics.jsonl


class UserMetrics:
    """Functions of all logits (N, K) float32 and labels, (N,) or multi-hot (N, K), each image once.

    The main process calls them on tensors in its memory (N x K x 4 bytes), in the order of the split's rows if the
    loader knows them, else in the order of the loaders, process by process. A metric of torchmetrics is one too. A
    function that raises is skipped in that pass; `failed` has the errors. Raises RunError for an invalid name.
    """

    def __init__(self, functions: Mapping[str, Metric] | None = None) -> None:
        self.functions = {name: _function_of(metric) for name, metric in (functions or {}).items()}
        for name in self.functions:
            if not isinstance(name, str) or not name or name in (*MAIN_METRICS, *RESERVED_NAMES):
                raise RunError(
                    f"metrics: {name!r} can't be a metric's name; reserved are "
                    f"{', '.join((*MAIN_METRICS, *RESERVED_NAMES))}; choose another one"
                )
        self.failed = FailedMetrics()
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Store a batch's logits (B, K) and labels on the host; waits for the device."""
        if self.functions:
            self._logits.append(logits.float().cpu())
            self._labels.append(labels.cpu())

    def clear(self) -> None:
        """Drop the stored batches."""
        self._logits, self._labels = [], []

    def compute(self, processes: Processes, rows: Sequence[int] | None = None) -> dict[str, float]:
        """Return name -> value, the same on every process; called by all of them.

        `rows`: indices of this process's images in the split, where they are known.
        """
        if not self.functions:
            return {}
        number = sum(map(len, self._labels))
        has_rows = number == 0 or (rows is not None and len(rows) == number)
        logits, labels = _concatenate(self._logits), _concatenate(self._labels)
        self.clear()
        on_main_process = [
            processes.rows_on_main(column) for column in (logits, labels, _indices(rows) if has_rows else None)
        ]
        has_order = not processes.any_process(not has_rows)

        def on_all_images() -> tuple[dict[str, float], dict[str, str]]:
            logits, labels, indices = on_main_process
            assert logits is not None
            assert labels is not None
            if has_order and indices is not None and not bool((indices.diff() > 0).all()):
                order = indices.argsort(stable=True)
                logits, labels = logits[order], labels[order]
            return self._values(logits, labels)

        values, self.failed.errors = on_main(on_all_images)
        return values

    def _values(self, logits: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, str]]:
        """Return the values by name, and the errors of the functions that raise or do not return a number."""
        values, errors = {}, {}
        is_shared = len(self.functions) > 1  # one may change its tensors in place
        for name, function in self.functions.items():
            try:
                arguments = (logits.clone(), labels.clone()) if is_shared else (logits, labels)
                values[name] = _as_number(function(*arguments))
            except Exception as error:  # noqa: BLE001 - the user's code; the run does not depend on it
                errors[name] = describe_error(error)
        return values, errors

    def error_on_batch(self, logits: Tensor, labels: Tensor) -> str | None:
        """Return a message on a function that fails on a batch and on synthetic logits of all classes, else None.

        A batch alone may lack classes that a function needs, such as the area under a ROC curve.
        """
        if not self.functions:
            return None
        number, num_classes = logits.shape
        with warnings.catch_warnings(action="ignore"):  # about missing classes
            _, errors = self._values(logits.float().cpu(), labels.cpu())
            if not errors:
                return None
            synthetic = _synthetic_batch(num_classes, labels.cpu())
            _, synthetic_errors = self._values(*synthetic)
        name = next((name for name in errors if name in synthetic_errors), None)
        if name is None:
            return None
        shapes = f"logits {tuple(synthetic[0].shape)} and labels {tuple(synthetic[1].shape)} {synthetic[1].dtype}"
        return (
            f"metrics: '{name}' fails on {number} images of the evaluation split ({errors[name]}) and on synthetic "
            f"logits of each class, {shapes} ({synthetic_errors[name]}); it is called with logits (N, {num_classes}) "
            "float32 and the labels, both on the CPU, and must return one number"
        )


def _function_of(metric: Any) -> Any:
    """Return a metric as a function; one of torchmetrics gets all images at once, and forgets them afterwards.

    Only the main process calls it, so it must not wait for the others.
    """
    if not all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")):
        return metric

    def measured(logits: Tensor, labels: Tensor) -> float:
        if hasattr(metric, "distributed_available_fn"):
            metric.distributed_available_fn = bool  # False: there is nobody to join values with
        metric.reset()
        try:
            metric.update(logits, labels.long())
            return float(metric.compute())
        finally:
            metric.reset()

    return measured


def _concatenate(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


def _indices(rows: Sequence[int] | None) -> Tensor | None:
    return torch.tensor(list(rows)) if rows else None


def _synthetic_batch(num_classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return synthetic logits (N, K) and labels of the form of `like`: two right and one wrong for each class."""
    classes = torch.arange(max(1, min(num_classes, MAX_SYNTHETIC_VALUES // (3 * num_classes))))
    true, predicted = classes.repeat(3), torch.cat([classes, classes, classes.roll(1)])
    generator = torch.Generator().manual_seed(0)
    logits = F.one_hot(predicted, num_classes) + torch.rand(len(true), num_classes, generator=generator)
    labels = F.one_hot(true, num_classes) if like.ndim == 2 else true
    return logits, labels.to(like.dtype)


def _as_number(value: Any) -> float:
    """Return a metric's result as a number. Raises TypeError if it is not one."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"it returns {shown(value)} instead of one number") from None


def require_logits(logits: Any, number: int, *, by_predict: bool) -> Tensor:
    """Return logits (B, K) of `number` images. Raises RunError for anything else."""
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == number:
        return logits
    description = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else shown(logits)
    subject, advice = ("the model returns", "pass predict= to Trainer, a function (model, images) -> logits")
    if by_predict:
        subject, advice = "predict returned", "return them from it"
    raise RunError(
        f"{subject} {description} for {number} images instead of logits ({number}, K), one per class: {advice}; for a "
        "single logit z, return torch.nn.functional.pad(z.view(-1, 1), (1, 0)), two classes with the same probabilities"
    )
