"""The speed of training on one NVIDIA GPU, and what its three usual techniques contribute, each alone.

    python benchmarks/gpu.py [--sections copy,train,ga,amp,pm,cifar10] [--json FILE] [--cifar10 FOLDER]
                             [--quick] [--budget-seconds 540] [--dry-run]

Sections, which can be run separately:

copy      uint8 batches from pinned and from pageable memory to the GPU
train     images/s at 224 px for model x precision x channels_last x compile: `Trainer.fit` (logging every 10 steps),
          a bare PyTorch loop and the step of timm's train.py (which reads the loss in each step), all with fused AdamW
          and the same uint8 batches on the GPU, normalised in the step
ga        gradient accumulation alone, compared with the baseline: each batch in 4 parts, and an update per 4 batches
amp       mixed precision alone, compared with the baseline: fp16, and bf16
pm        pinned memory alone, compared with the baseline. The baseline is `Trainer.fit` in PyTorch's default fp32 (TF32
          in convolutions), contiguous, full batches copied from pageable memory in each step
cifar10   seconds of training until the study's ResNet-50 (3x3 stem) reaches 92 % on the test images

The sides take turns; each figure is the median of several windows, at whose ends the device is synchronised. Warm-up
and compilation are reported separately; a side that is built later may find compiled code of an earlier one in the
cache. The file of --json is written after each row, the most important rows first. A row that fails or runs out of time
says so, and keeps its measurements. --dry-run trains tiny models on the CPU, to see whether everything runs.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_measure import OURS, SIDES, TECHNIQUES, forget_last, measure_copies, measure_technique, measure_training
from gpu_race import GOAL, race
from gpu_sides import Bench, Setting

from hf_fasttrain.utils.environment import describe_machine, describe_versions
from hf_fasttrain.utils.files import write_json
from hf_fasttrain.utils.format import format_bytes, format_duration, format_images_rate, format_percent

SECTIONS = ("copy", "train", *TECHNIQUES, "cifar10")
PRECISIONS = ("tf32", "fp16", "bf16")
MODELS = ("resnet50", "efficientnet_b0", "vit_base_patch16_224")
DRY_MODELS = ("test_resnet", "test_efficientnet", "test_vit")
DRY_RACE = (
    "data.workers=0",
    "model.name=test_resnet",
    "model.small_image_stem=false",
    "train.duration=6 steps",
    "train.batch_size=4",
    "evaluate.every=2 steps",
)
DIGITS = ("data.eval_split=auto", "data.eval_fraction=0.2")  # they have one split
# Seconds of a row of each kind; replaced by what rows have taken.
FIRST_GUESS = {"copy": 5.0, "eager": 25.0, "compile": 120.0, "technique": 40.0, "race": 30.0}

Row = dict[str, Any]


class OutOfTime(BaseException):
    """The budget ended in the middle of a row. Not an Exception, which other code might catch."""


@dataclass(frozen=True)
class Task:
    """A row that is still to be measured."""

    section: str
    name: str
    kind: str  # whose rows tell how long it takes
    measure: Callable[[Row], None]  # adds what it finds to the row


def usual_settings(models: tuple[str, ...]) -> list[Setting]:
    """Return the most common settings."""
    return [Setting(model, "bf16", channels_last=True) for model in models]


def more_settings(models: tuple[str, ...]) -> list[Setting]:
    """Return the other training rows: first one change each, then combinations; compiled ones come last."""
    changed = [Setting(model, precision, channels_last=True) for precision in ("tf32", "fp16") for model in models]
    changed += [Setting(model, "bf16", channels_last=True, compile=True) for model in models]
    changed += [Setting(model, "bf16") for model in models]
    every = [Setting(*values) for values in itertools.product(models, PRECISIONS, (True, False), (False, True))]
    ordered = dict.fromkeys([*changed, *sorted(every, key=lambda setting: setting.compile)])
    return [setting for setting in ordered if setting not in usual_settings(models)]


def list_tasks(args: argparse.Namespace, bench: Bench, left: Callable[[], float]) -> list[Task]:
    """Return the requested rows, the most important first; `left` returns the seconds that remain."""
    first, others = bench.models[:1], bench.models[1:]
    tasks = [
        Task("copy", "copy uint8 batches to the device", "copy", partial(measure_copies, bench)),
        *(training_task(bench, setting) for setting in usual_settings(bench.models)),
        *technique_tasks(bench, first),
        race_task(args, left),
    ]
    if not args.quick:
        tasks += technique_tasks(bench, others)
        tasks += [training_task(bench, setting) for setting in more_settings(bench.models)]
    return [task for task in tasks if task.section in args.sections]


def training_task(bench: Bench, setting: Setting) -> Task:
    """Return the row of one setting, with all sides."""
    kind = "compile" if setting.compile else "eager"
    return Task("train", f"train {setting}", kind, partial(measure_training, bench, setting))


def technique_tasks(bench: Bench, models: tuple[str, ...]) -> list[Task]:
    """Return a row for each model and technique."""
    return [
        Task(name, f"{name} {model}", "technique", partial(measure_technique, bench, name, model))
        for model in models
        for name in TECHNIQUES
    ]


def race_task(args: argparse.Namespace, left: Callable[[], float]) -> Task:
    """Return the race; without CIFAR-10, a dry run uses scikit-learn's digits."""
    folder = args.cifar10 or ("digits" if args.dry_run else None)
    goal = args.goal if args.goal is not None else 0.0 if args.dry_run else GOAL

    def measure(row: Row) -> None:
        if folder is None:
            row["status"] = "skipped: give the folder of CIFAR-10's parquet files with --cifar10"
            return
        overrides = [*(DIGITS if folder == "digits" else ()), *(DRY_RACE if args.dry_run else ())]
        race(folder, [*overrides, *args.cifar10_override], goal, min(args.cifar10_seconds, left() - 10), row)

    return Task("cifar10", f"cifar10 resnet50 to {goal:.0%}", "race", measure)


class Budget:
    """Measures rows as long as they are likely to finish in time; every row records how it ended.

    `guesses`: seconds of a row of each kind, until one has been measured.
    """

    def __init__(self, seconds: float, written: Callable[[list[Row]], None], guesses: dict[str, float]) -> None:
        self.ends, self.written = time.monotonic() + seconds, written
        self.rows: list[Row] = []
        self._guesses = dict(guesses)

    def left_seconds(self) -> float:
        """Return the remaining seconds."""
        return self.ends - time.monotonic()

    def run(self, task: Task) -> None:
        """Measure one row and store the result."""
        row: Row = {"section": task.section, "row": task.name}
        self.rows.append(row)
        try:
            if self.left_seconds() < self._guesses[task.kind]:
                row["status"] = "not run: budget"
            else:
                self._measure(task, row)
                self._guesses[task.kind] = max(row["wall_seconds"], self._guesses[task.kind] / 2)
        finally:
            row.setdefault("status", "stopped by a signal")
            self.written(self.rows)
            print("\n".join(lines_of(row)), flush=True)

    def _measure(self, task: Task, row: Row) -> None:
        start = time.monotonic()
        forget_last()
        try:
            with alarm(self.left_seconds()):
                task.measure(row)
            row.setdefault("status", "ok")
        except OutOfTime:
            row["status"] = "stopped: budget"
        except torch.OutOfMemoryError as error:
            row["status"] = f"out of memory: {first_line(error)}"
        except Exception as error:  # noqa: BLE001 - whatever stops one row, the others are still wanted
            row["status"] = f"failed: {first_line(error)}"
        finally:
            row["wall_seconds"] = time.monotonic() - start


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after a number of seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def lines_of(row: Row) -> list[str]:
    """Return the table lines of a row."""
    ended = [] if row["status"] == "ok" else [f"{row['row']:<46} {row['status']}"]
    if any("images_per_second" in side for side in row.get("sides", {}).values()):
        names = [OURS, *SIDES]
        return [_side_line(f"{row['row']} {name}", row["sides"][name], "fit_to_this") for name in names] + ended
    if "arms" in row:
        lines = [_side_line(f"{row['row']}: {name}", arm, "to_baseline") for name, arm in row["arms"].items()]
        return [*lines, *(f"{row['row']}: {name}: {why}" for name, why in row.get("not_run", {}).items()), *ended]
    if "pinned" in row:
        kinds = (
            f"{kind} {row[kind]['gb_per_second']:.2f} GB/s {format_images_rate(row[kind]['images_per_second'])}"
            for kind in ("pinned", "pageable")
        )
        return [f"{row['row']:<46} {'  '.join(kinds)}  {row['ratio']:.2f}x", *ended]
    if "train_seconds" in row:
        return [f"{row['row']:<46} {_race_figures(row)}", *ended]
    return ended


def _side_line(name: str, side: Row, ratio: str) -> str:
    rate, peak = side["images_per_second"], side["peak_memory_bytes"]
    line = f"{name:<62} {rate['median']:8.1f} ({rate['least']:.1f} - {rate['most']:.1f})"
    if ratio in side:
        line += f"  {side[ratio]['median']:.3f} ({side[ratio]['least']:.3f} - {side[ratio]['most']:.3f})"
    if "warmup_seconds" in side:
        line += f"  warm-up {format_duration(side['warmup_seconds'])}"
    return line if peak is None else f"{line}  peak {format_bytes(peak)}"


def _race_figures(row: Row) -> str:
    seconds, accuracy = row["seconds_to_goal"], row["accuracy"]
    return (
        f"{'goal missed' if seconds is None else f'{format_duration(seconds)} of training'}; "
        f"{'not evaluated' if accuracy is None else f'accuracy {accuracy:.4f}'}, "
        f"step {row['steps']} of {row['of_steps']}, {format_images_rate(row['images_per_second'])}, "
        f"waiting {format_percent(row['data_wait_fraction'], 0)}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="sections to measure, separated by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each row")
    parser.add_argument("--models", help=f"models, separated by commas (default: {','.join(MODELS)})")
    parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's parquet files, splits train and test")
    parser.add_argument("--cifar10-override", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--cifar10-seconds", type=float, default=220, help="maximum seconds of this row")
    parser.add_argument("--goal", type=float, help=f"accuracy at which it ends (default: {GOAL}; 0 with --dry-run)")
    parser.add_argument("--batch", type=int, default=128, help="batch size of the training rows")
    parser.add_argument("--windows", type=int, default=5, help="windows per side")
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument(
        "--quick", action="store_true", help="train in bf16 with channels_last only; ga, amp and pm of the first model"
    )
    parser.add_argument("--dry-run", action="store_true", help="run tiny models on the CPU, to check that it runs")
    args = parser.parse_args(arguments)
    args.sections = args.sections.split(",")
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"unknown section: {', '.join(unknown)}; allowed: {', '.join(SECTIONS)}")
    if args.batch < 4 or args.batch % 4 or args.windows < 1:
        parser.error("--batch must be a multiple of 4, --windows at least 1")
    return args


def build_bench(args: argparse.Namespace) -> Bench:
    """Return the configuration of the measurement; for a dry run a minimal one on the CPU."""
    models = tuple(args.models.split(",")) if args.models else DRY_MODELS if args.dry_run else MODELS
    if args.dry_run:
        return Bench(
            torch.device("cpu"), models, image_px=32, batch=8, windows=2, window_seconds=0.0, rounds=2, log_every=2
        )
    device = torch.device("cuda", 0)
    return Bench(device, models, image_px=224, batch=args.batch, windows=args.windows, window_seconds=0.5)


def about(bench: Bench, arguments: list[str]) -> Row:
    """Return the conditions of the figures."""
    software = {**describe_versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    facts = {"command": ["benchmarks/gpu.py", *arguments], "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    return {**facts, "machine": describe_machine(bench.device, 1), "versions": software}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available() and not args.dry_run:
        print("benchmarks/gpu.py needs an NVIDIA GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    bench = build_bench(args)
    header = about(bench, sys.argv[1:] if arguments is None else arguments)

    def written(rows: list[Row]) -> None:
        if args.json:
            write_json(args.json, {**header, "rows": rows})

    budget = Budget(args.budget_seconds, written, FIRST_GUESS)
    print(f"{header['machine']['device']}, torch {torch.__version__}, batch {bench.batch}, {bench.image_px} px")
    print("images/s: median (min - max); then the ratio fit / this side, or this arm / baseline, of paired windows")
    for task in list_tasks(args, bench, budget.left_seconds):
        budget.run(task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
