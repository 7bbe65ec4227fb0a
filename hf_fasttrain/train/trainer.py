"""The loop: exact gradients over a step's images, whatever the accumulation and the number of processes."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fasttrain.data.loading.loader import EvalLoader, Step, TrainLoader
from hf_fasttrain.data.loading.user_loader import OwnEvalLoader, OwnLoader
from hf_fasttrain.data.loading.worker_deaths import CHILD_SIGNAL, Deaths
from hf_fasttrain.data.pixels.images import BadImages
from hf_fasttrain.models.weights import save_weights
from hf_fasttrain.run_folder.checkpoint import Snapshot, checkpoint_path, complete_checkpoints, require_same_settings
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.run_folder.result import Result, Watch
from hf_fasttrain.train.callbacks import CallbackError, Callbacks, StepReport
from hf_fasttrain.train.checkpointing import Checkpoints, lock_run, unlock_run
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.early_stopping import EarlyStop, early_stop, go_on, how_to_go_on, record_of, waited_steps
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.evaluation import Evaluator, average_batch_norm
from hf_fasttrain.train.final_weights import FinalModel, load_final, resolve_final, with_metric
from hf_fasttrain.train.log import METRICS_FILE, RunLog, last_steps
from hf_fasttrain.train.loss import Loss, first_loss_note
from hf_fasttrain.train.optim import set_lr
from hf_fasttrain.train.retry import Retry
from hf_fasttrain.train.schedule import Schedule, constant
from hf_fasttrain.train.state import State, Stateful
from hf_fasttrain.train.step import TrainStep
from hf_fasttrain.train.steps import Steps
from hf_fasttrain.train.stop import StopRequests, StopSignals, only_one, signal_name, stopped
from hf_fasttrain.train.throughput import Throughput
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.environment import describe_machine, describe_versions, peak_memory_bytes, set_current_device
from hf_fasttrain.utils.errors import (
    PeerGone,
    RunError,
    RunFailure,
    how_to_resume,
    shortened,
)
from hf_fasttrain.utils.library_errors import is_peer_gone
from hf_fasttrain.utils.signals import SIGNALS, interruptible

if TYPE_CHECKING:
    from hf_fasttrain.recipe.schema import Recipe
    from hf_fasttrain.report.callback import Publish


class Trainer:
    """Trains `model` with `optimizer` over the steps of `train_loader`.

    `Trainer.from_recipe` makes one from a recipe. With your own objects, a batch of `train_loader` is (images,
    targets), this process's share of one step, which is split into `accumulation_steps` micro-batches; `loss` maps
    (logits, targets) to the mean over their images; `eval_loader` gives (images, labels), on all processes together
    each image once. The model is moved to the accelerator's device and wrapped; don't prepare anything yourself.
    `final`: with which weights the run ends, those of its best evaluation or its last ones; auto: best with
    `early_stopping`, else last. They are in the model after `fit`, and in output_dir/model.
    Before the first step two images of noise show which parameters forward does not use: they are frozen, and named.

    `callbacks` are called while it trains: see `Callback`.

    Raises RunError (a ValueError) for what can't be trained or resumed, and Stopped when a signal has stopped training,
    its state saved.
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
        final: str = "auto",
        output_dir: str | Path | None = None,
        checkpoint_every: Duration | str = "1 epoch",
        keep_checkpoints: int = 2,
        export: Callable[[nn.Module, Path], None] = save_weights,
        learnt: dict[str, Any] | None = None,
        recipe_text: str = "",
        launched: bool = False,
        bad_images: BadImages | None = None,
        report: bool = True,
        callbacks: Sequence[Any] = (),
        log: RunLog | None = None,
        log_every: int = 10,
        seed: int = 0,
    ) -> None:
        self.accelerator = accelerator or Accelerator(gradient_accumulation_steps=accumulation_steps)
        self.device = set_current_device(self.accelerator)
        self.processes, self.state = Processes(self.accelerator), State()
        self.step = TrainStep(
            self.accelerator, model, optimizer, loss, self.processes, self.state,
            seed=seed, clip_norm=clip_norm, ema=ema,
        )  # fmt: skip
        self.raw_model, self.optimizer, self.ema = self.step.raw_model, self.step.optimizer, ema
        self.lr = lr if lr is not None else float(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:  # the groups' own rates keep their ratios
            group.setdefault("lr_scale", float(group["lr"]) / self.lr)
        self.schedule = schedule

        join_single = bool(self.step.norms)
        self.train_loader = OwnLoader.wrap(
            train_loader,
            self.device,
            accumulation_steps,
            join_single=join_single,
            total=self.processes.sum if self.processes.is_distributed else None,
        )
        self.eval_loader = OwnEvalLoader.wrap(eval_loader, self.device)
        self.test_loader = OwnEvalLoader.wrap(test_loader, self.device)
        if evaluator is None and num_classes is not None:
            evaluator = Evaluator(self.accelerator, num_classes)
        if evaluator is None and (eval_loader is not None or test_loader is not None):
            raise RunError("nothing to evaluate with: give Trainer num_classes or an evaluator beside the eval_loader")
        self.evaluator, self.best, self.early_stopping = evaluator, best, early_stopping
        self.final = resolve_final(final, early_stopping)
        steps_per_epoch = self.train_loader.steps_per_epoch
        self.num_steps = Duration.parse(duration).to_steps(steps_per_epoch)
        self.evaluate_every = Duration.parse(evaluate_every).to_steps(steps_per_epoch)
        saving = Duration.parse(checkpoint_every, minutes=True)
        minutes = saving.count if saving.unit == "minutes" else None
        self.checkpoint_every = self.num_steps if minutes is not None else saving.to_steps(steps_per_epoch)
        if min(self.num_steps, self.evaluate_every, self.checkpoint_every, log_every) < 1 or saving.count == 0:
            raise RunError("duration, evaluate_every, checkpoint_every and log_every must be at least 1 step")
        self.log_every = log_every

        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.export, self.learnt, self.bad_images = export, learnt or {}, bad_images
        self.recipe_text, self.report = recipe_text, report and output_dir is not None
        self.publish: Publish | None = None  # the built-in callback: report, then push
        self.callbacks = Callbacks(callbacks)
        self.log = log or RunLog(self.output_dir, main=self.processes.is_main)
        if ema is not None and (slow := ema.slow_note(self.num_steps)):
            self.log.note(slow)
        self.throughput = Throughput(self.device, lambda: self.train_loader.wait_seconds)
        self.deaths = Deaths(lambda text: self.log.alert(f"after step {self.state.step:,} {text}"))
        for loader in (train_loader, eval_loader, test_loader):
            if isinstance(loader, TrainLoader | EvalLoader):
                loader.feed.deaths = self.deaths
        self.signals = StopSignals(self.log.hurry, launched=launched)
        self.checkpoints: Checkpoints | None = None
        if self.output_dir is not None:
            self.checkpoints = Checkpoints(self.output_dir, self.processes, self.log, keep_checkpoints)
        on_disk = (lambda: 0) if self.checkpoints is None else self.checkpoints.newest_written
        self.requests = StopRequests(self.processes, self.signals, minutes, on_disk)
        scaler = self.accelerator.scaler
        self.stateful = Stateful(self.processes, self.raw_model, ema, self.step.optimizer, scaler, self.train_loader)
        self.retry = Retry(
            self.step,
            self.train_loader,
            lambda: (self.eval_loader, self.test_loader),
            self.state,
            self.log,
            self.output_dir,
        )
        self._saved_at = self._collected_at = -1
        self._told_saved = 0  # step of the newest checkpoint that callbacks know
        self._is_running, self._held = False, ExitStack()
        self._has_logged = False
        self._final: FinalModel | None = None  # what the model holds since the run has ended
        self.predictions: Predictions | None = None  # of the evaluation split, once the run is finished
        self._test_metrics: dict[str, float] | None = None
        self._evaluation_seconds = 0.0  # of the last one
        self.reserved_memory = 0  # bytes of this machine's memory that the loaders will take beside this process

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe | str | Path,
        overrides: Sequence[str] = (),
        *,
        dataset: Any = None,
        resume: bool = False,
        callbacks: Sequence[Any] = (),
    ) -> Trainer:
        """Return the trainer of a recipe (file, name or `Recipe`) with `section.key=value` overrides.

        `dataset`: a `datasets.Dataset` or `DatasetDict` to use instead of the recipe's data.dataset. With `resume`,
        `fit` goes on from the newest complete checkpoint in the recipe's output_dir. `callbacks`: see `Callback`.
        """
        from hf_fasttrain.from_recipe.trainer import build_trainer

        return build_trainer(recipe, overrides, dataset=dataset, resume=resume, callbacks=callbacks, trainer_class=cls)

    # --- the loop ------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train to the end and return how it ended.

        Raises Stopped when a signal has stopped it before, with its state saved.
        """
        with self.running():
            for _ in self.iterate():
                pass
            return self.finish()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the run folder, listen to signals and let the clock run, for a loop over `iterate`.

        All of that ends with it, and loader processes too, whether the loop came to its end, was left by `break` or by
        an exception: another trainer may run then. Raises RunError where one is running in this process already.
        """
        with only_one(self.output_dir), self._run_folder():
            began_at, late = self.state.step, 0
            try:
                with ExitStack() as self._held:
                    self._begin(self._held)
                    yield
                    late = self.signals.received if self._is_running else 0
            except BaseException as error:
                self._failed(error)
                failure = self._failure(error, began_at)
                if failure is not None:
                    raise failure from None
                raise
            finally:
                self._is_running = False
                self._close()
        if late in SIGNALS:
            signal.raise_signal(late)  # that came after the last step: nobody has heeded it

    def iterate(self) -> Iterator[StepReport]:
        """Make the steps that are left, and yield each when all that is due after it is done.

        Within `running` alone. Goes on where an earlier loop was left. A signal ends it: the state is saved, and
        Stopped is raised, which is a KeyboardInterrupt too if it was Ctrl-C.
        """
        self._require_running("iterate()")
        return self._make_steps()

    def _make_steps(self) -> Iterator[StepReport]:
        self._catch_up()
        for step in self.upcoming if not self.is_finished else ():
            if not self.step.is_settled:
                step = self.retry.settle(step, self.upcoming)
            self.state.lr = self.lr * self.schedule(self.state.updates)
            set_lr(self.step.optimizer, self.state.lr)
            self.callbacks.call("before_step", self, self.state.step + 1)
            loss = self.retry(step, self.upcoming, self.train_step)
            self.throughput.add(loss, step.num_images, self.step.grad_norm, skipped=self.step.skipped)
            self.state.step += 1
            report = StepReport(self.state.step, loss, step.num_images, self.state.lr, self.step.grad_norm)
            self.log.at_step(self.state.step)
            request = self.requests.at_step(self.state.step)
            stop = request.stop
            if self._due(self.log_every, self.evaluate_every, self.checkpoint_every) or request:
                self._log_training()  # which stops a run whose loss is no number before that is saved
            self.callbacks.call("after_step", self, report)
            if self._due(self.evaluate_every) and not stop:
                stop = self._evaluate_and_compare()
            if self._due(self.checkpoint_every) or request.save or stop:
                self.save()
            self._tell_saved(request.on_disk)
            if stop:
                self._stop(stop)
            yield report
            if self.has_stopped_early:
                break

    def publish_by(self, publish: Publish) -> None:
        """Let a built-in callback report and push the run, before the other callbacks are called."""
        self.publish = publish
        self.callbacks.put_first(publish)
        if self.checkpoints is not None:
            self.checkpoints.saved = publish.saved

    @contextmanager
    def _run_folder(self) -> Iterator[None]:
        """Keep other runs out of the run folder."""
        self._require_free_folder()
        if self.publish is None and self.report and self.output_dir is not None:
            from hf_fasttrain.report.callback import Publish

            self.publish_by(Publish(self.output_dir, self.log))
        try:
            yield
        finally:
            if self.checkpoints is not None:
                unlock_run(self.checkpoints.run)

    def _begin(self, held: ExitStack) -> None:
        """Take hold of all that `running` holds, but for the run folder."""
        self.state.num_steps = self.num_steps
        self.upcoming = Steps(self.train_loader, self.state.step, self.num_steps)
        held.callback(self._close_loaders)
        self.step.accumulation.set_train_mode()
        self.deaths.number = 0
        bars = self.log.progress(self.num_steps, self.state.step, self.train_loader.steps_per_epoch)
        for each in (self.signals, CHILD_SIGNAL.noted(), bars, self.throughput.running()):
            held.enter_context(each)
        self._is_running = True

    def _close_loaders(self) -> None:
        for loader in (self.upcoming, self.eval_loader, self.test_loader):
            if hasattr(loader, "close"):
                loader.close()

    def _failed(self, error: BaseException) -> None:
        """Tell the callbacks that an exception has ended training, once nothing is being written."""
        if self.checkpoints is not None:
            self.checkpoints.stand_by()
        if self._is_running:
            for failed in self.callbacks.call_all("failed", self, error):
                self.log.alert(str(failed))

    def _close(self) -> None:
        """Wait for what is being written, and close the callbacks."""
        is_failing = sys.exception() is not None
        failed = self.callbacks.call_all("close")
        if self.checkpoints is not None:
            self.checkpoints.wait()
        if failed and not is_failing:
            raise failed[0]
        for error in failed:
            self.log.alert(str(error))

    def _require_running(self, method: str) -> None:
        if not self._is_running:
            raise RunError(f"{method} outside of running(): use it as `with trainer.running(): ...`, or call fit()")

    def _failure(self, error: BaseException, began_at: int) -> RunFailure | None:
        """Return the message for an error that comes of a process that is gone, with what is saved; else None."""
        if self.processes.is_distributed and is_peer_gone(error):
            error = PeerGone("another training process has ended; if it could, it has said why")
        if not isinstance(error, RunFailure):
            return None
        return error if self.checkpoints is None else self.checkpoints.what_remains(error, began_at)

    def _catch_up(self) -> None:
        """Evaluate what was due when the run was stopped."""
        if self.state.step == 0 or not self._due(self.evaluate_every) or self.is_finished:
            return
        stop = self._evaluate_and_compare()
        self.save()
        if stop:
            self._stop(stop)

    def train_step(self, step: Step) -> Tensor:
        """Make one optimizer step and return this process's part of the mean loss over the step's images.

        The loss is 0-d, on the device, and its parts add up over processes. Nothing waits for the device but
        fp16, for its scale.
        """
        loss = self.step.gradients(step)
        self.step.update()
        return loss

    @property
    def model(self) -> nn.Module:
        """The model that gives the logits of training: what the accelerator has made of `raw_model`."""
        return self.step.model

    def _due(self, *every: int) -> bool:
        return self.state.step == self.num_steps or any(self.state.step % number == 0 for number in every)

    @property
    def has_stopped_early(self) -> bool:
        """Whether the last evaluation came `patience` steps after the best one, or later."""
        return waited_steps(self.early_stopping, self.state) is not None

    @property
    def early_stop(self) -> EarlyStop | None:
        """How early stopping has ended training; None if it has not."""
        return early_stop(self.early_stopping, self.state, self.num_steps)

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
        """Return the metrics of the present model on `loader`, by default the evaluation split.

        While training, an empty dict if a signal has broken it off.
        """
        chosen = self.eval_loader if loader is None else OwnEvalLoader.wrap(loader, self.device)
        if chosen is None or self.evaluator is None:
            raise RunError("nothing to evaluate with; give Trainer an eval_loader, and num_classes or an evaluator")
        if not self._holds_earlier_weights:  # saved as means already
            self._average_batch_norm()
        self.trained_model.eval()
        metrics = self.evaluator(self.trained_model, chosen, self.requests.pending)
        self.step.accumulation.set_train_mode()
        return metrics

    def _evaluate_and_compare(self) -> int:
        """Evaluate, unless that was done after this step; return the signal that broke it off, or 0."""
        if self.eval_loader is None or self.state.evaluated_at == self.state.step:
            return 0
        with self.throughput.stopped():
            metrics = self._evaluate_and_log(self.eval_loader)
        if not metrics:
            return self.requests.now()
        self.state.metrics, self.state.evaluated_at = metrics, self.state.step
        if self.evaluator is not None and self.evaluator.collects:
            self._collected_at = self.state.step
        self._saved_at = -1  # a checkpoint of this step would not know it
        if self.early_stopping and self._improves(self.early_stopping, self.state.watched):
            self.state.watched = record_of(self.early_stopping, self.state)
        if self._improves(self.best, self.state.best):
            self.state.best = {**self._record(self.best), "metrics": metrics}
            self.save()
        self.callbacks.call("after_evaluation", self, metrics)
        return 0

    def _evaluate_and_log(self, loader: Iterable[Any]) -> dict[str, float]:
        assert self.evaluator is not None
        last = self.state.step == self.num_steps or self.early_stopping is not None  # as far as can be told
        self.evaluator.collects = self.report and last and loader is self.eval_loader
        began, most = time.perf_counter(), self.evaluator.most
        with self.log.doing(f"evaluating: {getattr(loader, 'name', 'evaluation split')}"):
            metrics = self.evaluate(loader)
        if self.evaluator.most != most:
            self.log.note(f"out of memory while evaluating: batches of {self.evaluator.most} images from now on")
        for failure in self.evaluator.external.take_failures():
            self.log.note(failure)
        if metrics:
            name, seconds = getattr(loader, "name", "evaluation split"), time.perf_counter() - began
            self._evaluation_seconds = seconds
            self.log.eval_line(self.state.step, self._epoch, name, metrics, seconds, self.throughput.train_seconds)
        return metrics

    def _improves(self, watch: Watch, record: dict[str, Any] | None) -> bool:
        if watch.metric not in self.state.metrics:
            if self.evaluator is not None and watch.metric in self.evaluator.external.modules:
                self.log.note(f"'{watch.metric}' is watched; evaluations without it are not compared with the best")
                return False
            known = ", ".join(self.state.metrics)
            raise RunError(f"'{watch.metric}' is watched, but the evaluation measures only {known}; watch one of them")
        return watch.is_better(self.state.metrics[watch.metric], record["value"] if record else None)

    def _record(self, watch: Watch) -> dict[str, Any]:
        return {"metric": watch.metric, "value": self.state.metrics[watch.metric], "step": self.state.step}

    def _average_batch_norm(self) -> None:
        average_batch_norm(self.raw_model, self.processes)
        if self.ema is not None:
            average_batch_norm(self.ema.module, self.processes)

    @property
    def _holds_earlier_weights(self) -> bool:
        """Whether the model has the weights of an earlier step, with which the run ends."""
        return self._final is not None and self._final.step != self.state.step

    # --- saving and restoring ------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to write a checkpoint of the present step, unless it is there or there is no run folder.

        Nor once the model has the best evaluation's weights, which are of another step.
        """
        if self.checkpoints is None or self._saved_at == self.state.step or self._holds_earlier_weights:
            return
        self._tell_saved()  # of the one before, which may be removed now
        self._saved_at = self.state.step
        self.requests.saved()
        with self.throughput.stopped():
            self._copy_throughput()
            about = {
                "state": asdict(self.state),
                "learnt": self.learnt,
                "recipe": self.recipe_text,
                "trackers": self.log.tracker_ids(),
                "processes": self.processes.number,
                "callbacks": self.callbacks.state_dict(),
            }
            best = self.state.best["step"] if self.state.best else None
            snapshot = Snapshot(self.state.step, about, self.stateful.weights(), self.stateful.training())
            self.checkpoints.save(snapshot, best)

    def _require_free_folder(self) -> None:
        if self.checkpoints is None:
            return
        if self.state.step == 0 and complete_checkpoints(self.checkpoints.folder):
            raise RunError(f"{self.output_dir}: holds checkpoints; call restore(), or give another output_dir")
        self.processes.wait()  # nobody writes before everybody has looked
        if not lock_run(self.checkpoints.run):
            self.log.note(f"{self.output_dir}: its file system has no locks; nothing keeps a second run out of it")

    def restore(self) -> None:
        """Go back to the newest complete checkpoint; say so and start afresh if there is none."""
        if self.checkpoints is None:
            raise RunError("nothing to resume: the trainer has no output_dir")
        lock_run(self.checkpoints.run)
        try:
            self._restore(self.checkpoints)
        except RunError:
            unlock_run(self.checkpoints.run)
            raise

    def _restore(self, checkpoints: Checkpoints) -> None:
        checkpoint = checkpoints.newest()
        if checkpoint is not None:
            require_same_settings(checkpoint.state["learnt"], self.learnt, checkpoint.path)
            state = State(**checkpoint.state["state"])
            if state.step > self.num_steps:
                raise RunError(
                    f"can't resume {checkpoint.path}: train.duration is {self.num_steps:,} steps, and {state.step:,} "
                    "are done already; give a longer one"
                )
            self.stateful.restore(checkpoint)
            self.state.__dict__.update(vars(state))  # in place: others hold it
            self._final = None
            self.state.best, note = with_metric(state.best, self.best)
            if note:
                self.log.note(note)
            self._go_on(checkpoint.path.name, checkpoint.state["processes"])
            self.callbacks.load_state_dict(checkpoint.state.get("callbacks", {}), self.log.note)
        else:
            self.log.say(f"nothing to resume in {self.output_dir}: training starts afresh")
            self.log.forget_after(0)
        self.retry.restore()

    def _go_on(self, name: str, processes: int) -> None:
        """Set clocks and records to the state that was restored, and say what is different now."""
        state = self.state
        self.throughput.images, self.throughput.train_seconds = state.images, state.train_seconds
        self.throughput.wait_seconds = state.wait_seconds
        self._saved_at = self._told_saved = state.step
        self.log.forget_after(state.step)
        if self.log.main and self.log.folder is not None:
            last = last_steps(self.log.folder)["train"]  # each checkpoint has its line
            if last < state.step:
                self.log.note(
                    f"{METRICS_FILE} has no figures of steps {last + 1:,} to {state.step:,}: they did not reach the "
                    "disk"
                )
        then = f" of {processes} processes" if processes != self.processes.number else ""
        self.log.say(f"resumed from {self.output_dir}/checkpoints/{name}{then}: step {state.step} of {self.num_steps}")
        if state.num_steps != self.num_steps:
            lr = self.lr * self.schedule(state.updates)
            self.log.note(
                f"train.duration is {self.num_steps:,} steps now, it was {state.num_steps:,}: after step "
                f"{state.step:,} lr follows the new schedule, {lr:.3g} after {state.lr:.3g}"
            )
        going_on = go_on(self.early_stopping, state, self.num_steps)
        if going_on:
            self.log.note(going_on)
        if not self.is_finished:
            state.resumed_at.append(state.step)
            self.log.resume_line(state.step, name, self.processes.number)

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, license: str | None = None, weights: str | None = None
    ) -> str:
        """Upload the finished run to a Hub repository, in one commit, and return its address.

        `private`: of a new repository; None: as its owner's settings say. `license` stands in the card. `weights`:
        last, best (of the best evaluation) or step_N; None: those in output_dir/model. Raises RunError with the command
        that finishes it.
        """
        from hf_fasttrain.hub.push import push_run

        if self.output_dir is None:
            raise RunError("nothing to push: the trainer has no output_dir")
        run = self.output_dir
        options: dict[str, Any] = {"private": private, "license": license, "weights": weights, "tell": self.log.say}
        return on_main(lambda: push_run(run, repo, **options))

    # --- logging and ending --------------------------------------------------------------------------------

    @property
    def _epoch(self) -> float:
        return self.state.step / self.train_loader.steps_per_epoch

    def _add_up(self, part: Tensor) -> Tensor:
        return self.processes.add_up(part)

    def _log_training(self) -> None:
        first = None if self._has_logged else self.throughput.first_loss(self._add_up)
        values = self.throughput.lap(self._add_up)
        if not math.isfinite(values["loss"]):
            raise self._not_finite()
        if first is not None:
            self._compare_with_uniform(max(first, values["loss"]))
        left = self.num_steps - self.state.step
        evaluating = math.ceil(left / self.evaluate_every) * self._evaluation_seconds
        eta = left * values["seconds_per_step"] + evaluating
        line = {**values, "epoch": self._epoch, "lr": self.state.lr, "eta_seconds": eta}
        line["peak_memory_bytes"] = peak_memory_bytes(self.device)
        self.log.train_line(self.state.step, self.num_steps, line)

    def _compare_with_uniform(self, first: float) -> None:
        """Say so if a run begins far above the loss of a model that finds all classes equally likely."""
        self._has_logged, uniform = True, self.step.accumulation.uniform_loss
        note = first_loss_note(first, float(uniform)) if uniform is not None else None
        if note and not self.state.resumed_at:
            self.log.note(note)

    def _not_finite(self) -> RunError:
        """Return the error that names the step where the loss or a gradient was no number, its lr and its images."""
        found = self.throughput.first_not_finite(self._add_up)
        ago = found.steps_ago if found else 0
        step = self.state.step - ago
        lr = self.lr * self.schedule(max(0, self.state.updates - 1 - ago))
        images = self.train_loader.image_indices(step - 1)
        listed = "" if images is None else f"\ntraining images of this step, by row: {shortened(images, 64)}"
        return RunError(
            f"{found or 'the loss is nan'} at step {step}, lr {lr:.3g}: lower optimizer.lr, set optimizer.clip_norm or "
            f"use another accelerate.mixed_precision; the checkpoints are as they were{listed}"
        )

    def finish(self) -> Result:
        """End the run after the steps that are made: evaluate, write model, result and report, tell the callbacks.

        Within `running` alone. After a `break` the run ends with the model as it is; resumed, it goes on from there.
        Raises Stopped when a signal has broken the evaluation off, and CallbackError, at last, if a callback failed.
        """
        self._require_running("finish()")
        if self.early_stop:
            self.log.say(f"{self.early_stop}; {how_to_go_on()}" if self.output_dir else str(self.early_stop))
        self.stateful.require_finite(self.state.step)
        stop = self._evaluate_and_compare()
        self._save_last()
        stop = stop or self.requests.now() or self._measure_final()
        if stop:
            self._leave(stop)
        if self.bad_images is not None and self.bad_images.count:
            self.log.note(f"{self.bad_images.count} bad images were replaced by others; {self.bad_images.where}")
        if self.checkpoints is not None and self.processes.is_main:
            self.checkpoints.write_results(
                lambda folder: self.export(self.trained_model, folder),
                self.predictions,
                lambda: asdict(self._result()),
            )
        result = self._result()
        self.processes.wait()
        self._held.close()
        self._is_running = False
        self._tell_finished(result)
        return result

    def _tell_finished(self, result: Result) -> None:
        """Tell the callbacks, and write down what they could not write; Ctrl-C and SIGTERM leave them off."""
        failed: list[CallbackError] = []
        try:
            with interruptible():
                failed = self.callbacks.call_all("finished", self, result)
        except KeyboardInterrupt:
            self.log.say("trained to the end; the callbacks that were left are not called")
        if self.checkpoints is not None and self.processes.is_main and self.log.lost != result.not_written:
            result.not_written = list(self.log.lost)
            self.checkpoints.write_result(asdict(result))
        for error in failed:
            self.log.alert(f"the run is finished, but {error}")
        if failed:
            raise failed[0]

    def _save_last(self) -> None:
        """Save the present step and wait until that is on disk; twice, if it must."""
        self.save()
        if self.checkpoints is None:
            return
        if self.processes.any_process(not self.checkpoints.wait()):
            self._saved_at = -1
            self.save()  # once more: what filled the disk may be gone
        self._tell_saved()

    def _tell_saved(self, on_disk: int | None = None) -> None:
        """Tell the callbacks of a checkpoint that has become complete; the main process knows which one."""
        if self.checkpoints is None:
            return
        if on_disk is None:
            self.checkpoints.wait()
            on_disk = self.processes.largest(self.checkpoints.newest_written())[0]
        if on_disk > self._told_saved:
            self._told_saved = on_disk
            self.callbacks.call("after_save", self, checkpoint_path(self.checkpoints.folder, on_disk))

    def _measure_final(self) -> int:
        """Load and measure the weights that the run ends with; return the signal that broke it off, or 0."""
        self._final = load_final(self.final, self.state, self.checkpoints, self.stateful, self.log)
        if self.evaluator is None:
            return 0
        if self.eval_loader is not None:
            with self.throughput.stopped():
                metrics = self._ask_model(self._final)
            if not metrics:
                return self.requests.now()
            self._final.metrics = self._final.metrics or metrics
        if self.test_loader is not None:
            with self.throughput.stopped():
                self._test_metrics = self._evaluate_and_log(self.test_loader)
            return 0 if self._test_metrics else self.requests.now()
        return 0

    def _ask_model(self, final: FinalModel) -> dict[str, float]:
        """Keep what the model says of each image of the evaluation split, if anybody wants it, and return its metrics.

        It is asked where the evaluation of these weights was not kept. An empty dict if a signal has broken it off.
        """
        assert self.evaluator is not None
        metrics = final.metrics or {}
        self.evaluator.collects = self.report
        if not metrics or (self.report and self._collected_at != final.step):
            metrics = self.evaluate()
        self.evaluator.collects = False
        if metrics and self.report:
            name, rows = getattr(self.eval_loader, "name", "evaluation split"), getattr(self.eval_loader, "rows", None)
            self.predictions = self.evaluator.predictions(final.step, name, rows)
            self._collected_at = -1  # they are not kept twice
        return metrics

    @property
    def final_step(self) -> int:
        """The step of the weights that a finished run's model folder should have, as far as they are kept."""
        best = self.state.best["step"] if self.state.best else self.state.step
        if self.final != "best" or best == self.state.step or self.checkpoints is None:
            return self.state.step
        return best if self.checkpoints.can_load(best) else self.state.step

    def _stop(self, stop: int) -> NoReturn:
        """Save the present step and leave."""
        self.stateful.require_finite(self.state.step)
        self._save_last()
        self._leave(stop)

    def _leave(self, stop: int) -> NoReturn:
        """Raise Stopped, the state being saved."""
        saved = self.checkpoints is None or not self.processes.any_process(not self.checkpoints.wait())
        message = f"stopped by {signal_name(stop)} after step {self.state.step} of {self.num_steps}"
        if self.checkpoints is None:
            message += "; nothing is saved without an output_dir"
        elif saved:
            message += f"; it is saved: {how_to_resume()} continues"
        else:
            message += f"; its state could not be saved: {self.checkpoints.failed}"
        self.log.say(message)
        raise stopped(stop, message, self.state.step, self._result(), saved=saved)

    def _copy_throughput(self) -> None:
        self.state.images, self.state.train_seconds = self.throughput.images, self.throughput.train_seconds
        self.state.wait_seconds = self.throughput.wait_seconds

    def _result(self) -> Result:
        self._copy_throughput()
        state, seconds = self.state, max(self.throughput.train_seconds, 1e-9)
        final = self._final or FinalModel("last", state.step, state.metrics)
        return Result(
            metrics=final.metrics or {},
            test_metrics=self._test_metrics,
            model={"weights": final.weights, "step": final.step, "ema": self.ema is not None},
            best=state.best,
            last={"step": state.step, "metrics": state.metrics},
            steps=state.step,
            skipped_steps=state.step - state.updates,
            micro_batch_size=self.train_loader.micro_batch_size,
            out_of_memory=state.out_of_memory,
            resumed_at=state.resumed_at,
            not_written=list(self.log.lost),
            images=state.images,
            train_seconds=state.train_seconds,
            images_per_second=state.images / seconds,
            data_wait_fraction=min(1.0, state.wait_seconds / seconds),
            bad_images=self.bad_images.count if self.bad_images else 0,
            peak_memory_bytes=peak_memory_bytes(self.device),
            stopped_early=state.step < self.num_steps,
            early_stopping=self.early_stop.as_json() if self.early_stop else None,
            machine=describe_machine(self.device, self.processes.number),
            versions=describe_versions(),
            notes=self.log.notes,
        )
