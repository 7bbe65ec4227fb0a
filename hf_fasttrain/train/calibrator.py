"""Fits the calibration of a model in the pass that evaluates it: temperature, and thresholds where they are tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_fasttrain.run_folder.calibration import Calibration, Reliability
from hf_fasttrain.run_folder.result import TUNED_METRICS
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.logits_sample import LogitsSample
from hf_fasttrain.train.metrics import Metrics
from hf_fasttrain.train.temperature import fit_temperature
from hf_fasttrain.train.thresholds import beyond, tune_thresholds
from hf_fasttrain.utils.environment import one_thread

MAX_VALUES = 2**22  # logits that a temperature is fitted to: 16 MiB, all images of 8 classes up to half a million


@dataclass(frozen=True)
class Fit:
    """What was fitted to a pass's logits, and the metrics at the tuned thresholds."""

    calibration: Calibration
    metrics: dict[str, float]


class Calibrator:
    """Fits a `Calibration` to the logits of a pass if `fits` is set, else measures the metrics of given `thresholds`.

    The temperature is fitted to a sample of at most MAX_VALUES logits (`LogitsSample`), thresholds with `tunes` to all
    logits, since the metrics at these thresholds are those of all images.
    """

    def __init__(self, *, tunes: bool = False) -> None:
        self.tunes = tunes
        self.fits = False
        self.thresholds: Sequence[float] | None = None  # of classes (K,), for the metrics of other passes
        self.calibration: Calibration | None = None  # of the last complete pass that fitted one
        self._sample: LogitsSample | None = None
        self._all: LogitsSample | None = None
        self._rows: Sequence[int] | None = None
        self._counts: Metrics | None = None

    def use(self, calibration: Calibration | None) -> None:
        """Measure other passes at the tuned thresholds of a calibration, if there are any."""
        self.thresholds = calibration.thresholds if self.tunes and calibration is not None else None

    @contextmanager
    def fitting(self, loader: Any, step: int) -> Iterator[None]:
        """Fit a calibration in the passes of this block, to the weights of a step; not if `loader` is None."""
        if loader is None:
            yield
            return
        self.fits, self.calibration = True, None
        try:
            yield
        finally:
            self.fits = False
        if self.calibration is not None:
            split = str(getattr(loader, "name", "evaluation split"))
            self.calibration = replace(self.calibration, step=step, split=split)

    def state(self) -> dict[str, Any] | None:
        """Return the last calibration as it is saved."""
        return None if self.calibration is None else asdict(self.calibration)

    def start(self, rows: Sequence[int] | None, device: torch.device) -> None:
        """Begin a pass; `rows` are the indices of this process's images in the split, where they are known."""
        self.clear()
        self._rows = rows
        if not self.fits and self.thresholds is not None:
            self._counts = Metrics(len(self.thresholds), device, multi_label=True)

    def update(self, logits: Tensor, labels: Tensor, process: int) -> None:
        """Take a batch of `logits` (B, K) and `labels`, (B,) or multi-hot (B, K)."""
        if self._counts is not None and self.thresholds is not None:
            self._counts.update(beyond(logits, self.thresholds), labels)
        if not self.fits:
            return
        if self._sample is None:
            self._sample = LogitsSample(max(1, MAX_VALUES // max(1, logits.shape[1])), self._rows, process)
            self._all = LogitsSample(None, self._rows, process) if self.tunes else None
        self._sample.add(logits, labels)
        if self._all is not None:
            self._all.add(logits, labels)

    def clear(self) -> None:
        """Drop what an interrupted pass has left."""
        self._sample = self._all = self._counts = None

    def compute(self, processes: Processes) -> dict[str, float]:
        """Fit, and return the metrics at tuned thresholds by name; called by all processes."""
        if self._counts is not None:
            values = _at_thresholds(self._counts.compute(processes.reduce_sum))
            self.clear()
            return values
        if not self.fits:
            return {}
        empty = LogitsSample(None, None, 0)
        sample = (self._sample or empty).on_main(processes)
        everything = (self._all or empty).on_main(processes) if self.tunes else None
        self.clear()
        with one_thread():  # whose number would change the last digits
            fit = on_main(lambda: _fit(sample, everything))
        self.calibration = fit.calibration
        return fit.metrics


def _at_thresholds(values: dict[str, float]) -> dict[str, float]:
    return {name: values[name.removesuffix("_tuned")] for name in TUNED_METRICS}


def _fit(sample: tuple[Tensor, Tensor] | None, everything: tuple[Tensor, Tensor] | None) -> Fit:
    assert sample is not None
    logits, labels = sample
    calibration = _with_temperature(logits, labels)
    if everything is None or not bool(everything[0].isfinite().all()):
        return Fit(calibration, {})
    thresholds = tune_thresholds(*everything)
    counts = Metrics(logits.shape[1], torch.device("cpu"), multi_label=True)
    counts.update(beyond(everything[0], thresholds), everything[1])
    return Fit(replace(calibration, thresholds=thresholds), _at_thresholds(counts.compute()))


def _with_temperature(logits: Tensor, labels: Tensor) -> Calibration:
    finite = logits.isfinite().all(1)
    if not bool(finite.all()):
        number = int((~finite).sum())
        remark = f"No temperature was fitted: logits of {number:,} of {len(logits):,} images are NaN or inf."
        return Calibration(0, "", len(logits), None, remark=remark)
    temperature, remark = fit_temperature(logits, labels)
    before, after = (reliability(logits / t, labels) for t in (1.0, temperature))
    return Calibration(0, "", len(logits), temperature, None, before, after, remark)


def reliability(logits: Tensor, labels: Tensor) -> Reliability:
    """Return the reliability of logits (N, K) on the CPU; labels (N,) or multi-hot (N, K)."""
    counts = Metrics(logits.shape[1], torch.device("cpu"), multi_label=labels.ndim == 2, calibration=True)
    counts.update(logits, labels)
    values = counts.compute()
    number, confidence, correct = counts.bins
    shares = [(part / number.clamp(min=1)).clamp(0, 1).tolist() for part in (confidence, correct)]
    figures = {name: values[name] for name in ("loss", "ece", "brier")}
    return Reliability(**figures, counts=number.long().tolist(), confidence=shares[0], correct=shares[1])
