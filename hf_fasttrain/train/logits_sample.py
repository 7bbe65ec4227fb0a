"""A bounded sample of the logits of a split, the same whatever the number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_fasttrain.data.loading.sampler import CALIBRATION_STREAM, keyed_uniforms
from hf_fasttrain.run_folder.predictions import Columns
from hf_fasttrain.train.distributed import Processes

OTHER_PROCESS = 2**40  # between numbers of images of two processes, where their rows are unknown


class LogitsSample:
    """Logits (M, K) and labels of the images whose rows have the smallest random numbers, at most `limit` of them.

    The random numbers depend on the rows only. The rows of this process are `rows`; without them, images are numbered
    in the order of the loader. Two samples are held on the device at most; all images, without a limit, on the host.
    """

    def __init__(self, limit: int | None, rows: Sequence[int] | None, process: int) -> None:
        self._limit, self._process = limit, process
        self._rows = None if rows is None else np.asarray(rows, np.int64)
        number = 0 if rows is None else len(rows)
        self._columns = Columns(number if limit is None else min(number, 2 * limit))
        self._ids: list[np.ndarray] = []  # of the rows of the columns, batch by batch
        self._seen, self._bound = 0, 1.0  # images whose random number is not below it are not wanted

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of `logits` (B, K) and `labels`, (B,) or multi-hot (B, K)."""
        ids = self._next(len(logits))
        if self._bound < 1:
            chosen = np.flatnonzero(_numbers(ids) < self._bound)
            ids, index = ids[chosen], torch.from_numpy(chosen).to(logits.device)
            logits, labels = logits[index], labels[index]
        if not len(ids):
            return
        labels = labels > 0.5 if labels.ndim == 2 else labels
        if self._limit is None:
            logits, labels = logits.cpu(), labels.cpu()
        self._columns.add(logits.float(), labels)
        self._ids.append(ids)
        if self._limit is not None and len(self._columns) > 2 * self._limit:
            self._prune(self._limit, logits.device)

    def _next(self, number: int) -> np.ndarray:
        """Return what identifies the next images of this process."""
        positions = np.arange(self._seen, self._seen + number)
        self._seen += number
        if self._rows is not None and self._seen <= len(self._rows):
            return self._rows[positions]
        return positions + OTHER_PROCESS * (self._process + 1)

    def _prune(self, limit: int, device: torch.device) -> None:
        ids = np.concatenate(self._ids)
        numbers = _numbers(ids)
        self._bound = float(np.partition(numbers, limit)[limit])
        kept = np.flatnonzero(numbers < self._bound)
        self._columns.keep(torch.from_numpy(kept).to(device))
        self._ids = [ids[kept]]

    def on_main(self, processes: Processes) -> tuple[Tensor, Tensor] | None:
        """Return the sample of all processes on the main one, in the order of their rows; None on the others.

        Called by all processes.
        """
        logits, labels = self._columns.columns() or (None, None)
        ids = torch.from_numpy(np.concatenate(self._ids)) if logits is not None else None
        logits, labels, ids = (processes.rows_on_main(column) for column in (logits, labels, ids))
        if logits is None or labels is None or ids is None:
            return None
        order = np.argsort(ids.numpy(), kind="stable")
        if self._limit is not None and len(order) > self._limit:
            numbers = _numbers(ids.numpy()[order])
            order = order[numbers < np.partition(numbers, self._limit)[self._limit]]
        if len(order) == len(ids) and bool((np.diff(order) == 1).all()):  # no copy of what is in order
            return logits, labels
        index = torch.from_numpy(order)
        return logits[index], labels[index]


def _numbers(ids: np.ndarray) -> np.ndarray:
    return keyed_uniforms(0, CALIBRATION_STREAM, 0, ids, 0, 1)[:, 0]
