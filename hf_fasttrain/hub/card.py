"""The model card (README.md) of a pushed run: its texts, metadata and tables. Its pictures: pictures.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_fasttrain.export.snippets import onnx_snippet, own_snippet, timm_snippet, transformers_snippet
from hf_fasttrain.hub.pictures import PICTURES
from hf_fasttrain.run_folder.calibration import read_calibration
from hf_fasttrain.run_folder.file_names import CALIBRATION_FILE, CONFIG_FILE, MODEL_FOLDER, ONNX_FILE, RECIPE_FILE
from hf_fasttrain.run_folder.finished import FinishedRun
from hf_fasttrain.run_folder.intervals import describe_intervals
from hf_fasttrain.run_folder.kept_weights import has_average, step_in_model
from hf_fasttrain.run_folder.schemas import ConfigFile, read_if_sound
from hf_fasttrain.run_folder.scrub import Scrubber, is_local_path
from hf_fasttrain.utils.clean import cut, markdown, markdown_block, markdown_code
from hf_fasttrain.utils.errors import shortened
from hf_fasttrain.utils.format import (
    NOTHING,
    format_bytes,
    format_command,
    format_count,
    format_duration,
    format_percent,
    format_rate,
)
from hf_fasttrain.utils.remote import is_hub_url, is_repo_name, parse_hub_url

CARD_METRICS = {
    "accuracy": "accuracy",
    "top5_accuracy": "accuracy",
    "f1_macro": "f1",
    "auroc": "roc_auc",
    "mcc": "matthews_correlation",
}  # ours -> the Hub's types
INTERVALS = ("intervals", "test_intervals")  # fields of a result
LOCAL_FILES = {
    "model.pretrained": "WEIGHTS",
    "distill.teacher": "TEACHER",
}  # what another machine has to give, if local


def model_card(
    run: FinishedRun,
    recipe: dict[str, Any],
    repo: str,
    files: Mapping[str, bytes | Path],
    license: str | None = None,
) -> str:
    """Return README.md: the model, its metrics, how to use it, how it was trained, and its cost.

    `recipe` is the recipe without local paths, `files` are pushed beside the card; the card has no license unless one
    is given.
    """
    from huggingface_hub import ModelCard, ModelCardData

    dataset = _hub_dataset(run)
    data = ModelCardData(
        license=license,
        library_name=_library(run.spec, files),
        pipeline_tag="image-classification",
        tags=["image-classification", "hf_fasttrain"],
        base_model=_base_model(run),
        datasets=[dataset] if dataset else None,
        model_name=repo.split("/")[-1],
        eval_results=_eval_results(run) or None,
    )
    name = Scrubber([]).value(str(run.spec["name"])).removeprefix("transformers:").removeprefix("own:")
    classes, multi = run.spec["class_names"], ", any number of them per image" if run.spec["multi_label"] else ""
    body = [
        f"# {repo.split('/')[-1]}",
        f"{markdown_code(name)} for {run.spec['image_size']} px images and {len(classes)} classes{multi}: "
        f"{shortened((markdown(cut(each, 100)) for each in classes), 20)}.",
        _state(run.result),
        _metrics_table(run.result),
        _calibration(run),
        *(f"![{PICTURES[name]}]({name})" for name in PICTURES if name in files),
        _usage(run.spec, repo, files),
        _training(run, recipe, repo, files),
        _cost(run.result),
        _versions(run.result),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"))


def is_hub_name(name: str) -> bool:
    """Return whether a name is OWNER/NAME on the Hub and not a local path."""
    return is_repo_name(name) and not is_local_path(name)


def _library(spec: dict[str, Any], files: Mapping[str, bytes | Path]) -> str:
    if spec["name"].startswith("transformers:"):
        return "transformers"
    return "timm" if CONFIG_FILE in files else "hf_fasttrain"  # timm can't build a changed stem


def _base_model(run: FinishedRun) -> str | None:
    """Return the Hub name of the pretrained weights, None if they have none."""
    model = run.recipe.get("model") or {}
    pretrained, name = model.get("pretrained"), str(model.get("name", run.spec["name"]))
    if "model" in run.passed:  # the recipe's was not built
        return None
    if is_hub_url(pretrained):
        return parse_hub_url(str(pretrained))[0]
    if pretrained is not True or run.is_local("model.name"):
        return None
    name = name.removeprefix("transformers:").removeprefix("hf-hub:")
    if is_hub_name(name):
        return name
    config = read_if_sound(run.folder / MODEL_FOLDER / CONFIG_FILE, ConfigFile)
    tag = (config.get("pretrained_cfg") or {}).get("tag")
    architecture = config.get("architecture")
    return f"timm/{architecture}.{tag}" if tag and architecture and not is_local_path(name) else None


def _dataset(run: FinishedRun) -> str:
    return str(run.setting("data.dataset") or "")


def _is_private_data(run: FinishedRun) -> bool:
    """Return whether the dataset is local or unknown."""
    dataset = _dataset(run)
    return dataset != "digits" and (not dataset or run.is_local("data.dataset"))


def _hub_dataset(run: FinishedRun) -> str | None:
    """Return the dataset's name on the Hub, None if it is not from the Hub."""
    dataset = _dataset(run)
    return dataset if dataset != "digits" and not _is_private_data(run) and re.fullmatch(r"[\w./-]+", dataset) else None


def _eval_results(run: FinishedRun) -> list[Any]:
    """Return the model-index entries of evaluation and test split."""
    from huggingface_hub import EvalResult

    data, dataset, is_private = run.recipe.get("data") or {}, _dataset(run), _is_private_data(run)
    eval_split = run.setting("data.eval_split")
    splits = {
        "metrics": eval_split if eval_split not in (None, "auto") else None,
        "test_metrics": data.get("test_split"),
    }
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if is_private else dataset,
            dataset_name=("own images" if is_private else dataset) + (", test split" if key == "test_metrics" else ""),
            dataset_config=None if is_private else data.get("config"),
            dataset_split=split,
            dataset_revision=None if is_private else data.get("revision"),
            metric_type=CARD_METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for key, split in splits.items()
        for name, value in (run.result.get(key) or {}).items()
        if name in CARD_METRICS and value is not None and math.isfinite(value)
    ]


def _metrics_table(result: dict[str, Any]) -> str:
    metrics, test = result.get("metrics") or {}, result.get("test_metrics") or {}
    if not metrics and not test:
        return ""
    rows = ["| metric | evaluation split | test split |", "| --- | ---: | ---: |"]
    for name in dict.fromkeys([*metrics, *test]):
        splits = zip((metrics, test), INTERVALS, strict=True)
        shown = [_with_interval(name, values.get(name), result.get(field)) for values, field in splits]
        rows.append(f"| {markdown(name)} | {' | '.join(shown)} |")
    notes = dict.fromkeys(describe_intervals(each) for each in map(result.get, INTERVALS) if each)
    return "\n".join([*rows, *(f"\n{note}" for note in notes)])


def _with_interval(name: str, value: float | None, intervals: dict[str, Any] | None) -> str:
    ends = ((intervals or {}).get("metrics") or {}).get(name)
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")


def _calibration(run: FinishedRun) -> str:
    """Return what temperature and thresholds the model has."""
    found = read_calibration(run.folder / MODEL_FOLDER)
    if found is None:
        return ""
    parts = []
    if found.temperature is not None and found.before is not None and found.after is not None:
        errors = (format_percent(part.ece) for part in (found.before, found.after))
        parts.append(
            f"To calibrate the scores, divide the logits by the temperature {found.temperature:.4g}: it was fitted "
            f"to {format_count(found.images, 'image')} of the evaluation split, where it changes the calibration error "
            f"(ECE) from {' to '.join(errors)}; the predicted classes stay the same."
        )
    if found.thresholds is not None:
        parts.append(
            f"Each class has its own threshold ({markdown_code(CALIBRATION_FILE)}), tuned for its best F1 on the "
            "evaluation split: metrics at these thresholds (f1_macro_tuned, f1_micro_tuned) are optimistic there, "
            "those of the test split are not."
        )
    return " ".join(parts)


def _state(result: dict[str, Any]) -> str:
    """Return which weights these are, unless they are the last ones of a finished run."""
    step, steps, num_steps = step_in_model(result), result.get("steps"), result.get("num_steps")
    if has_average(result):
        return f"These are the mean of the weights after steps {shortened(result['model'].get('steps') or [])}."
    if step is not None and num_steps is not None:
        return f"Training is still running: these are the weights after step {step:,} of {num_steps:,}."
    if step is None or step == steps:
        return ""
    best = " of the best evaluation," if (result.get("best") or {}).get("step") == step else ""
    bias = " The checkpoint was selected on the evaluation split, so its metrics below are optimistic." if best else ""
    return f"These are the weights{best} after step {step:,} of {steps:,}.{bias}"


def _usage(spec: dict[str, Any], repo: str, files: Mapping[str, bytes | Path]) -> str:
    """Return a program that classifies an image for each library that can open the model."""
    url, transformers = f"hf-hub:{repo}", spec["name"].startswith("transformers:")
    parts = {}
    if spec["name"].startswith("own:"):
        parts["torch, by the program that has trained it"] = own_snippet(repo)
    if CONFIG_FILE in files and not transformers:
        parts["timm"] = timm_snippet(url, multi_label=spec["multi_label"])
    if b'"auto_map"' not in _bytes_of(files.get(CONFIG_FILE, b'"auto_map"')):  # a model with remote code
        parts["transformers"] = transformers_snippet(repo)
    if ONNX_FILE in files:
        parts["onnxruntime, without torch"] = onnx_snippet(repo)
    if spec["name"].startswith("own:"):
        shown = [f"With {tool}:\n\n```python\n{code}```" for tool, code in parts.items()]
        return "\n\n".join(["## How to use it", *shown])
    shown = [f"With {tool} (`python classify.py IMAGE`):\n\n```python\n{code}```" for tool, code in parts.items()]
    command = format_command("predict", f"hf://{repo}", "IMAGE...")
    return "\n\n".join(["## How to use it", *shown, f"With hf_fasttrain:\n\n```bash\n{command}\n```"])


def _bytes_of(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _training(run: FinishedRun, recipe: dict[str, Any], repo: str, files: Mapping[str, bytes | Path]) -> str:
    steps, images = run.result.get("steps") or 0, run.result.get("images") or 0
    title, summary = "## How it was trained", f"{steps:,} steps, {images:,} images."
    text = files.get(RECIPE_FILE)
    summary = " ".join([summary, *_methods(recipe)])
    if not recipe or not isinstance(text, bytes):
        return f"{title}\n\n{summary}"
    if run.passed:
        listed = ", ".join(markdown_code(f"{part}={name}") for part, name in run.passed.items())
        return (
            f"{title}\n\n{summary} Beside the recipe the program passed parts of its own, which are not here: {listed}."
            f"\n\nThe recipe:\n\n{markdown_block(text.decode().strip(), 'yaml')}"
        )
    override = " data.dataset=FOLDER" if _is_private_data(run) else ""
    override += "".join(f" {key}={place}" for key, place in LOCAL_FILES.items() if run.is_local(key))
    elsewhere = " hub=null" if run.recipe.get("hub") else ""  # the author's own repository
    command = f"accelerate launch -m hf_fasttrain {{}}{override}"
    return (
        f"{title}\n\n{summary} To reproduce it, from a clone of this repository or without one:\n\n"
        f"```bash\n{command.format(RECIPE_FILE)}{elsewhere}\n{command.format(f'hf://{repo}')}\n```\n\n"
        f"The recipe:\n\n{markdown_block(text.decode().strip(), 'yaml')}"
    )


def _methods(recipe: dict[str, Any]) -> list[str]:
    """Return a sentence each on the teacher and on LoRA; the recipe is as its user wrote it, without defaults."""
    distill, lora, sentences = recipe.get("distill"), recipe.get("lora"), []
    if isinstance(distill, dict) and distill.get("teacher"):
        teacher = markdown_code(cut(str(distill["teacher"]), 100))
        sentences.append(f"The model learned from the logits of a teacher too, {teacher} (distillation).")
    if lora is True or isinstance(lora, dict):
        rank = lora.get("rank") if isinstance(lora, dict) else None
        named = f"LoRA of rank {markdown(str(rank))}" if rank is not None else "LoRA"
        sentences.append(f"Only the head and low-rank updates were trained ({named}), which the weights contain.")
    return sentences


def _cost(result: dict[str, Any]) -> str:
    """Return the table of hardware, time and memory."""
    machine = result.get("machine") or {}
    gpu = "" if machine.get("device") in (None, "cpu") else f"{machine.get('num_processes', 1)} x {machine['device']}, "
    seconds, memory = result.get("train_seconds"), result.get("peak_memory_bytes")
    rows = {
        "hardware": f"{gpu}{machine.get('processor', '?')}, {machine.get('cores', '?')} cores" if machine else None,
        "training steps took": None
        if seconds is None
        else f"{format_duration(seconds)}, without evaluation and saving",
        "images per second": format_rate(result.get("images_per_second")),
        "waiting for data": format_percent(result.get("data_wait_fraction")),
        "peak memory": None if not memory else f"{format_bytes(memory)}{' of the GPU' if gpu else ''}",
    }
    lines = [f"| {name} | {markdown(value)} |" for name, value in rows.items() if value not in (None, NOTHING)]
    return "\n".join(["## What it cost", "", "| | |", "| --- | --- |", *lines]) if lines else ""


def _versions(result: dict[str, Any]) -> str:
    versions = result.get("versions") or {}
    listed = ", ".join(markdown(f"{name} {version}") for name, version in versions.items())
    return f"## Versions\n\n{listed}." if listed else ""
