"""A trainer of objects that no recipe has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fasttrain import Trainer
from hf_fasttrain.train.log import RunLog


def small_trainer(folder: Path | None = None, steps: int = 6, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """Return a trainer of own objects."""
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, 2, 2), torch.arange(24) % 3
    data = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 24, 8)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    options = {"eval_loader": data, "num_classes": 3, "report": False, "log": RunLog(folder, show=False), **options}
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), options.pop("train_loader", data)
    return kind(model, loader, optimizer, duration=f"{steps} steps", output_dir=folder, **options)
