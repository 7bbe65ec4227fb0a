"""The command `train`: its messages before and after a training, and its exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.run_folder.file_names import REPORT_FILE
from hf_fasttrain.utils.errors import NotEnoughMemory, Stopped

if TYPE_CHECKING:
    from hf_fasttrain.recipe.schema import Recipe
    from hf_fasttrain.run_folder.result import Result
    from hf_fasttrain.train.trainer import Trainer


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's newest checkpoint.")] = False,
) -> None:
    """Train, evaluate and save the recipe's classifier (the default command)."""
    from hf_fasttrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # before anything heavy is imported
    from hf_fasttrain.from_recipe.trainer import build_trainer
    from hf_fasttrain.recipe.load import output_dir
    from hf_fasttrain.run_folder.missing import missing_results
    from hf_fasttrain.utils.format import format_count

    folder = Path(output_dir(loaded))
    trainer = build_trainer(loaded, resume=resume)
    if resume and trainer.is_finished:
        missing = missing_results(folder, trainer.state.step, **expected_results(trainer))
        if not missing:
            _print_finished(trainer, folder)
            return
        trainer.log.print(f"{folder}: trained to the end; now writing what is missing: {', '.join(missing)}")
    else:
        started = f"{format_count(trainer.num_steps, 'step')} on {trainer.device}, run folder {folder}"
        trainer.log.print(f"training {loaded.model.name} on {loaded.data.dataset}: {started}")
    result = carry_out(trainer, trainer.fit)
    _print_summary(trainer.log.print, folder, loaded, result)


def carry_out(trainer: Trainer, work: Callable[[], Result]) -> Result:
    """Return the result of a trainer's work, within the memory that is free.

    Ends the command, with its exit status, if a signal stops the work or if something could not be written.
    """
    from hf_fasttrain.run_folder.missing import describe_missing
    from hf_fasttrain.utils.signals import ignore_signals

    try:
        with _memory_limit(trainer):
            result = work()
    except Stopped as stopped:
        ignore_signals(stopped.status)
        _end_trackers(trainer)
        sys.exit(stopped.status)
    _end_trackers(trainer)
    if result.not_written:
        assert trainer.output_dir is not None
        expected = expected_results(trainer)
        trainer.log.print(describe_missing(trainer.output_dir, result.not_written, trainer.state.step, **expected))
        sys.exit(Stopped.NOT_WRITTEN)
    return result


def expected_results(trainer: Trainer) -> dict[str, Any]:
    """Return what a finished run's folder should hold, as `missing_results` takes it."""
    from hf_fasttrain.train.final_weights import final_step, will_average

    step = final_step(trainer.final, trainer.state, trainer.checkpoints)
    return {"model_step": step, "averaged": will_average(trainer), "report": trainer.report}


def _print_finished(trainer: Trainer, folder: Path) -> None:
    """Print that the run is finished, and the command of a push that is still missing."""
    from hf_fasttrain.run_folder.missing import is_pushed
    from hf_fasttrain.train.early_stopping import how_to_continue

    steps, pusher = trainer.state.step, getattr(trainer.publish, "pusher", None)
    early = f"\n{trainer.early_stop}; {how_to_continue()}" if trainer.early_stop else ""
    trainer.log.print(f"{folder}: this run is finished ({steps} steps); nothing to do{early}")
    if pusher is not None and not is_pushed(folder, pusher.options.repo, steps):
        trainer.log.print(f"not pushed to {pusher.options.repo} yet: {pusher.options.command(folder)}")


@contextlib.contextmanager
def _memory_limit(trainer: Trainer) -> Iterator[None]:
    """Limit training on a CPU to the memory that is free now: too large an allocation fails instead of a kill.

    Raises NotEnoughMemory if memory runs out where no step can be retried, as in a checkpoint's copy.
    """
    from hf_fasttrain.from_recipe.accelerator import local_processes
    from hf_fasttrain.utils.environment import free_memory_bytes
    from hf_fasttrain.utils.errors import first_line
    from hf_fasttrain.utils.library_errors import is_out_of_memory
    from hf_fasttrain.utils.process_memory import limited_memory

    free = free_memory_bytes()
    room = (free - trainer.reserved_memory - max(64 << 20, free // 50)) // local_processes()
    try:
        with limited_memory(room) if trainer.device.type == "cpu" else contextlib.nullcontext():
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemory(
            f"out of memory after step {trainer.state.step} ({first_line(error)}); the same command with --resume "
            "continues from the newest checkpoint; lower accelerate.micro_batch_size, evaluate.batch_size or "
            "data.workers"
        ) from None


def _end_trackers(trainer: Trainer) -> None:
    """End the trackers; the other processes wait for the main one, which has also written the report and uploaded."""
    for tracker in trainer.accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # noqa: BLE001 - a tracker's error; the run itself is complete
            trainer.log.print(f"note: a tracker could not be ended: {error}")
    trainer.processes.wait_for_main()


def _print_summary(log: Callable[[str], None], folder: Path, recipe: Recipe, result: Result) -> None:
    from hf_fasttrain.train.early_stopping import EarlyStop, how_to_continue
    from hf_fasttrain.train.final_weights import which_weights
    from hf_fasttrain.utils.format import (
        format_command,
        format_count,
        format_duration,
        format_images_rate,
        format_percent,
    )

    early = f"      {EarlyStop(**result.early_stopping)}\n      {how_to_continue()}\n" if result.early_stopping else ""
    metrics = result.test_metrics or result.metrics
    score = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
    held_out_none = not metrics and recipe.data.eval_fraction == 0
    page = folder / REPORT_FILE
    model = [text for text in recipe.source.overrides if text.startswith("model.")]
    longer = replace(recipe.train.duration, count=2 * recipe.train.duration.count)
    resume = format_command(folder, "--resume", f"train.duration={longer}")
    try_next = [
        format_command("predict", folder, "IMAGE..."),
        format_command("evaluate", folder, *(["data.dataset=FOLDER"] if held_out_none else [])),
        format_command("export", folder, "--onnx"),
    ]
    if not Path(recipe.data.dataset).exists():  # else these images are the user's own
        own = ("data.dataset=FOLDER", "output_dir=runs/mine")
        try_next.append(format_command("train", recipe.source.argument, *model, *own))
    report = f"  {page}    curves, classes, mistakes; opens in a browser\n" if page.exists() else ""
    log(
        f"done: {format_count(result.steps, 'step')}, {format_count(result.images, 'image')} in "
        f"{format_duration(result.train_seconds)} ({format_images_rate(result.images_per_second)}, "
        f"{format_percent(result.data_wait_fraction, 0)} waiting for data)\n"
        f"{score and f'    {score}{chr(10)}'}"
        f"{early}"
        f"  {folder}/model          the classifier: {which_weights(folder, result)}\n"
        f"  {folder}/result.json    final metrics; metrics.jsonl: their history; resolved.yaml: every setting\n"
        f"{report}"
        f"  {folder}/checkpoints    to continue from: {resume}\n"
        "  try next:\n" + "\n".join(f"    {command}" for command in try_next)
    )
