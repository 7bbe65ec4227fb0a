"""Two passes per step: sharpness-aware minimisation (SAM) with gradient accumulation.

    python examples/two_passes.py [ACCUMULATION_STEPS] [DURATION]

An optimizer that needs the gradients at other weights calls the closure that it gets. The closure computes the
gradients of the complete step, whatever the accumulation and the number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_fasttrain import Trainer


class SAM(torch.optim.SGD):
    """SGD with the gradients of the worst weights within `rho` of the current ones (arXiv 2010.01412)."""

    needs_closure = True

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["rho"] = rho  # a group option, which must stay the same when the run is resumed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        """Step along the gradients, compute those of the same images there, go back and descend with them."""
        weights = [(p, group["rho"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p, _ in weights])
        before = [p.clone() for p, _ in weights]
        for p, rho in weights:
            p.add_(p.grad * (rho / (norm + 1e-12)))
        closure()  # the same images and dropout masks; batch-norm statistics are not updated
        for (p, _), weight in zip(weights, before, strict=True):
            p.copy_(weight)
        super().step()


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of images (B, 1, 8, 8) in 0..1 and labels (B,): 1,437 digits to train on, 360 to evaluate."""
    pixels, labels = load_digits(return_X_y=True)
    images, targets = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.Generator().manual_seed(0)
    train = DataLoader(TensorDataset(images[:1437], targets[:1437]), batch_size=64, shuffle=True, generator=order)
    return train, DataLoader(TensorDataset(images[1437:], targets[1437:]), batch_size=256)


def make_model() -> nn.Module:
    """Return a small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10)
    )


def main(accumulation_steps: str = "4", duration: str = "5 epochs") -> nn.Module:
    """Train the network on digits and return it."""
    model, (train, evaluation) = make_model(), loaders()
    optimizer = SAM(model.parameters(), rho=0.05, lr=0.1, momentum=0.9)
    number = int(accumulation_steps)
    trainer = Trainer(model, train, optimizer, eval_loader=evaluation, accumulation_steps=number, duration=duration)
    result = trainer.fit()
    print(f"accuracy {result.metrics['accuracy']:.3f} after {result.steps} steps")
    return trainer.raw_model


if __name__ == "__main__":
    main(*sys.argv[1:])
