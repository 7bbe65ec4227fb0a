"""An optimizer step in its two halves: the gradients of the mean loss over its images, and the update they make."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fasttrain.data.loading.loader import Step, Timer, no_timer
from hf_fasttrain.train.batch_norm import frozen_norms_note
from hf_fasttrain.train.checkpoint_state import State, state_of
from hf_fasttrain.train.closure import wants_closure, wants_graph
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.gradients import Gradients
from hf_fasttrain.train.mean_check import mean_note
from hf_fasttrain.train.optim import (
    follow_parameters,
    foreign_parameters,
    names_not_optimized,
    require_parameters_of,
    scale_new_groups,
)
from hf_fasttrain.train.out_of_memory import Memory
from hf_fasttrain.train.step_loss import (
    At,
    LossOfLogits,
    Shares,
    StepLoss,
    module_of,
    named_parameters,
    wraps_loss,
)
from hf_fasttrain.train.update import Update
from hf_fasttrain.utils.errors import RunError, shortened

OF_LOSS = "give the loss as a torch.nn.Module that has them, or as a method of one"


class TrainStep:
    """Makes the steps of `model`, which is moved to the accelerator's device and wrapped, with `optimizer`.

    The phases of a step that can be timed are forward, backward and optimizer; by default nothing is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step_loss: StepLoss | LossOfLogits,
        processes: Processes,
        state: State,
        *,
        seed: int | None,
        clip_norm: float | None,
        ema: Ema | None,
    ) -> None:
        self.accelerator, self.processes, self.state = accelerator, processes, state
        self.given_seed = seed
        # By default what torch.manual_seed has set, or what torch has drawn; on all processes the main one's.
        state.seed = processes.gather([torch.initial_seed()])[0] if seed is None else int(seed)
        self.device = accelerator.device
        loss = module_of(step_loss)
        before = named_parameters(model, loss)
        self.raw_model = model.to(self.device)
        if loss is not None:
            loss.to(self.device)
        wrapped = _wrapped(accelerator, model, alone=wraps_loss(step_loss))
        named = named_parameters(self.raw_model, loss)
        follow_parameters(optimizer, before, named)
        require_parameters_of(optimizer, named)
        self._foreign = len(foreign_parameters(optimizer, named.values()))
        if self._foreign and processes.is_distributed:
            raise RunError(f"{self._foreign_note}: several processes do not exchange their gradients; {OF_LOSS}")
        _require_possible(optimizer, accelerator)
        optimizer = optimizer if accelerator.scaler is None else accelerator.prepare(optimizer)
        if ema is not None:
            ema.attach(self.raw_model)  # where it lies now
            processes.broadcast_from_main(ema.module.state_dict().values())  # as DDP does with the model's weights
        self.accumulation = Gradients(accelerator, wrapped, self.raw_model, step_loss, processes)
        self.accumulation.keeps_graph = wants_graph(optimizer)
        self.norms, self.parameters = self.accumulation.norms, self.accumulation.parameters
        self.loss_state = state_of(loss, self.raw_model)
        self.memory = Memory(self.raw_model.buffers(), self.parameters, self.norms, processes, self.loss_state)
        self.applying = Update(accelerator, optimizer, self.parameters, self.memory, clip_norm=clip_norm, ema=ema)
        self.is_settled = False  # whether it is known which parameters are trained
        self._known = list(self.accumulation.named_parameters().values())
        self._given = [parameter.requires_grad for parameter in self._known]  # as `settle` has found them, and
        self._trained = self._given  # without those that forward does not use
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._num_given_groups = len(optimizer.param_groups)
        self._has_gradients = self._has_compared = self._has_settled = False
        self._step: Step | None = None  # whose gradients are there
        self.steps_per_epoch, self.num_steps = 1, 0  # which a step loss is told
        self.time_by(no_timer)

    def time_by(self, timer: Timer) -> None:
        """Time the phases of steps from now on."""
        self._timer = timer
        self.accumulation.timer = None if timer is no_timer else timer

    @property
    def model(self) -> nn.Module:
        """The model that gives the outputs of training: `raw_model` wrapped by the accelerator."""
        return self.accumulation.model

    @property
    def uniform_loss(self) -> Tensor | None:
        """The loss of the first images, if all classes were equally likely; None where that is not known."""
        step_loss = self.accumulation.step_loss
        return step_loss.uniform if isinstance(step_loss, LossOfLogits) else None

    @property
    def returns_values(self) -> bool:
        """Whether the step loss may return values for the log."""
        return not isinstance(self.accumulation.step_loss, LossOfLogits)

    @property
    def values(self) -> Shares:
        """This process's part of what the step loss has returned for the log, on the device."""
        return self.accumulation.values

    @property
    def for_loader(self) -> dict[str, Any]:
        """What a `UserLoader` must know of the steps that it gives."""
        total = self.processes.sum if self.processes.is_distributed else None
        return {"join_single": bool(self.norms), "total": total, "begin_epoch": self.seed_epoch}

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
        self._has_gradients, self._step = True, step
        if self.applying.wants_closure:
            step.micro_batches.retain()
        return self._add_up(step)

    def _add_up(self, step: Step) -> Tensor:
        self.seed_masks(step.index)
        return self.accumulation.add_up(step, self.at(step), agree=self.memory.is_uncertain(step))

    def at(self, step: Step) -> At:
        """Return where training is in a step."""
        return At(step.index + 1, self.state.updates, step.index // self.steps_per_epoch, self.num_steps)

    def _add_up_again(self) -> Tensor:
        """Add up the gradients of the present step once more; return its mean loss over all processes."""
        assert self._step is not None
        values = self.accumulation.values  # those of the first pass are logged
        loss = self.processes.add_up(self._add_up(self._step))
        self.accumulation.values = values
        return loss

    def update(self) -> None:
        """Clip the gradients, step the optimizer and move the average; count the update unless fp16 skips it."""
        if self._step is None:
            raise RunError("step.update() without step.gradients(step) before it: there is nothing to update with")
        with self._timer("optimizer"):
            self.applying(self.state.updates, self._step.index, self._add_up_again)
        self._has_gradients, self._step = False, None
        self.state.updates += not self.applying.skipped

    def seed_masks(self, index: int) -> None:
        """Seed what dropout and drop-path draw from in the step with an index."""
        key = self._key(index)
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(key)
        if self.accumulation.keeps_graph and hasattr(
            self.optimizer, "generator"
        ):  # Adahessian's, which it doesn't save
            self.optimizer.generator.manual_seed(key)
            self.optimizer.seed = key  # for the one that it makes on the device

    def seed_epoch(self, epoch: int) -> None:
        """Seed what a user's loader draws an epoch's order and augmentation from; not the first one's.

        The first epoch goes on from where torch's generator is, as in a loop of one's own. Later ones would go on from
        the masks of the step before, which a resumed run does not make.
        """
        if epoch:
            torch.default_generator.manual_seed(self._key(-1 - epoch))

    def _key(self, index: int) -> int:
        return ((int(self.state.seed or 0) * 1_000_003 + index) * 65_537 + self.processes.index) % 2**63

    def settle(self, step: Step) -> list[str]:
        """Find out which parameters are trained; return notes on the others.

        Called before the first step, and before one from which on other parameters require gradients.
        """
        self._given = [parameter.requires_grad for parameter in self._known]
        frozen_norms = None if self._has_settled else frozen_norms_note(self.raw_model)  # as they were given
        notes = self.accumulation.leave_out_unused(step)  # memory may be too short for the step's images
        notes += self.split_notes(step)
        notes += [frozen_norms] if frozen_norms else []
        if self._foreign:
            notes.append(f"{self._foreign_note}: they are trained, but neither clipped nor saved; {OF_LOSS}")
        self.is_settled = self._has_settled = True
        self._trained = [parameter.requires_grad for parameter in self._known]
        self._group_sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        self.accumulation.set_train_mode()  # batch norms follow their weights
        named = self.accumulation.named_parameters()
        missing = names_not_optimized(self.optimizer, named)
        self.applying.ignore([named[name] for name in missing])
        if missing:
            notes.append(
                f"the optimizer has not been given {len(missing):,} of the model's {len(self.parameters):,} trainable "
                f"parameters ({shortened(missing, 3)}): they stay as they are"
            )
        return notes

    @property
    def _foreign_note(self) -> str:
        return f"the optimizer has {self._foreign:,} parameters that are neither the model's nor the loss's"

    def follow_changes(self, lr: float, base: float) -> None:
        """Notice whether, since the last step, parameters were frozen or unfrozen, or groups given to the optimizer.

        Then `is_settled` is False. `lr` is the schedule's in the step that comes, `base` what it is a share of. Called
        before each step: it asks each parameter, and waits for nothing.
        """
        scale_new_groups(self.optimizer, lr, base)
        trained = [parameter.requires_grad for parameter in self._known]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if (trained == self._trained and sizes == self._group_sizes) or not self.is_settled:
            return
        if trained == self._given and sizes == self._group_sizes:  # unfrozen anew, though forward does not use them
            for parameter, requires_grad in zip(self._known, self._trained, strict=True):
                parameter.requires_grad_(requires_grad)
        else:
            self.is_settled = False

    def trainable_state(self) -> dict[str, Any]:
        """Return the names of frozen parameters, and of those in each of the optimizer's groups (None: of others)."""
        named = self.accumulation.named_parameters()
        unused = {
            id(p) for p, was, is_ in zip(self._known, self._given, self._trained, strict=False) if was and not is_
        }
        names = {id(parameter): name for name, parameter in named.items()}
        return {
            "frozen": [name for name, p in named.items() if not p.requires_grad and id(p) not in unused],
            "groups": [[names.get(id(p)) for p in group["params"]] for group in self.optimizer.param_groups],
        }

    def restore_trainable(self, state: dict[str, Any]) -> str | None:
        """Freeze and unfreeze parameters, and add groups to the optimizer, as `trainable_state` has found them.

        Returns a note if parameters were frozen or unfrozen. Raises RunError for groups of unknown parameters.
        """
        named, groups = self.accumulation.named_parameters(), self.optimizer.param_groups
        for group in groups[max(len(state["groups"]), self._num_given_groups) :]:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
        del groups[max(len(state["groups"]), self._num_given_groups) :]
        for number, names in enumerate(state["groups"][len(groups) :], start=len(groups)):
            if not all(name in named for name in names):
                raise RunError(
                    f"the optimizer's group {number} was added while training, of parameters that are neither the "
                    "model's nor the loss's: give it to the optimizer from the start"
                )
            self.optimizer.add_param_group({"params": [named[name] for name in names]})
        frozen = set(state["frozen"])
        changed = [name for name, parameter in named.items() if parameter.requires_grad == (name in frozen)]
        for name in changed:
            named[name].requires_grad_(name not in frozen)
        if not changed:
            return None
        return (
            f"{len(changed):,} parameters were frozen or unfrozen when the checkpoint was saved, and are so again "
            f"({shortened(changed, 3)})"
        )

    def split_notes(self, step: Step) -> list[str]:
        """Return a note, at the first step that is split, if its loss depends on that. Raises RunError for a sum."""
        is_split = step.num_micro_batches > 1 or self.processes.is_distributed
        if self._has_compared or not is_split:
            return []
        note, error = "", None
        first = step.micro_batches.peek()
        arguments = (self.accumulation.step_loss, self.raw_model)
        if first is not None:
            try:
                note = mean_note(*arguments, *first, self.at(step))
            except RunError as raised:
                error = raised
        if self.processes.any_process(error is not None):
            raise error or RunError("another process's loss is a sum over its images; return the mean")
        self._has_compared = True  # not before: where memory runs out, a smaller step is compared
        return [note] if note else []

    def undo(self) -> None:
        """Undo a failed step."""
        self.applying.undo()
        self._has_gradients = False
        self.accumulation.set_train_mode()


def _require_possible(optimizer: Any, accelerator: Accelerator) -> None:
    """Raise RunError for an optimizer with modes, or one that makes passes or wants a graph where it can't."""
    name = type(optimizer).__name__
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise RunError(
            f"optimizer {name} has the modes train() and eval(), with other weights in each, which are not switched "
            "here: evaluations and checkpoints would have those of training; use another optimizer"
        )
    if accelerator.scaler is not None and (wants_closure(optimizer) or wants_graph(optimizer)):
        raise RunError(f"optimizer {name} makes several passes a step, and fp16's loss scale one: use bf16, or no")
    if accelerator.num_processes > 1 and wants_graph(optimizer):
        raise RunError(f"optimizer {name} differentiates gradients, which several processes can't exchange; use one")


def _wrapped(accelerator: Accelerator, model: nn.Module, *, alone: bool) -> nn.Module:
    """Return the model wrapped by the accelerator; `alone`: without DistributedDataParallel.

    Raises RunError for a precision that the device does not have.
    """
    with warnings.catch_warnings():  # of an argument that accelerate always passes on
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        prepared = accelerator.prepare_model(model, evaluation_mode=alone)
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise RunError(
            f"{accelerator.mixed_precision} has no effect on {accelerator.device}; use mixed_precision no or bf16"
        )
    if accelerator.num_processes == 1 and isinstance(prepared, DistributedDataParallel):
        return prepared.module  # nobody to exchange with, and after a failed backward it takes no other
    return prepared
