"""Builds a Trainer from a recipe: `build_trainer` is what `Trainer.from_recipe` and the command line call.

A new recipe key is used here, or in parts.py (accelerator, data, model) or loaders.py (images).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_fasttrain.before_torch import launched_rank
from hf_fasttrain.data.loading.loader import TrainLoader
from hf_fasttrain.data.loading.prefetch import num_slots
from hf_fasttrain.data.loading.worker_deaths import require_main_script
from hf_fasttrain.data.pixels.bad_images import BadImages
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.from_recipe.accelerator import local_processes
from hf_fasttrain.from_recipe.auto import decide, evaluation_batch_size
from hf_fasttrain.from_recipe.custom import CustomParts
from hf_fasttrain.from_recipe.early_checks import require_no_early_mistakes
from hf_fasttrain.from_recipe.kept_features import kept_features_of
from hf_fasttrain.from_recipe.loaders import Loaders, resolve_loading
from hf_fasttrain.from_recipe.memory import decide_evaluation_batch, evaluation_memory
from hf_fasttrain.from_recipe.older_rows import refuse_new_rows
from hf_fasttrain.from_recipe.optimization import (
    clip_of,
    distillation_of,
    gradual_training_of,
    loss_of,
    moving_average_of,
    optimizer_of,
    plateau_of,
    schedule_of,
)
from hf_fasttrain.from_recipe.parts import Parts, build_parts
from hf_fasttrain.from_recipe.probe import HeadProbe
from hf_fasttrain.from_recipe.report_pictures import ReportPictures
from hf_fasttrain.from_recipe.resume import decoding_as_begun, read_first_start, settings_of_run
from hf_fasttrain.hub.background import Pusher, PushOptions
from hf_fasttrain.hub.push import require_login
from hf_fasttrain.models.lora import merged_model
from hf_fasttrain.models.memory_forecast import WORKER_BYTES
from hf_fasttrain.models.saved import save_description, save_model
from hf_fasttrain.recipe.load import default_values, load_recipe, output_dir, recipe_text
from hf_fasttrain.recipe.resolved import ResolvedSettings, write_settings
from hf_fasttrain.recipe.schema import HubSection, Recipe
from hf_fasttrain.report.callback import Publish
from hf_fasttrain.run_folder.checkpoint import require_same_parts
from hf_fasttrain.run_folder.file_names import FILES_WHILE_TRAINING
from hf_fasttrain.run_folder.folder import holds_run, is_unsaved, remove_unsaved, require_free, saved_state
from hf_fasttrain.run_folder.result import TUNED_METRICS, Watch
from hf_fasttrain.train.arguments import require_allowed
from hf_fasttrain.train.checkpointing import lock_run, not_writable
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.log import RunLog, last_tracked_steps
from hf_fasttrain.train.metrics import require_classes, resolve_metrics, resolve_thresholds
from hf_fasttrain.train.optim import has_lr
from hf_fasttrain.train.score_metrics import require_memory
from hf_fasttrain.train.trackers import Trackers
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.train.user_metrics import Metric, Predict
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.environment import describe_machine, describe_versions, free_memory_bytes
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.limits import FILES_PER_WORKER, THREADS_PER_WORKER, require_files, require_threads

OTHER_THREADS, OTHER_FILES = 2, 10  # of training: for signals and checkpoints


def build_trainer(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    dataset: Any = None,
    resume: bool = False,
    callbacks: Sequence[Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
    takes_steps: bool = True,
    **custom_parts: Any,
) -> Trainer:
    """Return the trainer of a recipe, with its run folder created and everything checked. Raises UserError.

    Without `takes_steps` it is for what comes before the first step, so no training images are kept.
    `custom_parts` are the fields of `CustomParts`.
    """
    require_main_script()
    require_allowed({"callbacks": callbacks})
    custom = CustomParts(**custom_parts)
    loaded = load_recipe(recipe, overrides, metrics=custom.metrics or ())
    folder = Path(output_dir(loaded))
    require_no_early_mistakes(loaded, folder, resume=resume, dataset=dataset, custom=custom)
    if loaded.hub is not None and launched_rank() == 0:
        require_login(loaded.hub.repo)  # before training something that could not be pushed
    first_start = read_first_start(folder) if resume else None
    learnt = saved_state(folder).get("learnt", {}) if resume else {}
    if resume and (begun_with := settings_of_run(folder)) is not None:
        require_same_parts(begun_with, custom.settings, folder)
        loaded = decoding_as_begun(loaded, begun_with)
    presets = first_start.presets(loaded) if first_start else None
    try:
        parts = build_parts(loaded, dataset=dataset, presets=presets, custom=custom)
    except DataError as error:
        refuse_new_rows(loaded, learnt, error)
        raise
    if dataset is None:
        refuse_new_rows(loaded, learnt, parts.source)
    if replaced := open_run_folder(folder, parts.accelerator, resume=resume):
        parts.settings.note(
            f"output_dir {folder}: its run ended before its first checkpoint; {', '.join(replaced)} of it are replaced"
        )
    saved = saved_state(folder) if resume else None
    trainer = assemble(parts, folder, trainer_class, saved=saved, callbacks=callbacks, takes_steps=takes_steps)
    if first_start:
        first_start.note_changes(parts.settings)
    for note in [*parts.settings.notes, *([] if saved else parts.settings.weight_notes)]:
        trainer.log.note(note)
    if resume:
        trainer.restore()
    on_main(lambda: _write_settings(folder, parts.settings))
    return trainer


def build_trainer_without_folder(parts: Parts, *, keep_pixels: bool = True) -> Trainer:
    """Return a trainer that writes no run folder; without `keep_pixels` nothing at all, to check a recipe."""
    return assemble(parts, None, Trainer, keep_pixels=keep_pixels)


def assemble(
    parts: Parts,
    folder: Path | None,
    trainer_class: type[Trainer],
    *,
    keep_pixels: bool = True,
    saved: dict[str, Any] | None = None,
    callbacks: Sequence[Any] | None = None,
    takes_steps: bool = True,
) -> Trainer:
    """Return the trainer of the parts; without a folder it writes nothing but the pixel cache (with `keep_pixels`).

    `saved`: plain values of the checkpoint to resume from, so that trackers continue their runs.
    """
    recipe, settings, accelerator, source = parts.recipe, parts.settings, parts.accelerator, parts.source
    step_loss = distillation_of(parts) if parts.custom.step_loss is None else parts.custom.step_loss
    num_steps = recipe.train.duration.to_steps(parts.sampling_plan.steps_per_epoch)
    spec = parts.spec
    track = _start_trackers(parts, folder, saved or {}) if folder else None
    log = RunLog(folder, main=Processes(accelerator).is_main, track=track)
    log.expected = FILES_WHILE_TRAINING if folder else ()
    data_set = settings.record("data.fingerprint", fingerprint(source), "of labels and a sample of the images")
    best, stopping = _watches(parts)
    bad_images = BadImages(folder, recipe.data.max_bad_fraction, log.note)
    loaders = build_loaders(parts, bad_images, keep_pixels=keep_pixels)
    is_evaluated = recipe.evaluate.every != "never"
    eval_batch = _eval_batch_size(parts, loaders.workers) if is_evaluated or recipe.train.probe_first else 0
    read_steps = num_steps if takes_steps else 0
    own = "an own class of trainers" if trainer_class is not Trainer else "callbacks=" if callbacks else None
    kept = kept_features_of(parts, loaders, read_steps, own, is_run=folder is not None)
    read_steps -= kept.until if kept else 0  # the others need features, and evaluations one pass over the images
    evaluations = _num_evaluations(recipe, read_steps, parts.sampling_plan.steps_per_epoch)
    evaluations += kept is not None and read_steps > 0
    train_loader = loaders.train_loader(source.train, parts.sampling_plan, read_steps, spec.num_classes)
    if step_loss is None and kept is not None:
        step_loss = kept.loss(loss_of(parts))
    trainer = trainer_class(
        model=parts.model,
        train_loader=kept.train_loader(train_loader) if kept else train_loader,
        optimizer=optimizer_of(parts),
        duration=recipe.train.duration,
        accelerator=accelerator,
        **({"step_loss": step_loss} if step_loss is not None else {"loss": loss_of(parts)}),
        schedule=schedule_of(parts, num_steps),
        clip_norm=recipe.optimizer.clip_norm,
        ema=moving_average_of(parts),
        eval_loader=loaders.eval_loader(source.evaluation, eval_batch, passes=evaluations) if is_evaluated else None,
        evaluate_every=recipe.train.duration if recipe.evaluate.every == "never" else recipe.evaluate.every,
        best=best,
        early_stopping=stopping,
        output_dir=folder,
        checkpoint_every=recipe.checkpoint.every,
        report=recipe.log.report,
        callbacks=_with_built_in(callbacks or (), parts, num_steps),
        log=log,
        log_every=recipe.log.every,
        seed=recipe.seed,
    )
    trainer.evaluation.evaluator = build_evaluator(
        recipe, accelerator, source.multi_label, source.class_names, parts.custom.metrics, parts.custom.predict
    )
    evaluator = trainer.evaluation.evaluator
    chosen = [*(evaluator.metrics or ()), *(TUNED_METRICS if evaluator.calibrator.tunes else ())]
    largest = max(map(len, (source.evaluation, source.test or ())))
    require_memory(chosen, largest, spec.num_classes, free_memory_bytes())
    if kept is not None:
        kept.attach(trainer)
    trainer.recipe_text, trainer.bad_images = recipe_text(recipe), bad_images
    if has_lr(trainer.optimizer, recipe.optimizer.lr):
        trainer.lr = recipe.optimizer.lr
    trainer.step.updater.clip = clip_of(parts)
    trainer.evaluation.start = min(num_steps, recipe.evaluate.start.to_steps(parts.sampling_plan.steps_per_epoch))
    trainer.num_averaged = recipe.checkpoint.average
    trainer.final = decide(parts.settings, "checkpoint.final", early_stopping=stopping)
    trainer.export = lambda model, path: save_model(merged_model(model), spec, path)
    trainer.resume_settings = {
        **settings.result_settings(),
        **parts.custom.settings,
        **({"distill.teacher": parts.teacher.description} if parts.teacher else {}),  # wherever it is
        "data set": data_set,
        "class_names": spec.class_names,
    }
    if recipe.train.probe_first:
        trainer.probe = HeadProbe(parts, loaders, eval_batch)
    if source.test is not None:
        trainer.evaluation.test_loader = loaders.eval_loader(source.test, eval_batch)
    if trainer.checkpoints is not None:
        trainer.checkpoints.keep = recipe.checkpoint.keep
        trainer.checkpoints.default_settings = default_values()
    if settings.launched:
        trainer.stop.signals.watch_launcher()
    if folder and (publish := _publish_callback(parts, folder, log)):
        trainer.set_publish_callback(publish)
    parts.kept_pixels = loaders.planner.memory_bytes
    trainer.reserved_memory = parts.kept_pixels + loaders.workers * WORKER_BYTES * local_processes()
    return trainer


def _with_built_in(callbacks: Sequence[Any], parts: Parts, num_steps: int) -> list[Any]:
    """Return the user's callbacks with those of the recipe's phases and of its schedule."""
    return [*filter(None, [gradual_training_of(parts, num_steps)]), *callbacks, *filter(None, [plateau_of(parts)])]


def open_run_folder(folder: Path, accelerator: Accelerator, *, resume: bool) -> list[str]:
    """Create the run folder and lock it; return the names of files of a run that saved nothing, which are removed.

    Raises RunError if it holds a run and `resume` is False, if another process is training in it, or if it can't be
    written to.
    """
    require_free(folder, resume=resume)
    Processes(accelerator).wait()  # no process writes before all have checked
    is_locked = lock_run(folder)
    if resume or not is_unsaved(folder):
        return []
    if not is_locked:  # it may still be running
        raise holds_run(folder)

    def remove() -> list[str]:
        try:
            return remove_unsaved(folder)
        except OSError as error:
            raise not_writable(folder, error) from None

    return on_main(remove)


def _write_settings(folder: Path, settings: ResolvedSettings) -> None:
    try:
        write_settings(folder, settings)
    except OSError as error:
        raise not_writable(folder, error) from None


def _watches(parts: Parts) -> tuple[Watch, Watch | None]:
    """Return the watched metrics of the best checkpoint and of early stopping (None if the recipe has none)."""
    best, stopping = parts.recipe.checkpoint.best, parts.recipe.early_stopping
    watches = [("checkpoint.best.mode", best.mode, Watch(best.metric, best.mode))]
    if stopping:
        patience = stopping.patience.to_steps(parts.sampling_plan.steps_per_epoch)
        watches.append(
            ("early_stopping.mode", stopping.mode, Watch(stopping.metric, stopping.mode, patience, stopping.min_delta))
        )
    for key, mode, watch in watches:
        if mode == "auto":
            decide(parts.settings, key, watch=watch)
    return watches[0][2], watches[1][2] if stopping else None


def _publish_callback(parts: Parts, folder: Path, log: RunLog) -> Publish | None:
    """Return the callback that writes the report and pushes the run, None if the recipe wants neither."""
    recipe, spec = parts.recipe, parts.spec
    write_pictures, pusher = None, None
    if recipe.log.report:
        assert spec.preprocessing is not None
        pictures = ReportPictures(recipe, parts.source, parts.sampling_plan, spec.preprocessing, parts.custom)
        write_pictures = partial(pictures.write, folder, log.print)
    if recipe.hub and Processes(parts.accelerator).is_main:
        device, processes = parts.accelerator.device, parts.accelerator.num_processes
        environment = {"machine": describe_machine(device, processes), "versions": describe_versions()}
        options = _push_options(recipe.hub, parts.sampling_plan.steps_per_epoch, on_cpu=device.type == "cpu")
        num_steps = recipe.train.duration.to_steps(parts.sampling_plan.steps_per_epoch)
        describe = partial(save_description, parts.model, spec)
        pusher = Pusher(folder, options, describe, environment, log.print, num_steps)
    if not write_pictures and not recipe.hub:
        return None
    return Publish(folder, log, report=recipe.log.report, show=write_pictures, pusher=pusher)


def _push_options(hub: HubSection, steps_per_epoch: int, *, on_cpu: bool) -> PushOptions:
    """Return a recipe's push options, with durations in steps and seconds.

    If training itself needs the CPU's cores, uploads run for at most a tenth of the time.
    """
    every = hub.every.to_steps(steps_per_epoch) if isinstance(hub.every, Duration) else hub.every
    return PushOptions(hub.repo, every, hub.private, hub.license, 60 * hub.wait.count, rest=9.0 if on_cpu else 0.0)


def build_loaders(parts: Parts, bad_images: BadImages, *, keep_pixels: bool = True) -> Loaders:
    """Return the builder of the parts' loaders."""
    pre = parts.spec.preprocessing
    assert pre is not None
    needed = parts.forecast.needed(parts.sampling_plan.micro_batch_size) if parts.forecast else 0
    needed += _slot_bytes(parts)
    needed *= local_processes()
    evaluated = [len(split) for split in (parts.source.evaluation, parts.source.test) if split]
    options: dict[str, Any] = {"keep_pixels": keep_pixels, "needed_memory": needed, "evaluated_images": evaluated}
    options["custom"] = parts.custom
    _require_processes(parts)
    return Loaders(parts.recipe, parts.settings, parts.accelerator, pre, bad_images, **options)


def _require_processes(parts: Parts) -> None:
    """Raise RunError unless the loader processes of all splits can be started: they live side by side."""
    workers, _ = resolve_loading(parts.settings, parts.accelerator.device)
    loaders = 2 if parts.source.test is None else 3
    purpose = f"data.workers={workers}, each for {loaders} splits"
    require_threads(loaders * workers * THREADS_PER_WORKER + OTHER_THREADS, purpose)
    require_files(loaders * workers * FILES_PER_WORKER + OTHER_FILES, purpose)


def _slot_bytes(parts: Parts) -> int:
    """Return the shared memory of the loaders' batches on the host that the forecast does not include."""
    workers, _ = resolve_loading(parts.settings, parts.accelerator.device)
    batches = [(_planned_eval_batch(parts), parts.spec.image_size)]
    if parts.forecast is None:
        images = parts.sampling_plan.micro_batch_size * parts.recipe.data.views
        batches.append((images, parts.recipe.data.size_in_training))
    return sum(num_slots(workers, images) * images * 3 * size**2 for images, size in batches) if workers else 0


def build_train_loader(parts: Parts) -> TrainLoader:
    """Return only the training loader, as `Trainer.fit` uses it, to measure or inspect it."""
    bad_images = BadImages(None, parts.recipe.data.max_bad_fraction, parts.settings.note)
    num_steps = parts.recipe.train.duration.to_steps(parts.sampling_plan.steps_per_epoch)
    loaders = build_loaders(parts, bad_images)
    return loaders.train_loader(parts.source.train, parts.sampling_plan, num_steps, parts.spec.num_classes)


def _planned_eval_batch(parts: Parts) -> int:
    """Return the batch size of evaluation if memory suffices."""
    size = parts.recipe.evaluate.batch_size
    return (
        evaluation_batch_size(micro_batch_size=parts.sampling_plan.micro_batch_size).value if size == "auto" else size
    )


def _eval_batch_size(parts: Parts, workers: int) -> int:
    accelerator, forecast = parts.accelerator, parts.forecast
    if parts.custom.predict is not None:  # its memory is unknown
        return decide_evaluation_batch(parts.settings, parts.sampling_plan.micro_batch_size, dict)
    memory = partial(
        evaluation_memory,
        parts.model,
        parts.spec.image_size,
        accelerator.device,
        workers=workers,
        autocast=accelerator.autocast,
        state=forecast.gradients + forecast.optimizer + forecast.average if forecast else 0,
    )
    return decide_evaluation_batch(parts.settings, parts.sampling_plan.micro_batch_size, memory)


def build_evaluator(
    recipe: Recipe,
    accelerator: Accelerator,
    multi_label: bool,
    class_names: Sequence[str],
    user_metrics: Mapping[str, Metric] | None = None,
    predict: Predict | None = None,
) -> Evaluator:
    """Return the evaluator of a recipe's metrics and of `user_metrics`; `predict` returns a model's logits."""
    watched = [watch.metric for watch in (recipe.checkpoint.best, recipe.early_stopping) if watch]
    watched += [recipe.schedule.metric] if recipe.schedule.name == "plateau" else []
    number = len(class_names)
    built_in, external = resolve_metrics(recipe.evaluate.metrics, number, multi_label=multi_label, watched=watched)
    require_classes(built_in, class_names)
    tunes_thresholds = resolve_thresholds(recipe.evaluate.thresholds, multi_label=multi_label)
    names: dict[str, Any] = {"metrics": built_in, "external": external, "own": user_metrics, "predict": predict}
    names |= {"class_names": class_names, "tunes_thresholds": tunes_thresholds}
    return Evaluator(accelerator, number, multi_label=multi_label, **names)


def _num_evaluations(recipe: Recipe, num_steps: int, steps_per_epoch: int) -> int:
    """Return the number of evaluations in a complete training."""
    if recipe.evaluate.every == "never":
        return 0
    every, start = recipe.evaluate.every.to_steps(steps_per_epoch), recipe.evaluate.start.to_steps(steps_per_epoch)
    before = max(0, math.ceil(start / every) - 1)
    return max(1, math.ceil(num_steps / every) - before)


def _start_trackers(parts: Parts, folder: Path, saved: dict[str, Any]) -> Trackers | None:
    """Start the recipe's trackers and return them, None if there are none."""
    log, accelerator = parts.recipe.log, parts.accelerator
    if not log.trackers:
        return None
    config = {
        key: str(setting.value)
        for key, setting in parts.settings.all().items()
        if isinstance(setting.value, str | int | float | bool | list)
    }
    ids = {name: run for name, run in saved.get("trackers", {}).items() if name in log.trackers}
    sent = last_tracked_steps(folder) if saved else {}
    return Trackers(accelerator, log.project, config, ids=ids, step=saved.get("step", 0), sent=sent)
