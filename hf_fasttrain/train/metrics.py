"""Built-in metrics and those of the evaluate library, exact for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fasttrain.run_folder.predictions import squared_errors
from hf_fasttrain.run_folder.result import (
    BUILT_IN_METRICS,
    MAIN_METRICS,
    PER_CLASS,
    SCORE_METRICS,
    TUNED_METRICS,
    is_built_in,
    metric_name,
)
from hf_fasttrain.utils.errors import RecipeError, RunError, nearest, shortened, shown
from hf_fasttrain.utils.private_apis import reset_metric

SINGLE_LABEL = tuple(name for name in BUILT_IN_METRICS if name != "f1_micro")  # which would be accuracy
MULTI_LABEL = (
    "loss", "accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "ece", "brier", *SCORE_METRICS,
)  # fmt: skip
TOP5 = "top5_accuracy"
CALIBRATION = ("ece", "brier")
NUM_BINS = 15  # of confidence, for the calibration error


def built_in_metrics(num_classes: int, *, multi_label: bool, watched: Collection[str] = ()) -> list[str]:
    """Return the metrics that are measured unless the user chooses, and those that are `watched`.

    Top-5 accuracy of five classes is always 1.
    """
    known = MULTI_LABEL if multi_label else SINGLE_LABEL
    main = [name for name in MAIN_METRICS if name in known and (name != TOP5 or num_classes > 5)]
    return [*dict.fromkeys([*main, *(name for name in watched if name in known or name.startswith(PER_CLASS))])]


class Metrics:
    """Counts for one pass over a split.

    Single-label: `loss` is the mean cross-entropy, `accuracy` and `top5_accuracy` (top K with fewer than five
    classes) shares of images, `f1_macro` the mean F1 of all classes that occur or are predicted. Multi-label (a
    class is predicted from 0.5 on): `loss` is the mean binary cross-entropy, `accuracy` the share of images with
    every class right, `f1_macro` the mean over all classes. All are scikit-learn's definitions, and so are the others
    but `ece`: the expected calibration error in 15 bins of the predicted class's probability (Guo et al., arXiv
    1706.04599), multi-label of all probabilities. `brier` is the sum over the classes, multi-label their mean. These
    two are counted with `calibration` only, since they take a softmax more.
    """

    def __init__(
        self, num_classes: int, device: torch.device, *, multi_label: bool = False, calibration: bool = False
    ) -> None:
        self.num_classes, self.multi_label, self.calibration = num_classes, multi_label, calibration
        # images, sum of losses, correct, correct in the top five, invalid labels
        self.totals = torch.zeros(5, dtype=torch.float64, device=device)
        # of each bin: images (multi-label: probabilities), sum of probabilities, correct; and the sum of squares
        self.bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)
        self.squares = torch.zeros(1, dtype=torch.float64, device=device)
        self.of_classes: dict[str, Tensor] = {}  # precision, recall and f1 (K,), once computed
        # per class: predicted and true, predicted, true
        self.classes = torch.zeros(3, num_classes, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: `logits` (B, K), `labels` (B,) or multi-hot (B, K). No sync with the device.

        Raises RunError for other shapes.
        """
        self._require_shapes(logits, labels)
        logits = logits.float()
        count = self._update_multi if self.multi_label else self._update_single
        totals, classes = count(logits, labels)
        images = torch.full((), len(logits), device=logits.device)
        self.totals += torch.stack([images, *totals]).to(torch.float64)
        self.classes += classes
        if self.calibration:
            self._update_calibration(logits, labels)

    def _require_shapes(self, logits: Tensor, labels: Tensor) -> None:
        """Raise RunError unless logits and labels match the number of classes."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise RunError(
                f"the model's outputs for a batch are of shape {tuple(logits.shape)}, and num_classes is "
                f"{self.num_classes}: there must be one logit for each class, ({len(labels)}, {self.num_classes})"
            )
        expected = logits.shape if self.multi_label else logits.shape[:1]
        if labels.shape != expected or (labels.is_floating_point() and not self.multi_label):
            kind = "0 or 1 for each class" if self.multi_label else f"class numbers from 0 to {self.num_classes - 1}"
            raise RunError(
                f"the labels of an evaluation batch are {str(labels.dtype).removeprefix('torch.')} of shape "
                f"{tuple(labels.shape)}; must be {kind}, of shape {tuple(expected)}"
            )

    def _update_calibration(self, logits: Tensor, labels: Tensor) -> None:
        """Count the probabilities in bins (a, b], and their squared errors."""
        if self.multi_label:
            p, true = logits.sigmoid().flatten(), (labels > 0.5).flatten()
            self.squares += (p - true.to(p.dtype)).square().sum(dtype=torch.float64) / self.num_classes
        else:
            probabilities, labels = logits.softmax(1), labels.clamp(0, self.num_classes - 1)
            p, predicted = probabilities.max(1)
            true = predicted == labels
            self.squares += squared_errors(probabilities, labels).sum(dtype=torch.float64)
        bins = calibration_bins(p)
        for row, values in enumerate((torch.ones_like(p), p, true)):
            self.bins[row].scatter_add_(0, bins, values.to(torch.float64))

    def _update_single(self, logits: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        invalid = (labels < 0) | (labels >= self.num_classes)  # reported at the end, to avoid a sync
        labels = labels.clamp(0, self.num_classes - 1)
        predicted = logits.argmax(1)
        right = predicted == labels
        top = logits.topk(min(5, self.num_classes), dim=1).indices
        losses = F.cross_entropy(logits, labels, reduction="sum")
        classes = torch.zeros_like(self.classes)
        ones = torch.ones_like(labels, dtype=torch.float64)
        classes[0].scatter_add_(0, labels, right.to(torch.float64))
        classes[1].scatter_add_(0, predicted, ones)
        classes[2].scatter_add_(0, labels, ones)
        return [losses, right.sum(), (top == labels[:, None]).any(1).sum(), invalid.sum()], classes

    def _update_multi(self, logits: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        predicted, true = logits >= 0, labels > 0.5
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / self.num_classes
        right = (predicted == true).all(1).sum()
        classes = torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)])
        invalid = ((labels != 0) & (labels != 1)).any(1).sum()  # reported at the end
        return [losses, right, torch.zeros_like(right), invalid], classes.to(torch.float64)

    def compute(self, add: Callable[[Tensor], Tensor] = lambda counts: counts) -> dict[str, float]:
        """Return every metric by name; `add` sums a tensor of counts over all processes.

        Raises RunError if a label is not one of the classes, or if there were no images.
        """
        parts = (self.totals, self.squares, self.bins.flatten(), self.classes.flatten())
        counts = add(torch.cat(parts)).cpu()
        images, loss, right, top5, invalid, squares = counts[:6].tolist()
        num_bins = self.bins.numel()
        if not images:
            raise RunError("no images to evaluate: an iterator yields its images once; pass a list or a DataLoader")
        if invalid and self.multi_label:
            raise RunError(
                f"labels of {invalid:,.0f} of {images:,.0f} images of the evaluation split are not 0 or 1: return "
                f"class numbers (B,), or 0 or 1 for each class, (B, {self.num_classes})"
            )
        if invalid:
            raise RunError(
                f"{invalid:,.0f} of {images:,.0f} labels of the evaluation split are not from 0 to "
                f"{self.num_classes - 1}, and num_classes is {self.num_classes}: set it to the number of classes in "
                "the labels, and use a model with as many outputs"
            )
        number, confidence, correct = counts[6 : 6 + num_bins].view_as(self.bins)
        of_counts, self.of_classes = metrics_of_counts(
            *counts[6 + num_bins :].view(3, self.num_classes), multi_label=self.multi_label
        )
        values = {"loss": loss / images, "accuracy": right / images}
        if self.calibration:
            values["brier"] = squares / images
            values["ece"] = float((confidence - correct).abs().sum() / number.sum())
        values |= {name: float(value) for name, value in of_counts.items()}
        return values if self.multi_label else {**values, "top5_accuracy": top5 / images}

    def of_class(self, name: str, class_names: Sequence[str]) -> float:
        """Return a metric such as recall/cat, after `compute`."""
        metric, _, class_name = name.partition("/")
        return float(self.of_classes[metric][list(class_names).index(class_name)])


def calibration_bins(probabilities: Tensor) -> Tensor:
    """Return the bin (a, b] of NUM_BINS of each probability, int64."""
    return (probabilities * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)


def metrics_of_counts(
    both: Tensor, predicted: Tensor, true: Tensor, *, multi_label: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return metrics (...), and precision, recall and f1 of the classes (..., K), from counts (..., K) in float64."""
    f1 = 2 * both / (predicted + true).clamp(min=1)
    of_classes = {"precision": both / predicted.clamp(min=1), "recall": both / true.clamp(min=1), "f1": f1}
    is_counted = torch.ones_like(f1, dtype=torch.bool) if multi_label else (predicted + true) > 0
    values = {f"{name}_macro": _mean_where(is_counted, each) for name, each in of_classes.items()}
    if multi_label:
        total = (predicted + true).sum(-1).clamp(min=1)
        return {**values, "f1_micro": 2 * both.sum(-1) / total}, of_classes
    values["balanced_accuracy"] = _mean_where(true > 0, of_classes["recall"])
    return {**values, **_agreement(both, predicted, true)}, of_classes


def _mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    return torch.where(chosen, values, 0.0).sum(-1) / chosen.sum(-1)


def _agreement(both: Tensor, predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Return Matthews' correlation coefficient and Cohen's kappa from counts per class (..., K); 0 if undefined."""
    images, right, chance = true.sum(-1), both.sum(-1), (predicted * true).sum(-1)
    spread = (images**2 - (predicted**2).sum(-1)) * (images**2 - (true**2).sum(-1))
    mcc = torch.where(spread > 0, (right * images - chance) / spread.clamp(min=1).sqrt(), 0.0)
    expected = chance / images**2
    kappa = torch.where(expected < 1, (right / images - expected) / (1 - expected), 0.0)
    return {"mcc": mcc, "cohen_kappa": kappa}


class FailedMetrics:
    """The metrics that the last pass could not compute; each is reported once."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}  # name -> error
        self._reported: set[str] = set()

    def new_notes(self) -> list[str]:
        """Return a sentence for each metric that failed for the first time."""
        new = {name: error for name, error in self.errors.items() if name not in self._reported}
        self._reported |= new.keys()
        return [f"metric '{name}' could not be computed and is skipped: {error}" for name, error in new.items()]


class ExternalMetrics:
    """Metrics of the `evaluate` library, by Hub name or local path, computed from all predictions together.

    A metric that raises is skipped in that pass; `failed` has the errors.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.modules = {metric_name(name): _load_evaluate(name) for name in names}
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []  # predictions and references of each
        self.failed = FailedMetrics()

    def try_out(self, num_classes: int, *, multi_label: bool) -> None:
        """Compute every metric on synthetic predictions. Raises RecipeError if one fails or returns no number."""
        if not self.modules:
            return
        self.update(*_synthetic_batch(num_classes, multi_label=multi_label))
        number = len(self._batches[0][0])
        self.compute()
        kind = "with several labels" if multi_label else "with one label each"
        for name, error in self.failed.errors.items():
            raise RecipeError(
                f"evaluate.metrics: '{name}' fails on {number} synthetic images {kind} of {num_classes} classes: "
                f"{error}; leave it out, or name your own module that calls it with its arguments, such as "
                "average='macro'"
            )

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch's predictions: class numbers, or 0 and 1 for each class (multi-label)."""
        if not self.modules:
            return
        predicted = logits.argmax(1) if labels.ndim == 1 else (logits >= 0).int()
        self._batches.append((predicted.cpu().numpy(), labels.to(predicted.dtype).cpu().numpy()))

    def clear(self) -> None:
        """Clear the stored predictions."""
        self._batches = []

    def compute(self, gather: Callable[[list[Any]], list[Any]] = lambda rows: rows) -> dict[str, float]:
        """Return each module's first number under the module's name; `gather` joins lists of all processes.

        A module that raises on any process is omitted on all.
        """
        if not self.modules:
            return {}
        batches = gather(self._batches)
        self.clear()
        predictions, references = (np.concatenate(part) for part in zip(*batches, strict=True)) if batches else ([], [])
        results, failures = {}, {}
        for name, module in self.modules.items():
            try:
                results[name] = _first_number(module.compute(predictions=predictions, references=references))
            except Exception as error:  # noqa: BLE001 - others' code; the run does not depend on it
                failures[name] = describe_error(error)
                reset_metric(module)
        self.failed.errors = dict(gather(list(failures.items())))
        return {name: value for name, value in results.items() if name not in self.failed.errors}


def _synthetic_batch(num_classes: int, *, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Return synthetic logits (N, K) and labels: of each class (at most 100) one right and one wrong prediction."""
    classes = torch.arange(min(num_classes, 100))
    labels, predicted = classes.repeat(2), torch.cat([classes, classes.roll(1)])
    logits = F.one_hot(predicted, num_classes) - 0.5
    return logits, F.one_hot(labels, num_classes).float() if multi_label else labels


def _first_number(values: Any) -> float:
    """Return the first value of a module's result as a number. Raises TypeError if there is none."""
    value = next(iter(values.values()), None) if isinstance(values, dict) else values
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"it returns {shown(values)} instead of one number") from None


def describe_error(error: Exception) -> str:
    """Return an error's type and first line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def resolve_metrics(
    names: str | Sequence[str], num_classes: int, *, multi_label: bool, watched: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the names of built-in and of external metrics; ``auto`` means those of `built_in_metrics`."""
    if isinstance(names, str):
        return built_in_metrics(num_classes, multi_label=multi_label, watched=watched), []
    unsuitable = set(BUILT_IN_METRICS) - set(MULTI_LABEL if multi_label else SINGLE_LABEL)
    for name in names:
        if name in unsuitable:
            kind = "multi-label data" if multi_label else "one label per image, where it is the accuracy"
            raise RecipeError(f"evaluate.metrics: {name} has no meaning for {kind}; leave it out")
    chosen = [name for name in dict.fromkeys(["loss", *names]) if is_built_in(name) and name not in TUNED_METRICS]
    return chosen, [name for name in names if not is_built_in(name)]


def resolve_thresholds(choice: str, *, multi_label: bool) -> bool:
    """Return whether thresholds are tuned. Raises RecipeError if they are, and an image has one label."""
    if choice == "tuned" and not multi_label:
        raise RecipeError(
            "evaluate.thresholds: tuned has no meaning for one label per image, of which the likeliest is predicted; "
            "leave it out"
        )
    return choice == "tuned"


def require_classes(names: Iterable[str], class_names: Collection[str]) -> None:
    """Raise RunError if a metric of one class names none of the data's."""
    for name in names:
        class_name = name.partition("/")[2]
        if name.startswith(PER_CLASS) and class_name not in class_names:
            raise RunError(
                f"metric '{name}': '{class_name}' is not a class of the data set.{nearest(class_name, class_names)} "
                f"Its classes are {shortened(class_names, 30)}"
            )


def _load_evaluate(name: str) -> Any:
    import evaluate

    try:
        module = evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # noqa: BLE001 - a module may raise anything when it is imported
        raise RecipeError(
            f"evaluate.metrics: '{name}' is not built in ({', '.join(BUILT_IN_METRICS)}) and can't be loaded by the "
            f"evaluate library from a local path or the Hub: {describe_error(error)}{nearest(name, BUILT_IN_METRICS)}"
        ) from None
    if getattr(module, "module_type", "") not in ("metric", "comparison", "measurement"):
        raise RecipeError(f"evaluate.metrics: '{name}' is not a metric of the evaluate library")
    return module
