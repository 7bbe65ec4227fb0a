"""Image classifiers of transformers: built from a configuration, or loaded with their weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_fasttrain.models.head import WeightsSource, transformers_head_names
from hf_fasttrain.models.limits import building, require_plain_args, require_plain_config
from hf_fasttrain.models.weights import is_within, names_in
from hf_fasttrain.run_folder.file_names import CONFIG_FILE
from hf_fasttrain.utils.errors import ModelError, shortened, shown
from hf_fasttrain.utils.library_errors import is_remote_code_refused

if TYPE_CHECKING:
    from hf_fasttrain.models.model import ModelSpec


class TransformersClassifier(nn.Module):
    """A transformers image classifier that maps `images` (B, 3, H, W) to `logits` (B, K), without its own loss.

    For images of another size than the model's, position embeddings are interpolated in each forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._size = _image_size(model.config) if "interpolate_pos_encoding" in parameters else None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, under timm's name for it. ValueError if the model can't."""
        verb = "enable" if enable else "disable"
        newer = getattr(self.model, f"activation_checkpointing_{verb}", None)  # the other name is deprecated
        (newer or getattr(self.model, f"gradient_checkpointing_{verb}"))()

    def forward(self, images: Tensor) -> Tensor:
        if self._size in (None, images.shape[-1]):
            return self.model(pixel_values=images).logits
        return self.model(pixel_values=images, interpolate_pos_encoding=True).logits


def _vision_config(config: Any) -> Any:
    """Return the part of a configuration that has the image size; models of images and texts have one for each."""
    return config if hasattr(config, "image_size") else getattr(config, "vision_config", config)


def _image_size(config: Any) -> int | None:
    """Return the height and width of a model's images, None if they are not fixed, or differ."""
    size = getattr(_vision_config(config), "image_size", None)
    sides = {*size} if isinstance(size, list | tuple) else {size}
    side = sides.pop()
    return side if isinstance(side, int) and not sides else None


def takes_size(classifier: TransformersClassifier, image_size: int) -> bool:
    """Return whether a model takes images of a size without interpolated position embeddings."""
    if image_size == _image_size(classifier.model.config):
        return True
    try:
        with torch.no_grad():
            classifier.model(pixel_values=torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
        return False
    return True


def build_classifier(spec: ModelSpec, *, image_size: int | None = None) -> TransformersClassifier:
    """Return a classifier with random weights, for images of `image_size` unless model.args sets another."""
    from transformers import AutoModelForImageClassification

    labels = {
        "id2label": dict(enumerate(spec.class_names)),
        "label2id": {name: i for i, name in enumerate(spec.class_names)},
    }
    options: dict[str, Any] = {"num_labels": spec.num_classes, **labels, **spec.args}
    with _errors_of(spec):
        config, _ = _config(spec, _source_name(spec), **options)
        sized = _vision_config(config)
        if image_size and hasattr(sized, "image_size") and "image_size" not in spec.args:
            sized.image_size = image_size
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=spec.trust_remote_code)
    return TransformersClassifier(model.float())


def open_classifier(spec: ModelSpec) -> TransformersClassifier:
    """Return the classifier of a folder or Hub repository with its weights. Raises ModelError if some are missing."""
    model, info = _open(spec, **spec.args)
    if info["missing_keys"]:
        missing = sorted(map(str, info["missing_keys"]))
        raise ModelError(
            f"{_source_name(spec)}: {len(missing)} tensors are missing ({shortened(missing, 3)}); copy it again"
        )
    return TransformersClassifier(model)


def published_weights(spec: ModelSpec) -> tuple[dict[str, Tensor], WeightsSource, list[str]]:
    """Return a classifier's published weights, their source, and the names of tensors that are missing in them."""
    model, info = _open(spec)
    missing = [str(name) for name in info["missing_keys"]]
    head = transformers_head_names(model)
    weights = {name: value for name, value in model.state_dict().items() if name not in missing}
    class_names = None if any(is_within(name, head) for name in missing) else names_in(model.config.to_dict())
    return weights, WeightsSource(_source_name(spec), class_names), missing


def current_names(
    spec: ModelSpec, classifier: nn.Module, weights: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names that this version of transformers uses.

    Files keep the names of the version that wrote them. Shapes are those of the config.json in `folder`, else of the
    published model; tensors of other shapes are dropped.
    """
    if weights.keys() <= classifier.state_dict().keys():
        return weights
    origin = str(folder) if (folder / CONFIG_FILE).exists() else _source_name(spec)
    with _errors_of(spec), _quiet():
        config, _ = _config(spec, origin)
        renamed, info = type(classifier).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=weights, ignore_mismatched_sizes=True, output_loading_info=True
        )
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    current = {name: value.float() for name, value in renamed.state_dict().items() if name not in missing}
    return current | {name: weights[name] for name in info["unexpected_keys"] if name in weights}


def _config(spec: ModelSpec, origin: str, **options: Any) -> tuple[Any, str | None]:
    """Return the configuration of a folder or Hub repository, and its commit there, if it has one.

    Raises ModelError for one that names kernels, unless the spec trusts the repository's code. What was looked at is
    what is loaded: the commit is kept.
    """
    from transformers import AutoConfig, PretrainedConfig

    values, _ = PretrainedConfig.get_config_dict(origin)
    require_plain_config(values, spec.name, trusted=spec.trust_remote_code)
    commit = values.get("_commit_hash")
    pinned = {"revision": commit} if isinstance(commit, str) else {}
    return AutoConfig.from_pretrained(origin, trust_remote_code=spec.trust_remote_code, **pinned, **options), commit


def _open(spec: ModelSpec, **args: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder or Hub repository in fp32, and transformers' loading info."""
    from transformers import AutoModelForImageClassification

    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "weights_only": True}  # no pickle
    with _errors_of(spec), _quiet():
        require_plain_args(args, trusted=spec.trust_remote_code)
        config, commit = _config(spec, _source_name(spec), **args)
        options |= {"revision": commit} if commit else {}
        try:
            model, info = AutoModelForImageClassification.from_pretrained(
                _source_name(spec), config=config, output_loading_info=True, **options
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"{_source_name(spec)}: weights and config.json do not fit each other: {reason}") from None
    return model.float(), info


def _source_name(spec: ModelSpec) -> str:
    return spec.name.removeprefix("transformers:")


@contextmanager
def _errors_of(spec: ModelSpec) -> Iterator[None]:
    with building(f"model {spec.name} with model.args={shown(spec.args)}"):
        try:
            yield
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            if is_remote_code_refused(error) and not spec.trust_remote_code:
                raise ModelError(
                    f"model {spec.name} needs its own Python code, which is not run unless the recipe sets "
                    "model.trust_remote_code: true; read that code first"
                ) from None
            raise ModelError(download_error(spec.name, error)) from None


def download_error(name: str, error: Exception) -> str:
    """Return the message for a model that could not be downloaded from the Hub."""
    return (
        f"model {name}: weights or configuration could not be downloaded from the Hub: {str(error).splitlines()[0]} "
        "Check name and network, give local weights (model.pretrained=FILE) or train from scratch "
        "(model.pretrained=false)"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' table of tensors: new ones are reported in a note."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
