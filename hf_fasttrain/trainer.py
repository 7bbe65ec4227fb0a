"""The loop: exact gradients over a step's images, whatever the accumulation and the number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from hf_fasttrain.checkpoint import (
    complete_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    require_same,
    save_checkpoint,
)
from hf_fasttrain.data.images import BadImages
from hf_fasttrain.data.loader import OwnEvalLoader, OwnLoader, Step
from hf_fasttrain.duration import Duration
from hf_fasttrain.ema import Ema
from hf_fasttrain.environment import describe_machine, describe_versions, peak_memory_bytes
from hf_fasttrain.errors import RunError
from hf_fasttrain.evaluation import Evaluator, average_batch_norm
from hf_fasttrain.loss import Loss
from hf_fasttrain.model import batch_norms
from hf_fasttrain.optim import set_lr
from hf_fasttrain.pace import Pace
from hf_fasttrain.result import Result, Watch
from hf_fasttrain.runlog import RunLog, write_json
from hf_fasttrain.schedule import Schedule, constant
from hf_fasttrain.weights import save_weights

if TYPE_CHECKING:
    from hf_fasttrain.recipe import Recipe


@dataclass
class State:
    """What changes while training, beside weights and optimizer."""

    step: int = 0  # optimizer steps done; the only clock
    updates: int = 0  # steps whose update was made: fp16 skips some; lr and EMA follow this
    images: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluated_at: int = -1  # step of the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    watched: dict[str, Any] | None = None  # early stopping's best value and its step


class Trainer:
    """Trains `model` with `optimizer` over the steps of `train_loader`.

    `Trainer.from_recipe` makes one from a recipe. With your own objects, a batch of `train_loader` is (images,
    targets), this process's share of one step, which is split into `accumulation_steps` micro-batches; `loss` maps
    (logits, targets) to the mean over their images; `eval_loader` gives (images, labels), on all processes together
    each image once. The model is moved to the accelerator's device and wrapped; don't prepare anything yourself.

    Raises RunError (a ValueError) for what can't be trained or resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        duration: Duration | str = "1 epoch",
        accelerator: Accelerator | None = None,
        accumulation_steps: int = 1,
        loss: Loss = F.cross_entropy,
        lr: float | None = None,
        schedule: Schedule = constant,
        clip_norm: float | None = None,
        ema: Ema | None = None,
        eval_loader: Iterable[Any] | None = None,
        test_loader: Iterable[Any] | None = None,
        evaluator: Evaluator | None = None,
        num_classes: int | None = None,
        evaluate_every: Duration | str = "1 epoch",
        best: Watch = Watch(),  # noqa: B008 - frozen
        early_stopping: Watch | None = None,
        output_dir: str | Path | None = None,
        checkpoint_every: Duration | str = "1 epoch",
        keep_checkpoints: int = 2,
        export: Callable[[nn.Module, Path], None] = save_weights,
        learnt: dict[str, Any] | None = None,
        bad_images: BadImages | None = None,
        log: RunLog | None = None,
        log_every: int = 10,
        seed: int = 0,
    ) -> None:
        self.accelerator = accelerator or Accelerator(gradient_accumulation_steps=accumulation_steps)
        self.device = self.accelerator.device
        self.raw_model = model.to(self.device)
        self.norms = batch_norms(model)
        self.model = self.accelerator.prepare_model(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer if self.accelerator.scaler is None else self.accelerator.prepare(optimizer)
        if self.accelerator.mixed_precision != "no" and not self.accelerator.native_amp:
            raise RunError(
                f"{self.accelerator.mixed_precision} has no effect on {self.device}; use mixed_precision no or bf16"
            )
        self.loss, self.clip_norm, self.ema, self.seed = loss, clip_norm, ema, seed
        self.lr = lr if lr is not None else float(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:  # the groups' own rates keep their ratios
            group.setdefault("lr_scale", float(group["lr"]) / self.lr)
        self.schedule = schedule

        join_single = bool(self.norms)
        self.train_loader = OwnLoader.wrap(train_loader, self.accelerator, accumulation_steps, join_single=join_single)
        self.eval_loader = OwnEvalLoader.wrap(eval_loader, self.device)
        self.test_loader = OwnEvalLoader.wrap(test_loader, self.device)
        if evaluator is None and num_classes is not None:
            evaluator = Evaluator(self.accelerator, num_classes)
        if evaluator is None and (eval_loader is not None or test_loader is not None):
            raise RunError("nothing to evaluate with: give Trainer num_classes or an evaluator beside the eval_loader")
        self.evaluator, self.best, self.early_stopping = evaluator, best, early_stopping
        steps_per_epoch = self.train_loader.steps_per_epoch
        self.num_steps = Duration.parse(duration).to_steps(steps_per_epoch)
        self.evaluate_every = Duration.parse(evaluate_every).to_steps(steps_per_epoch)
        self.checkpoint_every = Duration.parse(checkpoint_every).to_steps(steps_per_epoch)
        if min(self.num_steps, self.evaluate_every, self.checkpoint_every, log_every) < 1:
            raise RunError("duration, evaluate_every, checkpoint_every and log_every must be at least 1 step")
        self.log_every, self.keep_checkpoints = log_every, keep_checkpoints

        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.export, self.learnt, self.bad_images = export, learnt or {}, bad_images
        self.log = log or RunLog(self.output_dir, main=self.accelerator.is_main_process)
        self.pace = Pace(self.device, lambda: self.train_loader.wait_seconds)
        self.state = State()
        self._saved_at = -1
        self._scale: float | None = None  # fp16's loss scale after the last step

    @classmethod
    def from_recipe(
        cls, recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, dataset: Any = None, resume: bool = False
    ) -> Trainer:
        """Return the trainer of a recipe (file, name or `Recipe`) with `section.key=value` overrides.

        `dataset`: a `datasets.Dataset` or `DatasetDict` to use instead of the recipe's data.dataset. With `resume`,
        `fit` goes on from the newest complete checkpoint in the recipe's output_dir.
        """
        from hf_fasttrain.build import build_trainer

        return build_trainer(recipe, overrides, dataset=dataset, resume=resume, trainer_class=cls)

    # --- the loop ------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train to the end and return how it ended."""
        self._require_free_folder()
        self._set_train_mode()
        with self.log.progress(self.num_steps, self.state.step), self.pace.running():
            for step in self.train_loader.steps(self.state.step, self.num_steps):
                set_lr(self.optimizer, self.lr * self.schedule(self.state.updates))
                self.pace.add(self.train_step(step), step.num_images)
                self.state.step += 1
                if self._due(self.log_every, self.evaluate_every, self.checkpoint_every):
                    self._log_training()  # which stops a run whose loss is no number before that is saved
                if self._due(self.evaluate_every):
                    self._evaluate_and_compare()
                if self._due(self.checkpoint_every):
                    self.save()
                if self.has_stopped_early:
                    break
        return self._finish()

    def train_step(self, step: Step) -> Tensor:
        """Make one optimizer step and return this process's part of the mean loss over the step's images.

        The loss is 0-d, on the device, and its parts add up over processes. Nothing waits for the device but
        fp16, for its scale.
        """
        self._seed_step(step.index)
        total: Tensor | None = None
        for number, (images, targets) in enumerate(step.micro_batches, start=1):
            alone = bool(self.norms) and len(images) == 1  # one image has no batch statistics
            if alone:
                self._freeze_batch_norm()
            with self._gradient_exchange(last=number == step.num_micro_batches):
                loss = self.loss(self.model(images), targets)
                if len(images) != step.num_images:  # a factor of 1 would cost 2 % of a small step
                    loss = loss * (len(images) / step.num_images)
                self._backward(loss)
            if alone:
                self._set_train_mode()
            total = loss.detach() if total is None else total + loss.detach()
        if total is None:
            total = self._join_without_images(step.image_shape)
        self._update()
        return total

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of the loss; what DDP and Accelerator divide by is taken back."""
        if self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes
        if self.accelerator.scaler is None:
            loss.backward()
        else:
            self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)

    def _update(self) -> None:
        scaled = self.accelerator.scaler is not None
        if self.clip_norm is not None:
            clip = self.accelerator.clip_grad_norm_ if scaled else torch.nn.utils.clip_grad_norm_
            clip(self.parameters, self.clip_norm)
        if scaled and self._scale is None:
            self._scale = self.accelerator.scaler.get_scale()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if scaled and self._has_skipped():
            return
        if self.ema is not None:
            self.ema.update(self.state.updates)
        self.state.updates += 1

    def _has_skipped(self) -> bool:
        """Return whether fp16's last step overflowed, by its shrunken scale; waits for the device.

        Accelerate's own flag misses what a fused optimizer skips in its kernel.
        """
        before, self._scale = self._scale, self.accelerator.scaler.get_scale()
        return before is not None and self._scale < before

    def _gradient_exchange(self, *, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between processes in a step's last backward only."""
        if last or self.accelerator.num_processes == 1:
            return nullcontext()
        return self.accelerator.no_sync(self.model)

    def _join_without_images(self, image_shape: Sequence[int]) -> Tensor:
        """Take part in the exchange of gradients with weight zero, and without moving batch-norm statistics."""
        images = torch.zeros(2, *image_shape, device=self.device, dtype=self.parameters[0].dtype)
        self._freeze_batch_norm()
        loss = self.model(images).sum() * 0.0
        self._backward(loss)
        self._set_train_mode()
        return loss.detach()

    def _seed_step(self, step: int) -> None:
        """Make dropout and drop-path masks a function of (seed, step, process): no random state needs saving."""
        key = ((self.seed * 1_000_003 + step) * 65_537 + self.accelerator.process_index) % 2**63
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(key)

    def _freeze_batch_norm(self) -> None:
        for norm in self.norms:
            norm.eval()

    def _set_train_mode(self) -> None:
        """Training mode, but batch norms whose weights are frozen keep their statistics."""
        self.model.train()
        for norm in self.norms:
            if norm.weight is not None and not norm.weight.requires_grad:
                norm.eval()

    def _due(self, *every: int) -> bool:
        return self.state.step == self.num_steps or any(self.state.step % number == 0 for number in every)

    @property
    def has_stopped_early(self) -> bool:
        """Whether the last evaluation came `patience` steps after the best one, or later."""
        if self.early_stopping is None or self.early_stopping.patience is None or self.state.watched is None:
            return False
        return self.state.evaluated_at - self.state.watched["step"] >= self.early_stopping.patience

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state.step >= self.num_steps or self.has_stopped_early

    # --- evaluating ----------------------------------------------------------------------------------------

    @property
    def trained_model(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.raw_model

    def evaluate(self, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Return the metrics of the present model on `loader`, by default the evaluation split."""
        chosen = self.eval_loader if loader is None else OwnEvalLoader.wrap(loader, self.device)
        if chosen is None or self.evaluator is None:
            raise RunError("nothing to evaluate with; give Trainer an eval_loader, and num_classes or an evaluator")
        self._average_batch_norm()
        self.trained_model.eval()
        metrics = self.evaluator(self.trained_model, chosen)
        self._set_train_mode()
        return metrics

    def _evaluate_and_compare(self) -> None:
        if self.eval_loader is None or self.state.evaluated_at == self.state.step:
            return
        with self.pace.stopped():
            self.state.metrics = self._evaluate_and_log(self.eval_loader)
        self.state.evaluated_at = self.state.step
        if self.early_stopping and self._improves(self.early_stopping, self.state.watched):
            self.state.watched = self._record(self.early_stopping)
        if self._improves(self.best, self.state.best):
            self.state.best = self._record(self.best)
            self.save()

    def _evaluate_and_log(self, loader: Iterable[Any]) -> dict[str, float]:
        began = time.perf_counter()
        metrics = self.evaluate(loader)
        name, seconds = getattr(loader, "name", "evaluation split"), time.perf_counter() - began
        self.log.eval_line(self.state.step, self._epoch, name, metrics, seconds)
        return metrics

    def _improves(self, watch: Watch, record: dict[str, Any] | None) -> bool:
        if watch.metric not in self.state.metrics:
            known = ", ".join(self.state.metrics)
            raise RunError(f"'{watch.metric}' is watched, but the evaluation measures only {known}; watch one of them")
        return watch.is_better(self.state.metrics[watch.metric], record["value"] if record else None)

    def _record(self, watch: Watch) -> dict[str, Any]:
        return {"metric": watch.metric, "value": self.state.metrics[watch.metric], "step": self.state.step}

    def _average_batch_norm(self) -> None:
        average_batch_norm(self.norms, self.accelerator)
        if self.ema is not None:
            average_batch_norm(batch_norms(self.ema.module), self.accelerator)

    # --- saving and restoring ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the present step, unless it is there or there is no run folder."""
        if self.output_dir is None or self._saved_at == self.state.step:
            return
        self._saved_at = self.state.step
        with self.pace.stopped():
            self._average_batch_norm()
            if self.accelerator.is_main_process:
                self._write_checkpoint(self.output_dir / "checkpoints")
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path) -> None:
        self._copy_pace()
        weights = {"model": self.raw_model.state_dict()}
        if self.ema is not None:
            weights["ema"] = self.ema.module.state_dict()
        scaler = self.accelerator.scaler
        tensors = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "loader": self.train_loader.state_dict(),
        }
        state = {"state": asdict(self.state), "learnt": self.learnt}
        save_checkpoint(folder, self.state.step, state, weights, tensors)
        prune_checkpoints(folder, self.keep_checkpoints, self.state.best["step"] if self.state.best else None)

    def _require_free_folder(self) -> None:
        if self.output_dir is None:
            return
        if self.state.step == 0 and complete_checkpoints(self.output_dir / "checkpoints"):
            raise RunError(f"{self.output_dir}: holds checkpoints; call restore() to go on, or give another output_dir")
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def restore(self) -> None:
        """Go back to the newest complete checkpoint; say so and start afresh if there is none."""
        checkpoint = newest_checkpoint(self.output_dir / "checkpoints", self.device) if self.output_dir else None
        self._require_agreement(checkpoint.state["step"] if checkpoint else 0)
        if checkpoint is None:
            self.log.say(f"nothing to resume in {self.output_dir}: training starts afresh")
            return
        require_same(checkpoint.state["learnt"], self.learnt, checkpoint.path)
        self.raw_model.load_state_dict(checkpoint.weights["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.weights["ema"])
        self.optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        if self.accelerator.scaler is not None and checkpoint.tensors["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.tensors["scaler"])
        self.state = State(**checkpoint.state["state"])
        self.train_loader.load_state_dict(checkpoint.tensors["loader"])
        self.pace.images, self.pace.train_seconds = self.state.images, self.state.train_seconds
        self.pace.wait_seconds = self.state.wait_seconds
        self._saved_at = self.state.step
        self.log.forget_after(self.state.step)
        self.log.say(f"resumed from {checkpoint.path}: step {self.state.step} of {self.num_steps}")

    def _require_agreement(self, step: int) -> None:
        if len(set(gather_object([step]))) > 1:
            raise RunError(f"can't resume: processes see different checkpoints in {self.output_dir}; share its disk")

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload the finished run's model folder to a Hub repository and return its address."""
        from hf_fasttrain.publish.hub import push_run

        if self.output_dir is None:
            raise RunError("nothing to push: the trainer has no output_dir")
        address = [push_run(self.output_dir, repo, private=private) if self.accelerator.is_main_process else ""]
        return str(broadcast_object_list(address)[0])

    # --- logging and ending --------------------------------------------------------------------------------

    @property
    def _epoch(self) -> float:
        return self.state.step / self.train_loader.steps_per_epoch

    def _add_up(self, part: Tensor) -> Tensor:
        return part if self.accelerator.num_processes == 1 else self.accelerator.reduce(part, reduction="sum")

    def _log_training(self) -> None:
        values = self.pace.lap(self._add_up)
        lr = self.lr * self.schedule(max(0, self.state.updates - 1))
        if not math.isfinite(values["loss"]):
            raise RunError(
                f"the loss is {values['loss']} at step {self.state.step}, lr {lr:.3g}: lower optimizer.lr, set "
                "optimizer.clip_norm or use another accelerate.mixed_precision; the checkpoints are as they were"
            )
        eta = (self.num_steps - self.state.step) * values["seconds_per_step"]
        line = {**values, "epoch": self._epoch, "lr": lr, "eta_seconds": eta}
        self.log.train_line(self.state.step, self.num_steps, line)

    def _finish(self) -> Result:
        self._evaluate_and_compare()
        self.save()
        if self.output_dir is not None and self.accelerator.is_main_process:
            self.export(self.trained_model, self.output_dir / "model")
        test = self._evaluate_and_log(self.test_loader) if self.test_loader is not None else None
        if self.bad_images is not None and self.bad_images.count:
            self.log.note(f"{self.bad_images.count} bad images were replaced by others; {self.bad_images.where}")
        result = self._result(test)
        if self.output_dir is not None and self.accelerator.is_main_process:
            write_json(self.output_dir / "result.json", asdict(result))
        self.accelerator.wait_for_everyone()
        return result

    def _copy_pace(self) -> None:
        self.state.images, self.state.train_seconds = self.pace.images, self.pace.train_seconds
        self.state.wait_seconds = self.pace.wait_seconds

    def _result(self, test: dict[str, float] | None) -> Result:
        self._copy_pace()
        state, seconds = self.state, max(self.pace.train_seconds, 1e-9)
        return Result(
            metrics=state.metrics,
            test_metrics=test,
            best=state.best,
            steps=state.step,
            skipped_steps=state.step - state.updates,
            images=state.images,
            train_seconds=state.train_seconds,
            images_per_second=state.images / seconds,
            data_wait_fraction=min(1.0, state.wait_seconds / seconds),
            bad_images=self.bad_images.count if self.bad_images else 0,
            peak_memory_bytes=peak_memory_bytes(self.device),
            stopped_early=state.step < self.num_steps,
            machine=describe_machine(self.device, self.accelerator.num_processes),
            versions=describe_versions(),
            notes=self.log.notes,
        )
