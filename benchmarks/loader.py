"""Images/s of input pipelines, ours and others: from image files to shuffled, cropped, flipped batches.

    python benchmarks/loader.py DIR [--rounds 3] [--workers 2] [--size 224] [--small] [--large] [--json FILE]

DIR is an image folder (DIR/train/<class>/*.jpg) or a folder of parquet files with the columns image and label.

hf_example      datasets and torchvision's transforms, as in transformers' image classification example
timm_loader     timm's create_dataset and create_loader
torchvision_v2  torchvision's decoder and its v2 transforms on tensors
dali            NVIDIA DALI on the CPU, antialiased like the others
uncached        `hf_fasttrain`, each image decoded every time
cached          `hf_fasttrain`, pixels cached, the short side at most --short-side (with --small: full size)
stored_jpeg     `hf_fasttrain`, JPEGs of that short side and of --quality cached

All yield normalised float batches (B, 3, size, size) in the process that would train. The arms take turns, each run in
its own process, each round starting with another arm. A run's first epoch is a warm-up that fills the page cache and
the caches; only the others are timed. Memory is the peak of the process and its descendants together (PSS and files in
memory), sampled during warm-up and for a second after the timing, because sampling takes time.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from loader_peers import ARMS, CannotRun, Epochs, Options
from memory import PeakMemory

STARTED, STOPPED = "clock started", "clock stopped"
AFTERWARDS_SECONDS = 1.0
LIBRARIES = ("pillow", "simplejpeg", "nvidia-dali-cuda130")


def measure(epochs: Epochs, number: int) -> dict[str, float]:
    """Return images and seconds of all but the first of `number` epochs."""
    for _batch in next(epochs):
        pass
    print(STARTED, flush=True)
    start = time.perf_counter()
    images = sum(len(labels) for epoch in islice(epochs, number - 1) for _, labels in epoch)
    seconds = time.perf_counter() - start
    print(STOPPED, flush=True)
    for _batch in next(epochs):
        if time.perf_counter() - start - seconds > AFTERWARDS_SECONDS:
            break
    return {"images": images, "seconds": seconds}


def run_arm(name: str, args: argparse.Namespace) -> None:
    """Measure one arm and print the result as a line of JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        options = {f.name: getattr(args, f.name) for f in fields(Options) if f.name != "scratch"}
        try:
            outcome: dict[str, Any] = measure(ARMS[name](Options(**options, scratch=Path(scratch))), args.epochs)
        except CannotRun as reason:
            outcome = {"cannot": str(reason)}
        print(json.dumps(outcome), flush=True)


@dataclass
class Arm:
    """The results of an arm over the rounds."""

    rates: list[float] = field(default_factory=list)  # images/s
    peaks: list[float] = field(default_factory=list)  # MiB
    images: int = 0  # in a run's timed epochs
    notes: list[str] = field(default_factory=list)  # of the last run
    reason: str = ""  # why it was not measured
    failed: bool = False

    @property
    def median(self) -> float:
        """Median images/s."""
        return statistics.median(self.rates)


def start_arm(name: str, scratch: str) -> tuple[dict[str, Any], float]:
    """Return the output of one run of an arm, and its peak memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
    environment = {"TMPDIR": scratch, "HF_DATASETS_CACHE": f"{scratch}/datasets", "HF_HUB_OFFLINE": "1"}
    last, notes = "", []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
        )
        assert process.stdout is not None
        try:
            with PeakMemory(process.pid) as memory:
                for line in process.stdout:
                    last = line.strip()
                    if last == STARTED:
                        memory.pause()
                    elif last == STOPPED:
                        memory.resume()
                    elif not last.startswith("{"):
                        notes.append(last)
        finally:
            process.kill()  # has no effect on one that has ended
            status = process.wait()
        if status == 0 and last.startswith("{"):
            return json.loads(last) | {"notes": notes}, memory.peak_mib
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    return {"failed": lines[-1] if lines else f"exit status {status}"}, memory.peak_mib


def run_rounds(names: list[str], rounds: int) -> dict[str, Arm]:
    """Return the results of each arm; one that can't run or fails is skipped in later rounds."""
    arms = {name: Arm() for name in names}
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        for index in range(rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                arm = arms[name]
                if arm.reason:
                    continue
                outcome, peak = start_arm(name, scratch)
                if "seconds" not in outcome:
                    arm.reason, arm.failed = next(iter(outcome.values())), "failed" in outcome
                    print(f"round {index + 1}: {name:<14} no figures: {arm.reason}", file=sys.stderr, flush=True)
                    continue
                arm.images, arm.notes = outcome["images"], outcome["notes"]
                arm.rates.append(outcome["images"] / outcome["seconds"])
                arm.peaks.append(peak)
                print(f"round {index + 1}: {name:<14} {arm.rates[-1]:8.0f} images/s", file=sys.stderr, flush=True)
    return arms


def ratio(arm: Arm, other: Arm | None) -> str:
    """Return the median of the rounds' ratios of images/s to another arm."""
    if other is None or other.reason:
        return f"{'-':>10}"
    return f"{statistics.median(mine / theirs for mine, theirs in zip(arm.rates, other.rates, strict=True)):10.2f}"


def print_table(arms: dict[str, Arm]) -> None:
    """Print images/s, median (min - max), ratios and memory."""
    print(f"{'arm':<14} {'images/s':>9} {'(least - most)':>17} {'/hf_example':>11} {'/dali':>10} {'peak MiB':>9}")
    for name, arm in arms.items():
        if arm.reason:
            print(f"{name:<14} {'failed' if arm.failed else 'not run'}: {arm.reason}")
            continue
        spread = f"({min(arm.rates):.0f} - {max(arm.rates):.0f})"
        ratios = f" {ratio(arm, arms.get('hf_example'))} {ratio(arm, arms.get('dali'))}"
        print(f"{name:<14} {arm.median:9.0f} {spread:>17} {ratios} {max(arm.peaks):9.0f}")
    for name, arm in arms.items():
        for note in arm.notes:
            print(f"{name}: {note}")


def report(arms: dict[str, Arm], args: argparse.Namespace) -> dict[str, Any]:
    """Return the medians and, under `about`, the conditions of the measurement."""
    # Not above: the peers' processes begin with this file, and what it imports would be in their memory.
    from hf_fasttrain.utils.environment import describe_machine, describe_versions

    medians = {name: arm.median for name, arm in arms.items() if not arm.reason}
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(torch.device("cpu"), 1),
        "versions": describe_versions() | {name: version_of(name) for name in LIBRARIES},
        "options": {name: value for name, value in vars(args).items() if name not in ("arm", "json", "folder")},
        "folder": args.folder.name,
        "images_timed": {name: arms[name].images for name in medians},
        "images_per_second": {name: arms[name].rates for name in medians},
        "peak_memory_mib": {name: max(arms[name].peaks) for name in medians},
        "notes": {name: arms[name].notes for name in medians if arms[name].notes},
        "not_run": {name: arm.reason for name, arm in arms.items() if arm.reason},
    }
    return medians | {"about": about}


def version_of(package: str) -> str:
    """Return the version of a package that is not a dependency of the project."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    args = parse_arguments()
    if args.arm:
        run_arm(args.arm, args)
        return 0
    arms = run_rounds(args.arms, args.rounds)
    crop = "padded crop" if args.small else "random-resized crop"
    print(
        f"{args.folder.name}: {crop} to {args.size} px, batch {args.batch}, {args.workers} workers, "
        f"at least {args.min_images:,} images an epoch, {args.rounds} rounds"
    )
    print_table(arms)
    if args.json:
        args.json.write_text(json.dumps(report(arms, args), indent=2) + "\n", encoding="utf-8")
    return int(any(arm.failed for arm in arms.values()))


def parse_arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--workers", type=int, default=2, help="loader processes; DALI: threads")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2, help="of a run, the first one warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short-side", type=int, default=256, help="short side of cached images")
    parser.add_argument("--quality", type=int, default=90, help="quality of cached JPEGs")
    parser.add_argument("--small", action="store_true", help="as for CIFAR: padded crop instead of a resized one")
    parser.add_argument("--large", action="store_true", help="only images above 100 kB")
    parser.add_argument("--min-images", type=int, default=3000, help="each image is repeated until they are so many")
    parser.add_argument("--cache", choices=("memory", "disk"), default="memory", help="where ours keeps images")
    parser.add_argument("--uint8", action="store_true", help="ours: leave normalising out, as if a GPU did it")
    parser.add_argument("--arms", type=lambda names: names.split(","), default=list(ARMS), help="a,b,c")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown or len(set(args.arms)) < len(args.arms):
        parser.error(f"--arms: each once, of {', '.join(ARMS)}; got {','.join(args.arms)}")
    if args.epochs < 2 or args.workers < 0 or min(args.rounds, args.size, args.batch) < 1:
        parser.error("--epochs is at least 2, --rounds, --size and --batch at least 1, --workers at least 0")
    if not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder")
    return args


if __name__ == "__main__":
    sys.exit(main())
