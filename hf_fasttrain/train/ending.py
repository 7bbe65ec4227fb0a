"""The end of a run: last checkpoint, final weights and metrics, results on disk, callbacks; or Stopped."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_fasttrain.run_folder.calibration import calibration_in, write_calibration
from hf_fasttrain.run_folder.checkpoint import checkpoint_path, complete_checkpoints
from hf_fasttrain.run_folder.file_names import CHECKPOINTS_FOLDER
from hf_fasttrain.run_folder.result import Result
from hf_fasttrain.train.callbacks import CallbackError
from hf_fasttrain.train.final_weights import FinalModel, load_final
from hf_fasttrain.train.stop import signal_name, stopped
from hf_fasttrain.utils.environment import describe_machine, describe_versions, peak_memory_bytes
from hf_fasttrain.utils.errors import how_to_resume
from hf_fasttrain.utils.signals import interruptible

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer


def save_last(trainer: Trainer) -> None:
    """Save the current step and wait until it is on disk; retried once."""
    trainer.save()
    if trainer.checkpoints is None:
        return
    if trainer.processes.any_process(not trainer.checkpoints.wait()):
        trainer.checkpoints.saved_at = -1
        trainer.save()  # retry: there may be space on the disk now
    trainer.announce_saved()


def stop_run(trainer: Trainer, number: int) -> NoReturn:
    """Save the current step, and raise Stopped for a signal."""
    trainer.stateful.require_finite(trainer.state.step)
    save_last(trainer)
    raise_stopped(trainer, number)


def raise_stopped(trainer: Trainer, number: int) -> NoReturn:
    """Raise Stopped for a signal, after the state was saved."""
    checkpoints, step = trainer.checkpoints, trainer.state.step
    saved = checkpoints is None or not trainer.processes.any_process(not checkpoints.wait())
    message = f"stopped by {signal_name(number)} after step {step} of {trainer.num_steps}"
    if checkpoints is None:
        message += "; nothing is saved without an output_dir"
    elif saved:
        message += "; its state is saved" + _resume_text(trainer)
    else:
        message += f"; its state could not be saved: {checkpoints.failed}"
    trainer.log.print(message)
    raise stopped(number, message, step, result_of(trainer), saved=saved)


def _resume_text(trainer: Trainer) -> str:
    if trainer.stateful.can_resume_here:
        return f": {how_to_resume()} continues"
    assert trainer.checkpoints is not None
    step = max(trainer.checkpoints.resumable, default=0)
    action = f"continues from step {step}, the end of an epoch" if step else "starts the training over"
    lacking = "train_loader does not store its position within an epoch"
    if trainer.processes.has_left_others:
        lacking = "the positions of the other processes' train_loader are lost"
    return f", but {lacking}: Trainer.restore() {action}"


def evaluate_final(trainer: Trainer) -> int:
    """Load and evaluate the final weights; return the signal that interrupted this, or 0."""
    evaluation = trainer.evaluation
    final = load_final(trainer)
    trainer.final_model = final
    if final.is_of_step(trainer.state.step):
        final.calibration = calibration_in(vars(trainer.state))
    if evaluation.eval_loader is not None:
        with trainer.throughput.stopped():
            metrics = evaluation.final_metrics(trainer.evaluate, final.step, final.metrics)
        if not metrics:
            return trainer.stop.now()
        final.metrics = final.metrics or metrics
        fitted = evaluation.evaluator.calibrator.calibration
        if fitted is not None and fitted.step == final.step:
            final.calibration = fitted
    if evaluation.test_loader is not None:
        evaluation.evaluator.calibrator.use(final.calibration)
        return 0 if evaluation.measure_test(trainer.evaluate, final.step) else trainer.stop.now()
    return 0


def write_results(trainer: Trainer) -> Result:
    """Write model, predictions and result.json, if there is a run folder; return the result."""
    bad = trainer.bad_images
    if bad is not None and bad.count:
        replaced = "image was replaced by another" if bad.count == 1 else "images were replaced by others"
        trainer.log.note(f"{bad.count:,} bad {replaced}; {bad.where}")
    if trainer.checkpoints is not None and trainer.processes.is_main:
        trainer.checkpoints.write_results(
            partial(_write_model, trainer),
            trainer.evaluation.predictions,
            lambda: asdict(result_of(trainer)),
        )
    result = result_of(trainer)
    trainer.processes.wait()
    return result


def _write_model(trainer: Trainer, folder: Path) -> None:
    trainer.export(trainer.trained_model, folder)
    write_calibration(folder, trainer.final_model.calibration if trainer.final_model is not None else None)


def call_finished(trainer: Trainer, result: Result) -> None:
    """Call `finished` of the callbacks, and record what they could not write; Ctrl-C and SIGTERM skip the others."""
    errors: list[CallbackError] = []
    try:
        with interruptible():
            errors = trainer.callbacks.call_all("finished", trainer, result)
    except KeyboardInterrupt:
        trainer.log.print("trained to the end; the remaining callbacks are skipped")
    lost = trainer.log.lost
    if trainer.checkpoints is not None and trainer.processes.is_main and lost != result.not_written:
        result.not_written = list(lost)
        trainer.checkpoints.write_result(asdict(result))
    for error in errors:
        trainer.log.alert(f"the run is finished, but {error}")
    if errors:
        raise errors[0]


def _best_evaluation(trainer: Trainer) -> dict[str, Any] | None:
    """Return the best evaluation with the path of its checkpoint in the run folder; None: not on disk."""
    best, checkpoints = trainer.state.best, trainer.checkpoints
    if best is None:
        return None
    path = checkpoint_path(checkpoints.folder, best["step"]) if checkpoints is not None else None
    is_kept = checkpoints is not None and path in complete_checkpoints(checkpoints.folder)
    return {**best, "path": f"{CHECKPOINTS_FOLDER}/{path.name}" if is_kept and path is not None else None}


def _intervals(trainer: Trainer, field: str) -> dict[str, Any] | None:
    found = trainer.evaluation.intervals.get(field)
    return None if found is None else asdict(found)


def result_of(trainer: Trainer) -> Result:
    """Return the result of a run so far."""
    trainer.throughput.save(trainer.state)
    state, seconds = trainer.state, max(trainer.throughput.train_seconds, 1e-9)
    final = trainer.final_model or FinalModel("last", state.step, state.metrics)
    return Result(
        metrics=final.metrics or {},
        test_metrics=trainer.evaluation.test_metrics,
        model=final.as_json() | {"ema": trainer.ema is not None},
        best=_best_evaluation(trainer),
        last={"step": state.step, "metrics": state.metrics},
        steps=state.step,
        skipped_steps=state.step - state.updates,
        micro_batch_size=trainer.train_loader.micro_batch_size,
        out_of_memory=state.out_of_memory,
        resumed_at=state.resumed_at,
        not_written=list(trainer.log.lost),
        images=state.images,
        train_seconds=state.train_seconds,
        images_per_second=state.images / seconds,
        data_wait_fraction=min(1.0, state.wait_seconds / seconds),
        bad_images=trainer.bad_images.count if trainer.bad_images else 0,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        stopped_early=state.step < trainer.num_steps,
        early_stopping=trainer.early_stop.as_json() if trainer.early_stop else None,
        machine=describe_machine(trainer.device, trainer.processes.number),
        versions=describe_versions(),
        notes=trainer.log.notes,
        **trainer.evaluation.evaluator.user_function_names(),
        intervals=_intervals(trainer, "intervals"),
        test_intervals=_intervals(trainer, "test_intervals"),
        probe=asdict(trainer.probe.result) if trainer.probe is not None and trainer.probe.result else None,
    )
