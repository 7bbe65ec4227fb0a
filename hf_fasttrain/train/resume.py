"""Resuming: restores a trainer from the newest checkpoint in its run folder, or loads the best weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_fasttrain.run_folder.checkpoint import Checkpoint, checkpoint_step, require_same_settings
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.checkpointing import Checkpoints, lock_run, unlock_run
from hf_fasttrain.train.early_stopping import adapt_state
from hf_fasttrain.train.final_weights import FinalModel, with_metric
from hf_fasttrain.train.log import METRICS_FILE, last_tracked_steps
from hf_fasttrain.train.user_settings import MAY_CHANGE, comparable_settings
from hf_fasttrain.utils.errors import RunError, UnusableCheckpoint, first_line

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer


def restore(trainer: Trainer) -> None:
    """Restore a trainer; see `Trainer.restore`. The run folder stays locked for the training that follows."""
    if trainer.session.is_open:
        raise RunError("restore() inside running(): call it before, the steps of this loop are loaded already")
    if trainer.checkpoints is None:
        raise RunError("nothing to resume: the trainer has no output_dir")
    lock_run(trainer.checkpoints.run)
    try:
        if not _load_newest(trainer, trainer.checkpoints):
            trainer.checkpoints.saved_at = 0  # the folder has been checked
            trainer.log.print(f"nothing to resume in {trainer.output_dir}: training starts from the beginning")
            trainer.log.drop_lines_after(0)
        trainer.retry.restore()
    except RunError:
        unlock_run(trainer.checkpoints.run)
        raise


def _load_newest(trainer: Trainer, checkpoints: Checkpoints) -> bool:
    """Load the newest checkpoint that fits; return whether there is any checkpoint.

    Those that do not fit are skipped like corrupt ones. Raises the first one's error if none fits.
    """
    first_error: UnusableCheckpoint | None = None
    before: int | None = None
    while (checkpoint := checkpoints.newest(trainer.stateful.reason_to_skip, before)) is not None:
        try:
            _load(trainer, checkpoint)
        except UnusableCheckpoint as error:
            trainer.log.print(f"{error}: skipped")
            first_error, before = first_error or error, checkpoint_step(checkpoint.path)
        else:
            return True
    if first_error is not None:
        raise first_error
    return False


def load_best(trainer: Trainer) -> int:
    """Load the best evaluation's weights; see `Trainer.load_best`."""
    state, checkpoints = trainer.state, trainer.checkpoints
    if trainer.session.is_open:
        raise RunError("load_best() inside running(): later steps would continue from these weights; call it after")
    if state.best is None:
        raise RunError("load_best(): there is no best evaluation yet; pass eval_loader to Trainer, and train first")
    best = FinalModel("best", int(state.best["step"]), state.best.get("metrics"))
    current = trainer.final_model or FinalModel("last", state.step, None)
    if current.is_of_step(best.step):
        return best.step
    checkpoint = None
    if checkpoints is not None:
        checkpoints.wait()
        checkpoint = checkpoints.best(best.step)
    if checkpoint is None:
        reason = "no checkpoints are kept without an output_dir" if checkpoints is None else "its checkpoint is gone"
        raise RunError(f"load_best(): the weights of step {best.step:,}, the best evaluation, are missing: {reason}")
    trainer.stateful.restore_weights(checkpoint)
    trainer.final_model = best
    return best.step


def continue_after_finish(trainer: Trainer) -> None:
    """Load the last weights if `finish` has loaded the best ones or an average. Raises RunError if they are gone."""
    final, trainer.final_model = trainer.final_model, None
    if final is None or final.is_of_step(trainer.state.step):
        return
    checkpoint = trainer.checkpoints.newest() if trainer.checkpoints is not None else None
    if checkpoint is None or checkpoint.state["state"]["step"] != trainer.state.step:
        raise RunError(
            f"can't continue: the model has the weights of {final.name}, and those of step "
            f"{trainer.state.step:,} are not on disk; call restore(), or set final='last' before finish()"
        )
    trainer.stateful.restore_weights(checkpoint)


def _load(trainer: Trainer, checkpoint: Checkpoint) -> None:
    _require_same_settings(trainer, checkpoint)
    participants = checkpoint.state.get("callbacks")
    if isinstance(participants, list):  # older versions stored only states
        trainer.callbacks.require_same(participants, checkpoint.path)
    state = State(**checkpoint.state["state"])
    if state.step > trainer.num_steps:
        raise RunError(
            f"can't resume {checkpoint.path}: {_duration_name(trainer)} is {trainer.num_steps:,} steps, and "
            f"{state.step:,} are done already; set a longer one"
        )
    user_seed = trainer.step.user_seed
    state.seed = (user_seed or 0) if state.seed is None else state.seed
    if user_seed not in (None, state.seed):
        raise RunError(
            f"can't resume {checkpoint.path}: seed is {user_seed} now, and {state.seed} in the run; leave it out"
        )
    _restore_states(trainer, checkpoint)
    vars(trainer.state).update(vars(state))  # in place: other objects share it
    trainer.lr = state.base_lr or trainer.lr
    trainer.final_model = None
    trainer.state.best, note = with_metric(state.best, trainer.evaluation.best)
    if note:
        trainer.log.note(note)
    trainer.throughput.restore(state)
    assert trainer.checkpoints is not None
    trainer.checkpoints.saved_at = trainer.checkpoints.announced = state.step
    trainer.checkpoints.resumable = {state.step}
    _note_differences(trainer, checkpoint)
    if not trainer.is_finished:
        trainer.state.resumed_at.append(state.step)
        trainer.log.resume_line(state.step, checkpoint.path.name, trainer.processes.number)


def _restore_states(trainer: Trainer, checkpoint: Checkpoint) -> None:
    try:
        trainer.callbacks.restore(checkpoint.training.get("callbacks", []), trainer.processes, trainer.log.note)
        trainable = checkpoint.training.get("trainable")
        if trainable and (note := trainer.step.restore_trainable(trainable)):
            trainer.log.note(note)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        text = f"can't resume {checkpoint.path}: its trainable parameters can't be read: {first_line(error)}"
        raise UnusableCheckpoint(text) from None
    trainer.stateful.restore(checkpoint)


def _duration_name(trainer: Trainer) -> str:
    return "train.duration" if trainer.recipe_text else "duration"


def _require_same_settings(trainer: Trainer, checkpoint: Checkpoint) -> None:
    assert trainer.checkpoints is not None
    current, defaults = trainer.resume_settings, trainer.checkpoints.default_settings
    saved = {**{key: defaults[key] for key in current.keys() & defaults}, **checkpoint.state["learnt"]}
    if trainer.recipe_text:
        require_same_settings(saved, current, checkpoint.path)
    elif saved:  # older versions stored no settings of user objects
        saved, current = comparable_settings(saved, current)
        weights = f"load {checkpoint.path / 'model.safetensors'} into the model"
        require_same_settings(saved, current, checkpoint.path, f"another output_dir, and {weights}. {MAY_CHANGE}")


def _note_differences(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Report where the run continues and what has changed."""
    state, log, processes = trainer.state, trainer.log, checkpoint.state["processes"]
    log.drop_lines_after(state.step)
    if log.main and log.folder is not None:
        last = last_tracked_steps(log.folder)["train"]  # each checkpoint has its line
        if last < state.step:
            log.note(
                f"{METRICS_FILE} has no lines for steps {last + 1:,} to {state.step:,}: they did not reach the disk"
            )
    old_processes = f" of {processes} processes" if processes != trainer.processes.number else ""
    log.print(f"resumed from {checkpoint.path}{old_processes}: step {state.step} of {trainer.num_steps}")
    if state.num_steps != trainer.num_steps:
        lr = trainer.lr * trainer.schedule(state.updates)
        log.note(
            f"{_duration_name(trainer)} is now {trainer.num_steps:,} steps, before {state.num_steps:,}: after step "
            f"{state.step:,} lr follows the new schedule, {lr:.3g} after {state.lr:.3g}"
        )
    early_stopping_note = adapt_state(trainer.evaluation.early_stopping, state, trainer.num_steps)
    if early_stopping_note:
        log.note(early_stopping_note)
