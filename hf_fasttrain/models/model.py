"""Image classifiers of timm and transformers: built, loaded with weights, prepared for training."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.data.pixels.rgb import ValueRange
from hf_fasttrain.models.head import HeadChoice, WeightsSource, output_layers, timm_head_names, transformers_head_names
from hf_fasttrain.models.limits import building, require_plain_args
from hf_fasttrain.models.pretrained import Head, Note, adapt_published_head, load_pretrained
from hf_fasttrain.models.transformers_model import (
    TransformersClassifier,
    build_classifier,
    current_names,
    download_error,
    published_weights,
    takes_size,
)
from hf_fasttrain.models.weights import (
    architecture_of,
    class_names_of,
    names_in,
    read_weights,
    weights_file,
    without_wrapper,
)
from hf_fasttrain.run_folder.file_names import CONFIG_FILE
from hf_fasttrain.run_folder.schemas import ConfigFile, read_file
from hf_fasttrain.utils.errors import ModelError, nearest, shortened, shown
from hf_fasttrain.utils.files import expand_user
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.private_apis import batch_norm_class
from hf_fasttrain.utils.qualified_name import qualified_name

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input."""

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"  # center_floor as transformers crops; squash: resized to a square
    value_range: ValueRange | None = None  # of grey of more than 8 bits


FROZEN = "has_frozen_statistics"  # attribute of a batch norm
USER_MODEL_PREFIX = "own:"  # prefix of the name of a user's model


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build the model again."""

    name: str
    class_names: list[str]
    image_size: int
    multi_label: bool = False
    drop_path: float = 0.0
    small_image_stem: bool = False
    trust_remote_code: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    @property
    def is_user_model(self) -> bool:
        """Whether the model is the user's object or the result of the user's function: its name starts with `own:`."""
        return self.name.startswith(USER_MODEL_PREFIX)

    @property
    def is_transformers(self) -> bool:
        """Whether the model is one of transformers' rather than timm's."""
        return self.name.startswith("transformers:")


def build_model(
    spec: ModelSpec, pretrained: bool | str = False, *, head: HeadChoice = "auto", note: Note = lambda _: None
) -> nn.Module:
    """Return the model, in fp32 on the CPU, with a head for the spec's classes.

    `pretrained` is False, True for the published weights of the name, or a local folder or file of weights. Their head
    is kept if it has the same class names (`head` auto), always (keep) or never (new); otherwise the head is
    zero-initialised, with a `note`. Position embeddings are resized. Any other misfit raises ModelError.
    """
    require_plain_args(spec.args, trusted=spec.trust_remote_code)
    if spec.is_transformers:
        return _build_transformers(spec, pretrained, head, note)
    model = _create_timm(spec, pretrained is True)
    if spec.small_image_stem:
        use_small_image_stem(model)
    target = Head(head_names(model), _output_layers(model, spec), spec.class_names, head)
    if isinstance(pretrained, str):
        weights, source, _ = _read(pretrained)
        load_pretrained(model, weights, source, target, note)
    elif pretrained:
        adapt_published_head(model, _published(model), target, note, loaded=_has_published_head(model, spec))
    return model


def _read(location: str) -> tuple[dict[str, Tensor], WeightsSource, Path]:
    """Return the weights of a path or Hub URL, their source, and their folder."""
    path = weights_file(location)
    source = WeightsSource(location, class_names_of(location, path), architecture_of(location, path))
    return read_weights(path), source, path.parent


def _output_layers(model: nn.Module, spec: ModelSpec) -> list[str]:
    return output_layers(model, head_names(model), spec.num_classes)


def timm_name(name: str) -> str:
    """Return the name of a recipe's model for `timm.create_model`: plain, ``hf-hub:...`` or ``local-dir:...``."""
    import timm

    if name.startswith("hf-hub:"):
        return name
    if name.startswith("timm/"):
        return f"hf-hub:{name}"
    path = expand_user(name)
    if path.is_dir():
        if not (path / CONFIG_FILE).exists():
            raise ModelError(f"model.name: folder {name} has no config.json; give a folder that timm saved")
        if not read_file(path / CONFIG_FILE, ConfigFile).get("architecture"):
            raise ModelError(
                f"model.name: {path / CONFIG_FILE} names no 'architecture'; give a folder that timm saved, or "
                f"transformers:{name} for one of transformers"
            )
        return f"local-dir:{path}"
    if timm.is_model(name):
        return name
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model.name: no folder {name}")
    known = [*timm.list_models(), *timm.list_models(pretrained=True)]
    if "/" in name:
        raise ModelError(
            f"model.name: '{name}' is not a timm model; write timm/{name.split('/')[-1]} for timm's on the Hub, "
            f"or transformers:{name} for one of transformers"
        )
    beginning = [other for other in known if other.startswith(name.lower())]
    hint = nearest(name, known) or (f" It has {shortened(beginning, 8)}" if beginning else "")
    raise ModelError(f"model.name: timm {timm.__version__} has no model '{name}'.{hint}")


def _create_timm(spec: ModelSpec, pretrained: bool) -> nn.Module:
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    name = timm_name(spec.name)
    options: dict[str, Any] = {"drop_path_rate": spec.drop_path} if spec.drop_path else {}
    if _has_fixed_input_size(name):
        options["img_size"] = spec.image_size
    with building(f"model {spec.name} with model.args={shown(spec.args)}"):
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=spec.num_classes, **options, **spec.args)
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"model {spec.name} does not take {options | spec.args}: {error}") from None
        except (AssertionError, ValueError) as error:
            raise ModelError(f"model {spec.name} can't be built for {spec.image_size} px images: {error}") from None
        except (HfHubHTTPError, OSError) as error:
            raise ModelError(download_error(spec.name, error)) from None
        except RuntimeError as error:
            if not pretrained or is_out_of_memory(error):
                raise
            raise ModelError(f"model {spec.name}: no pretrained weights: {error}; set model.pretrained=false") from None


def _published(model: nn.Module) -> WeightsSource:
    """Return the source of the weights that timm has loaded into a model."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return WeightsSource("the published model", names_in(config))


def _has_published_head(model: nn.Module, spec: ModelSpec) -> bool:
    """Return whether timm has loaded the head too: it does so for the same number of classes."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return bool(config.get("num_classes") == spec.num_classes)


def _has_fixed_input_size(name: str) -> bool:
    """Return whether the model is built for one image size, like a ViT and unlike a convolutional network."""
    import timm

    try:
        if name.startswith("hf-hub:"):
            _, name, _ = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
        elif name.startswith("local-dir:"):
            config = Path(name.removeprefix("local-dir:")) / CONFIG_FILE
            name = read_file(config, ConfigFile).get("architecture") or ""
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(download_error(name, error)) from None
    return bool(getattr(timm.get_pretrained_cfg(str(name)), "fixed_input_size", False))


def use_small_image_stem(model: nn.Module) -> None:
    """Replace a ResNet's 7x7 stride-2 convolution and max-pool by a 3x3 stride-1 convolution, for 32 px images."""
    if not _has_resnet_stem(model):
        raise ModelError(
            f"model.small_image_stem: {type(model).__name__} has no 7x7 stem to replace; it works for timm's "
            "resnet18, resnet34, resnet50, resnet101, resnet152, resnext and wide_resnet"
        )
    stem: Any = model.conv1
    new = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = new, nn.Identity()


def _has_resnet_stem(model: nn.Module) -> bool:
    return type(model).__name__ == "ResNet" and isinstance(getattr(model, "conv1", None), nn.Conv2d)


def has_large_stem(model: nn.Module) -> bool:
    """Return whether `use_small_image_stem` would replace the stem of a model by one for smaller images."""
    stem: Any = getattr(model, "conv1", None)
    return _has_resnet_stem(model) and bool(stem.stride[0] > 1)


def spec_of_custom(model: nn.Module, spec: ModelSpec) -> ModelSpec:
    """Return the spec of a user's model, named by timm if timm builds the same model, else by its class."""
    plain = replace(spec, drop_path=0.0, small_image_stem=False, trust_remote_code=False, args={})
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if name:
        try:
            if _structure(_create_timm(replace(plain, name=name), pretrained=False)) == _structure(model):
                return replace(plain, name=name)
        except (ModelError, RuntimeError):
            pass
    return replace(plain, name=f"{USER_MODEL_PREFIX}{qualified_name(model)}")


def _structure(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, description) of each layer that affects inference."""
    layers = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    return [(name, repr(layer)) for name, layer in layers if not re.match("Identity|Drop", type(layer).__name__)]


def _build_transformers(spec: ModelSpec, pretrained: bool | str, head: HeadChoice, note: Note) -> nn.Module:
    if spec.small_image_stem or spec.drop_path:
        raise ModelError(
            f"model {spec.name}: drop_path and small_image_stem are for timm models; transformers' settings go into "
            "model.args, such as {drop_path_rate: 0.1}"
        )
    classifier = build_classifier(spec, image_size=None if pretrained is True else spec.image_size)
    if pretrained is True and not takes_size(classifier, spec.image_size):
        classifier = build_classifier(spec, image_size=spec.image_size)  # position embeddings are resized to it
    if not pretrained:
        return classifier
    inner = classifier.model
    names = transformers_head_names(inner)
    target = Head(names, output_layers(inner, names, spec.num_classes), spec.class_names, head)
    if isinstance(pretrained, str):
        weights, source, folder = _read(pretrained)
        weights = current_names(spec, inner, without_wrapper(weights, inner), folder)
        load_pretrained(inner, weights, source, target, note)
    else:
        weights, source, missing = published_weights(spec)
        load_pretrained(inner, weights, source, target, note, absent=missing)
    return classifier


def head_names(model: nn.Module, num_classes: int = 0) -> list[str]:
    """Return the prefixes of the head's parameters; `num_classes` is used if the model has no such attribute."""
    if isinstance(model, TransformersClassifier):
        return [f"model.{name}" for name in transformers_head_names(model.model)]
    return timm_head_names(model, num_classes)


def use_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping all of them."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, ValueError) as error:
        raise ModelError(
            f"model.gradient_checkpointing: {type(model).__name__} does not support it: {error}; set it to false"
        ) from None


def require_logits(model: nn.Module, spec: ModelSpec, key: str = "data.image_size") -> None:
    """Raise ModelError unless the model maps an image of the spec's size to one logit for each class.

    `key` is the setting that the size comes from.
    """
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, spec.image_size, spec.image_size))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise ModelError(
            f"model {spec.name} can't take {spec.image_size} px colour images with model.args={spec.args}: "
            f"{str(error).splitlines()[0]}; change {key} or model.args{_other_sizes(model, spec)}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (1, spec.num_classes):
        returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"model {spec.name} with model.args={spec.args} returns {returned} instead of "
            f"(1, {spec.num_classes}) logits"
        )


def _other_sizes(model: nn.Module, spec: ModelSpec) -> str:
    """Return how a model takes images of other sizes, "" if it can't, or that is not known."""
    name = "dynamic_img_size"  # of timm: position embeddings are interpolated in each forward pass
    if name in spec.args or name not in inspect.signature(type(model).__init__).parameters:
        return ""
    return f": {{{name}: true}} lets it take other multiples of its patch size"


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep running statistics of their batches."""
    return [module for module in model.modules() if isinstance(module, batch_norm_class())]


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Return whether a batch norm uses batch statistics in training, or its running ones.

    It does not with frozen weights, nor after `freeze_statistics`.
    """
    return not getattr(norm, FROZEN, False) and has_trained_weight(norm)


def freeze_statistics(model: nn.Module) -> None:
    """Let the batch norms use and keep their running statistics in training. Raises ModelError without batch norms."""
    norms = batch_norms(model)
    if not norms:
        raise ModelError(f"model.batch_norm=frozen: {type(model).__name__} has no batch norms; leave it out")
    for norm in norms:
        setattr(norm, FROZEN, True)


def has_trained_weight(norm: nn.Module) -> bool:
    """Return whether a norm has no weight, or one that is trained."""
    return norm.weight is None or bool(norm.weight.requires_grad)


def set_train_mode(model: nn.Module, norms: Sequence[nn.Module]) -> None:
    """Set training mode, except for batch norms with frozen weights."""
    model.train()
    for norm in norms:
        if not uses_batch_statistics(norm):
            norm.eval()


def model_preprocessing(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    """Return the model's preprocessing, at the spec's image size.

    timm: from the pretrained configuration; transformers: from the model's image processor, else ImageNet's.
    """
    if isinstance(model, TransformersClassifier):
        return _processor_preprocessing(spec)
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    return Preprocessing(
        spec.image_size,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
        config["crop_pct"],
        "squash" if config.get("crop_mode") == "squash" else "center",
    )


def _processor_preprocessing(spec: ModelSpec) -> Preprocessing:
    from transformers import AutoImageProcessor

    from hf_fasttrain.data.pixels.augment import FILTERS

    base = Preprocessing(spec.image_size, crop_mode="center_floor")
    try:
        name = spec.name.removeprefix("transformers:")
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return base
    number = getattr(processor, "resample", None)
    names = {int(value): name for name, value in FILTERS.items()}
    normalised = getattr(processor, "do_normalize", True)
    size = getattr(processor, "size", None) or {}
    square = "height" in size and not getattr(processor, "do_center_crop", False)
    return replace(
        base,
        mean=tuple(getattr(processor, "image_mean", None) or base.mean) if normalised else (0.0,) * 3,
        std=tuple(getattr(processor, "image_std", None) or base.std) if normalised else (1.0,) * 3,
        interpolation=names.get(int(number), base.interpolation) if number is not None else base.interpolation,
        crop_pct=_processor_crop_pct(processor),
        crop_mode="squash" if square else "center_floor",
    )


def _processor_crop_pct(processor: Any) -> float:
    """Return crop size / resize size of a transformers image processor, 1 if it does not crop."""
    crop_pct = getattr(processor, "crop_pct", None)
    if crop_pct or not getattr(processor, "do_center_crop", False):
        return float(crop_pct or 1.0)
    crop, size = dict(getattr(processor, "crop_size", None) or {}), dict(getattr(processor, "size", None) or {})
    cut, resized = crop.get("height"), size.get("shortest_edge") or size.get("height")
    if not cut or not resized:
        return 1.0
    share = cut / resized
    return min(1.0, share if math.floor(cut / share) == resized else math.nextafter(share, 0))
