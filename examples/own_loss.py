"""A loss with trainable weights: ArcFace with a centre per class, trained and resumed with the model.

    python examples/own_loss.py [RUN_FOLDER] [DURATION]

The model returns embeddings. The loss contains the centres of the classes (Deng et al., arXiv 1801.07698). Since it is
a module, it is moved, clipped, saved and restored with the model. Run the program again with a longer DURATION to
continue the run.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_fasttrain import Result, Trainer


class ArcFace(nn.Module):
    """Cross-entropy of scaled cosines to the centres (K, D); `margin` (radians) enlarges the true class's angle."""

    def __init__(self, num_classes: int, size: int, scale: float = 16.0, margin: float = 0.2) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(num_classes, size))
        self.scale, self.margin = scale, margin

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Return the cosines (B, K) between embeddings (B, D) and centres."""
        return F.linear(F.normalize(embeddings), F.normalize(self.centres))

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and the mean angle to the true centre for the log."""
        cosines = self.cosines(model(images)).clamp(-1 + 1e-6, 1 - 1e-6)
        angles = cosines.gather(1, labels[:, None]).acos()
        margin = self.margin if at.epoch else 0.0  # the first epoch is easier
        logits = self.scale * cosines.scatter(1, labels[:, None], (angles + margin).cos())
        return F.cross_entropy(logits, labels), {"angle": angles.mean()}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return images (N, 1, 8, 8) in 0..1 and labels (N,): 1,437 digits to train on, 360 to evaluate."""
    pixels, labels = load_digits(return_X_y=True)
    images, targets = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    return TensorDataset(images[:1437], targets[:1437]), TensorDataset(images[1437:], targets[1437:])


def main(folder: str = "runs/own_loss", duration: str = "4 epochs") -> tuple[Result, ArcFace]:
    """Train the embeddings and the centres, or continue a run of fewer epochs."""
    train, evaluation = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 16)
    )
    arcface = ArcFace(num_classes=10, size=16)
    trainer = Trainer(
        model,
        DataLoader(train, batch_size=64, shuffle=True),
        torch.optim.AdamW([*model.parameters(), *arcface.parameters()], lr=3e-3),
        step_loss=arcface,
        eval_loader=DataLoader(evaluation, batch_size=256),
        predict=lambda model, images: arcface.scale * arcface.cosines(model(images)),
        accumulation_steps=4,
        clip_norm=10.0,
        duration=duration,
        output_dir=folder,
        report=False,
    )
    trainer.restore()  # or starts a new run if there is none
    result = trainer.fit()
    print(f"accuracy {result.metrics['accuracy']:.3f} after {result.steps} steps")
    return result, arcface


if __name__ == "__main__":
    main(*sys.argv[1:])
