"""Fine-tuning published weights: accuracy, time and memory of recipes/finetune.yaml compared with common alternatives.

    python benchmarks/finetune.py --data DIR [DIR ...] --weights FILE [--seeds 5] [--sides plain ours ...] [--json FILE]

plain        a typical script: timm, torchvision's ImageFolder, AdamW, one cycle, label smoothing
hf_trainer   the same model and images with transformers.Trainer
ours         `hf-fasttrain finetune` as shipped, with the same model, image size and images per step
probe        `hf-fasttrain probe finetune`: features once, then logistic regression
probe_views  the same with the features of four augmented views of each training image
probe_first  `ours` with train.probe_first=true and model.batch_norm=frozen: the probe, then the training
efficientnet `hf-fasttrain efficientnet` with the same number of epochs and images per step
finetune_small  `hf-fasttrain finetune_small` as shipped, with its own epochs and images per step

DIR is an image folder. Without a validation split, a stratified fifth of it is held out, the same for all sides. FILE
has published weights of --model, with their head (safetensors). The sides take turns, each run in its own process,
each seed starting with another side. CPU seconds are those of the process and its loader processes from start to end,
including evaluation and writing; memory is their peak together. If other programs run at the same time, only the
accuracy is meaningful.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memory import PeakMemory

SIDES = ("plain", "hf_trainer", "ours")
# Side -> command and recipe, overrides.
OURS: dict[str, tuple[list[str], list[str]]] = {
    "ours": (["finetune"], []),
    "efficientnet": (["efficientnet"], []),
    "finetune_small": (["finetune_small"], []),
    "probe": (["probe", "finetune"], []),
    "probe_views": (["probe", "finetune"], ["probe.views=4"]),
    "probe_first": (["finetune"], ["train.probe_first=true", "model.batch_norm=frozen"]),
}
OWN_STEPS = {"finetune_small"}  # whose epochs and images per step are a part of the comparison
PEERS = Path(__file__).with_name("finetune_peers.py")
EVERY_SECONDS = 1.0  # between two measurements of memory, which take 15 ms per GB


def with_splits(folder: Path, scratch: Path) -> Path:
    """Return a folder of links with the splits train and validation."""
    names = {entry.name.lower(): entry for entry in folder.iterdir() if entry.is_dir()}
    splits = {"train": names.get("train") or names.get("training")}
    splits["validation"] = next((names[n] for n in ("validation", "val", "valid", "dev", "test") if n in names), None)
    target = scratch / folder.resolve().name
    target.mkdir()
    if all(splits.values()):
        for name, source in splits.items():
            assert source is not None
            (target / name).symlink_to(source.resolve())
        return target
    root = splits["train"] or folder
    for kind in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        for number, image in enumerate(sorted(file for file in kind.rglob("*") if file.is_file())):
            source = target / ("validation" if number % 5 == 4 else "train") / kind.name
            source.mkdir(parents=True, exist_ok=True)
            (source / f"{number}_{image.name}").symlink_to(image.resolve())
    return target


def command(side: str, folder: Path, seed: int, run: Path, args: argparse.Namespace) -> list[str]:
    """Return the command line of one training."""
    if side in ("plain", "hf_trainer"):
        options = {"model": args.model, "weights": args.weights, "size": args.size, "batch": args.batch, "seed": seed}
        options |= {"epochs": args.epochs, "threads": args.threads, "workers": args.workers}
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(PEERS), side, str(folder), *arguments]
    words, more = OURS[side]
    overrides = {
        "data.dataset": folder,
        "data.image_size": args.size,
        "model.name": args.model,
        "model.pretrained": args.weights,
        "train.batch_size": args.batch,
        "train.duration": f"{args.epochs} epochs",
        "accelerate.cpu_threads": args.threads,
        "seed": seed,
        "output_dir": run,
    }
    if side in OWN_STEPS:
        del overrides["train.batch_size"], overrides["train.duration"]
    arguments = [f"{key}={value}" for key, value in overrides.items()] + args.override
    return [sys.executable, "-m", "hf_fasttrain", *words, *arguments, *more]


def accuracy_of(side: str, run: Path, output: str) -> float:
    """Return the accuracy of a training from its output or its files."""
    if side in ("plain", "hf_trainer"):
        return float(json.loads(output.strip().splitlines()[-1])["accuracy"])
    return float(json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]["accuracy"])


def train(side: str, folder: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once in a separate process; return accuracy, seconds and MiB."""
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        run = Path(scratch) / "run"
        environment = {"HF_FASTTRAIN_CACHE": f"{scratch}/pixels", "HF_FASTTRAIN_TUNINGS": f"{scratch}/tunings"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
        with tempfile.TemporaryFile("w+") as output:
            start = time.perf_counter()
            process = subprocess.Popen(
                command(side, folder, seed, run, args),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
            with PeakMemory(process.pid, every_seconds=EVERY_SECONDS) as memory:
                _, status, used = os.wait4(process.pid, 0)  # counts the loader processes that have ended too
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            text = output.read()
        if process.returncode:
            raise SystemExit(f"{side} on {folder.name}, seed {seed}: exit status {process.returncode}\n{text[-3000:]}")
        return {
            "side": side,
            "data": folder.name,
            "seed": seed,
            "accuracy": accuracy_of(side, run, text),
            "user_seconds": used.ru_utime,
            "system_seconds": used.ru_stime,
            "wall_seconds": seconds,
            "peak_mib": memory.peak_mib,
        }


def summary(runs: Sequence[dict[str, Any]], data: str, side: str) -> dict[str, float]:
    """Return means and spread of a side's runs on a dataset."""
    selected = [run for run in runs if run["data"] == data and run["side"] == side]
    medians = {key: statistics.median(run[key] for run in selected) for key in ("wall_seconds", "peak_mib")}
    accuracies = [run["accuracy"] for run in selected]
    return {
        **medians,
        "user_seconds": statistics.mean(run["user_seconds"] for run in selected),
        "system_seconds": statistics.mean(run["system_seconds"] for run in selected),
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(selected) > 1 else 0.0,
        "seeds": len(selected),
    }


def print_table(runs: Sequence[dict[str, Any]], sides: Sequence[str]) -> None:
    """Print a Markdown table, a row for each dataset and side."""
    print("| photos | side | seeds | accuracy | user CPU s | / plain | system CPU s | wall s | peak MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for data in dict.fromkeys(run["data"] for run in runs):
        present = [side for side in sides if any(run["data"] == data and run["side"] == side for run in runs)]
        rows = {side: summary(runs, data, side) for side in present}
        for side, row in rows.items():
            ratio = f"{row['user_seconds'] / rows['plain']['user_seconds']:.2f}" if "plain" in rows else ""
            print(
                f"| {data} | {side} | {row['seeds']} | {row['accuracy']:.4f} +- {row['spread']:.4f} "
                f"| {row['user_seconds']:.0f} | {ratio} | {row['system_seconds']:.0f} | {row['wall_seconds']:.0f} "
                f"| {row['peak_mib']:.0f} |"
            )


def recipe_epochs() -> int:
    """Return the epochs of the shipped recipe."""
    from hf_fasttrain.recipe.load import load_recipe

    duration = load_recipe("finetune").train.duration
    assert duration.unit == "epochs"
    return round(duration.count)


def machine() -> str:
    """Return the processor, its cores and torch's version, as text."""
    import torch

    from hf_fasttrain.utils.environment import (  # after the trainings: it loads torch
        describe_machine,
        describe_versions,
    )

    description = describe_machine(torch.device("cpu"), 1)
    return f"{description['processor']}, {description['cores']} cores, torch {describe_versions()['torch']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", choices=dict.fromkeys([*SIDES, *OURS]), default=list(SIDES))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, help="epochs of all sides (default: as in the recipe)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=1, help="loader processes of the peers")
    parser.add_argument("--override", action="append", default=[], help="section.key=value for the recipe")
    parser.add_argument("--json", type=Path, help="append each run to this file, as a line")
    args = parser.parse_args()
    args.weights, args.epochs = args.weights.resolve(), args.epochs or recipe_epochs()
    runs = []
    with tempfile.TemporaryDirectory(prefix="finetune-data-") as scratch:
        folders = [with_splits(folder, Path(scratch)) for folder in args.data]
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            turn = seed % len(args.sides)
            for folder in folders:
                for side in args.sides[turn:] + args.sides[:turn]:
                    runs.append(train(side, folder, seed, args))
                    print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                    if args.json:
                        with args.json.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(runs[-1]) + "\n")
    print(f"{datetime.now(UTC).date()}, {machine()}")
    print(f"{args.model}, {args.size} px, {args.epochs} epochs of steps of {args.batch}, {args.threads} threads")
    print_table(runs, args.sides)


if __name__ == "__main__":
    main()
