"""What training costs on one NVIDIA GPU, beside a bare PyTorch loop with the same settings.

    python benchmarks/gpu.py [--json FILE] [--cifar10 FOLDER] [--quick] [--budget-seconds 540]

Rows, the most important first; one that fails or no longer fits the time says so:

copy      uint8 batches from pinned and from pageable memory to the GPU
train     images/s at 224 px for model x precision x channels_last x compile: `Trainer.train_step` and the bare loop,
          both with fused AdamW and the same uint8 batches on the GPU, normalised there in the step
cifar10   seconds of training until ResNet-50 (3x3 stem) first has 92 % of the test images right

The sides take turns; each figure is the median of several windows, and the device is waited for only at their ends.
Warm-up and compilation are reported apart; the side built second may find the first one's compiled code in the cache.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import gc
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from gpu_measure import DTYPES, GOAL, Bench, Setting, measure_copies, measure_training, race_cifar10

from hf_fasttrain.environment import describe_machine, describe_versions
from hf_fasttrain.runlog import write_json

MODELS = ("resnet50", "efficientnet_b0", "vit_base_patch16_224")
DRY_MODELS = ("test_resnet", "test_efficientnet", "test_vit")
DRY_OVERRIDES = (
    "model.name=test_resnet",
    "model.small_image_stem=false",
    "train.duration=2 steps",
    "train.batch_size=4",
    "data.workers=0",
)
FIRST_GUESS = {"compile": 90.0, "eager": 15.0}  # seconds of a training row; replaced by what rows have taken

Row = dict[str, Any]


class OutOfTime(Exception):
    """The budget ended in the middle of a row."""


# --- rows --------------------------------------------------------------------------------------------------


def settings_in_order(models: tuple[str, ...], quick: bool) -> list[Setting]:
    """Return the training rows: what people run first, then one thing changed, then all the rest."""
    usual = [Setting(model, "bf16", True, False) for model in models]
    if quick:
        return usual
    changed = [Setting(model, precision, True, False) for precision in ("tf32", "fp16") for model in models]
    changed += [Setting(model, "bf16", True, True) for model in models]
    changed += [Setting(model, "bf16", False, False) for model in models]
    every = (Setting(*values) for values in itertools.product(models, DTYPES, (True, False), (False, True)))
    return list(dict.fromkeys([*usual, *changed, *sorted(every, key=lambda setting: setting.compile)]))


class Budget:
    """Runs rows as long as they are likely to end in time; every row says how it ended."""

    def __init__(self, seconds: float, written: Callable[[list[Row]], None]) -> None:
        self.ends, self.written = time.monotonic() + seconds, written
        self.rows: list[Row] = []
        self._guesses = dict(FIRST_GUESS)

    @property
    def left_seconds(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    def run(self, name: str, measure: Callable[[], Row], kind: str = "") -> None:
        """Run one row and keep what came of it; `kind` is whose earlier rows tell how long it takes."""
        if self.left_seconds < self._guesses.get(kind, 5.0):
            row: Row = {"row": name, "status": "not run: budget"}
        else:
            row = self._measured(name, measure)
            if kind:
                self._guesses[kind] = max(row["wall_seconds"], self._guesses[kind] / 2)
        self.rows.append(row)
        self.written(self.rows)
        print(line_of(row), flush=True)

    def _measured(self, name: str, measure: Callable[[], Row]) -> Row:
        forget_last_row()
        start = time.monotonic()
        try:
            with alarm(self.left_seconds):
                row = {"row": name, "status": "ok", **measure()}
        except OutOfTime:
            row = {"row": name, "status": "stopped: budget"}
        except torch.OutOfMemoryError as error:
            row = {"row": name, "status": f"out of memory: {first_line(error)}"}
        except Exception as error:  # noqa: BLE001 - whatever stops one row, the others are still wanted
            late = self.left_seconds <= 0  # the compiler wraps what is raised inside it
            row = {"row": name, "status": "stopped: budget" if late else f"failed: {first_line(error)}"}
        return {**row, "wall_seconds": time.monotonic() - start}


def first_line(error: Exception) -> str:
    """Return what kind of error it is, and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def forget_last_row() -> None:
    """Free memory and compiled code, and accelerate's state: its precision is one for the whole process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- the table ---------------------------------------------------------------------------------------------


def line_of(row: Row) -> str:
    """Return a row as a line of the table."""
    return f"{row['row']:<56} {_figures(row)}"


def _figures(row: Row) -> str:
    if "ours_images_per_second" in row:
        sides = row["sides"]
        peak = "/".join(_gib(sides[name]["peak_memory_bytes"]) for name in ("ours", "bare"))
        warmup = "/".join(f"{sides[name]['warmup_seconds']:.1f}" for name in ("ours", "bare"))
        return (
            f"{row['ours_images_per_second']:8.1f} {row['bare_images_per_second']:8.1f}  {row['ratio']:.3f} "
            f"({row['ratio_least']:.3f} - {row['ratio_most']:.3f})  peak {peak} GiB  warm-up {warmup} s"
        )
    if "pinned" in row:
        kinds = (f"{k} {row[k]['gb_per_second']:.2f} GB/s {row[k]['images_per_second']:,.0f} images/s" for k in COPIES)
        return f"{'  '.join(kinds)}  {row['ratio']:.2f}x"
    if "goal" in row:
        reached = (
            f"{row['seconds_to_goal']:.1f} s to {GOAL:.0%}" if row["seconds_to_goal"] is not None else "goal missed"
        )
        return (
            f"{reached}; accuracy {row['accuracy']:.4f} at step {row['steps']} of {row['of_steps']}, "
            f"{row['images_per_second']:,.0f} images/s, waiting {row['data_wait_fraction']:.0%}"
        )
    return str(row["status"])


COPIES = ("pinned", "pageable")


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


# --- the command -------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each of them")
    parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's parquet files, splits train and test")
    parser.add_argument("--cifar10-override", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--cifar10-seconds", type=float, default=220, help="most seconds that this row may take")
    parser.add_argument("--batch", type=int, default=128, help="images of each step of the training rows")
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--quick", action="store_true", help="copies, bf16 with channels_last, CIFAR-10")
    parser.add_argument("--dry-run-cpu", action="store_true", help=argparse.SUPPRESS)  # tiny sizes: does it run at all
    return parser.parse_args()


def build_bench(args: argparse.Namespace) -> Bench:
    """Return what is measured, on the GPU or, for a dry run, with next to nothing on the CPU."""
    if args.dry_run_cpu:
        return Bench(torch.device("cpu"), DRY_MODELS, image_px=64, batch=4, windows=2, window_seconds=0.0)
    return Bench(torch.device("cuda", 0), MODELS, image_px=224, batch=args.batch, windows=5, window_seconds=0.5)


def about(bench: Bench) -> Row:
    """Return what the figures hold for."""
    software = {**describe_versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    facts = {"command": ["benchmarks/gpu.py", *sys.argv[1:]], "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    return {**facts, "machine": describe_machine(bench.device, 1), "versions": software}


def main() -> int:
    args = parse()
    if not torch.cuda.is_available() and not args.dry_run_cpu:
        print("benchmarks/gpu.py needs an NVIDIA GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    bench = build_bench(args)
    header = about(bench)

    def written(rows: list[Row]) -> None:
        if args.json:
            write_json(args.json, {**header, "rows": rows})

    budget = Budget(args.budget_seconds, written)
    print(f"{header['machine']['device']}, torch {torch.__version__}, batch {bench.batch}, {bench.image_px} px")
    print(f"{'row':<56} {'ours':>8} {'bare':>8}  ours / bare; images/s")
    settings = settings_in_order(bench.models, args.quick)
    most, rest = settings[: len(bench.models)], settings[len(bench.models) :]
    budget.run("copy uint8 batches to the device", partial(measure_copies, bench))
    for setting in most:
        budget.run(str(setting), partial(measure_training, bench, setting), "eager")
    overrides = [*args.cifar10_override, *(DRY_OVERRIDES if args.dry_run_cpu else ())]
    seconds = min(args.cifar10_seconds, budget.left_seconds - 20)
    budget.run(f"cifar10 resnet50 to {GOAL:.0%}", partial(race_cifar10, args.cifar10, overrides, seconds))
    for setting in rest:
        kind = "compile" if setting.compile else "eager"
        budget.run(str(setting), partial(measure_training, bench, setting), kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())
