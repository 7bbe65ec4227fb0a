"""An optimizer step in its two halves: the gradients of the mean loss over its images, and the update they make."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fasttrain.data.loading.loader import Step, Timer, no_timer
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.gradients import Gradients
from hf_fasttrain.train.loss import Loss
from hf_fasttrain.train.optim import follow_parameters, names_not_optimized, require_parameters_of
from hf_fasttrain.train.out_of_memory import Memory
from hf_fasttrain.train.update import Update
from hf_fasttrain.utils.errors import RunError, shortened


class TrainStep:
    """Makes the steps of `model`, which is moved to the accelerator's device and wrapped, with `optimizer`.

    The phases of a step that can be timed are forward, backward and optimizer; by default nothing is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        processes: Processes,
        state: State,
        *,
        seed: int,
        clip_norm: float | None,
        ema: Ema | None,
    ) -> None:
        self.accelerator, self.processes, self.state, self.seed = accelerator, processes, state, seed
        self.device = accelerator.device
        before = dict(model.named_parameters())
        self.raw_model = model.to(self.device)
        wrapped = _wrapped(accelerator, model)
        follow_parameters(optimizer, before, self.raw_model)
        require_parameters_of(optimizer, self.raw_model)
        optimizer = optimizer if accelerator.scaler is None else accelerator.prepare(optimizer)
        if ema is not None:
            ema.attach(self.raw_model)  # where it lies now
            processes.broadcast_from_main(ema.module.state_dict().values())  # as DDP does with the model's weights
        self.accumulation = Gradients(accelerator, wrapped, self.raw_model, loss, processes)
        self.norms, self.parameters = self.accumulation.norms, self.accumulation.parameters
        self.memory = Memory(self.raw_model, self.parameters, self.norms, processes)
        self.applying = Update(accelerator, optimizer, self.parameters, self.memory, clip_norm=clip_norm, ema=ema)
        self.is_settled = False  # whether it is known which parameters are trained
        self._has_gradients = False
        self._index = 0  # of the step whose gradients are there
        self.time_by(no_timer)

    def time_by(self, timer: Timer) -> None:
        """Time the phases of steps from now on."""
        self._timer = self.accumulation.timer = timer

    @property
    def model(self) -> nn.Module:
        """The model that gives the logits of training: `raw_model` wrapped by the accelerator."""
        return self.accumulation.model

    @property
    def optimizer(self) -> Any:
        """The optimizer, Accelerate's where fp16 scales the loss."""
        return self.applying.optimizer

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last update's gradients, 0-d, on the device; None where fp16 has scaled it."""
        return self.applying.grad_norm

    @property
    def skipped(self) -> bool:
        """Whether the last update was not made: fp16's gradients overflowed."""
        return self.applying.skipped

    def gradients(self, step: Step) -> Tensor:
        """Add up a step's gradients; return this process's part of the mean loss over its images, 0-d, on the device.

        The same gradients however often it is called: dropout and drop-path masks are a function of (seed, step,
        process), so that no random state needs saving.
        """
        if self._has_gradients:  # of an earlier pass, or of a step that an exception has ended
            self.applying.zero_grad()
        self._has_gradients, self._index = True, step.index
        self.seed_masks(step.index)
        return self.accumulation.add_up(step, agree=self.memory.is_uncertain(step))

    def update(self) -> None:
        """Clip the gradients, step the optimizer and move the average; count the update unless fp16 skips it."""
        with self._timer("optimizer"):
            self.applying(self.state.updates, self._index)
        self._has_gradients = False
        self.state.updates += not self.applying.skipped

    def seed_masks(self, index: int) -> None:
        """Seed what dropout and drop-path draw from in the step with an index."""
        key = ((self.seed * 1_000_003 + index) * 65_537 + self.processes.index) % 2**63
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(key)

    def settle(self, step: Step) -> list[str]:
        """Find out, before the first step, which parameters are trained; return notes on the others."""
        notes = self.accumulation.leave_out_unused(step)  # memory may be too short for the step's images
        self.is_settled = True
        missing = names_not_optimized(self.optimizer, self.raw_model)
        if missing:
            self.applying.ignore([self.raw_model.get_parameter(name) for name in missing])
            notes.append(
                f"the optimizer has not been given {len(missing):,} of the model's {len(self.parameters):,} trainable "
                f"parameters ({shortened(missing, 3)}): they stay as they are"
            )
        return notes

    def undo(self) -> None:
        """Undo a failed step."""
        self.applying.undo()
        self._has_gradients = False
        self.accumulation.set_train_mode()


def _wrapped(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Return the model wrapped by the accelerator. Raises RunError for a precision that the device does not have."""
    with warnings.catch_warnings():  # of an argument that accelerate always passes on
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        prepared = accelerator.prepare_model(model)
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise RunError(
            f"{accelerator.mixed_precision} has no effect on {accelerator.device}; use mixed_precision no or bf16"
        )
    if accelerator.num_processes == 1 and isinstance(prepared, DistributedDataParallel):
        return prepared.module  # nobody to exchange with, and after a failed backward it takes no other
    return prepared
