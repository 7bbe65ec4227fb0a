"""The model folder of a run: weights, classes and preprocessing, saved and loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_fasttrain.data.pixels.resize import FILTERS
from hf_fasttrain.data.pixels.rgb import ValueRange
from hf_fasttrain.models.limits import building, limited_size
from hf_fasttrain.models.model import (
    USER_MODEL_PREFIX,
    ModelSpec,
    Preprocessing,
    build_model,
    model_preprocessing,
    require_logits,
)
from hf_fasttrain.models.transformers_model import TransformersClassifier, open_classifier
from hf_fasttrain.models.weights import load_weights, save_weights, without_sharing
from hf_fasttrain.run_folder.file_names import CONFIG_FILE, MODEL_FOLDER, SPEC_FILE, WEIGHTS_FILE
from hf_fasttrain.run_folder.finished import needs_user_model
from hf_fasttrain.run_folder.schemas import SpecFile, read_if_sound, require
from hf_fasttrain.utils.errors import ModelError, RunError
from hf_fasttrain.utils.files import expand_user, read_object, reason, restore_folder
from hf_fasttrain.utils.remote import download_run, is_hub_url


def save_model(model: nn.Module, spec: ModelSpec, folder: Path) -> None:
    """Write a folder with weights in fp32, classes and preprocessing, which `load_model` and other tools load.

    timm models: `timm.create_model("local-dir:...", pretrained=True)` and transformers' pipeline; transformers models:
    `from_pretrained` and the pipeline; provided that the tool can build the model.
    """
    if isinstance(model, TransformersClassifier):
        with _without_progress_bars():
            model.model.save_pretrained(folder, state_dict=without_sharing(model.model))  # type: ignore[operator]
    else:
        save_weights(model, folder)
    save_description(model, spec, folder)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Disable transformers' progress bars."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def save_description(model: nn.Module, spec: ModelSpec, folder: Path) -> None:
    """Write everything that `save_model` writes except the weights.

    A model with the small-image stem and a user's model get no config.json: timm would build a different model from it.
    """
    pre = spec.preprocessing or model_preprocessing(model, spec)
    if isinstance(model, TransformersClassifier):
        config: Any = model.model.config
        config.problem_type = f"{'multi' if spec.multi_label else 'single'}_label_classification"
        config.dtype = "float32"
        config.save_pretrained(folder)
        image_processor(pre).save_pretrained(folder)
    elif not spec.small_image_stem and not spec.is_user_model:
        config = timm_config(model, spec)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    values = asdict(_self_contained(model, replace(spec, preprocessing=pre)))
    if pre.value_range is None:
        del values["preprocessing"]["value_range"]  # which older versions don't know
    else:
        values["preprocessing"]["value_range"] = {
            name: getattr(pre.value_range, name) for name in ("low", "high", "clips")
        }
    (folder / SPEC_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def image_processor(pre: Preprocessing) -> Any:
    """Return transformers' image processor that does what `EvalTransform` and `Normalize` do.

    PilBackend is the base of all its Pillow processors. With the name of any other one, AutoImageProcessor and the
    pipeline use the torchvision variant if torchvision is installed. Measured with 50 photos at 224 px (ViT and
    ResNet with random weights, heads scaled by 20): logits then differ by 0.001 to 0.4, with PilBackend by 0.
    """
    from transformers import PilBackend

    short, square = math.floor(pre.image_size / pre.crop_pct), pre.crop_mode == "squash"
    return PilBackend(
        do_convert_rgb=True,
        do_resize=True,
        size={"height": short, "width": short} if square else {"shortest_edge": short},
        resample=int(FILTERS[pre.interpolation]),
        do_center_crop=not square or short != pre.image_size,
        crop_size={"height": pre.image_size, "width": pre.image_size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(pre.mean),
        image_std=list(pre.std),
    )


def timm_config(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json that timm and transformers' TimmWrapper read."""
    pre = spec.preprocessing or model_preprocessing(model, spec)
    known = _pretrained_cfg(model)
    args = _model_args(model, spec)
    if known.get("fixed_input_size"):
        args["img_size"] = spec.image_size
    keep = ("tag", "license", "first_conv", "classifier", "fixed_input_size", "pool_size")
    return {
        "architecture": _architecture(model, spec),
        "num_classes": spec.num_classes,
        "label_names": spec.class_names,
        "model_args": args,
        "pretrained_cfg": {
            **{key: known[key] for key in keep if known.get(key) is not None},
            "input_size": [3, spec.image_size, spec.image_size],
            "interpolation": pre.interpolation,
            "crop_pct": pre.crop_pct,
            "crop_mode": pre.crop_mode,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "num_classes": spec.num_classes,
        },
        **({"problem_type": "multi_label_classification"} if spec.multi_label else {}),
    }


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "pretrained_cfg", None) or {})


def _architecture(model: nn.Module, spec: ModelSpec) -> str:
    return str(_pretrained_cfg(model).get("architecture") or spec.name.split("/")[-1].split(".")[0])


def _model_args(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """Return the architecture's arguments: the recipe's, and those of a Hub model's configuration."""
    built: dict[str, Any] = dict(getattr(model, "_model_args", None) or {})
    for name in ("num_classes", *(["drop_path_rate"] if spec.drop_path else [])):
        built.pop(name, None)  # TimmWrapper gives the number itself
    return {**built, **spec.args}


def _self_contained(model: nn.Module, spec: ModelSpec) -> ModelSpec:
    """Return a spec that loads the folder anywhere, without the folder or Hub model that training started from."""
    import timm

    if spec.is_transformers or spec.is_user_model or ("/" not in spec.name and not Path(spec.name).is_dir()):
        return spec
    architecture, args = _architecture(model, spec), _model_args(model, spec)
    if getattr(timm.get_pretrained_cfg(architecture), "fixed_input_size", False):
        args.pop("img_size", None)  # `build_model` gives the image size itself
    if spec.name.removeprefix("hf-hub:").startswith("timm/"):  # the same model by its timm name
        tagged = f"{architecture}.{_pretrained_cfg(model).get('tag')}"
        architecture = tagged if timm.is_model_pretrained(tagged) else architecture
    return replace(spec, name=architecture, args=args)


def open_run(run: str | Path) -> Path:
    """Return a run's local folder; hf://OWNER/NAME[@REVISION] is downloaded.

    Raises RunError for a pushed model that needs its own Python code.
    """
    if not is_hub_url(str(run)):
        return expand_user(run)
    folder = download_run(str(run))
    if not (folder / SPEC_FILE).is_file():
        raise RunError(
            f"{run}: contains no model of hf_fasttrain ({SPEC_FILE}); give a repository that hf_fasttrain pushed"
        )
    if read_if_sound(folder / SPEC_FILE, SpecFile).get("trust_remote_code"):
        raise RunError(
            f"{run}: its model needs its own Python code; `hf download` it to a folder, read that code, then give the "
            "folder"
        )
    return folder


def model_folder(run: Path, *, pushed: bool = False) -> Path:
    """Return the model folder of a run folder, or the folder itself if it is one; a `pushed` run is always one."""
    restore_folder(run / MODEL_FOLDER)
    if not pushed:
        needs_user_model(run, None)
    for folder in (run,) if pushed else (run / MODEL_FOLDER, run):
        if (folder / SPEC_FILE).exists():
            return folder
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give a run folder")
    raise RunError(f"{run}: contains no model; give the folder of a finished run")


def load_model(folder: Path) -> tuple[nn.Module, ModelSpec]:
    """Return the model and its spec from a folder that `save_model` wrote."""
    path = folder / SPEC_FILE
    if not path.exists():
        raise ModelError(f"{folder}: no {SPEC_FILE}; give a run folder whose training has ended, or its model folder")
    spec = read_spec(path)
    if spec.is_user_model:
        raise ModelError(
            f"{folder}: its model was built by your own code ({spec.name.removeprefix(USER_MODEL_PREFIX)}), which is "
            "not in the folder; for a run folder pass the model, --model package.module:function (in Python "
            "model=...), or load model.safetensors into your model"
        )
    what = f"the model of {folder}"
    with limited_size(what, sorted(folder.glob("*.safetensors"))), building(what):
        if spec.is_transformers:
            model: nn.Module = open_classifier(replace(spec, name=f"transformers:{folder}"))
        else:
            model = build_model(spec)
            load_weights(model, folder / WEIGHTS_FILE)
        require_logits(model, spec, f"{SPEC_FILE}'s image_size")
    return model.eval(), spec


def read_spec(path: Path) -> ModelSpec:
    """Return the spec that `save_description` wrote. Raises ModelError for another content."""
    try:
        values = require(SpecFile, read_object(path))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: can't be read as a model's description ({reason(error)}); use the version of hf_fasttrain that "
            "wrote it, or copy the folder again"
        ) from None
    pre = values.get("preprocessing")
    if pre is not None:
        read: dict[str, Any] = {name: tuple(pre[name]) for name in ("mean", "std")}
        if pre.get("value_range") is not None:
            read["value_range"] = ValueRange(**pre["value_range"])
        pre = Preprocessing(**{**pre, **read})
    return ModelSpec(**{**values, "preprocessing": pre})
