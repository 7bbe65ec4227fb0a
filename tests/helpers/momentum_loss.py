"""A step loss with all that a loss may keep: weights that it learns, a buffer, a teacher that follows the model."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fasttrain.train.step_loss import At


class MomentumLoss(nn.Module):
    """Cross-entropy, the distance of logits from their class's centre, and that from an averaged teacher's."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.centers = nn.Parameter(torch.linspace(-1, 1, 100).view(10, 10))
        self.teacher = timm.create_model("test_vit", num_classes=10, img_size=32).eval().requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor, at: At) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images (B, 3, 32, 32) with targets (B,) or (B, 10), and the distance for the log."""
        self.count += 1
        for old, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
            old.data.lerp_(new.data, 0.1)
        logits, classes = model(images), targets if targets.ndim == 2 else F.one_hot(targets, 10).float()
        distance = (logits - classes @ self.centers).square().sum(1).mean()
        teaching = (logits - self.teacher(images)).square().mean()
        return F.cross_entropy(logits, targets) + 0.1 * distance + teaching, {"distance": distance.detach()}
