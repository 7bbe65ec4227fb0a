"""The model folder of a run: weights, classes and preprocessing, written and read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_fasttrain.errors import ModelError
from hf_fasttrain.model import (
    ModelSpec,
    Preprocessing,
    TransformersClassifier,
    build_model,
    build_transformers,
    model_preprocessing,
)
from hf_fasttrain.weights import load_weights, save_weights

SPEC_FILE = "hf_fasttrain.json"


def save_model(model: nn.Module, spec: ModelSpec, folder: Path) -> None:
    """Write weights, classes and preprocessing to a folder that `load_model` reads.

    timm models also get the config.json that `timm.create_model("local-dir:...", pretrained=True)` reads,
    transformers models what `from_pretrained` reads.
    """
    if isinstance(model, TransformersClassifier):
        model.model.save_pretrained(folder)  # type: ignore[operator]
    else:
        save_weights(model, folder)
        config = timm_config(model, spec)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / SPEC_FILE).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")


def timm_config(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json that timm and transformers' TimmWrapper read."""
    pre = spec.preprocessing or model_preprocessing(model, spec)
    known = dict(getattr(model, "pretrained_cfg", None) or {})
    args = dict(spec.args)
    if known.get("fixed_input_size"):
        args["img_size"] = spec.image_size
    keep = ("tag", "license", "first_conv", "classifier", "fixed_input_size", "pool_size")
    return {
        "architecture": known.get("architecture") or spec.name.split("/")[-1].split(".")[0],
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


def load_model(folder: Path) -> tuple[nn.Module, ModelSpec]:
    """Return the model and its spec from a folder that `save_model` wrote."""
    path = folder / SPEC_FILE
    if not path.exists():
        raise ModelError(f"{folder}: no {SPEC_FILE}; give a run folder whose training has ended, or its model folder")
    values = json.loads(path.read_text(encoding="utf-8"))
    pre = values.pop("preprocessing", None)
    if pre:
        pre = Preprocessing(**{**pre, "mean": tuple(pre["mean"]), "std": tuple(pre["std"])})
    spec = ModelSpec(**values, preprocessing=pre)
    if spec.is_transformers:
        model = build_transformers(replace(spec, name=f"transformers:{folder}"), pretrained=True)
    else:
        model = build_model(spec)
        load_weights(model, folder / "model.safetensors")
    return model.eval(), spec
