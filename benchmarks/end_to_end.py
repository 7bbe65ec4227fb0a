"""Images/s of whole trainings on a CPU, from JPEG files to optimizer steps, beside common ways to train.

    python benchmarks/end_to_end.py DIR [--models resnet50 ...] [--sizes 128 224] [--busy 0 1] [--seconds 20]
        [--rounds 3] [--timm-script train.py] [--tune 60s] [--json FILE]

bare         a plain PyTorch loop with a DataLoader and the data of transformers' image classification example
hf_trainer   transformers.Trainer with the same data
timm         timm's train.py, which is in its repository (--timm-script)
ours         hf_fasttrain with its defaults
ours_tuned   the same after `hf-fasttrain tune` (--tune, its time budget), whose choice is stored
model_alone  the plain loop on one batch in memory, in the faster of two memory layouts: what the model alone takes

DIR is an image folder with the splits train and validation. All train the same timm model from scratch in fp32 with
batches of --batch images and random resized crops; each is started as its users start it, in its own process. The
peers use --workers loader processes. With --busy 1 a program that computes without pause runs beside each side.
The sides take turns, each round starting with another one. The first --skip steps, in which memory is allocated, are
not counted. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = ("bare", "hf_trainer", "timm")
TIMM_STEP = re.compile(rb"^Train: ")
START_SECONDS = 180.0  # until the first measured step

RECIPE = """
output_dir: {scratch}/run
model: {{name: {model}, pretrained: false}}
data: {{dataset: {folder}, image_size: {size}, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225],
  interpolation: bilinear}}
augment: {{crop: random_resized, flip: true}}
train: {{duration: 100000 steps, batch_size: {batch}}}
optimizer: {{name: adamw, lr: 1e-3}}
evaluate: {{every: never}}
checkpoint: {{every: 100000 steps}}
"""


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """Run so many programs that compute without pause."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def side_command(side: str, case: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Return the command that starts a side."""
    model, size = case["model"], str(case["size"])
    if side == "timm":
        command = [args.timm_script, args.folder, "--model", model, "--img-size", size, "--device", "cpu"]
        command += ["-b", args.batch, "-j", args.workers, "--num-classes", args.classes, "--epochs", 1000]
        command += ["--train-split", "train", "--val-split", "validation", "--log-interval", 1, "--opt", "adamw"]
        command += ["--lr", 1e-3, "--output", case["scratch"] / "timm"]
        command += ["--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225]
    else:
        name = "ours" if side.startswith("ours") else "model_alone" if side.startswith("model") else side
        command = [HERE / "end_to_end_sides.py", name, args.folder, "--model", model, "--size", size]
        command += ["--batch", args.batch, "--workers", args.workers, "--classes", args.classes]
        command += ["--recipe", case["recipe"]] + ["--channels-last"] * (side == "model_channels_last")
    return [sys.executable, *map(str, command)]


def environment(side: str, case: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a side; only the tuned one finds the stored tuning."""
    cache = case["scratch"] / ("tuned" if side == "ours_tuned" else "untuned")
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_FASTTRAIN_CACHE": str(cache)}


def step_times(side: str, case: dict[str, Any], args: argparse.Namespace) -> list[float]:
    """Start a side, and return when each of its steps ended until --seconds after the first --skip ones."""
    subprocess.run(["rm", "-rf", case["scratch"] / "run"], check=True)
    with open(case["scratch"] / f"{side}.log", "wb") as log:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "start_new_session": True}
        if side == "timm":
            options["stderr"] = subprocess.STDOUT
        process = subprocess.Popen(side_command(side, case, args), env=environment(side, case), **options)
        try:
            return list(_times(process, side, args, log))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _times(process: subprocess.Popen[bytes], side: str, args: argparse.Namespace, log: Any) -> Iterator[float]:
    assert process.stdout is not None
    descriptor, rest, number, started = process.stdout.fileno(), b"", 0, time.perf_counter()
    end = started + START_SECONDS
    while (left := end - time.perf_counter()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            continue
        block = os.read(descriptor, 1 << 16)
        if not block:
            raise SystemExit(f"{side} ended: see {log.name}")
        log.write(block)
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line == b"step" or (side == "timm" and TIMM_STEP.match(line)):
                now = time.perf_counter()
                number += 1
                if number == args.skip:
                    end = now + args.seconds
                if number >= args.skip:
                    yield now


def rate(times: list[float], batch: int) -> float:
    """Return images/s over all steps; 0 if there was not one within START_SECONDS, as beside busy neighbours."""
    if len(times) < 2:
        return 0.0
    return batch * (len(times) - 1) / (times[-1] - times[0])


def run_case(case: dict[str, Any], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return images/s of each side in each round."""
    text = RECIPE.format(folder=args.folder.resolve(), batch=args.batch, **case)
    case["recipe"] = case["scratch"] / "e2e.yaml"
    case["recipe"].write_text(text, encoding="utf-8")
    sides = ["bare", "hf_trainer", *(["timm"] if args.timm_script else []), "ours"]
    if args.tune:
        command = [sys.executable, "-m", "hf_fasttrain", "tune", case["recipe"], "--budget", args.tune]
        with neighbours(case["busy"]):
            subprocess.run(command, env=environment("ours_tuned", case), check=True, stdout=subprocess.DEVNULL)
        sides.append("ours_tuned")
    if case["busy"] == 0:
        sides += ["model_alone", "model_channels_last"]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in [*sides[number % len(sides) :], *sides[: number % len(sides)]]:
            with neighbours(case["busy"]):
                rates[side].append(rate(step_times(side, case, args), args.batch))
    return rates


def show(case: dict[str, Any], rates: dict[str, list[float]]) -> dict[str, Any]:
    """Print a case's table and return it."""
    medians = {side: statistics.median(values) for side, values in rates.items()}
    best = max(medians[side] for side in PEERS if side in medians)
    alone = max((medians[side] for side in medians if side.startswith("model")), default=None)
    print(f"\n{case['model']}, {case['size']} px, {case['busy']} busy neighbours")
    for side, median in medians.items():
        spread = f"{min(rates[side]):.1f} - {max(rates[side]):.1f}"
        share = f"  {median / alone:.2f} of the model alone" if alone else ""
        print(
            f"  {side:<20} {median:7.1f} images/s ({spread})  {median / best:.2f} of the best peer{share}", flush=True
        )
    return {**{key: case[key] for key in ("model", "size", "busy")}, "images_per_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--models", nargs="+", default=["resnet50", "efficientnet_b0", "vit_small_patch16_224"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 224])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1], help="numbers of busy neighbours")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of the peers")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of each side")
    parser.add_argument("--skip", type=int, default=3, help="first steps, which are not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timm-script", type=Path, help="train.py of timm's repository")
    parser.add_argument("--tune", help="time budget of `hf-fasttrain tune`, such as 60s; by default it is left out")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.classes = sum(entry.is_dir() for entry in os.scandir(args.folder / "train"))
    tables = []
    for model, size, busy in itertools.product(args.models, args.sizes, args.busy):
        with tempfile.TemporaryDirectory() as scratch:
            case = {"model": model, "size": size, "busy": busy, "scratch": Path(scratch)}
            tables.append(show(case, run_case(case, args)))
            if args.json:
                args.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
