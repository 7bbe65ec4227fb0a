"""The Trainer: the training loop, on one page. A step's gradients and update are in step.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.data.loading.user_loader import UserEvalLoader, UserLoader
from hf_fasttrain.data.pixels.bad_images import BadImages
from hf_fasttrain.models.weights import save_weights
from hf_fasttrain.run_folder.checkpoint import Snapshot, checkpoint_path
from hf_fasttrain.run_folder.result import Result, Watch
from hf_fasttrain.train.arguments import check_arguments, parse_duration
from hf_fasttrain.train.batch_norm import average_batch_norm
from hf_fasttrain.train.callbacks import Callbacks, StepReport
from hf_fasttrain.train.checkpoint_state import State, TrainingObjects
from hf_fasttrain.train.checkpointing import Checkpoints
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.early_stopping import EarlyStop, early_stop, how_to_continue, waited_steps
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.ending import call_finished, evaluate_final, raise_stopped, save_last, stop_run, write_results
from hf_fasttrain.train.evaluation import Evaluation, Evaluator
from hf_fasttrain.train.final_weights import FinalModel, prepare_final
from hf_fasttrain.train.launcher import resolve_accelerator
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.loss import Loss
from hf_fasttrain.train.optim import keep_lr_ratios, set_lr
from hf_fasttrain.train.progress import Progress
from hf_fasttrain.train.resume import continue_after_finish, load_best, restore
from hf_fasttrain.train.retry import Retry
from hf_fasttrain.train.schedule import Schedule, constant
from hf_fasttrain.train.session import Probe, Session
from hf_fasttrain.train.step import TrainStep
from hf_fasttrain.train.step_loss import LossOfLogits, StepLoss
from hf_fasttrain.train.steps import Steps
from hf_fasttrain.train.stop import StopRequests, StopSignals
from hf_fasttrain.train.throughput import Throughput
from hf_fasttrain.train.user_metrics import Metric, Predict
from hf_fasttrain.train.user_settings import user_settings
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.environment import set_current_device
from hf_fasttrain.utils.errors import RunError

if TYPE_CHECKING:
    from hf_fasttrain.from_recipe.custom import RecipeOptions
    from hf_fasttrain.recipe.schema import Recipe
    from hf_fasttrain.report.callback import Publish


class Trainer:
    """Trains `model` with `optimizer` over the steps of `train_loader`.

    `Trainer.from_recipe` builds one from a recipe. With your own objects, a batch of `train_loader` is (images,
    targets), this process's share of one step, which is split into `accumulation_steps` micro-batches; both are
    tensors, or tuples, lists and dicts of them. `loss` maps (logits, targets) to the mean over their images.
    `step_loss` replaces it and maps (model, images, targets, at) to that mean, or to (mean, {name: value to log}).
    `eval_loader` yields (images, labels), over all processes each image once. The model is moved to the device and
    wrapped; don't prepare anything yourself. Parameters that forward does not use are found with two noise images
    before the first step, frozen and reported. docs/python-api.md describes each parameter, and the less common
    settings, which are attributes. Raises RunError (a ValueError) for what can't be trained or resumed, and Stopped
    when a signal ends training.
    """

    @check_arguments
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
        step_loss: StepLoss | None = None,
        schedule: Schedule = constant,
        clip_norm: float | None = None,
        ema: Ema | None = None,
        eval_loader: Iterable[Any] | None = None,
        num_classes: int | None = None,
        metrics: Mapping[str, Metric] | None = None,
        predict: Predict | None = None,
        evaluate_every: Duration | str = "1 epoch",
        best: Watch = Watch(),  # noqa: B008 - frozen
        early_stopping: Watch | None = None,
        output_dir: str | Path | None = None,
        checkpoint_every: Duration | str = "1 epoch",
        report: bool = True,
        callbacks: Sequence[Any] | None = None,
        log: RunLog | None = None,
        log_every: int = 10,
        seed: int | None = None,
    ) -> None:
        self.accelerator = resolve_accelerator(accelerator, accumulation_steps, train_loader)
        self.device = set_current_device(self.accelerator)
        self.processes, self.state = Processes(self.accelerator), State()
        objects = (self.accelerator, model, optimizer, step_loss or LossOfLogits(loss), self.processes, self.state)
        self.step = TrainStep(*objects, seed=seed, clip_norm=clip_norm, ema=ema)
        self.raw_model, self.optimizer, self.ema = self.step.raw_model, self.step.optimizer, ema
        self.lr, self.schedule, self.log_every = keep_lr_ratios(optimizer), schedule, log_every
        self.train_loader = UserLoader.wrap(train_loader, self.device, accumulation_steps, **self.step.loader_options)
        steps_per_epoch = self.train_loader.steps_per_epoch
        self.num_steps = parse_duration("duration", duration).to_steps(steps_per_epoch)
        self.step.steps_per_epoch, self.step.num_steps = steps_per_epoch, self.num_steps
        self.evaluate_every = parse_duration("evaluate_every", evaluate_every).to_steps(steps_per_epoch)
        checkpoint_interval = parse_duration("checkpoint_every", checkpoint_every, minutes=True)
        minutes = checkpoint_interval.count if checkpoint_interval.unit == "minutes" else None
        self.checkpoint_every = self.num_steps if minutes is not None else checkpoint_interval.to_steps(steps_per_epoch)
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.report = report and output_dir is not None
        self.log = log or RunLog(self.output_dir, main=self.processes.is_main)
        if ema is not None and (ema_note := ema.slow_note(self.num_steps)):
            self.log.note(ema_note)
        self.throughput = Throughput(self.device, lambda: self.train_loader.wait_seconds)
        self.evaluation = Evaluation(
            Evaluator(self.accelerator, num_classes, own=metrics, predict=predict),
            UserEvalLoader.wrap(eval_loader, self.device),
            state=self.state,
            log=self.log,
            throughput=self.throughput,
            steps_per_epoch=steps_per_epoch,
            best=best,
            early_stopping=early_stopping,
            keeps_predictions=self.report,
        )
        self.checkpoints = Checkpoints(self.output_dir, self.processes, self.log) if self.output_dir else None
        on_disk = self.checkpoints.newest_written if self.checkpoints else lambda: 0
        self.stop = StopRequests(
            self.processes, StopSignals(self.log.report_signal, self.log.report_slow_data), minutes, on_disk
        )
        stateful = (self.raw_model, ema, self.optimizer, self.accelerator.scaler, self.train_loader)
        self.stateful = TrainingObjects(self.processes, *stateful, self.step.loss_state)
        self.retry = Retry(
            self.step, self.train_loader, lambda: self.evaluation.loaders, self.state, self.log, self.output_dir
        )
        self.upcoming: Steps  # the remaining steps, while running
        self.callbacks = Callbacks(callbacks or ())
        self.publish: Publish | None = None  # the built-in callback: report, then push
        self.progress, self.session = Progress(self), Session(self)
        self.final, self.num_averaged, self.recipe_text = "auto", 5, ""
        self.final_model: FinalModel | None = None  # the weights in the model after the run has ended
        self.export: Callable[[nn.Module, Path], None] = save_weights
        self.resume_settings = user_settings(
            self, optimizer, step_loss or loss, clip_norm
        )  # a resumed run has the same
        self.bad_images: BadImages | None = None
        self.probe: Probe | None = None
        self.reserved_memory = 0  # bytes of this machine's memory that the loaders will need

    @classmethod
    @check_arguments
    def from_recipe(
        cls, recipe: Recipe | str | Path, overrides: Sequence[str] = (), **options: Unpack[RecipeOptions]
    ) -> Trainer:
        """Return the trainer of a recipe (file, name or `Recipe`) with `section.key=value` overrides.

        `dataset`: a `datasets.Dataset` or `DatasetDict` to use instead of the recipe's data.dataset. With `resume`,
        `fit` continues from the newest complete checkpoint in the recipe's output_dir. `callbacks`: see `Callback`.

        The other options replace parts that the recipe would build (docs/python-api.md): `model`, `step_loss`,
        `optimizer=f(groups)`, `schedule=f(num_steps)`, `metrics`, `predict`, `transform=f(pixels, rng)` and
        `sample_weights`. Pass the same ones when you resume.
        """
        from hf_fasttrain.from_recipe.trainer import build_trainer

        return build_trainer(recipe, overrides, trainer_class=cls, **options)

    def fit(self) -> Result:
        """Train to the end and return the result.

        Raises Stopped if a signal ends training early; the state is saved.
        """
        with self.running():
            for _ in self.iterate():
                pass
            return self.finish()

    def running(self) -> AbstractContextManager[None]:
        """Return a context manager that locks the run folder, handles signals and runs the clock, for `iterate`.

        When the block ends, by `break` or an exception too, everything is released, including loader processes, and
        another trainer may run. Raises RunError if one is already running in this process.
        """
        prepare_final(self)
        if self.publish is None and self.report and self.output_dir is not None:
            from hf_fasttrain.report.callback import Publish

            self.set_publish_callback(Publish(self.output_dir, self.log))
        return self.session.open()

    def iterate(self) -> Iterator[StepReport]:
        """Run the remaining steps; each is yielded after its evaluation and checkpoint.

        Only inside `running`. Continues where an earlier loop ended. After a signal the state is saved and Stopped is
        raised, which is also a KeyboardInterrupt after Ctrl-C.
        """
        self.session.require_open("iterate()")
        return self._make_steps()

    def _make_steps(self) -> Iterator[StepReport]:
        if not self.is_finished:
            continue_after_finish(self)
        if self.state.step and self._is_due(self.evaluate_every) and not self.is_finished:  # not done before a stop
            stop = self._evaluate() if self.evaluation.has_started else 0
            self.save()
            if stop:
                stop_run(self, stop)
        for step in self.upcoming if not self.is_finished else ():
            self.state.lr = self.lr * self.schedule(self.state.updates)
            set_lr(self.step.optimizer, self.state.lr, self.lr)
            self.callbacks.call("before_step", self, self.step.at(step))
            self.step.detect_changes(self.state.lr, self.lr)
            if not self.step.is_settled:
                if type(self).evaluate is Trainer.evaluate:
                    self.evaluation.try_out(self.trained_model)
                step = self.retry.settle(step, self.upcoming)
            loss = self.retry(step, self.upcoming, self.train_step)
            self.throughput.add(loss, step.num_images, self.step.grad_norm, self.step.values, skipped=self.step.skipped)
            self.state.step += 1
            report = StepReport(self.state.step, loss, step.num_images, self.state.lr, self.step.grad_norm)
            self.log.at_step(self.state.step)
            request = self.stop.at_step(self.state.step)
            stop = request.stop
            if self._is_due(self.log_every, self.evaluate_every, self.checkpoint_every) or request:
                self.progress.log_training()  # raises if the loss is NaN or inf, before that is saved
            self.callbacks.call("after_step", self, report)
            if self._is_due(self.evaluate_every) and self.evaluation.has_started and not stop:
                stop = self._evaluate()
            if self._is_due(self.checkpoint_every) or request.save or stop:
                self.save()
            self.announce_saved(request.on_disk)
            if stop:
                stop_run(self, stop)
            yield report
            if self.has_stopped_early:
                break

    def finish(self) -> Result:
        """End the run: evaluate, write model, result and report, call the callbacks.

        Only inside `running`. After a `break` the run ends with the current model; a resumed run continues from there.
        Raises Stopped if a signal interrupts the evaluation, and at the end CallbackError if a callback failed.
        """
        self.session.require_open("finish()")
        if self.early_stop:
            self.log.print(f"{self.early_stop}; {how_to_continue()}" if self.output_dir else str(self.early_stop))
        self.progress.log_remaining()
        self.stateful.require_finite(self.state.step)
        stop = self._evaluate()
        save_last(self)
        stop = stop or self.stop.now() or evaluate_final(self)
        if stop:
            raise_stopped(self, stop)
        result = write_results(self)
        self.session.release()
        call_finished(self, result)
        return result

    def set_publish_callback(self, publish: Publish) -> None:
        """Set the built-in callback that reports and pushes the run; it is called before the others."""
        self.publish = publish
        self.callbacks.insert_first(publish)
        if self.checkpoints is not None:
            self.checkpoints.saved = publish.saved

    def train_step(self, step: Step) -> Tensor:
        """Run one optimizer step; return this process's part of its mean loss, 0-d, on the device.

        The sum over processes is the loss. Only fp16 waits for the device, for its loss scale.
        """
        loss = self.step.gradients(step)
        self.step.update()
        return loss

    @property
    def model(self) -> nn.Module:
        """The model that is called in training: `raw_model` wrapped by the accelerator."""
        return self.step.model

    def _is_due(self, *every: int) -> bool:
        step = self.state.step
        return step == self.num_steps or 0 in [step % number for number in every]

    @property
    def has_stopped_early(self) -> bool:
        """Whether the last evaluation was at least `patience` steps after the best one."""
        return waited_steps(self.evaluation.early_stopping, self.state) is not None

    @property
    def early_stop(self) -> EarlyStop | None:
        """How early stopping ended training; None if it did not."""
        return early_stop(self.evaluation.early_stopping, self.state, self.num_steps)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state.step >= self.num_steps or self.has_stopped_early

    @property
    def trained_model(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.raw_model

    def evaluate(self, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Return the metrics of the current model on `loader`, by default the evaluation split.

        During training, returns an empty dict if a signal interrupts it.
        """
        eval_loader = self.evaluation.eval_loader if loader is None else UserEvalLoader.wrap(loader, self.device)
        if eval_loader is None:
            raise RunError("nothing to evaluate; pass eval_loader to Trainer, or a loader to evaluate()")
        if not self._has_earlier_weights:  # those were averaged when they were saved
            for model in dict.fromkeys((self.raw_model, self.trained_model)):  # in this order on all processes
                average_batch_norm(model, self.processes)
        self.trained_model.eval()
        metrics = self.evaluation.evaluator(self.trained_model, eval_loader, self.stop.pending)
        self.step.accumulation.set_train_mode()
        return metrics

    def _evaluate(self) -> int:
        """Evaluate, unless that was done after this step; return the signal that interrupted it, or 0."""
        if not self.evaluation.is_due:
            return 0
        is_last = self.state.step == self.num_steps
        metrics = self.evaluation.measure(self.evaluate, self.evaluation.eval_loader, is_last=is_last)
        if not metrics:
            return self.stop.now()
        if self.checkpoints is not None:
            self.checkpoints.saved_at = -1  # an earlier checkpoint of this step does not contain the evaluation
        is_best = self.evaluation.compare(metrics)
        self.callbacks.call("after_evaluation", self, metrics)  # before saving, which includes their states
        if is_best:
            self.save()
        return 0

    @property
    def _has_earlier_weights(self) -> bool:
        """Whether the model has other weights than the last: the best ones, or an average, with which the run ends."""
        return self.final_model is not None and not self.final_model.is_of_step(self.state.step)

    def save(self) -> None:
        """Start to write a checkpoint of the current step, unless it exists or there is no run folder.

        Does nothing if the model has the weights of another step, those of the best evaluation.
        """
        checkpoints, step = self.checkpoints, self.state.step
        if checkpoints is None or checkpoints.saved_at == step or self._has_earlier_weights:
            return
        self.announce_saved()  # the previous one, before it may be pruned
        self.stop.saved()
        with self.throughput.stopped():
            self.throughput.save(self.state)
            self.state.base_lr = self.lr  # which a callback may have changed
            description = {
                "state": asdict(self.state),
                "learnt": self.resume_settings,
                "recipe": self.recipe_text,
                "trackers": self.log.tracker_ids(),
                "processes": self.processes.number,
                "callbacks": self.callbacks.participants,
            }
            states = {"trainable": self.step.trainable_state(), "callbacks": self.callbacks.states(self.processes)}
            best = self.state.best["step"] if self.state.best else None
            snapshot = Snapshot(step, description, self.stateful.weights(), self.stateful.training() | states)
            checkpoints.save(snapshot, best, resumable=self.stateful.can_resume_here)

    def announce_saved(self, on_disk: int | None = None) -> None:
        """Call `after_save` for the newest complete checkpoint, that of step `on_disk`.

        Called by all processes at the same point; without `on_disk` they wait for what is being written.
        """
        checkpoints = self.checkpoints
        if checkpoints is None:
            return
        if on_disk is None:
            checkpoints.wait()
            on_disk = self.processes.largest(checkpoints.newest_written())[0]
        if on_disk > checkpoints.announced:
            checkpoints.announced = on_disk
            self.callbacks.call("after_save", self, checkpoint_path(checkpoints.folder, on_disk))

    def restore(self) -> None:
        """Restore the newest complete checkpoint; call it before `running`. Without one, training starts over."""
        restore(self)

    def load_best(self) -> int:
        """Load the best evaluation's weights, outside `running`; return their step. RunError if they are gone."""
        return load_best(self)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        weights: str | None = None,
        model: Any = None,
    ) -> str:
        """Upload the finished run to a Hub repository in one commit, and return its URL.

        `private`: for a new repository; None: as in its owner's settings. `license`: for the model card. `weights`:
        last, best (of the best evaluation), average or step_N; None: those in output_dir/model. `model`: needed for a
        run of your own model, see `open_user_model`. Raises RunError with the command that completes the push.
        """
        from hf_fasttrain.hub.push import push_run

        if (run := self.output_dir) is None:
            raise RunError("nothing to push: the trainer has no output_dir")
        options: dict[str, Any] = {"private": private, "license": license, "weights": weights, "model": model}
        return on_main(lambda: push_run(run, repo, **options, log=self.log.print))
