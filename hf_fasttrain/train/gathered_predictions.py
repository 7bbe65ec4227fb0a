"""The predictions of a pass, gathered from all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.train.distributed import Processes


def gather_predictions(
    processes: Processes,
    local: tuple[Tensor, ...] | None,
    rows: Sequence[int] | None,
    *,
    step: int,
    split: str,
    num_classes: int,
) -> Predictions | None:
    """Return the predictions of all processes, None if none has any. Called by all processes.

    `local`: this process's columns (`Collector`); `rows`: indices of its images in the split, where they are known.
    """
    parts = [part for part in processes.gather([local]) if part is not None and len(part)]
    if not parts:
        return None
    number = len(local[0]) if local else 0
    local_rows = rows if rows is not None and len(rows) == number else None
    all_rows = [
        part for part in processes.gather([None if local_rows is None else list(local_rows)]) if part is not None
    ]
    columns = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
    number = len(columns[0])
    indices = torch.tensor([row for part in all_rows for row in part] or [-1] * number)
    indices = indices if len(indices) == number else torch.full((number,), -1)
    return Predictions(step, split, indices, *columns, num_classes=num_classes if columns[0].ndim == 2 else 0)
