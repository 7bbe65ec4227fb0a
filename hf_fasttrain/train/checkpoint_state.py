"""All that a checkpoint holds of a training: gathered for saving, restored on resuming."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.data.loading.user_loader import NO_POSITION, UserLoader
from hf_fasttrain.run_folder.checkpoint import Checkpoint
from hf_fasttrain.train.batch_norm import averaged_statistics, running_statistics
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.optim import optimizer_state, restore_optimizer
from hf_fasttrain.utils.environment import one_thread
from hf_fasttrain.utils.errors import RunError

LOSS = "loss"  # file of a checkpoint with what the loss learns


@dataclass
class State:
    """What changes while training, beside weights and optimizer."""

    step: int = 0  # optimizer steps done; the only clock
    updates: int = 0  # steps whose update was made: fp16 skips some; lr and EMA follow this
    images: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    lr: float = 0.0  # of the last step
    num_steps: int = 0  # the training's length when this was saved
    seed: int | None = None  # of masks, and of the epochs of a user's loader; None: saved by an older version
    evaluated_at: int = -1  # step of the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    watched: dict[str, Any] | None = None  # early stopping's best value and its step
    patience_from: int = 0  # step from which early stopping counts, if there was no better value since
    resumed_at: list[int] = field(default_factory=list)
    out_of_memory: list[dict[str, Any]] = field(default_factory=list)  # step, micro-batch before and after


@dataclass(frozen=True)
class LossState:
    """What a loss that is a module learns or counts: neither the frozen weights of a teacher in it, nor constants."""

    module: nn.Module
    names: frozenset[str]

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers, as they are now."""
        return [buffer for name, buffer in self.module.named_buffers() if name in self.names]

    def weights(self) -> dict[str, Tensor]:
        """Return name -> tensor."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name in self.names}

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take over saved tensors. Raises KeyError for those of another loss."""
        if weights.keys() != self.names:
            raise KeyError(f"the loss has {sorted(self.names)}, and the checkpoint {sorted(weights)}")
        self.module.load_state_dict(weights, strict=False)


def state_of(loss: nn.Module | None) -> LossState | None:
    """Return the state of a loss; None if it is no module, or has none."""
    if loss is None:
        return None
    frozen = {name for name, p in loss.named_parameters(remove_duplicate=False) if not p.requires_grad}
    names = frozenset(loss.state_dict().keys() - frozen)
    return LossState(loss, names) if names else None


@dataclass(frozen=True)
class TrainingObjects:
    """The objects of a training that have a state."""

    processes: Processes
    model: nn.Module
    ema: Ema | None
    optimizer: Any
    scaler: Any  # fp16's loss scaler, or None
    loader: Any
    loss: LossState | None = None

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, **({"ema": self.ema.module} if self.ema is not None else {})}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the model, and of its moving average; called by all processes.

        Batch-norm statistics in them are the means of all processes'; the processes' own go on as they are.
        """
        modules = self._modules.items()
        weights = {kind: {**m.state_dict(), **averaged_statistics(m, self.processes)} for kind, m in modules}
        return weights if self.loss is None else {**weights, LOSS: self.loss.weights()}

    def training(self) -> dict[str, Any]:
        """Return the states of optimizer and scaler, and what each process has of its own; called by all processes."""
        own: dict[str, Any] = {"loader": self.loader.state_dict()}
        if self.processes.is_distributed:
            statistics = {kind: running_statistics(module) for kind, module in self._modules.items()}
            own["statistics"] = {k: {n: t.cpu() for n, t in named.items()} for k, named in statistics.items()}
        return {
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "own": self.processes.gather([own]),
        }

    def restore_weights(self, checkpoint: Checkpoint) -> None:
        """Take over the weights, the moving average and all statistics of a checkpoint of this training."""
        with one_thread():
            for kind, module in self._modules.items():
                module.load_state_dict(checkpoint.weights[kind])
            if self.loss is not None:
                self.loss.restore(checkpoint.weights.get(LOSS, {}))
            elif LOSS in checkpoint.weights:
                raise KeyError("the checkpoint has the weights of a loss, and this loss has none")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint; RunError if it is of another model."""
        try:
            self.restore_weights(checkpoint)
            with one_thread():
                restore_optimizer(self.optimizer, checkpoint.training["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(f"can't resume {checkpoint.path}: it is of another model or optimizer: {error}") from None
        if self.scaler is not None and checkpoint.training["scaler"] is not None:
            self.scaler.load_state_dict(checkpoint.training["scaler"])
        self._restore_own(checkpoint.training["own"])

    def _restore_own(self, own: list[dict[str, Any]]) -> None:
        """Take over what each process had of its own: statistics where there are as many processes as then."""
        now = self.processes.number
        if len(own) == now:
            mine = own[self.processes.index]
            for kind, statistics in mine.get("statistics", {}).items():
                self._modules[kind].load_state_dict(statistics, strict=False)
            self.loader.load_state_dict(mine["loader"])
        elif isinstance(self.loader, UserLoader):
            self.loader.load_state_dict(own[0]["loader"], same_processes=False)

    @property
    def can_resume_here(self) -> bool:
        """Whether a checkpoint of the present step could be resumed: a user's loader may keep no position."""
        return not isinstance(self.loader, UserLoader) or self.loader.can_resume_here

    def why_not(self, checkpoint: Checkpoint) -> str | None:
        """Return why training can't go on from a checkpoint, as far as a user's loader is concerned; None if it can."""
        own, now = checkpoint.training["own"], self.processes.number
        if not isinstance(self.loader, UserLoader):
            return None
        if self.loader.can_resume(own[0]["loader"], same_processes=len(own) == now):
            return None
        position = own[0]["loader"] is not None and own[0]["loader"]["loader"] is not None
        if position and self.loader.keeps_position:
            return f"is within an epoch, and its position was saved by {len(own)} processes, now there are {now}"
        return f"is within an epoch, and {NO_POSITION}"

    def require_finite(self, step: int) -> None:
        """Raise RunError if a weight is no finite number; waits for the device."""
        floating = [p for p in self.model.parameters() if p.is_floating_point()]
        with one_thread():
            largest = torch.nn.utils.get_total_norm([p.detach() for p in floating], float("inf"))
        if not torch.isfinite(largest):
            raise RunError(
                f"weights are no finite numbers after step {step}: lower optimizer.lr or set optimizer.clip_norm; "
                "the checkpoints are as they were"
            )
