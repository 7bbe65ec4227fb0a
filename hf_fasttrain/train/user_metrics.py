"""Metrics that functions of the user's compute from the logits and labels of a whole split, once, on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.run_folder.result import BUILT_IN_METRICS
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.metrics import LeftOut, in_words
from hf_fasttrain.utils.errors import RunError, shown

Metric = Callable[[Tensor, Tensor], float]  # logits (N, K) float32, labels (N,) or (N, K); on the CPU
Predict = Callable[[nn.Module, Any], Tensor]  # model, images (B, ...) -> logits (B, K)

MOST_NUMBERS = 50_000_000  # of the logits that are made up to try metrics out: 200 MB
IN_A_LINE = ("kind", "step", "epoch", "split", "train_seconds")  # of metrics.jsonl, beside the metrics


class UserMetrics:
    """Functions of all logits (N, K) float32 and labels, (N,) or multi-hot (N, K), each image once.

    They are called by the main process, on tensors in its memory, in the order of the split's rows where a loader
    knows them, else by process and in its loader's order: N x K x 4 bytes. A function that raises is left out of that
    pass; `left_out` has the errors. Raises RunError for a name that can't be one.
    """

    def __init__(self, functions: Mapping[str, Metric] | None = None) -> None:
        self.functions = dict(functions or {})
        for name in self.functions:
            if not isinstance(name, str) or not name or name in (*BUILT_IN_METRICS, *IN_A_LINE):
                raise RunError(
                    f"metrics: {name!r} can't be a metric's name; taken are "
                    f"{', '.join((*BUILT_IN_METRICS, *IN_A_LINE))}; choose another one"
                )
        self.left_out = LeftOut()
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch's logits (B, K) and labels in this machine's memory; waits for the device."""
        if self.functions:
            self._logits.append(logits.float().cpu())
            self._labels.append(labels.cpu())

    def clear(self) -> None:
        """Clear what was kept."""
        self._logits, self._labels = [], []

    def compute(self, processes: Processes, rows: Sequence[int] | None = None) -> dict[str, float]:
        """Return name -> value, the same on every process; called by all of them.

        `rows`: indices of this process's images in the split, where they are known.
        """
        if not self.functions:
            return {}
        number = sum(map(len, self._labels))
        known = number == 0 or (rows is not None and len(rows) == number)
        logits, labels = _joined(self._logits), _joined(self._labels)
        self.clear()
        every = [processes.rows_on_main(column) for column in (logits, labels, _indices(rows) if known else None)]
        has_order = not processes.any_process(not known)

        def on_all_images() -> tuple[dict[str, float], dict[str, str]]:
            logits, labels, indices = every
            assert logits is not None
            assert labels is not None
            if has_order and indices is not None and not bool((indices.diff() > 0).all()):
                order = indices.argsort(stable=True)
                logits, labels = logits[order], labels[order]
            return self._values(logits, labels)

        values, self.left_out.errors = on_main(on_all_images)
        return values

    def _values(self, logits: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, str]]:
        """Return the values by name, and the errors of those functions that raise or return no number."""
        values, errors = {}, {}
        several = len(self.functions) > 1  # one may change its tensors in place
        for name, function in self.functions.items():
            try:
                given = (logits.clone(), labels.clone()) if several else (logits, labels)
                values[name] = _number(function(*given))
            except Exception as error:  # noqa: BLE001 - the user's code; the run does not depend on it
                errors[name] = in_words(error)
        return values, errors

    def mistake(self, logits: Tensor, labels: Tensor) -> str | None:
        """Return a message on a function that fails on some images and on made-up ones of all classes, else None.

        Of some images alone it may fail for want of a class, as the area under a ROC curve does.
        """
        if not self.functions:
            return None
        number, num_classes = logits.shape
        with warnings.catch_warnings(action="ignore"):  # of classes that some images lack
            _, errors = self._values(logits.float().cpu(), labels.cpu())
            if not errors:
                return None
            made_up = _made_up(num_classes, labels.cpu())
            _, still = self._values(*made_up)
        name = next((name for name in errors if name in still), None)
        if name is None:
            return None
        shapes = f"logits {tuple(made_up[0].shape)} and labels {tuple(made_up[1].shape)} {made_up[1].dtype}"
        return (
            f"metrics: '{name}' fails on {number} images of the evaluation split ({errors[name]}) and on made-up ones "
            f"of each class, {shapes} ({still[name]}); it is called with logits (N, {num_classes}) float32 and the "
            "labels, both on the CPU, and must return one number"
        )


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


def _indices(rows: Sequence[int] | None) -> Tensor | None:
    return torch.tensor(list(rows)) if rows else None


def _made_up(num_classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and labels like those given: of each class, as far as they go, two right and one wrong."""
    classes = torch.arange(max(1, min(num_classes, MOST_NUMBERS // (3 * num_classes))))
    true, predicted = classes.repeat(3), torch.cat([classes, classes, classes.roll(1)])
    generator = torch.Generator().manual_seed(0)
    logits = F.one_hot(predicted, num_classes) + torch.rand(len(true), num_classes, generator=generator)
    labels = F.one_hot(true, num_classes) if like.ndim == 2 else true
    return logits, labels.to(like.dtype)


def _number(value: Any) -> float:
    """Return a metric's answer as a number. Raises TypeError if it is none."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"it returns {shown(value)}, where one number is needed") from None
