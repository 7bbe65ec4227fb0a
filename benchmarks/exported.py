"""Exported models opened by timm, transformers and onnxruntime, compared with this package on the same photos.

    python benchmarks/exported.py DIR [--run RUN]... [--model NAME]... [--photos 50] [--size 224] [--steps 30]

DIR is an image folder with splits. Each RUN, or a model trained for a few steps for each NAME, is exported with ONNX.
Processes that do not import this package then load it and classify photos of DIR, spread evenly over its files. The
table gives the largest difference of a logit and of a score from `hf-fasttrain evaluate` and `predict`, and for how
many photos the top five classes agree in order; then the seconds of an export without and with ONNX, and the logits of
its check.

The head of a model trained here is scaled so that logits spread by 3, as after a long training: differences of logits
near 0 would show little. With too few steps, this also scales rounding errors up.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_fasttrain import Trainer
from hf_fasttrain.data.pixels.decode import read_pixels
from hf_fasttrain.data.source.inventory import images_below, list_folder
from hf_fasttrain.export.export import export_run, preprocess
from hf_fasttrain.export.snippets import ONNX
from hf_fasttrain.inference import predict_images
from hf_fasttrain.models.model import head_names
from hf_fasttrain.models.saved import load_model, save_model

MODELS = ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0", "transformers:vit", "transformers:convnext"]

TIMM = """
import json, sys, timm, torch
from PIL import Image, ImageOps
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
for path in sys.argv[2:]:
    image = transform(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    with torch.inference_mode():
        logits = model(image[None])
    print(json.dumps([logits[0].tolist(), logits.softmax(1)[0].tolist()]))
"""
PIPELINE = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1])
names = classify.model.config.id2label.values()
for path in sys.argv[2:]:
    answers = []
    for function in ("none", "softmax"):
        found = {one["label"]: one["score"] for one in classify(path, top_k=len(names), function_to_apply=function)}
        answers.append([found[name] for name in names])
    print(json.dumps(answers))
"""


def onnx_program() -> str:
    """Return the model card's program for onnxruntime, changed to classify many photos and print all numbers."""
    code = ONNX.format(imports="", file='sys.argv[1] + "/model.onnx"')
    head, body = code.split("\nimage = ", 1)
    body = ("image = " + body.split("\nfor number in")[0]).replace("sys.argv[1]", "path")
    body += "\nprint(json.dumps([logits.tolist(), scores.tolist()]))"
    return head + "\nfor path in sys.argv[2:]:\n" + "".join(f"    {line}\n" for line in body.splitlines())


PROGRAMS = {"timm": TIMM, "transformers": PIPELINE, "onnx": onnx_program()}


def their_predictions(program: str, folder: Path, photos: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and scores (B, K) from a process that does not import this package."""
    code = program + '\nassert "hf_fasttrain" not in sys.modules\n'
    process = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder), *photos], capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(process.stderr)
    answers = torch.tensor([json.loads(line) for line in process.stdout.splitlines()])
    return answers[:, 0], answers[:, 1]


def our_predictions(folder: Path, photos: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and scores (B, K) of this package."""
    model, spec = load_model(folder)
    assert spec.preprocessing is not None
    with torch.inference_mode():
        logits = torch.cat(
            [model(preprocess([Image.fromarray(read_pixels(photo))], spec.preprocessing)) for photo in photos]
        )
    scores = []
    for row in predict_images(folder, photos, top=spec.num_classes):
        by_name = {entry["class"]: entry["score"] for entry in row["classes"]}
        scores.append([by_name[name] for name in spec.class_names])
    return logits, torch.tensor(scores)


def compare(run: Path, photos: list[str]) -> None:
    """Export a run and print how far the other libraries' numbers differ from ours."""
    start = time.perf_counter()
    export_run(run, run / "exported")
    plain = time.perf_counter() - start
    exported = export_run(run, run / "exported", onnx=True)
    total = time.perf_counter() - start - plain
    logits, scores = our_predictions(run / "model", photos)
    print(
        f"{run.name}: export {plain:.1f} s, with ONNX {total:.1f} s, its check {exported.onnx_difference:.1e}; logits "
        f"{logits.min():.1f} to {logits.max():.1f}"
    )
    for note in exported.notes:
        print(f"  note: {note}")
    for form in exported.forms:
        if form not in PROGRAMS:
            continue
        theirs, their_scores = their_predictions(PROGRAMS[form], exported.folder, photos)
        top = min(5, logits.shape[1])
        num_same = (theirs.topk(top).indices == logits.topk(top).indices).all(1).sum()
        print(
            f"  {form:<13} logits {(theirs - logits).abs().max():.1e}  scores "
            f"{(their_scores - scores).abs().max():.1e}  same top {top}: {num_same} of {len(photos)}"
        )


def train(name: str, folder: Path, data: Path, size: int, steps: int) -> Path:
    """Return the folder of a short training from random weights."""
    run = folder / name.replace("transformers:", "transformers-")
    if name.startswith("transformers:") and not Path(name.removeprefix("transformers:")).exists():
        name = f"transformers:{configuration(name.removeprefix('transformers:'), folder)}"
    overrides = [
        f"model.name={name}", f"data.dataset={data}", f"output_dir={run}", f"train.duration={steps} steps",
        f"data.image_size={size}", "train.batch_size=16", "model.small_image_stem=false", "data.workers=0",
        "augment.crop=random_resized", "evaluate.every=1000 steps", "checkpoint.every=1000 steps",
    ]  # fmt: skip
    Trainer.from_recipe("quickstart", overrides).fit()
    sharpen(run / "model", data)
    return run


def image_files(folder: Path) -> list[str]:
    """Return the paths of all images below a folder, sorted."""
    return sorted(str(folder / name) for name in images_below(list_folder(str(folder)))[0])


def sharpen(folder: Path, data: Path) -> None:
    """Scale a model's head so that its logits of 16 photos spread by 3."""
    photos = image_files(data)
    model, spec = load_model(folder)
    logits = our_predictions(folder, photos[:: max(1, len(photos) // 16)])[0]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(head_names(model))):
            parameter.data.sub_(logits.mean(0) if name.endswith("bias") else 0).mul_(3 / logits.std(0).mean())
    save_model(model, spec, folder)


def configuration(kind: str, folder: Path) -> Path:
    """Return a folder with the configuration of a small transformers model."""
    from transformers import ConvNextConfig, ViTConfig

    size: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    }
    configurations = {
        "vit": ViTConfig(**size),
        "convnext": ConvNextConfig(hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 2, 1]),
    }
    configurations[kind].save_pretrained(folder / "configs" / kind)
    return folder / "configs" / kind


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, action="append", default=[])
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    files = image_files(args.folder)
    photos = files[:: max(1, len(files) // args.photos)][: args.photos]
    with tempfile.TemporaryDirectory() as folder:
        names = args.model or ([] if args.run else MODELS)
        for run in [*args.run, *(train(name, Path(folder), args.folder, args.size, args.steps) for name in names)]:
            compare(run, photos)


if __name__ == "__main__":
    main()
