"""The gradients of a step's mean loss, whatever its micro-batches and the number of processes."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fasttrain.data.loading.loader import FEATURE_SHAPE, Step, Timer
from hf_fasttrain.data.loading.trees import Tree, leaves, num_images, zeros_like
from hf_fasttrain.models.model import batch_norms, set_train_mode
from hf_fasttrain.train.closure import no_graph_warning, twice_differentiable
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.loss import loss_input
from hf_fasttrain.train.step_loss import (
    At,
    LossOfLogits,
    ModelAndLoss,
    Shares,
    StepLoss,
    add_values,
    checked,
    module_of,
    named_parameters,
    wraps_loss,
)
from hf_fasttrain.train.unused_parameters import find_parameter_use
from hf_fasttrain.utils.errors import RunError, StepOutOfMemory, first_line, shortened
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import replace_prepared

MAX_CACHED_WEIGHTS = 100  # a user's loader may have batches of any size


class Gradients:
    """Accumulates gradients over a step's micro-batches and the processes.

    `model` is `raw_model` wrapped by the accelerator. If `wraps_loss(step_loss)`, DistributedDataParallel wraps model
    and loss together instead.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        raw_model: nn.Module,
        step_loss: StepLoss | LossOfLogits,
        processes: Processes,
    ) -> None:
        self.accelerator, self.model, self.processes = accelerator, model, processes
        self.step_loss, self.loss_module = step_loss, module_of(step_loss)
        self.values: Shares = {}  # this process's part of the values that the step loss returned for the log
        self.timer: Timer | None = None
        self.keeps_graph = False  # for an optimizer that differentiates the gradients
        self._weights: dict[tuple[Any, ...], Tensor] = {}  # of micro-batches, cached by `_weight_like`
        self.raw_model, self.norms = raw_model, batch_norms(raw_model)
        self.parameters = [p for p in self.named_parameters().values() if p.requires_grad]
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        if self._ddp is not None:
            _disable_buffer_broadcast(self._ddp)
        self._is_use_known = True  # whether it is known which parameters get gradients
        if wraps_loss(step_loss) and processes.is_distributed:
            self._ddp = self._distributed(ModelAndLoss(model, step_loss), init_sync=True)
            self._is_use_known = isinstance(step_loss, LossOfLogits)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter of the model, and of a loss that is a module with the prefix `loss.`."""
        return named_parameters(self.raw_model, self.loss_module)

    def freeze_unused(self, step: Step) -> list[str]:
        """Freeze the parameters that forward does not use; return notes on them.

        Called by all processes before the first step, which is not consumed, and before a step for which parameters
        were frozen or unfrozen.
        """
        trainable = {name: p for name, p in self.named_parameters().items() if p.requires_grad}
        use = None
        # A step_loss may have side effects, so its step shows it; the layer that features are given to uses them.
        if trainable and isinstance(self.step_loss, LossOfLogits) and step.image_shape != FEATURE_SHAPE:
            batch = step.micro_batches.peek()
            use = find_parameter_use(self.raw_model, self.step_loss.loss, trainable, batch, self.processes)
        for name in use.never if use else ():
            trainable[name].requires_grad_(False)
        remaining = [parameter for parameter in trainable.values() if parameter.requires_grad]
        needs_search = bool(use and use.sometimes) and self.processes.is_distributed
        if remaining and (needs_search or self._finds_unused or {*map(id, remaining)} != {*map(id, self.parameters)}):
            self._wrap_again(search=needs_search)
            self._is_use_known = isinstance(self.step_loss, LossOfLogits) or self._ddp is None
        self.parameters[:] = remaining  # in place: other objects share this list
        notes = [use.never_note(len(trainable))] if use and use.never else []
        return [*notes, use.sometimes_note()] if use and needs_search else notes

    @property
    def _finds_unused(self) -> bool:
        """Whether DDP searches for unused parameters in each step."""
        return self._ddp is not None and self._ddp.find_unused_parameters

    def _wrap_again(self, *, search: bool = False) -> None:
        """Wrap the model in DDP again for the current trainable parameters; `search`: DDP searches for unused ones."""
        old_ddp = self._ddp
        if old_ddp is None:
            return
        self._ddp = self._distributed(old_ddp.module, search=search or old_ddp.find_unused_parameters)
        if self.model is old_ddp:
            self.model = self._ddp
            replace_prepared(self.accelerator, old_ddp, self._ddp)

    def _distributed(
        self, module: nn.Module, *, search: bool = False, init_sync: bool = False
    ) -> DistributedDataParallel:
        """Return a module wrapped in DDP, with the accelerator's options."""
        handler, device = self.accelerator.ddp_handler, self.accelerator.device
        options: dict[str, Any] = handler.to_kwargs() if handler is not None else {}
        options.pop("broadcast_buffers", None)  # passing it warns
        if search:
            options |= {"find_unused_parameters": True, "static_graph": False}
        devices = [device.index] if device.type == "cuda" else None
        options |= {"device_ids": devices, "output_device": device.index if devices else None, "init_sync": init_sync}
        wrapped = DistributedDataParallel(module, **options)
        if handler is not None:
            handler.register_comm_hook(wrapped)
        _disable_buffer_broadcast(wrapped)
        return wrapped

    def accumulate(self, step: Step, at: At, *, check_memory: bool = False) -> Tensor:
        """Accumulate the step's gradients, and return this process's part of its mean loss, 0-d.

        Several processes exchange gradients in their last backward. With `check_memory` they first agree on whether
        memory sufficed on all of them; if not, all raise StepOutOfMemory, and nothing was exchanged.
        """
        self.values = {}
        if not check_memory and self._is_use_known:
            total = self._local_gradients(step, at, exchange=True)
            if total is None:
                total = self._join_without_images(step, at)
            if self._ddp is not None:
                self._require_exchanged(step)
            return total
        error_text, total = None, None
        try:
            total = self._local_gradients(step, at, exchange=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            error_text = first_line(error)
        if self._finds_unused:  # it would carry its findings from a backward without exchange into the next one
            self._wrap_again()
        if self.processes.any_process(error_text is not None):
            raise StepOutOfMemory(error_text or "another process had too little memory")
        self._exchange(has_images=total is not None)
        return torch.zeros((), device=self.accelerator.device) if total is None else total

    def _local_gradients(self, step: Step, at: At, *, exchange: bool) -> Tensor | None:
        """Accumulate the gradients of this process's images; return its part of the loss, None without images."""
        total: Tensor | None = None
        is_distributed = self.processes.is_distributed
        for number, (images, targets) in enumerate(step.micro_batches, start=1):
            count = images.shape[0] if isinstance(images, Tensor) else num_images(images)
            is_single_image = count == 1 and bool(self.norms)  # one image has no batch statistics
            if is_single_image:
                self._freeze_batch_norm()
            weight = count / step.num_images
            if is_distributed and not (exchange and number == step.num_micro_batches):
                with self.accelerator.no_sync(self._ddp):
                    loss = self._micro_batch(images, targets, weight, at)
            else:
                loss = self._micro_batch(images, targets, weight, at)
            if is_single_image:
                self.set_train_mode()
            if total is not None:
                total.add_(loss, alpha=weight)
            else:
                total = loss if weight == 1 else loss * weight
        return total

    def _micro_batch(self, images: Tree, targets: Tree, weight: float, at: At) -> Tensor:
        """Run forward and backward of a micro-batch; return its loss, detached."""
        timer = self.timer
        if timer is None:  # no contexts: they would take time
            loss = self._forward(images, targets, weight, at)
            self._backward(loss, weight)
        else:
            with timer("forward"):
                loss = self._forward(images, targets, weight, at)
            with timer("backward"):
                self._backward(loss, weight)
        return loss.detach() if not loss.ndim else loss.detach().view(())

    def _forward(self, images: Tree, targets: Tree, weight: float, at: At) -> Tensor:
        """Return the loss of a micro-batch, and add the step loss's other values to `values`."""
        loss = self._loss(images, targets, at)
        if not isinstance(loss, Tensor):
            loss, values = checked(loss)
            add_values(self.values, values, weight, loss.device)
        if not loss.requires_grad:
            raise RunError(
                "the loss of a batch does not require gradients, so nothing would be trained; compute it from the "
                "model's output without .detach(), .item() and torch.no_grad()"
            )
        return loss

    def _loss(self, images: Tree, targets: Tree, at: At) -> Any:
        """Return the step loss's result for a micro-batch."""
        if self.keeps_graph:
            with twice_differentiable():
                return self.step_loss(self.model, images, targets, at)
        if self._ddp is None or self._ddp is self.model:
            return self.step_loss(self.model, images, targets, at)
        return self._ddp(images, targets, at)

    def _backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Add the gradients of `weight` times a loss; compensates the divisions by DDP and Accelerator.

        The weight is passed to backward as the initial gradient. Multiplying the loss by it would add an operation to
        the graph of each micro-batch and take longer.
        """
        if self.keeps_graph:
            with no_graph_warning():
                loss.backward(self._weight_like(loss, weight), create_graph=True)
        elif self.accelerator.scaler is None:
            loss.backward(self._weight_like(loss, weight))
        else:
            scaled = self._weight_like(loss, weight) * loss
            self.accelerator.backward(scaled * self.accelerator.gradient_accumulation_steps)

    def _weight_like(self, loss: Tensor, weight: float) -> Tensor:
        """Return the weight of a loss times the number of processes, as a tensor like the loss."""
        key = (weight, loss.dtype, loss.device, loss.shape)
        cached = self._weights.get(key)
        if cached is None:
            checked(loss)
            if len(self._weights) >= MAX_CACHED_WEIGHTS:
                self._weights.clear()
            cached = self._weights[key] = torch.ones_like(loss) * self.processes.number * weight
        return cached

    def _join_without_images(self, step: Step, at: At) -> Tensor:
        """Take part in the exchange of gradients with weight zero, without updating batch-norm statistics."""
        if self._ddp is self.model:
            options: Any = {"device": self.accelerator.device, "dtype": self.parameters[0].dtype}
            images = torch.zeros(2, *step.image_shape, **options) if step.like is None else zeros_like(step.like, 2)
            self._freeze_batch_norm()
            outputs = [leaf for leaf in leaves(loss_input(self.model(images))) if isinstance(leaf, Tensor)]
            loss = torch.stack([output.float().sum() for output in outputs]).sum() * 0.0
        else:
            loss = self._loss(None, None, at)
        self._backward(loss)
        self.set_train_mode()
        return loss.detach()

    @torch.no_grad()
    def _exchange(self, *, has_images: bool) -> None:
        """Average the gradients over the processes as DDP does: divided first, then summed."""
        has_gradient = [parameter.grad is not None for parameter in self.parameters]
        is_needed = self.processes.largest(*has_gradient)
        if not self._is_use_known:
            self._is_use_known = True
            if self.processes.any_process(has_images and not all(has_gradient)):
                self._wrap_again(search=True)
        for parameter in compress(self.parameters, is_needed):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            mean = parameter.grad.div_(self.processes.number).contiguous()
            dist.all_reduce(mean)
            parameter.grad.copy_(mean)

    def _require_exchanged(self, step: Step) -> None:
        """Raise RunError if a gradient is missing, because DDP then leaves others unsynchronised."""
        if self._ddp is None or self._ddp.static_graph or self._finds_unused:
            return
        if any(parameter.grad is None for parameter in self.parameters):
            names = [n for n, p in self.named_parameters().items() if p.requires_grad and p.grad is None]
            error = RunError(
                f"step {step.index + 1}: forward no longer uses {shortened(names, 3)}, so the processes could not "
                "exchange their gradients; the checkpoints have not changed: use all parameters in every step, or "
                "freeze these with requires_grad_(False) before training"
            )
            error.on_every_process = False
            raise error

    def _freeze_batch_norm(self) -> None:
        for norm in self.norms:
            norm.eval()

    def set_train_mode(self) -> None:
        """Set training mode, except for batch norms with frozen weights."""
        set_train_mode(self.model, self.norms)


def _disable_buffer_broadcast(wrapped: DistributedDataParallel) -> None:
    """Don't broadcast buffers: statistics are averaged elsewhere, and processes may run unequally many forwards."""
    wrapped.broadcast_buffers = False
