"""The gradients of a step: of the mean loss over its images, for any micro-batches and number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fasttrain.data.loading.loader import Step, Timer, no_timer
from hf_fasttrain.models.model import batch_norms, set_train_mode
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.loss import Loss, loss_of_uniform_logits
from hf_fasttrain.train.unused_parameters import find_use
from hf_fasttrain.utils.errors import RunError, StepOutOfMemory, first_line, shortened
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import replace_prepared

MOST_WEIGHTS = 100  # cached: batches of a user's loader may have any sizes
_NOTHING = nullcontext()
StepLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, images, targets -> mean over the images, 0-d


class Gradients:
    """Adds up gradients over a step's micro-batches and the processes.

    `model` is `raw_model` wrapped by `accelerator`; `loss` maps (logits, targets) to the mean over their images.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, raw_model: nn.Module, loss: Loss, processes: Processes
    ) -> None:
        self.accelerator, self.model, self.loss, self.processes = accelerator, model, loss, processes
        self.uniform_loss: Tensor | None = None  # of the first images, if all classes were equally likely
        self.step_loss: StepLoss = self._loss_of_logits
        self.timer: Timer = no_timer
        self._is_first = True
        self._weights: dict[tuple[Any, ...], Tensor] = {}  # of micro-batches, as `_weight_like` has made them
        self.raw_model, self.norms = raw_model, batch_norms(raw_model)
        self.parameters = [p for p in raw_model.parameters() if p.requires_grad]
        if isinstance(model, DistributedDataParallel):  # running statistics are averaged instead,
            model.broadcast_buffers = False  # and processes may make unequally many forwards

    def leave_out_unused(self, step: Step) -> list[str]:
        """Freeze the parameters that forward does not use; return notes on them.

        Called by all processes before the first step, which is not consumed.
        """
        trainable = {name: p for name, p in self.raw_model.named_parameters() if p.requires_grad}
        first = step.micro_batches.peek() if trainable else None
        use = find_use(self.raw_model, self.loss, trainable, first, self.processes) if trainable else None
        for name in use.never if use else ():
            trainable[name].requires_grad_(False)
        present = [parameter for parameter in trainable.values() if parameter.requires_grad]
        skips = bool(use and use.sometimes) and self.processes.is_distributed
        if present and (skips or self._searches or {*map(id, present)} != {*map(id, self.parameters)}):
            self._wrap_again(search=skips)
        self.parameters[:] = present  # in place: other objects share this list
        notes = [use.never_note(len(trainable))] if use and use.never else []
        return [*notes, use.sometimes_note()] if use and skips else notes

    @property
    def _searches(self) -> bool:
        """Whether DDP searches for unused parameters in each step."""
        return isinstance(self.model, DistributedDataParallel) and self.model.find_unused_parameters

    def _wrap_again(self, *, search: bool = False) -> None:
        """Wrap the model in DDP again for the current trainable parameters; with `search`, DDP searches unused ones."""
        old, handler = self.model, self.accelerator.ddp_handler
        if not isinstance(old, DistributedDataParallel):
            return
        options: dict[str, Any] = handler.to_kwargs() if handler is not None else {}
        options.pop("broadcast_buffers", None)  # which warns; nothing is synchronised here
        if search or old.find_unused_parameters:
            options |= {"find_unused_parameters": True, "static_graph": False}
        options |= {"device_ids": old.device_ids, "output_device": old.output_device, "init_sync": False}
        self.model = DistributedDataParallel(old.module, **options)
        self.model.broadcast_buffers = False
        if handler is not None:
            handler.register_comm_hook(self.model)
        replace_prepared(self.accelerator, old, self.model)

    def add_up(self, step: Step, *, agree: bool = False) -> Tensor:
        """Add up the step's gradients, and return this process's part of its mean loss, 0-d.

        Several processes exchange gradients in their last backward. With `agree` they first find out whether memory
        was enough on all of them: if not, StepOutOfMemory is raised on all of them, and nothing was exchanged.
        """
        if not agree:
            total = self._local_gradients(step, exchange=True)
            if total is None:
                total = self._join_without_images(step.image_shape)
            self._require_exchanged(step)
            return total
        short, total = None, None
        try:
            total = self._local_gradients(step, exchange=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            short = first_line(error)
        if self._searches:  # what it takes for used in a backward without exchange would count in the next one
            self._wrap_again()
        if self.processes.any_process(short is not None):
            raise StepOutOfMemory(short or "another process had too little memory")
        self._exchange()
        return torch.zeros((), device=self.accelerator.device) if total is None else total

    def _local_gradients(self, step: Step, *, exchange: bool) -> Tensor | None:
        """Add up the gradients of this process's images, and return its part of the loss; None if it has none."""
        total: Tensor | None = None
        several = self.processes.is_distributed
        for number, (images, targets) in enumerate(step.micro_batches, start=1):
            num_images = len(images)
            alone = num_images == 1 and bool(self.norms)  # one image has no batch statistics
            if alone:
                self._freeze_batch_norm()
            weight = num_images / step.num_images
            last = exchange and number == step.num_micro_batches
            with self.accelerator.no_sync(self.model) if several and not last else _NOTHING:
                with self.timer("forward"):
                    loss = self.step_loss(self.model, images, targets)
                with self.timer("backward"):
                    self._backward(loss, weight)
            if alone:
                self.set_train_mode()
            if total is not None:
                total = torch.add(total, loss.detach(), alpha=weight)
            else:
                total = loss.detach() if weight == 1 else loss.detach() * weight
        return total

    def _loss_of_logits(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        if self._is_first:
            self._is_first = False
            self.uniform_loss = loss_of_uniform_logits(self.loss, logits, targets)
        return self.loss(logits, targets)

    def _backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Add the gradients of `weight` times a loss; undoes the divisions by DDP and Accelerator.

        The backward begins with the weight, which is what the backward of a product would pass on: a product for each
        micro-batch, on the graph, would take longer.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            loss.backward(self._weight_like(loss, weight))
        else:
            scaled = self._weight_like(loss, weight) * loss
            self.accelerator.backward(scaled * self.accelerator.gradient_accumulation_steps)

    def _weight_like(self, loss: Tensor, weight: float) -> Tensor:
        """Return a loss's weight times the number of processes, as a tensor like the loss."""
        key = (weight, loss.dtype, loss.device, loss.shape)
        found = self._weights.get(key)
        if found is None:
            if loss.numel() != 1:
                raise RunError(
                    f"the loss of a batch is a tensor of shape {tuple(loss.shape)}; give Trainer a loss that returns "
                    "the mean over the images, a single number"
                )
            if len(self._weights) >= MOST_WEIGHTS:
                self._weights.clear()
            found = self._weights[key] = torch.ones_like(loss) * self.processes.number * weight
        return found

    def _join_without_images(self, image_shape: Sequence[int]) -> Tensor:
        """Take part in the exchange of gradients with weight zero, and without moving batch-norm statistics."""
        images = torch.zeros(2, *image_shape, device=self.accelerator.device, dtype=self.parameters[0].dtype)
        self._freeze_batch_norm()
        loss = self.model(images).sum() * 0.0
        self._backward(loss)
        self.set_train_mode()
        return loss.detach()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Give every process the mean of all processes' gradients, as DDP does: divided first, then summed."""
        present = self.processes.largest(*(parameter.grad is not None for parameter in self.parameters))
        for parameter in compress(self.parameters, present):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            mean = parameter.grad.div_(self.processes.number).contiguous()
            dist.all_reduce(mean)
            parameter.grad.copy_(mean)

    def _require_exchanged(self, step: Step) -> None:
        """Raise RunError if a gradient is missing, so that DDP has left others unsynchronised."""
        model = self.model
        if not isinstance(model, DistributedDataParallel) or model.static_graph or self._searches:
            return
        if any(parameter.grad is None for parameter in self.parameters):
            names = [n for n, p in self.raw_model.named_parameters() if p.requires_grad and p.grad is None]
            error = RunError(
                f"step {step.index + 1}: forward no longer uses {shortened(names, 3)}, so that the processes could not "
                "exchange their gradients; the checkpoints are as they were: use all parameters in every step, or "
                "freeze those with requires_grad_(False) before training"
            )
            error.on_every_process = False
            raise error

    def _freeze_batch_norm(self) -> None:
        for norm in self.norms:
            norm.eval()

    def set_train_mode(self) -> None:
        """Training mode, but batch norms whose weights are frozen keep their statistics."""
        set_train_mode(self.model, self.norms)
