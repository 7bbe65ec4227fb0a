"""A recipe to a Trainer: wishes become plain numbers here, and every choice is recorded with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from hf_fasttrain import launch
from hf_fasttrain.data.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.batch import Mixing, Normalize
from hf_fasttrain.data.loader import EvalLoader, Feed, ImageBatches, TrainLoader
from hf_fasttrain.data.order import Order, micro_batch_size_for, process_share
from hf_fasttrain.data.source import Source, Split, load_source
from hf_fasttrain.ema import Ema
from hf_fasttrain.environment import num_cores
from hf_fasttrain.errors import RunError
from hf_fasttrain.evaluation import Evaluator
from hf_fasttrain.facts import Facts
from hf_fasttrain.loss import ClassificationLoss, resolve_class_weights
from hf_fasttrain.metrics import resolve_metrics
from hf_fasttrain.model import (
    ModelSpec,
    Preprocessing,
    batch_norms,
    build_model,
    freeze_backbone,
    head_names,
    model_preprocessing,
    save_model,
    use_gradient_checkpointing,
)
from hf_fasttrain.optim import build_optimizer, build_param_groups
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.recipe_file import load_recipe
from hf_fasttrain.result import Watch
from hf_fasttrain.runfolder import open_run_folder, write_resolved
from hf_fasttrain.runlog import RunLog
from hf_fasttrain.schedule import Schedule, build_schedule
from hf_fasttrain.trainer import Trainer


@dataclass
class Parts:
    """Everything that a recipe stands for, built but not yet trained."""

    recipe: Recipe
    facts: Facts
    accelerator: Accelerator
    source: Source
    spec: ModelSpec
    model: nn.Module
    order: Order


def build_trainer(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    dataset: Any = None,
    resume: bool = False,
    trainer_class: type[Trainer] = Trainer,
) -> Trainer:
    """Return the trainer of a recipe, its run folder opened and everything checked; UserErrors otherwise."""
    parts = build_parts(recipe, overrides, dataset=dataset)
    folder = Path(launch.output_dir(parts.recipe))
    open_run_folder(folder, parts.facts, parts.accelerator, resume=resume)
    trainer = _assemble(parts, folder, trainer_class)
    if parts.accelerator.is_main_process:
        write_resolved(folder, parts.facts)
    for note in parts.facts.notes:
        trainer.log.note(note)
    if resume:
        trainer.restore()
    return trainer


def build_parts(recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, dataset: Any = None) -> Parts:
    """Return the model, data and numbers of a recipe; nothing is written."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    facts = Facts(loaded)
    accelerator = launch.build_accelerator(loaded, facts)
    source = _load_source(loaded, dataset, facts)
    spec = ModelSpec(
        name=loaded.model.name,
        class_names=source.class_names,
        image_size=loaded.data.image_size,
        multi_label=source.multi_label,
        drop_path=loaded.model.drop_path,
        small_image_stem=loaded.model.small_image_stem,
        args=dict(loaded.model.args),
    )
    torch.manual_seed(loaded.seed)
    model = build_model(spec, loaded.model.pretrained)
    spec = replace(spec, preprocessing=_resolve_preprocessing(model, spec, loaded, facts))
    model = _prepare_model(model, loaded, accelerator)
    order = _resolve_order(loaded, len(source.train), model, accelerator, facts)
    return Parts(loaded, facts, accelerator, source, spec, model, order)


def _load_source(recipe: Recipe, dataset: Any, facts: Facts) -> Source:
    data = recipe.data
    source = load_source(
        data.dataset if dataset is None else dataset,
        config=data.config,
        revision=data.revision,
        train_split=data.train_split,
        eval_split=data.eval_split,
        test_split=data.test_split,
        image_column=data.image_column,
        label_column=data.label_column,
        eval_fraction=data.eval_fraction,
        seed=recipe.seed,
    )
    facts.resolve("data.train_split", source.train.name, f"{len(source.train):,} images")
    facts.resolve("data.eval_split", source.evaluation.name, f"{len(source.evaluation):,} images")
    facts.resolve("data.image_column", source.columns.image, "found" if data.image_column == "auto" else "")
    facts.resolve("data.label_column", source.columns.label, "found" if data.label_column == "auto" else "")
    facts.resolve("classes", len(source.class_names), "of the label column")
    if source.held_out:
        facts.note(
            f"no validation split: {len(source.evaluation):,} of {len(source.train) + len(source.evaluation):,} "
            "training images are held out, each class alike (data.eval_fraction)"
        )
    return source


def _resolve_preprocessing(model: nn.Module, spec: ModelSpec, recipe: Recipe, facts: Facts) -> Preprocessing:
    found, data = model_preprocessing(model, spec), recipe.data
    values: dict[str, Any] = {}
    for key in ("mean", "std", "interpolation", "crop_pct"):
        asked, own = getattr(data, key), getattr(found, key)
        value = own if asked == "auto" else tuple(asked) * (3 // len(asked)) if isinstance(asked, list) else asked
        shown = list(value) if isinstance(value, tuple) else value
        facts.resolve(f"data.{key}", shown, "the model's configuration" if asked == "auto" else "")
        values[key] = value
    return replace(found, **values)


def _prepare_model(model: nn.Module, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    if recipe.model.freeze_backbone:
        freeze_backbone(model)
    if recipe.model.gradient_checkpointing:
        use_gradient_checkpointing(model)
    if recipe.accelerate.sync_batch_norm:
        if accelerator.device.type != "cuda":
            raise RunError("accelerate.sync_batch_norm needs GPUs; set it to false")
        from timm.layers import convert_sync_batchnorm

        model = convert_sync_batchnorm(model)
    model = model.to(accelerator.device)
    if recipe.accelerate.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if recipe.accelerate.compile:
        model.compile(dynamic=False)
    return model


def _resolve_order(recipe: Recipe, num_images: int, model: nn.Module, accelerator: Accelerator, facts: Facts) -> Order:
    train, wish = recipe.train, recipe.accelerate
    processes = accelerator.num_processes
    pieces = 1 if wish.gradient_accumulation_steps == "auto" else wish.gradient_accumulation_steps
    pairs = (train.batch_size + 1) // 2
    if pairs < processes * pieces and (processes > 1 or pieces > 1):
        raise RunError(
            f"train.batch_size={train.batch_size} is too small for {processes} processes x {pieces} accumulation "
            f"steps of at least 2 images; raise it to {2 * processes * pieces} or use fewer"
        )
    if train.drop_last and num_images < train.batch_size:
        raise RunError(
            f"train.drop_last leaves nothing: {num_images} images, train.batch_size={train.batch_size}; "
            "lower the batch size or set train.drop_last=false"
        )
    size = wish.micro_batch_size or micro_batch_size_for(train.batch_size, processes, pieces)
    largest = len(process_share(train.batch_size, processes, processes - 1))
    steps = math.ceil(largest / size)
    if wish.micro_batch_size and size > largest + 1:
        facts.note(f"accelerate.micro_batch_size={size} has no effect: a process's share of a step is {largest} images")
    order = Order(
        num_images=num_images,
        batch_size=train.batch_size,
        micro_batch_size=size,
        seed=recipe.seed,
        drop_last=train.drop_last,
        join_single=bool(batch_norms(model)),
        num_processes=processes,
        process_index=accelerator.process_index,
    )
    accelerator.gradient_accumulation_steps = steps
    facts.resolve("accelerate.micro_batch_size", size, "images per process and forward")
    facts.resolve("accelerate.gradient_accumulation_steps", steps, f"{largest} images per process in micro-batches")
    facts.resolve("processes", processes, "of the launcher")
    facts.resolve("steps_per_epoch", order.steps_per_epoch, f"{num_images:,} images / {train.batch_size}")
    if recipe.accelerate.sync_batch_norm:
        _require_equal_counts(order)
    return order


def _require_equal_counts(order: Order) -> None:
    """Synchronised batch norm meets in every forward: all processes must make equally many."""
    for step in {0, order.steps_per_epoch - 1}:
        plans = [replace(order, process_index=i).plan(step) for i in range(order.num_processes)]
        counts = {len(plan.micro_batches) for plan in plans}
        if len(counts) > 1 or 0 in counts:
            raise RunError(
                "accelerate.sync_batch_norm needs equally many micro-batches on every process in every step: "
                "choose train.batch_size as a multiple of 2 x processes and train.drop_last=true"
            )


def build_unwritten(parts: Parts) -> Trainer:
    """Return a trainer without a run folder, to see whether everything can be built."""
    return _assemble(parts, None, Trainer)


# --- assembling --------------------------------------------------------------------------------------------


def _assemble(parts: Parts, folder: Path | None, trainer_class: type[Trainer]) -> Trainer:
    recipe, facts, accelerator, source = parts.recipe, parts.facts, parts.accelerator, parts.source
    make = _Loaders(parts)
    train_loader = make.training()
    num_steps = recipe.train.duration.to_steps(parts.order.steps_per_epoch)
    spec = parts.spec
    log = RunLog(folder, main=accelerator.is_main_process, track=_tracker(parts) if folder else None)
    stopping = recipe.early_stopping
    return trainer_class(
        model=parts.model,
        train_loader=train_loader,
        optimizer=_optimizer(parts),
        duration=recipe.train.duration,
        accelerator=accelerator,
        loss=_loss(parts),
        lr=recipe.optimizer.lr,
        schedule=_schedule(parts, num_steps),
        clip_norm=recipe.optimizer.clip_norm,
        ema=Ema(parts.model, recipe.ema.decay, warmup=recipe.ema.warmup) if recipe.ema else None,
        eval_loader=make.evaluating(source.evaluation),
        test_loader=make.evaluating(source.test) if source.test else None,
        evaluator=build_evaluator(recipe, accelerator, source.multi_label, len(source.class_names)),
        evaluate_every=recipe.evaluate.every,
        best=Watch(recipe.checkpoint.best.metric, recipe.checkpoint.best.mode),
        early_stopping=Watch(stopping.metric, stopping.mode, stopping.patience.to_steps(parts.order.steps_per_epoch))
        if stopping
        else None,
        output_dir=folder,
        checkpoint_every=recipe.checkpoint.every,
        keep_checkpoints=recipe.checkpoint.keep,
        export=lambda model, path: save_model(model, spec, path),
        learnt=facts.learnt(),
        log=log,
        log_every=recipe.log.every,
        seed=recipe.seed,
    )


def build_evaluator(recipe: Recipe, accelerator: Accelerator, multi_label: bool, num_classes: int) -> Evaluator:
    """Return the evaluator of a recipe's metrics."""
    own, external = resolve_metrics(recipe.evaluate.metrics, multi_label=multi_label)
    return Evaluator(accelerator, num_classes, multi_label=multi_label, metrics=own, external=external)


def resolve_loading(recipe: Recipe, device: torch.device, facts: Facts) -> tuple[int, bool]:
    """Return the number of loader processes and whether their batches are pinned."""
    cuda, workers, pinned = device.type == "cuda", recipe.data.workers, recipe.data.pin_memory
    if workers == "auto":
        local = max(1, torch.cuda.device_count()) if cuda else 1
        number = min(16, num_cores() // local) if cuda else 1
        workers = facts.resolve("data.workers", max(1, number), "the cores of each GPU" if cuda else "one on a CPU")
    if pinned == "auto":
        pinned = facts.resolve("data.pin_memory", cuda, "a GPU" if cuda else "there is no GPU")
    elif pinned and not cuda:
        facts.note("data.pin_memory=true has no effect without a GPU")
        pinned = facts.resolve("data.pin_memory", False, "no effect without a GPU")
    return workers, pinned


class _Loaders:
    """Makes the loaders of a recipe's parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.recipe = parts, parts.recipe
        self.device = parts.accelerator.device
        assert parts.spec.preprocessing is not None
        self.pre = parts.spec.preprocessing
        self.workers, self.pinned = resolve_loading(parts.recipe, self.device, parts.facts)
        channels_last = parts.recipe.accelerate.channels_last
        self.normalize = Normalize(self.pre.mean, self.pre.std, self.device, channels_last=channels_last)

    def _feed(self, split: Split, transform: Any) -> Feed:
        images = ImageBatches(split, transform, self.pre.image_size)
        return Feed(images, self.device, workers=self.workers, pin_memory=self.pinned)

    def training(self) -> TrainLoader:
        augment, seed, size = self.recipe.augment, self.recipe.seed, self.pre.image_size
        transform = TrainTransform(
            image_size=size,
            seed=seed,
            interpolation=self.pre.interpolation,
            crop_pct=self.pre.crop_pct,
            crop=augment.crop,
            crop_scale=augment.crop_scale,
            crop_ratio=augment.crop_ratio,
            crop_padding=augment.crop_padding,
            flip=augment.flip,
            erase_prob=augment.erase,
            randaugment=augment.randaugment.model_dump() if augment.randaugment else None,
            trivialaugment=augment.trivialaugment,
        )
        mixing = None
        if augment.mixup or augment.cutmix:
            mixing = Mixing(augment.mixup, augment.cutmix, self.parts.spec.num_classes, size, seed)
        feed = self._feed(self.parts.source.train, transform)
        return TrainLoader(feed, self.parts.order, self.normalize, mixing, size)

    def evaluating(self, split: Split) -> EvalLoader:
        wish, accelerator = self.recipe.evaluate.batch_size, self.parts.accelerator
        size = wish
        if wish == "auto":
            rule = "accelerate.micro_batch_size, at least 32"
            size = self.parts.facts.resolve("evaluate.batch_size", max(32, self.parts.order.micro_batch_size), rule)
        transform = EvalTransform(self.pre.image_size, self.pre.interpolation, self.pre.crop_pct)
        return EvalLoader(
            self._feed(split, transform),
            len(split),
            int(size),
            self.normalize,
            accelerator.num_processes,
            accelerator.process_index,
            name=split.name,
        )


def _optimizer(parts: Parts) -> torch.optim.Optimizer:
    wish = parts.recipe.optimizer
    groups = build_param_groups(
        parts.model,
        lr=wish.lr,
        weight_decay=wish.weight_decay,
        head_names=head_names(parts.model),
        backbone_lr_scale=wish.backbone_lr_scale,
        layer_decay=wish.layer_decay,
    )
    return build_optimizer(wish.name, groups, momentum=wish.momentum, args=wish.args)


def _schedule(parts: Parts, num_steps: int) -> Schedule:
    wish, steps_per_epoch = parts.recipe.schedule, parts.order.steps_per_epoch
    warmup_steps = wish.warmup.to_steps(steps_per_epoch)
    if warmup_steps >= num_steps:
        raise RunError(
            f"schedule.warmup of {wish.warmup} is {warmup_steps} steps, the whole training only {num_steps}; shorten it"
        )
    return build_schedule(
        wish.name,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=wish.min_lr_ratio,
        gamma=wish.gamma,
        every_steps=wish.every.to_steps(steps_per_epoch),
    )


def _loss(parts: Parts) -> ClassificationLoss:
    labels, recipe = parts.source.train.labels, parts.recipe
    multi_label = parts.source.multi_label
    counts = labels.sum(0) if multi_label else np.bincount(labels, minlength=len(parts.source.class_names))
    weights = resolve_class_weights(recipe.train.class_weights, counts)
    loss = ClassificationLoss(
        multi_label=multi_label, label_smoothing=recipe.augment.label_smoothing, class_weights=weights
    )
    return loss.to(parts.accelerator.device)


def _tracker(parts: Parts) -> Any:
    """Start the trackers asked for, and return what feeds them."""
    log, accelerator = parts.recipe.log, parts.accelerator
    if not log.trackers:
        return None
    config = {
        k: str(f.value) for k, f in parts.facts.all().items() if isinstance(f.value, str | int | float | bool | list)
    }
    accelerator.init_trackers(log.project, config=config)
    return lambda values, step: accelerator.log(values, step=step)
