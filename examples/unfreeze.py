"""Gradual unfreezing: trains the head first, then the backbone too, with a tenth of the lr.

    python examples/unfreeze.py [section.key=value ...]

The recipe freezes the backbone (`model.freeze_backbone`), so the optimizer has only the head. A callback adds the
backbone's parameters in new groups; clipping, batch norms and synchronisation between processes adapt. The callback
needs no state: checkpoints store which parameters are frozen and which groups exist.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_fasttrain import Callback, Result, Trainer

if TYPE_CHECKING:
    from hf_fasttrain.train.step_loss import At


class Unfreeze(Callback):
    """Unfreezes all parameters at an epoch, with `lr_ratio` times the lr of the others."""

    def __init__(self, epoch: int = 1, lr_ratio: float = 0.1, weight_decay: float = 0.05) -> None:
        self.epoch, self.lr_ratio, self.weight_decay = epoch, lr_ratio, weight_decay

    def before_step(self, trainer: Trainer, at: At) -> None:
        frozen = [parameter for parameter in trainer.raw_model.parameters() if not parameter.requires_grad]
        if at.epoch < self.epoch or not frozen:
            return
        for parameter in frozen:
            parameter.requires_grad_(True)
        matrices, vectors = ([p for p in frozen if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
        # norms and biases get no weight decay
        for parameters, weight_decay in ((matrices, self.weight_decay), (vectors, 0.0)):
            group = {"params": parameters, "lr": trainer.lr * self.lr_ratio, "weight_decay": weight_decay}
            trainer.optimizer.add_param_group(group)
        if trainer.accelerator.is_main_process:
            print(f"step {at.step}: {len(frozen)} more parameters are trained")


def main(overrides: Sequence[str]) -> Result:
    """Fine-tune the head for one epoch, then the complete model."""
    return Trainer.from_recipe("finetune", ["model.freeze_backbone=true", *overrides], callbacks=[Unfreeze()]).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
