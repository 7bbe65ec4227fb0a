"""A model's predictions for every image of a split, stored in the run folder for reports and for your analysis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fasttrain.run_folder.bits import num_bytes, pack_bits, unpack_bits
from hf_fasttrain.run_folder.schemas import MAX_CLASSES
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason, require_regular, write_atomically

_TENSORS = ("rows", "labels", "predicted", "confidence", "losses", "worst_class")
_OPTIONAL = {"brier": torch.float32, "top5": torch.bool, "images": torch.int64, "groups": torch.int64}


@dataclass(frozen=True)
class Predictions:
    """One row for each image, on the CPU.

    Single-label: `labels` and `predicted` (N,) int64, `confidence` (N,) the softmax of the predicted class, `losses`
    the cross-entropy. Multi-label: `labels` and `predicted` (from 0.5 on) are bits of `num_classes` classes, (N, K / 8)
    uint8 (bits.py); (N, K) bool is packed when it is given. `confidence` (N,) is then the largest distance between a
    class's sigmoid and its label, `losses` the mean binary cross-entropy.
    """

    step: int  # of the model
    split: str
    rows: Tensor  # (N,) int64: row of the image in the split; -1 with a user's loader
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    losses: Tensor
    worst_class: Tensor  # (N,) int64: the predicted class; multi-label: the class that `confidence` is of
    # (N,) each; None in files of older versions
    brier: Tensor | None = None  # float32: squared errors of the probabilities, summed over classes; multi-label: mean
    top5: Tensor | None = None  # bool: the label is among the five highest scores; None for several labels
    images: Tensor | None = None  # int64: which image it is (data/source/identity.py); None with a user's loader
    groups: Tensor | None = None  # int64: of which group (data.group_column); None: without groups
    num_classes: int = field(default=0, kw_only=True)  # multi-label: K

    def __post_init__(self) -> None:
        if self.labels.dtype == torch.bool:
            object.__setattr__(self, "num_classes", self.labels.shape[1])
            for name in ("labels", "predicted"):
                object.__setattr__(self, name, pack_bits(getattr(self, name)))

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.labels.ndim == 2

    @property
    def is_wrong(self) -> Tensor:
        """Which images are not predicted as labelled, (N,) bool."""
        wrong = self.labels != self.predicted
        return wrong.any(1) if self.is_multi_label else wrong

    def classes_of(self, classes: Tensor, index: int) -> list[int]:
        """Return the classes of an image, by its row of `labels` or `predicted`."""
        if not self.is_multi_label:
            return [int(classes[index])]
        return [int(number) for number in unpack_bits(classes[index : index + 1], self.num_classes)[0].nonzero()]

    def worst(self, number: int) -> list[int]:
        """Return the indices (0 to N - 1) of the wrongly predicted images with the highest losses."""
        wrong = self.is_wrong.nonzero().flatten()
        order = self.losses[wrong].argsort(descending=True, stable=True)
        return [int(index) for index in wrong[order[:number]]]

    def at(self, indices: Tensor) -> Predictions:
        """Return the predictions for some of the images, in the order of `indices`."""
        columns = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        return replace(self, **{name: column[indices] for name, column in columns.items() if column is not None})

    def save(self, path: Path) -> None:
        """Write one safetensors file atomically. Raises OSError."""
        from safetensors.torch import save

        names = [name for name in (*_TENSORS, *_OPTIONAL) if getattr(self, name) is not None]
        tensors = {name: getattr(self, name).clone().contiguous() for name in names}  # unshared memory
        metadata = {"step": str(self.step), "split": self.split, "columns": json.dumps(names)}
        if self.is_multi_label:
            metadata["num_classes"] = str(self.num_classes)
        write_atomically(path, save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Return the predictions that `save` wrote. Raises RunError if the file can't be read."""
        from safetensors import SafetensorError, safe_open

        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                optional = [name for name in _OPTIONAL if name in file.keys()]  # noqa: SIM118 - not a dict
                tensors = {name: file.get_tensor(name) for name in (*_TENSORS, *optional)}
                num_classes = int(metadata.get("num_classes", 0))  # 0: of one label, or of an older run, a byte a class
                _require_rows(tensors, num_classes)
                return cls(int(metadata["step"]), metadata["split"], **tensors, num_classes=num_classes)
        except (SafetensorError, OSError, KeyError, ValueError, OverflowError) as error:
            raise RunError(
                f"{path}: can't be read as predictions ({reason(error)}); remove it, or write it again by evaluating"
            ) from None


def _require_rows(tensors: dict[str, Tensor], num_classes: int) -> None:
    """Raise ValueError unless the tensors have a row for each image, and classes that there may be."""
    labels, predicted = tensors["labels"], tensors["predicted"]
    number = len(labels) if labels.ndim in (1, 2) else -1
    kind = torch.int64 if labels.ndim == 1 else torch.uint8 if num_classes else torch.bool
    if labels.shape != predicted.shape or {labels.dtype, predicted.dtype} != {kind}:
        raise ValueError("labels and predicted are not of one kind")
    for name, kind in _OPTIONAL.items():
        if name in tensors and tensors[name].dtype != kind:
            raise ValueError(f"{name} is {tensors[name].dtype}, not {kind}")
    for name in ("rows", "confidence", "losses", "worst_class", *(name for name in _OPTIONAL if name in tensors)):
        if tensors[name].shape != (number,):
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, not ({number},)")
    if labels.ndim == 2 and max(num_classes, labels.shape[1]) > MAX_CLASSES:
        raise ValueError(f"{max(num_classes, labels.shape[1]):,} classes; allowed are {MAX_CLASSES:,}")
    if labels.dtype == torch.uint8 and labels.shape[1] != num_bytes(num_classes):
        raise ValueError(f"{labels.shape[1]:,} bytes an image for {num_classes:,} classes")
    if labels.ndim == 1 and number:
        lowest, highest = int(min(labels.min(), predicted.min())), int(max(labels.max(), predicted.max()))
        if lowest < 0 or highest >= MAX_CLASSES:
            raise ValueError(f"classes from {lowest} to {highest}; allowed are 0 to {MAX_CLASSES - 1:,}")


def squared_errors(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over the classes of the squared errors of probabilities (B, K), for labels (B,)."""
    of_label = probabilities.gather(1, labels[:, None].long())[:, 0]
    return probabilities.square().sum(1) - 2 * of_label + 1


class Collector:
    """Collects the predictions of an evaluation batch by batch, on the device, in columns for `num_images`."""

    def __init__(self, num_images: int = 0) -> None:
        self._columns = Columns(num_images)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of `logits` (B, K) and `labels`, (B,) or multi-hot (B, K). No sync with the device."""
        logits = logits.float()
        if labels.ndim == 1:
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            probabilities = logits.softmax(1)
            confidence, predicted = probabilities.max(1)
            brier = squared_errors(probabilities, labels)
            top5 = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
            self._columns.add(labels, predicted, confidence, losses, predicted, brier, top5)
            return
        true = labels > 0.5
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, true.float(), reduction="none").mean(1)
        errors = (logits.sigmoid() - true.float()).abs()
        confidence, worst = errors.max(1)
        self._columns.add(pack_bits(true), pack_bits(logits >= 0), confidence, losses, worst, errors.square().mean(1))

    def columns(self) -> tuple[Tensor, ...]:
        """Return this process's tensors of `Predictions` but for the rows, on the CPU, and reset the collector."""
        return self._columns.columns()


class Columns:
    """Tensors (N, ...) that batches of rows are added to; made once for `capacity` rows, and larger if there are more.

    Small tensors of each batch would lie between the large ones of the next batches, and keep the allocator from using
    their memory again.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._capacity, self._filled = capacity, 0
        self._columns: list[Tensor] = []

    def __len__(self) -> int:
        return self._filled

    def keep(self, rows: Tensor) -> None:
        """Keep only the rows of these indices (M,), which are on the device, in this order."""
        for column in self._columns:
            column[: len(rows)] = column[rows]
        self._filled = len(rows)

    def add(self, *parts: Tensor) -> None:
        """Add rows: a tensor (B, ...) for each column. No sync with the device."""
        end = self._filled + len(parts[0])
        if not self._columns:
            self._capacity = max(self._capacity, end)
            self._columns = [part.new_empty((self._capacity, *part.shape[1:])) for part in parts]
        if end > self._capacity:
            self._capacity = max(2 * self._capacity, end)
            old = self._columns
            self._columns = [column.new_empty((self._capacity, *column.shape[1:])) for column in old]
            for column, before in zip(self._columns, old, strict=True):
                column[: self._filled] = before[: self._filled]
        for column, part in zip(self._columns, parts, strict=True):
            column[self._filled : end] = part
        self._filled = end

    def columns(self) -> tuple[Tensor, ...]:
        """Return the columns, on the CPU, and start again without any."""
        columns, self._columns = self._columns, []
        number, self._filled = self._filled, 0
        return tuple(column[:number].cpu() for column in columns)


def join_predictions(parts: Sequence[Predictions], split: str) -> Predictions:
    """Return the predictions of several splits as those of one; a column that a part lacks is left out."""
    columns: dict[str, Any] = {}
    for name in (*_TENSORS, *_OPTIONAL):
        found = [getattr(part, name) for part in parts]
        columns[name] = None if any(each is None for each in found) else torch.cat(found)
    rows = torch.full((sum(len(part.rows) for part in parts),), -1)
    return replace(parts[0], split=split, **{**columns, "rows": rows})
