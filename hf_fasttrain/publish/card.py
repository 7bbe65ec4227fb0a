"""The model card of a finished run."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from hf_fasttrain.errors import shortened
from hf_fasttrain.publish.finished import RECIPE_FILE, FinishedRun
from hf_fasttrain.publish.local_paths import Scrubber, is_local_path

CARD_METRICS = {"accuracy": "accuracy", "top5_accuracy": "accuracy", "f1_macro": "f1"}  # ours -> the Hub's types


def model_card(run: FinishedRun, recipe: dict[str, Any], repo: str) -> str:
    """Return README.md: what the model is, its figures, how to load it and how it was trained.

    `recipe` is the recipe without local paths.
    """
    from huggingface_hub import ModelCard, ModelCardData

    asked, dataset = run.recipe.get("model") or {}, _dataset(run)
    source = str(run.spec["name"]).removeprefix("transformers:").removeprefix("hf-hub:")
    data = ModelCardData(
        library_name=_library(run.spec),
        pipeline_tag="image-classification",
        tags=["image-classification", "hf_fasttrain"],
        base_model=source if asked.get("pretrained") is True and is_hub_name(source) else None,
        datasets=[dataset] if is_hub_name(dataset) else None,
        model_name=repo.split("/")[-1],
        eval_results=_eval_results(run, dataset) or None,
    )
    name = Scrubber([]).value(str(run.spec["name"])).removeprefix("transformers:")
    classes, multi = run.spec["class_names"], ", any number of them true of an image" if run.spec["multi_label"] else ""
    body = [
        f"# {repo.split('/')[-1]}",
        f"`{name}` for {run.spec['image_size']} px images and {len(classes)} classes{multi}: {shortened(classes, 20)}.",
        _figures(run.result),
        f"## Load it\n\n```python\n{_snippet(run.spec, repo)}```",
        _training(run.result, recipe, _is_own(dataset)),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"))


def is_hub_name(name: str) -> bool:
    """Return whether a name is OWNER/NAME on the Hub rather than a folder here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_local_path(name)


def _library(spec: dict[str, Any]) -> str:
    if spec["name"].startswith("transformers:"):
        return "transformers"
    return "hf_fasttrain" if spec.get("small_image_stem") else "timm"  # timm can't build the other stem


def _dataset(run: FinishedRun) -> str:
    return str((run.recipe.get("data") or {}).get("dataset", ""))


def _is_own(dataset: str) -> bool:
    """Return whether the data set is a folder or file of the one who trained, or unknown."""
    return dataset != "digits" and (not dataset or is_local_path(dataset) or os.path.exists(dataset))


def _eval_results(run: FinishedRun, dataset: str) -> list[Any]:
    from huggingface_hub import EvalResult

    data, local = run.recipe.get("data") or {}, _is_own(dataset)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if local else dataset,
            dataset_name="own images" if local else dataset,
            dataset_config=None if local else data.get("config"),
            dataset_revision=None if local else data.get("revision"),
            metric_type=CARD_METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in (run.result.get("metrics") or {}).items()
        if name in CARD_METRICS and value is not None and math.isfinite(value)
    ]


def _figures(result: dict[str, Any]) -> str:
    metrics, test = result.get("metrics") or {}, result.get("test_metrics") or {}
    if not metrics and not test:
        return ""
    rows = ["| metric | evaluation split | test split |", "| --- | ---: | ---: |"]
    for name in dict.fromkeys([*metrics, *test]):
        shown = [f"{values[name]:.4f}" if name in values else "-" for values in (metrics, test)]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)


def _snippet(spec: dict[str, Any], repo: str) -> str:
    if _library(spec) == "timm":
        return (
            "import timm\n\n"
            f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()\n'
            "config = timm.data.resolve_model_data_config(model)\n"
            "transform = timm.data.create_transform(**config, is_training=False)\n"
        )
    return (
        "from pathlib import Path\n\nfrom huggingface_hub import snapshot_download\n"
        "from hf_fasttrain.model_folder import load_model\n\n"
        f'model, spec = load_model(Path(snapshot_download("{repo}")))\n'
    )


def _training(result: dict[str, Any], recipe: dict[str, Any], own_images: bool) -> str:
    device = (result.get("machine") or {}).get("device", "?")
    facts = (
        f"{result.get('steps', 0):,} steps, {result.get('images', 0):,} images in "
        f"{result.get('train_seconds', 0):,.0f} s of training steps on {device}."
    )
    if not recipe:
        return f"## How it was trained\n\n{facts}"
    override = " data.dataset=FOLDER" if own_images else ""
    command = f"accelerate launch -m hf_fasttrain {RECIPE_FILE}{override}"
    return f"## How it was trained\n\nBy [{RECIPE_FILE}]({RECIPE_FILE}):\n\n```\n{command}\n```\n\n{facts}"
