"""An optimizer step in two halves: the gradients of the mean loss over its images, and the update."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fasttrain.data.loading.loader import Step, Timer, no_timer
from hf_fasttrain.train.batch_norm import frozen_norms_note
from hf_fasttrain.train.checkpoint_state import State, loss_state_of
from hf_fasttrain.train.closure import needs_closure, needs_graph
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.gradients import Gradients
from hf_fasttrain.train.mean_check import mean_note
from hf_fasttrain.train.optim import (
    names_not_optimized,
    replace_parameters,
    require_model_parameters,
    scale_new_groups,
    unknown_parameters,
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

LOSS_HINT = "pass a loss that is a torch.nn.Module with these parameters, or a method of one"


class TrainStep:
    """Runs optimizer steps; moves `model` to the accelerator's device and wraps it.

    A timer can measure the phases forward, backward and optimizer; by default nothing is timed.
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
        self.user_seed = seed
        # By default the seed of torch.manual_seed, or the one that torch drew; the main process's on all processes.
        state.seed = processes.gather([torch.initial_seed()])[0] if seed is None else int(seed)
        self.device = accelerator.device
        loss = module_of(step_loss)
        old_parameters = named_parameters(model, loss)
        self.raw_model = model.to(self.device)
        if loss is not None:
            loss.to(self.device)
        wrapped = _wrap(accelerator, model, without_ddp=wraps_loss(step_loss))
        parameters = named_parameters(self.raw_model, loss)
        replace_parameters(optimizer, old_parameters, parameters)
        require_model_parameters(optimizer, parameters)
        self._num_unknown = len(unknown_parameters(optimizer, parameters.values()))
        if self._num_unknown and processes.is_distributed:
            raise RunError(f"{self._unknown_note}: several processes do not exchange their gradients; {LOSS_HINT}")
        _require_supported(optimizer, accelerator)
        optimizer = optimizer if accelerator.scaler is None else accelerator.prepare(optimizer)
        if ema is not None:
            ema.attach(self.raw_model)  # now on its device
            processes.broadcast_from_main(ema.module.state_dict().values())  # as DDP does with the model's weights
        self.accumulation = Gradients(accelerator, wrapped, self.raw_model, step_loss, processes)
        self.accumulation.keeps_graph = needs_graph(optimizer)
        self.norms, self.parameters = self.accumulation.norms, self.accumulation.parameters
        self.loss_state = loss_state_of(loss, self.raw_model)
        self.memory = Memory(self.raw_model.buffers(), self.parameters, self.norms, processes, self.loss_state)
        self.updater = Update(accelerator, optimizer, self.parameters, self.memory, clip_norm=clip_norm, ema=ema)
        self.is_settled = False  # whether the trainable parameters are known
        self._all_parameters = list(self.accumulation.named_parameters().values())
        self._requires_grad = [parameter.requires_grad for parameter in self._all_parameters]  # before `settle`
        self._trainable = self._requires_grad  # after it, without those that forward does not use
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._num_initial_groups = len(optimizer.param_groups)
        self._has_gradients = self._is_split_checked = self._has_settled = False
        self._step: Step | None = None  # the step that the gradients belong to
        self.steps_per_epoch, self.num_steps = 1, 0  # for the step loss's `at`
        self.time_by(no_timer)

    def time_by(self, timer: Timer) -> None:
        """Time the phases of steps from now on."""
        self._timer = timer
        self.accumulation.timer = None if timer is no_timer else timer

    @property
    def model(self) -> nn.Module:
        """The model that is called in training: `raw_model` wrapped by the accelerator."""
        return self.accumulation.model

    @property
    def uniform_loss(self) -> Tensor | None:
        """The loss of uniform logits for the first images; None if it is not known."""
        step_loss = self.accumulation.step_loss
        return step_loss.uniform if isinstance(step_loss, LossOfLogits) else None

    @property
    def returns_values(self) -> bool:
        """Whether the step loss may return values for the log."""
        return not isinstance(self.accumulation.step_loss, LossOfLogits)

    @property
    def values(self) -> Shares:
        """This process's part of the values that the step loss returned for the log, on the device."""
        return self.accumulation.values

    @property
    def loader_options(self) -> dict[str, Any]:
        """Options for a `UserLoader`."""
        total = self.processes.sum if self.processes.is_distributed else None
        return {"join_single": bool(self.norms), "total": total, "begin_epoch": self.seed_epoch}

    @property
    def optimizer(self) -> Any:
        """The optimizer; with fp16, Accelerate's wrapper."""
        return self.updater.optimizer

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last update's gradients, 0-d, on the device; None if fp16 scaled them without clipping."""
        return self.updater.grad_norm

    @property
    def skipped(self) -> bool:
        """Whether the last update was skipped because fp16's gradients overflowed."""
        return self.updater.skipped

    def gradients(self, step: Step) -> Tensor:
        """Accumulate a step's gradients; return this process's part of its mean loss, 0-d, on the device.

        Repeated calls give the same gradients: dropout and drop-path masks are a function of (seed, step, process),
        so no random state needs saving.
        """
        if self._has_gradients:  # from an earlier pass, or a step that raised an exception
            self.updater.zero_grad()
        self._has_gradients, self._step = True, step
        if self.updater.needs_closure:
            step.micro_batches.retain()
        return self._accumulate(step)

    def _accumulate(self, step: Step) -> Tensor:
        self.seed_masks(step.index)
        return self.accumulation.accumulate(step, self.at(step), check_memory=self.memory.is_uncertain(step))

    def at(self, step: Step) -> At:
        """Return the position in training at a step."""
        return At(step.index + 1, self.state.updates, step.index // self.steps_per_epoch, self.num_steps)

    def _recompute_gradients(self) -> Tensor:
        """Compute the gradients of the current step again; return its mean loss over all processes."""
        assert self._step is not None
        values = self.accumulation.values  # the first pass's are logged
        loss = self.processes.reduce_sum(self._accumulate(self._step))
        self.accumulation.values = values
        return loss

    def update(self) -> None:
        """Clip the gradients, step the optimizer and update the average; count the update unless fp16 skips it."""
        if self._step is None:
            raise RunError("step.update() without step.gradients(step) before it: there are no gradients")
        with self._timer("optimizer"):
            self.updater(self.state.updates, self._step.index, self._recompute_gradients)
        self._has_gradients, self._step = False, None
        self.state.updates += not self.updater.skipped

    def seed_masks(self, index: int) -> None:
        """Seed the generators that dropout and drop-path use in the step with an index."""
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
        """Seed the generator that a user's loader uses for an epoch's order and augmentation, except the first epoch.

        The first epoch uses torch's generator as it is, like a plain loop. Later epochs would depend on the dropout
        masks drawn before, which a resumed run does not draw.
        """
        if epoch:
            torch.default_generator.manual_seed(self._key(-1 - epoch))

    def _key(self, index: int) -> int:
        return ((int(self.state.seed or 0) * 1_000_003 + index) * 65_537 + self.processes.index) % 2**63

    def settle(self, step: Step) -> list[str]:
        """Determine which parameters are trained; return notes on the others.

        Called before the first step, and before a step for which parameters were frozen or unfrozen.
        """
        self._requires_grad = [parameter.requires_grad for parameter in self._all_parameters]
        frozen_norms = None if self._has_settled else frozen_norms_note(self.raw_model)  # before any are frozen here
        notes = self.accumulation.freeze_unused(step)  # memory may be too short for the step's images
        notes += self.split_notes(step)
        notes += [frozen_norms] if frozen_norms else []
        if self._num_unknown:
            notes.append(f"{self._unknown_note}: they are trained, but not clipped and not saved; {LOSS_HINT}")
        self.is_settled = self._has_settled = True
        self._trainable = [parameter.requires_grad for parameter in self._all_parameters]
        self._group_sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        self.accumulation.set_train_mode()  # batch norms follow their weights
        parameters = self.accumulation.named_parameters()
        missing = names_not_optimized(self.optimizer, parameters)
        self.updater.ignore([parameters[name] for name in missing])
        if missing:
            notes.append(
                f"the optimizer does not have {len(missing):,} of the model's {len(self.parameters):,} trainable "
                f"parameters ({shortened(missing, 3)}): they do not change"
            )
        return notes

    @property
    def _unknown_note(self) -> str:
        return f"the optimizer has {self._num_unknown:,} parameters that are neither the model's nor the loss's"

    def detect_changes(self, lr: float, base: float) -> None:
        """Set `is_settled` to False if parameters were frozen or unfrozen or groups added since the last step.

        `lr` is the schedule's value for the coming step, `base` the lr that it is relative to. Called before each step;
        checks each parameter and does not wait for the device.
        """
        scale_new_groups(self.optimizer, lr, base)
        trainable = [parameter.requires_grad for parameter in self._all_parameters]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if (trainable == self._trainable and sizes == self._group_sizes) or not self.is_settled:
            return
        if (
            trainable == self._requires_grad and sizes == self._group_sizes
        ):  # unfrozen anew, though forward does not use them
            for parameter, requires_grad in zip(self._all_parameters, self._trainable, strict=True):
                parameter.requires_grad_(requires_grad)
        else:
            self.is_settled = False

    def trainable_state(self) -> dict[str, Any]:
        """Return the names of frozen parameters, and of those in each optimizer group (None: unknown parameters)."""
        parameters = self.accumulation.named_parameters()
        unused = {
            id(p)
            for p, required_grad, trains in zip(
                self._all_parameters, self._requires_grad, self._trainable, strict=False
            )
            if required_grad and not trains
        }
        names = {id(parameter): name for name, parameter in parameters.items()}
        return {
            "frozen": [name for name, p in parameters.items() if not p.requires_grad and id(p) not in unused],
            "groups": [[names.get(id(p)) for p in group["params"]] for group in self.optimizer.param_groups],
        }

    def restore_trainable(self, state: dict[str, Any]) -> str | None:
        """Freeze and unfreeze parameters, and add groups to the optimizer, to restore a `trainable_state`.

        Returns a note if parameters were frozen or unfrozen. Raises RunError for groups of unknown parameters.
        """
        parameters, groups = self.accumulation.named_parameters(), self.optimizer.param_groups
        for group in groups[max(len(state["groups"]), self._num_initial_groups) :]:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
        del groups[max(len(state["groups"]), self._num_initial_groups) :]
        for number, names in enumerate(state["groups"][len(groups) :], start=len(groups)):
            if not all(name in parameters for name in names):
                raise RunError(
                    f"the optimizer's group {number} was added during training, with parameters that are neither the "
                    "model's nor the loss's: add it before training"
                )
            self.optimizer.add_param_group({"params": [parameters[name] for name in names]})
        frozen = set(state["frozen"])
        changed = [name for name, parameter in parameters.items() if parameter.requires_grad == (name in frozen)]
        for name in changed:
            parameters[name].requires_grad_(name not in frozen)
        if not changed:
            return None
        return (
            f"{len(changed):,} parameters are frozen or unfrozen again, as when the checkpoint was saved "
            f"({shortened(changed, 3)})"
        )

    def split_notes(self, step: Step) -> list[str]:
        """At the first split step, return a note if its loss depends on the split. Raises RunError for a sum."""
        is_split = step.num_micro_batches > 1 or self.processes.is_distributed
        if self._is_split_checked or not is_split:
            return []
        note, error = "", None
        batch = step.micro_batches.peek()
        arguments = (self.accumulation.step_loss, self.raw_model)
        if batch is not None:
            try:
                note = mean_note(*arguments, *batch, self.at(step))
            except RunError as raised:
                error = raised
        if self.processes.any_process(error is not None):
            raise error or RunError("another process's loss is a sum over its images; return the mean")
        self._is_split_checked = True  # only now: if memory runs out, a step with smaller micro-batches is compared
        return [note] if note else []

    def undo(self) -> None:
        """Undo a failed step."""
        self.updater.undo()
        self._has_gradients = False
        self.accumulation.set_train_mode()


def _require_supported(optimizer: Any, accelerator: Accelerator) -> None:
    """Raise RunError for an optimizer with modes, or one whose passes or graph are not supported here."""
    name = type(optimizer).__name__
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise RunError(
            f"optimizer {name} has the modes train() and eval() with different weights, which are not supported: "
            "evaluations and checkpoints would use the training weights; use another optimizer"
        )
    if accelerator.scaler is not None and (needs_closure(optimizer) or needs_graph(optimizer)):
        raise RunError(f"optimizer {name} makes several passes per step, which fp16 does not support: use bf16 or no")
    if accelerator.num_processes > 1 and needs_graph(optimizer):
        raise RunError(f"optimizer {name} differentiates gradients, which works with one process only")


def _wrap(accelerator: Accelerator, model: nn.Module, *, without_ddp: bool) -> nn.Module:
    """Return the model wrapped by the accelerator; `without_ddp`: without DistributedDataParallel.

    Raises RunError for a precision that the device does not have.
    """
    with warnings.catch_warnings():  # of an argument that accelerate always passes on
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        prepared = accelerator.prepare_model(model, evaluation_mode=without_ddp)
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise RunError(
            f"{accelerator.mixed_precision} has no effect on {accelerator.device}; use mixed_precision no or bf16"
        )
    if accelerator.num_processes == 1 and isinstance(prepared, DistributedDataParallel):
        return prepared.module  # one process needs no DDP, which allows no backward after a failed one
    return prepared
