"""Image classifiers of transformers: built from a configuration, or loaded with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_fasttrain.models.head import WeightsSource, transformers_head_names
from hf_fasttrain.models.weights import is_within, names_in
from hf_fasttrain.run_folder.file_names import CONFIG_FILE
from hf_fasttrain.utils.errors import ModelError, shortened
from hf_fasttrain.utils.library_errors import is_remote_code_refused

if TYPE_CHECKING:
    from hf_fasttrain.models.model import ModelSpec


class TransformersClassifier(nn.Module):
    """A transformers image classifier that maps `images` (B, 3, H, W) to `logits` (B, K), without its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def build_classifier(spec: ModelSpec, *, image_size: int | None = None) -> TransformersClassifier:
    """Return a classifier with random weights, for images of `image_size` unless model.args sets another."""
    from transformers import AutoConfig, AutoModelForImageClassification

    labels = {
        "id2label": dict(enumerate(spec.class_names)),
        "label2id": {name: i for i, name in enumerate(spec.class_names)},
    }
    options: dict[str, Any] = {"num_labels": spec.num_classes, **labels, **spec.args}
    with _errors_of(spec):
        config = AutoConfig.from_pretrained(_source_name(spec), trust_remote_code=spec.trust_remote_code, **options)
        if image_size and hasattr(config, "image_size") and "image_size" not in spec.args:
            config.image_size = image_size
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
    """Return a classifier's published weights with their class names, and the names of tensors that they lack."""
    model, info = _open(spec)
    lacking = [str(name) for name in info["missing_keys"]]
    head = transformers_head_names(model)
    weights = {name: value for name, value in model.state_dict().items() if name not in lacking}
    named = None if any(is_within(name, head) for name in lacking) else names_in(model.config.to_dict())
    return weights, WeightsSource(_source_name(spec), named), lacking


def current_names(
    spec: ModelSpec, classifier: nn.Module, weights: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names that this version of transformers uses.

    Files keep the names of the version that wrote them. Shapes are those of the config.json in `folder`, else of the
    published model; tensors of other shapes are dropped.
    """
    from transformers import AutoConfig

    if weights.keys() <= classifier.state_dict().keys():
        return weights
    origin = str(folder) if (folder / CONFIG_FILE).exists() else _source_name(spec)
    with _errors_of(spec), _quiet():
        config = AutoConfig.from_pretrained(origin, trust_remote_code=spec.trust_remote_code)
        renamed, info = type(classifier).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=weights, ignore_mismatched_sizes=True, output_loading_info=True
        )
    lacking = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    known = {name: value.float() for name, value in renamed.state_dict().items() if name not in lacking}
    return known | {name: weights[name] for name in info["unexpected_keys"] if name in weights}


def _open(spec: ModelSpec, **args: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder or Hub repository in fp32, and transformers' loading info."""
    from transformers import AutoModelForImageClassification

    options = {"trust_remote_code": spec.trust_remote_code, "weights_only": True}  # nothing is unpickled
    with _errors_of(spec), _quiet():
        try:
            model, info = AutoModelForImageClassification.from_pretrained(
                _source_name(spec), output_loading_info=True, **options, **args
            )
        except RuntimeError as error:
            why = str(error).splitlines()[-1].strip()
            raise ModelError(f"{_source_name(spec)}: weights and config.json do not fit each other: {why}") from None
    return model.float(), info


def _source_name(spec: ModelSpec) -> str:
    return spec.name.removeprefix("transformers:")


@contextmanager
def _errors_of(spec: ModelSpec) -> Iterator[None]:
    try:
        yield
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
