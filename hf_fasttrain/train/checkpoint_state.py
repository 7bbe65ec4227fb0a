"""The state that a checkpoint holds: gathered for saving, restored on resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.data.loading.user_loader import NO_POSITION, UserLoader
from hf_fasttrain.models.lora import adapter_state, load_merged, load_ordinary, merged_state
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
ADAPTERS = "_lora"  # end of the names of files with adapters


@dataclass
class State:
    """The state of a training besides weights and optimizer."""

    step: int = 0  # optimizer steps done; the only clock
    updates: int = 0  # steps with an update (fp16 skips some); lr and EMA depend on it
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
    calibration: dict[str, Any] | None = None  # `Calibration` of the last evaluation


class LossState:
    """The weights and buffers of a loss module, without those of the model, which it may contain.

    Frozen weights are included once they have changed: a loss may update them itself, as with a momentum encoder.
    """

    def __init__(self, module: nn.Module, names: set[str], frozen: set[str]) -> None:
        self.module, self.names, self._required = module, names, frozenset(names)
        tensors = module.state_dict()
        self._frozen = {name: _sum(tensors[name]) for name in frozen}

    def buffers(self) -> dict[str, Tensor]:
        """Return name -> buffer."""
        return {name: b for name, b in self.module.named_buffers(remove_duplicate=False) if name in self.names}

    def copy(self) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Return the buffers with their values, for `restore_buffers`."""
        copies = []
        for name, buffer in self.buffers().items():
            path, _, key = name.rpartition(".")
            copies.append((buffer_registry(self.module.get_submodule(path)), key, buffer, buffer.detach().clone()))
        return copies

    @torch.no_grad()
    def restore_buffers(self, copies: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
        """Restore the buffers that `copy` has returned; a loss may have replaced some since."""
        for registry, name, buffer, value in copies:
            buffer.copy_(value)
            registry[name] = buffer

    def weights(self) -> dict[str, Tensor]:
        """Return name -> tensor."""
        tensors = self.module.state_dict()
        self.names |= {name for name, old_sum in self._frozen.items() if _sum(tensors[name]) != old_sum}
        return {name: tensors[name] for name in tensors if name in self.names}

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Load saved tensors. Raises KeyError for those of another loss."""
        if not self._required <= weights.keys() <= self._required | self._frozen.keys():
            raise KeyError(f"the loss has {sorted(self.names)}, and the checkpoint {sorted(weights)}")
        self.names |= weights.keys()
        self.module.load_state_dict(weights, strict=False)


def _sum(tensor: Tensor) -> Any:
    """Return the sum of a tensor, by which a change of its values is noticed; waits for the device."""
    with one_thread():
        return tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64).item()


def loss_state_of(loss: nn.Module | None, model: nn.Module) -> LossState | None:
    """Return the state of a loss without that of the model; None if it is not a module or has no state."""
    if loss is None:
        return None
    model_ids = set(map(id, model.state_dict(keep_vars=True).values()))
    tensors = loss.state_dict(keep_vars=True).items()
    loss_tensors = {
        name: tensor for name, tensor in tensors if isinstance(tensor, Tensor) and id(tensor) not in model_ids
    }
    frozen = {
        name for name, tensor in loss_tensors.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }
    return LossState(loss, loss_tensors.keys() - frozen, frozen) if loss_tensors else None


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
        """Return the tensors of the model, the moving average and the loss; called by all processes.

        Adapters are merged, so that a checkpoint's model is an ordinary one, and stand beside it for resuming.
        Their batch-norm statistics are averaged over the processes; those in the processes' models do not change.
        """
        modules = self._modules.items()
        weights = {name: self._ordinary_state(module) for name, module in modules}
        weights |= {name + ADAPTERS: state for name, m in modules if (state := adapter_state(m))}
        loss_weights = self.loss.weights() if self.loss is not None else {}
        return {**weights, LOSS: loss_weights} if loss_weights else weights

    def _ordinary_state(self, module: nn.Module) -> dict[str, Tensor]:
        return {**merged_state(module), **averaged_statistics(module, self.processes)}

    @property
    def _final_module(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def final_weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the model that is evaluated and saved, and of the loss; called by all processes."""
        loss_weights = self.loss.weights() if self.loss is not None else {}
        weights = {"model": self._ordinary_state(self._final_module)}
        return {**weights, LOSS: loss_weights} if loss_weights else weights

    def load_final_weights(self, weights: dict[str, dict[str, Tensor]]) -> None:
        """Load the result of `final_weights`, or a mean of several; adapters are merged."""
        with one_thread():
            load_ordinary(self._final_module, weights["model"])
            if self.loss is not None:
                self.loss.restore(weights.get(LOSS, {}))

    def training(self) -> dict[str, Any]:
        """Return the states of optimizer and scaler, and the state of each process; called by all processes."""
        process_state: dict[str, Any] = {"loader": self.loader.state_dict()}
        if self.processes.is_distributed:
            statistics = {kind: running_statistics(module) for kind, module in self._modules.items()}
            process_state["statistics"] = {k: {n: t.cpu() for n, t in named.items()} for k, named in statistics.items()}
            process_state[LOSS] = {n: t.cpu() for n, t in self.loss.buffers().items()} if self.loss is not None else {}
        return {
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "own": self.processes.gather([process_state]),
        }

    def restore_weights(self, checkpoint: Checkpoint) -> None:
        """Load the weights, the moving average and the statistics of a checkpoint of this training."""
        with one_thread():
            for kind, module in self._modules.items():
                load_merged(module, checkpoint.weights[kind], checkpoint.weights.get(kind + ADAPTERS, {}))
            if self.loss is not None:
                self.loss.restore(checkpoint.weights.get(LOSS, {}))
            elif LOSS in checkpoint.weights:
                raise KeyError("the checkpoint has the weights of a loss, and this loss has none")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint. Raises UnusableCheckpoint if it is of another model, or its states are damaged."""
        try:
            self.restore_weights(checkpoint)
            with one_thread():
                restore_optimizer(self.optimizer, checkpoint.training["optimizer"])
            if self.scaler is not None and checkpoint.training["scaler"] is not None:
                self.scaler.load_state_dict(checkpoint.training["scaler"])
            self._restore_process_states(checkpoint.training["own"])
        except RunError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            text = f"can't resume {checkpoint.path}: it is of another model or optimizer: {error}"
            raise UnusableCheckpoint(text) from None

    def _restore_process_states(self, states: list[dict[str, Any]]) -> None:
        """Load the state of each process: statistics only if the number of processes is the same."""
        num_processes = self.processes.number
        if len(states) == num_processes:
            state = states[self.processes.index]
            for kind, statistics in state.get("statistics", {}).items():
                self._modules[kind].load_state_dict(statistics, strict=False)
            if self.loss is not None:
                self.loss.module.load_state_dict(state.get(LOSS, {}), strict=False)
            self.loader.load_state_dict(state["loader"])
        elif isinstance(self.loader, UserLoader):
            self.loader.load_state_dict(states[0]["loader"], same_processes=False)

    @property
    def can_resume_here(self) -> bool:
        """Whether a checkpoint of the current step could be resumed: a user's loader may not store its position."""
        if not isinstance(self.loader, UserLoader):
            return True
        return self.loader.is_between_epochs if self.processes.has_left_others else self.loader.can_resume_here

    def reason_to_skip(self, checkpoint: Checkpoint) -> str | None:
        """Return why a user's loader can't continue from a checkpoint, None if it can."""
        states, num_processes = checkpoint.training["own"], self.processes.number
        if not isinstance(self.loader, UserLoader):
            return None
        if self.loader.can_resume(states[0]["loader"], same_processes=len(states) == num_processes):
            return None
        has_position = states[0]["loader"] is not None and states[0]["loader"]["loader"] is not None
        if has_position and self.loader.keeps_position:
            return (
                f"is within an epoch, and its position was saved by {len(states)} processes, now there are "
                f"{num_processes}"
            )
        return f"is within an epoch, and {NO_POSITION}"

    def require_finite(self, step: int) -> None:
        """Raise RunError if a weight is NaN or inf; waits for the device."""
        floating = [p for p in self.model.parameters() if p.is_floating_point()]
        with one_thread():
            largest = torch.nn.utils.get_total_norm([p.detach() for p in floating], float("inf"))
        if not torch.isfinite(largest):
            raise RunError(
                f"weights are NaN or inf after step {step}: lower optimizer.lr or set optimizer.clip_norm; the "
                "checkpoints have not changed"
            )
