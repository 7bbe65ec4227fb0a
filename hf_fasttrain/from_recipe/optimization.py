"""Optimizer, clipping, schedule, loss and moving average of a recipe, or the user's instead of them."""

from __future__ import annotations

from typing import Any

import torch

from hf_fasttrain.data.source.multi_label import class_counts
from hf_fasttrain.from_recipe.auto import decide
from hf_fasttrain.from_recipe.parts import Parts
from hf_fasttrain.models.layers import names_by_phase
from hf_fasttrain.models.model import head_names
from hf_fasttrain.recipe.schema_loss import AsymmetricSection, BinaryCrossEntropy, FocalSection
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.clipping import Clip, clip_adaptively, clip_by_value
from hf_fasttrain.train.distillation import Distillation, TeacherLogits
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.gradual import GradualTraining, PhaseOfSteps
from hf_fasttrain.train.imbalanced_losses import AsymmetricLoss, FocalLoss
from hf_fasttrain.train.loss import ClassificationLoss, resolve_class_weights, resolve_loss
from hf_fasttrain.train.optim import build_optimizer, build_param_groups, has_lr, has_prefix
from hf_fasttrain.train.plateau import ReduceLROnPlateau
from hf_fasttrain.train.schedule import Schedule, build_schedule, resolve_warmup
from hf_fasttrain.train.step_loss import module_of


def optimizer_of(parts: Parts) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of its parameter groups, or the user's."""
    section, custom = parts.recipe.optimizer, parts.custom
    names, groups = set[str](), list[dict[str, Any]]()
    for trained in names_by_phase(parts.model, parts.recipe.model.trained, parts.spec.num_classes):
        groups += build_param_groups(  # each phase's new parameters are in groups of their own
            parts.model,
            lr=section.lr,
            weight_decay=section.weight_decay,
            head_names=head_names(parts.model, parts.spec.num_classes),
            backbone_lr_scale=section.backbone_lr_scale,
            layer_decay=section.layer_decay,
            names=trained - names,
        )
        names |= trained
    loss = module_of(custom.step_loss) if custom.step_loss is not None else None
    if loss is not None:
        model_ids = set(map(id, parts.model.parameters()))
        loss_groups = build_param_groups(loss, lr=section.lr, weight_decay=section.weight_decay)
        for group in loss_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in model_ids]
        groups += [group for group in loss_groups if group["params"]]
    if custom.optimizer is not None:
        optimizer = custom.build_optimizer(groups)
        if not has_lr(optimizer, section.lr):
            parts.settings.note(
                f"optimizer.lr={section.lr:g} has no effect: optimizer={custom.names['optimizer']} has its own"
            )
            for group in optimizer.param_groups:  # their own rates determine the scales
                group.pop("lr_scale", None)
        return optimizer
    return build_optimizer(section.name, groups, momentum=section.momentum, args=section.args)


def clip_of(parts: Parts) -> Clip | None:
    """Return the recipe's clipping by value or AGC, None if it has neither."""
    section, heads = parts.recipe.optimizer, head_names(parts.model, parts.spec.num_classes)
    if section.clip_value is not None:
        return clip_by_value(section.clip_value)
    if section.clip_agc is None:
        return None
    parameters = parts.model.named_parameters()
    return clip_adaptively(section.clip_agc, [parameter for name, parameter in parameters if has_prefix(name, heads)])


def schedule_of(parts: Parts, num_steps: int) -> Schedule:
    """Return the recipe's schedule, with its warmup recorded, or the user's."""
    section, steps_per_epoch = parts.recipe.schedule, parts.sampling_plan.steps_per_epoch
    if parts.custom.schedule is not None:
        return parts.custom.build_schedule(num_steps)
    warmup = resolve_warmup(section.warmup, section.name, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    parts.settings.record("schedule.warmup", f"{warmup.steps} steps", warmup.reason)
    if warmup.note:
        parts.settings.note(warmup.note)
    milestones = [milestone.to_steps(steps_per_epoch) for milestone in section.milestones]
    if section.name == "multistep" and max(milestones) >= num_steps:
        parts.settings.note(
            f"schedule.milestones: {section.milestones[milestones.index(max(milestones))]} is not before the end, "
            f"{num_steps:,} steps: lr is not multiplied there"
        )
    if section.start_ratio is not None and not warmup.steps and section.name != "onecycle":
        parts.settings.note("schedule.start_ratio has no effect without schedule.warmup")
    return build_schedule(
        "constant" if section.name == "plateau" else section.name,  # which `plateau_of` lowers
        num_steps=num_steps,
        warmup_steps=warmup.steps,
        start_ratio=section.start_ratio,
        min_lr_ratio=section.min_lr_ratio,
        gamma=section.gamma,
        every_steps=section.every.to_steps(steps_per_epoch),
        milestones=milestones,
        power=section.power,
        cycles=section.cycles,
        div=section.div,
        final_div=section.final_div,
    )


def plateau_of(parts: Parts) -> ReduceLROnPlateau | None:
    """Return the callback that lowers lr by the recipe's schedule, None if that is not plateau, or the user's."""
    section = parts.recipe.schedule
    if section.name != "plateau" or parts.custom.schedule is not None:
        return None
    patience = section.patience.to_steps(parts.sampling_plan.steps_per_epoch)
    watch = Watch(section.metric, section.mode, patience, section.min_delta)
    if section.mode == "auto":
        decide(parts.settings, "schedule.mode", watch=watch)
    return ReduceLROnPlateau(watch, section.gamma, section.min_lr_ratio)


def gradual_training_of(parts: Parts, num_steps: int) -> GradualTraining | None:
    """Return the callback that begins the phases of model.train, None if there is only one."""
    trained, begin = parts.recipe.model.trained, 1
    if not trained.is_gradual:
        return None
    phases = []
    for phase, names in zip(trained.phases, names_by_phase(parts.model, trained, parts.spec.num_classes), strict=True):
        phases.append(PhaseOfSteps(str(phase.part), begin, frozenset(names)))
        if begin > num_steps:
            parts.settings.note(
                f"model.train: {phase.part} would be trained from step {begin:,} on, after the end, {num_steps:,} steps"
            )
        begin += phase.duration.to_steps(parts.sampling_plan.steps_per_epoch) if phase.duration else 0
    return GradualTraining(phases)


def loss_of(parts: Parts) -> ClassificationLoss:
    """Return the recipe's loss, on the device."""
    recipe, multi_label, class_names = parts.recipe, parts.source.multi_label, parts.source.class_names
    counts = class_counts(parts.source.train.labels, len(class_names))
    weights = resolve_class_weights(recipe.train.class_weights, counts, class_names)
    train = recipe.train
    options: dict[str, Any] = {"multi_label": multi_label, "label_smoothing": recipe.augment.label_smoothing}
    options["class_weights"] = weights
    name = resolve_loss(train.loss, train.loss_sections, multi_label=multi_label)
    loss: ClassificationLoss
    if name == "focal":
        loss = FocalLoss((train.focal or FocalSection()).gamma, **options)
    elif name == "asymmetric":
        section = train.asymmetric or AsymmetricSection()
        focusing = (section.gamma_negative, section.gamma_positive, section.clip)
        loss = AsymmetricLoss(*focusing, sum_classes=section.sum, **options)
    else:
        bce = train.bce or BinaryCrossEntropy()
        options |= {"target_threshold": bce.target_threshold, "sum_classes": bce.sum} if name == "bce" else {}
        loss = ClassificationLoss(binary=name == "bce", **options)
    return loss.to(parts.accelerator.device)


def distillation_of(parts: Parts) -> Distillation | None:
    """Return the step loss that learns from the recipe's teacher too, None without a teacher."""
    section, teacher, ours = parts.recipe.distill, parts.teacher, parts.spec.preprocessing
    if section is None or teacher is None:
        return None
    assert ours is not None
    theirs, bce = teacher.preprocessing, parts.recipe.train.bce
    logits = TeacherLogits(
        teacher.model,
        theirs.image_size,
        mean=theirs.mean,
        std=theirs.std,
        student_mean=ours.mean,
        student_std=ours.std,
        columns=teacher.columns,
        autocast=parts.accelerator.autocast,
        device=parts.accelerator.device,
    )
    return Distillation(
        loss_of(parts),
        logits,
        weight=section.weight,
        temperature=section.temperature,
        multi_label=parts.source.multi_label,
        sum_classes=bce is not None and bce.sum,
    )


def moving_average_of(parts: Parts) -> Ema | None:
    """Return the recipe's moving average, None without one; compiled like the model, since it is evaluated."""
    section = parts.recipe.ema
    if section is None:
        return None
    ema = Ema(parts.model, section.decay, warmup=section.warmup)
    if parts.recipe.accelerate.compile is True:
        ema.module.compile(dynamic=False)  # a copy of a compiled model is not compiled
    return ema
