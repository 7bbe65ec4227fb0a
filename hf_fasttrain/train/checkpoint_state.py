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
from hf_fasttrain.utils.errors import RunError, UnusableCheckpoint
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import buffer_registry

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
    base_lr: float = 0.0  # what the schedule's factor multiplies; 0: saved by an older version
    num_steps: int = 0  # the training's length when this was saved
    seed: int | None = None  # of masks, and of the epochs of a user's loader; None: saved by an older version
    evaluated_at: int = -1  # step of the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    watched: dict[str, Any] | None = None  # early stopping's best value and its step
    patience_from: int = 0  # step from which early stopping counts, if there was no better value since
    resumed_at: list[int] = field(default_factory=list)
    out_of_memory: list[dict[str, Any]] = field(default_factory=list)  # step, micro-batch before and after


class LossState:
    """What a loss that is a module learns or counts beside the model, which it may hold.

    Frozen weights, a teacher's, belong to it from the first checkpoint before which they were changed on: a loss may
    move them itself, as a momentum encoder's.
    """

    def __init__(self, module: nn.Module, names: set[str], frozen: set[str]) -> None:
        self.module, self.names, self._required = module, names, frozenset(names)
        tensors = module.state_dict()
        self._frozen = {name: _fingerprint(tensors[name]) for name in frozen}

    def buffers(self) -> dict[str, Tensor]:
        """Return name -> buffer, as it is now."""
        return {name: b for name, b in self.module.named_buffers(remove_duplicate=False) if name in self.names}

    def copy(self) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Return the buffers with their values, for `put_back`."""
        kept = []
        for name, buffer in self.buffers().items():
            path, _, own = name.rpartition(".")
            kept.append((buffer_registry(self.module.get_submodule(path)), own, buffer, buffer.detach().clone()))
        return kept

    @torch.no_grad()
    def put_back(self, kept: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
        """Restore the buffers that `copy` has returned; a loss may have replaced some since."""
        for registry, name, buffer, value in kept:
            buffer.copy_(value)
            registry[name] = buffer

    def weights(self) -> dict[str, Tensor]:
        """Return name -> tensor."""
        tensors = self.module.state_dict()
        self.names |= {name for name, before in self._frozen.items() if _fingerprint(tensors[name]) != before}
        return {name: tensors[name] for name in tensors if name in self.names}

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take over saved tensors. Raises KeyError for those of another loss."""
        if not self._required <= weights.keys() <= self._required | self._frozen.keys():
            raise KeyError(f"the loss has {sorted(self.names)}, and the checkpoint {sorted(weights)}")
        self.names |= weights.keys()
        self.module.load_state_dict(weights, strict=False)


def _fingerprint(tensor: Tensor) -> Any:
    """Return a number that changes with a tensor's values; waits for the device."""
    with one_thread():
        return tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64).item()


def state_of(loss: nn.Module | None, model: nn.Module) -> LossState | None:
    """Return the state of a loss beside its model's; None if it is no module, or has none."""
    if loss is None:
        return None
    of_model = set(map(id, model.state_dict(keep_vars=True).values()))
    tensors = loss.state_dict(keep_vars=True).items()
    own = {name: tensor for name, tensor in tensors if isinstance(tensor, Tensor) and id(tensor) not in of_model}
    frozen = {name for name, tensor in own.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad}
    return LossState(loss, own.keys() - frozen, frozen) if own else None


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
        of_loss = self.loss.weights() if self.loss is not None else {}
        return {**weights, LOSS: of_loss} if of_loss else weights

    def training(self) -> dict[str, Any]:
        """Return the states of optimizer and scaler, and what each process has of its own; called by all processes."""
        own: dict[str, Any] = {"loader": self.loader.state_dict()}
        if self.processes.is_distributed:
            statistics = {kind: running_statistics(module) for kind, module in self._modules.items()}
            own["statistics"] = {k: {n: t.cpu() for n, t in named.items()} for k, named in statistics.items()}
            own[LOSS] = {n: t.cpu() for n, t in self.loss.buffers().items()} if self.loss is not None else {}
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
        """Take over a checkpoint; UnusableCheckpoint if it is of another model, or its states are damaged."""
        try:
            self.restore_weights(checkpoint)
            with one_thread():
                restore_optimizer(self.optimizer, checkpoint.training["optimizer"])
            if self.scaler is not None and checkpoint.training["scaler"] is not None:
                self.scaler.load_state_dict(checkpoint.training["scaler"])
            self._restore_own(checkpoint.training["own"])
        except RunError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            text = f"can't resume {checkpoint.path}: it is of another model or optimizer: {error}"
            raise UnusableCheckpoint(text) from None

    def _restore_own(self, own: list[dict[str, Any]]) -> None:
        """Take over what each process had of its own: statistics where there are as many processes as then."""
        now = self.processes.number
        if len(own) == now:
            mine = own[self.processes.index]
            for kind, statistics in mine.get("statistics", {}).items():
                self._modules[kind].load_state_dict(statistics, strict=False)
            if self.loss is not None:
                self.loss.module.load_state_dict(mine.get(LOSS, {}), strict=False)
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
