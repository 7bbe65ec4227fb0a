"""A recipe's model: built, with weights, and prepared for training on a device."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.data.source.dataset import Source
from hf_fasttrain.from_recipe.auto import decide
from hf_fasttrain.from_recipe.custom import NO_CUSTOM_PARTS, CustomParts
from hf_fasttrain.from_recipe.value_range import resolve_value_range
from hf_fasttrain.models.input_size import notes_on_size, seen_by_layers
from hf_fasttrain.models.layers import freeze_untrained
from hf_fasttrain.models.limits import limited_size
from hf_fasttrain.models.lora import add_adapters
from hf_fasttrain.models.model import (
    ModelSpec,
    Preprocessing,
    build_model,
    freeze_statistics,
    has_large_stem,
    head_names,
    model_preprocessing,
    require_logits,
    spec_of_custom,
    use_gradient_checkpointing,
)
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.schema_transfer import LoraSection
from hf_fasttrain.train.loss import describe_output, loss_input
from hf_fasttrain.utils.errors import ModelError, RunError, first_line
from hf_fasttrain.utils.qualified_name import qualified_name


def model_from(
    recipe: Recipe,
    source: Source,
    device: torch.device,
    settings: ResolvedSettings,
    custom: CustomParts = NO_CUSTOM_PARTS,
) -> tuple[nn.Module, ModelSpec]:
    """Return a recipe's model for the classes of its data, or the user's, on a device, and its spec.

    Raises ModelError for weights that don't fit and for a model that does not return logits.
    """
    spec = _spec(recipe, source)
    torch.manual_seed(recipe.seed)
    if custom.model is not None:
        return _custom_model(custom, recipe, spec, device, settings, source)
    with limited_size(f"model {recipe.model.name}"):
        model = build_model(spec, recipe.model.pretrained, head=recipe.model.head, note=settings.weight_notes.append)
    for key, size in _sizes(recipe).items():
        with seen_by_layers(model) as seen:
            require_logits(model, replace(spec, image_size=size), key)
        for note in notes_on_size(seen, size, key, stem=not recipe.model.pretrained and has_large_stem(model)):
            settings.note(note)
    spec = replace(spec, preprocessing=_preprocessing(model, spec, settings, source))
    return _prepare(model, recipe, device, settings, spec.num_classes), spec


def _custom_model(
    custom: CustomParts,
    recipe: Recipe,
    spec: ModelSpec,
    device: torch.device,
    settings: ResolvedSettings,
    source: Source,
) -> tuple[nn.Module, ModelSpec]:
    """Return the user's model, prepared, and its spec."""
    assert custom.model is not None
    model = custom.model
    spec = spec_of_custom(model, spec)
    has_other_outputs = custom.step_loss is not None and recipe.evaluate.every == "never"
    # Such a model is called by the step loss alone.
    for key, size in _sizes(recipe).items() if not has_other_outputs else ():
        with seen_by_layers(model) as seen:
            _require_custom_logits(model, custom, spec, size)
        for note in notes_on_size(seen, size, key):
            settings.note(note)
    pre = _preprocessing(model, spec, settings, source)
    keys = [key for key in ("data.mean", "data.std", "data.interpolation", "data.crop_pct") if settings.is_open(key)]
    if keys and not getattr(model, "pretrained_cfg", None):
        settings.note(
            f"model={qualified_name(model)} has no pretrained_cfg with its preprocessing: ImageNet's values are used "
            f"for {', '.join(keys)}"
        )
    return _prepare(model, recipe, device, settings, spec.num_classes), replace(spec, preprocessing=pre)


def _sizes(recipe: Recipe) -> dict[str, int]:
    """Return key -> size of the images that a recipe gives to the model."""
    growth, sizes = recipe.augment.progressive, {"data.image_size": recipe.data.image_size}
    if recipe.data.train_size:
        sizes["data.train_size"] = recipe.data.train_size
    return sizes | ({"augment.progressive.start_size": growth.start_size} if growth else {})


def _require_custom_logits(model: nn.Module, custom: CustomParts, spec: ModelSpec, size: int) -> None:
    """Raise ModelError unless the user's model, or `predict`, returns one logit per class."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images, classes = torch.zeros(1, 3, size, size, device=device), spec.num_classes
    if custom.predict is None:
        name, forward = f"model={qualified_name(model)}", model.__call__
        advice = f"give it {classes} outputs, or pass predict, a function (model, images) -> logits (B, {classes})"
        if custom.step_loss is not None:
            advice += "; with a step_loss, evaluate.every=never trains without evaluations"
    else:
        name, forward = f"predict={qualified_name(custom.predict)}", functools.partial(custom.predict, model)
        advice = f"return logits (B, {classes}) from it"
    model.eval()
    with torch.no_grad():
        try:
            output = forward(images)
        except Exception as error:  # noqa: BLE001 - whatever the user's model raises
            raise ModelError(
                f"{name}: failed for an image of {size} px: {type(error).__name__}: {first_line(error)}; change "
                f"data.image_size or the model, or {advice}"
            ) from None
    logits = loss_input(output) if custom.predict is None else output
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        description = (
            f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else describe_output(logits)
        )
        raise ModelError(f"{name}: returns {description} for an image; the data has {classes} classes, so {advice}")


def _spec(recipe: Recipe, source: Source) -> ModelSpec:
    return ModelSpec(
        name=recipe.model.name,
        class_names=source.class_names,
        image_size=recipe.data.image_size,
        multi_label=source.multi_label,
        drop_path=recipe.model.drop_path,
        small_image_stem=recipe.model.small_image_stem,
        trust_remote_code=recipe.model.trust_remote_code,
        args=dict(recipe.model.args),
    )


def _preprocessing(model: nn.Module, spec: ModelSpec, settings: ResolvedSettings, source: Source) -> Preprocessing:
    pretrained = model_preprocessing(model, spec)
    values: dict[str, Any] = {}
    for name in ("mean", "std", "interpolation", "crop_pct"):
        key, default = f"data.{name}", getattr(pretrained, name)
        value = decide(settings, key, value=list(default) if isinstance(default, tuple) else default)
        if isinstance(value, list) and not settings.is_open(key):  # one number stands for all channels
            value = settings.record(key, value * (3 // len(value)))
        values[name] = tuple(value) if isinstance(value, list) else value
    return replace(pretrained, value_range=resolve_value_range(settings, source.train), **values)


def _prepare(
    model: nn.Module, recipe: Recipe, device: torch.device, settings: ResolvedSettings, num_classes: int
) -> nn.Module:
    if recipe.lora is not None:
        _add_adapters(model, recipe.lora, recipe.data.image_size, num_classes, settings)
    if trained := freeze_untrained(model, recipe.model.trained, num_classes):
        settings.note(f"model.train: {settings.record('trained_parameters', trained)}")
    if recipe.model.batch_norm == "frozen":
        freeze_statistics(model)
    if recipe.model.gradient_checkpointing:
        use_gradient_checkpointing(model)
    if recipe.accelerate.sync_batch_norm:
        if device.type != "cuda":
            raise RunError("accelerate.sync_batch_norm needs GPUs; set it to false")
        from timm.layers import convert_sync_batchnorm

        model = convert_sync_batchnorm(model)
    model = model.to(device)
    if recipe.accelerate.channels_last is True:
        model = model.to(memory_format=torch.channels_last)
    if recipe.accelerate.compile is True:
        model.compile(dynamic=False)
    return model


def _add_adapters(
    model: nn.Module, lora: LoraSection, image_size: int, num_classes: int, settings: ResolvedSettings
) -> None:
    """Add a recipe's adapters to a model, and record which layers have them."""
    head = head_names(model, num_classes)
    targets = None if lora.targets == "auto" else lora.targets
    options: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}
    names = add_adapters(model, head, image_size, targets=targets, **options)
    numbers = {grad: sum(p.numel() for p in model.parameters() if p.requires_grad == grad) for grad in (True, False)}
    share = numbers[True] / sum(numbers.values())
    ends = targets or sorted({name.rpartition(".")[2] for name in names})
    settings.record("lora.targets", ends, f"{len(names)} layers; with the head {share:.1%} of the weights are trained")
