"""A small trainer without a recipe, and a loader whose position can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fasttrain import Trainer
from hf_fasttrain.train.log import RunLog


def small_trainer(folder: Path | None = None, steps: int = 6, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """Return a trainer of a linear model on 24 images of 2 px."""
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, 2, 2), torch.arange(24) % 3
    data = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 24, 8)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    options = {"eval_loader": data, "num_classes": 3, "report": False, "log": RunLog(folder, show=False), **options}
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), options.pop("train_loader", data)
    return kind(model, loader, optimizer, duration=f"{steps} steps", output_dir=folder, **options)


class StatefulLoader:
    """Batches with a position that can be saved and restored within an epoch, as torchdata's StatefulDataLoader has."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.position = list(batches), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
