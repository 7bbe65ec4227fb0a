"""Your own model, loader and optimizer, trained by `Trainer`: checkpoints, exact accumulation, evaluation.

    python examples/own_model.py [RUN_FOLDER] [DURATION]

A second run in the same folder is refused. To continue the first one, call `trainer.restore()` before `fit`: with this
loader it continues from the end of an epoch, with torchdata's StatefulDataLoader from any step.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_fasttrain import Trainer


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return images (N, 1, 8, 8) in 0..1 and labels (N,): 1,437 digits to train on, 360 to evaluate."""
    pixels, labels = load_digits(return_X_y=True)
    images: Tensor = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels)
    return TensorDataset(images[:1437], targets[:1437]), TensorDataset(images[1437:], targets[1437:])


def main(folder: str = "runs/own_model", duration: str = "5 epochs") -> None:
    """Train a small convolutional network and print its accuracy."""
    train, evaluation = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    trainer = Trainer(
        model,
        DataLoader(train, batch_size=64, shuffle=True),  # a batch is this process's share of one step
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        eval_loader=DataLoader(evaluation, batch_size=256),
        num_classes=10,
        accumulation_steps=4,  # four micro-batches per batch: the same gradients, less memory
        duration=duration,
        output_dir=folder,
    )
    result = trainer.fit()
    print(f"accuracy {result.metrics['accuracy']:.3f} after {result.steps} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
