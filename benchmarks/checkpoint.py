"""The cost of saving: hf_fasttrain's checkpoints compared with `accelerate.Accelerator.save_state` (ResNet-50, AdamW).

    python benchmarks/checkpoint.py [--model resnet50] [--rounds 7] [--dir FOLDER] [--json FILE]

blocked       seconds that training is blocked: until `Checkpoints.save` returns, which copies the state to the host and
              leaves the writing to a thread; until `save_state` returns, which syncs nothing
durable       seconds until the checkpoint survives a power failure: until `Checkpoints.wait` returns; until every file
              that `save_state` wrote, and its folder, is synced
load          seconds to load and restore it with its files in the page cache; ours verifies a hash over every byte
load_cold     the same with its files dropped from the page cache and read from disk
bytes         size of the checkpoint

Both sides save the same model and optimizer (fused AdamW, its moments filled by a step with random gradients). They
run alternately, and start in turn. Each save goes to a new folder, after a sync of earlier writes; deleting folders is
not timed. After each load all tensors are compared with those saved. The first round is discarded. Ours also checks
for NaN and inf in the weights before writing; that is included in `durable`.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning
from hf_fasttrain.train.distributed import Processes

limit_spinning()

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_fasttrain.run_folder.checkpoint import Snapshot, checkpoint_path, load_checkpoint
from hf_fasttrain.train.checkpoint_state import TrainingObjects
from hf_fasttrain.train.checkpointing import Checkpoints
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.environment import describe_machine, describe_versions
from hf_fasttrain.utils.files import sync_files, sync_folder

Row = dict[str, float]
FIGURES = ("blocked", "durable", "load", "load_cold", "bytes")
STEP = 1


class NoLoader:
    """A loader without a position, like the recipe's."""

    def state_dict(self) -> None:
        """Return nothing."""

    def load_state_dict(self, state: Any) -> None:
        """Do nothing."""


class Training:
    """A model and its optimizer, prepared by Accelerate, which both sides save."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        model = timm.create_model(name, num_classes=1000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        bare = getattr(self.optimizer, "optimizer", self.optimizer)
        self.stateful = TrainingObjects(Processes(self.accelerator), self.model, None, bare, None, NoLoader())
        self.expected = [tensor.clone() for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """Return all tensors that must be equal after loading."""
        moments = [value for state in self.stateful.optimizer.state.values() for value in state.values()]
        return [*self.model.state_dict().values(), *moments]

    def spoil(self) -> None:
        """Zero every tensor, so that loading has to restore it."""
        for tensor in self.tensors():
            tensor.zero_()

    def require_expected(self, who: str) -> None:
        """Exit if a tensor has changed."""
        tensors = self.tensors()
        if len(tensors) != len(self.expected) or not all(map(torch.equal, tensors, self.expected)):
            raise SystemExit(f"{who}: the loaded state differs from the saved one")

    def wait_for_device(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def save_ours(training: Training, folder: Path) -> tuple[float, float, Path]:
    """Return the seconds that training is blocked, those until all is on disk, and the checkpoint's folder."""
    stateful = training.stateful
    checkpoints = Checkpoints(folder, stateful.processes, RunLog(None, show=False), keep=2)
    metadata = {"state": {}, "learnt": {}, "recipe": "", "trackers": {}, "processes": 1}
    training.wait_for_device()
    start = time.perf_counter()
    checkpoints.save(Snapshot(STEP, metadata, stateful.weights(), stateful.training()), None)
    blocked = time.perf_counter() - start
    saved = checkpoints.wait()
    durable = time.perf_counter() - start
    if not saved:
        raise SystemExit(f"ours: not saved: {checkpoints.failed}")
    return blocked, durable, checkpoint_path(checkpoints.folder, STEP)


def save_theirs(training: Training, folder: Path) -> tuple[float, float, Path]:
    """Return the seconds until `save_state` returns, those until its files are synced, and the folder."""
    training.wait_for_device()
    start = time.perf_counter()
    training.accelerator.save_state(str(folder))
    blocked = time.perf_counter() - start
    sync_files(folder)
    sync_folder(folder)
    sync_folder(folder.parent)
    return blocked, time.perf_counter() - start, folder


def load_ours(training: Training, folder: Path) -> None:
    training.stateful.restore(load_checkpoint(folder))


def load_theirs(training: Training, folder: Path) -> None:
    training.accelerator.load_state(str(folder))


Save = Callable[[Training, Path], tuple[float, float, Path]]
Load = Callable[[Training, Path], None]
SIDES: dict[str, tuple[Save, Load]] = {"ours": (save_ours, load_ours), "save_state": (save_theirs, load_theirs)}


def measure_once(training: Training, name: str, folder: Path) -> Row:
    """Save and load once and return the figures; the folder is deleted afterwards."""
    save, load = SIDES[name]
    os.sync()  # earlier writes must not keep the disk busy
    blocked, durable, saved = save(training, folder)
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    row = {"blocked": blocked, "durable": durable, "bytes": float(size)}
    row["load"] = timed_load(training, name, load, saved)
    drop_from_memory(saved)
    row["load_cold"] = timed_load(training, name, load, saved)
    shutil.rmtree(folder)
    return row


def timed_load(training: Training, name: str, load: Load, folder: Path) -> float:
    """Return the seconds to load a checkpoint, and check that it equals what was saved."""
    training.spoil()
    training.wait_for_device()
    start = time.perf_counter()
    load(training, folder)
    training.wait_for_device()
    seconds = time.perf_counter() - start
    training.require_expected(name)
    return seconds


def drop_from_memory(folder: Path) -> None:
    """Drop the contents of synced files from the page cache; Linux only."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(training: Training, rounds: int, folder: Path) -> dict[str, list[Row]]:
    """Return side -> figures of each round."""
    rows: dict[str, list[Row]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        names = list(SIDES)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rows[name].append(measure_once(training, name, folder / f"{number}_{name}"))
        progress = ", ".join(f"{name} {runs[-1]['blocked']:.3f} s" for name, runs in rows.items())
        print(f"round {number}{'' if number else ' (discarded)'}: {progress}", file=sys.stderr, flush=True)
    return {name: runs[1:] for name, runs in rows.items()}


def spread(values: list[float]) -> Row:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summarise(rows: dict[str, list[Row]]) -> dict[str, dict[str, Row]]:
    """Return figure -> side -> median, minimum and maximum, and those of the rounds' ratios ours / save_state."""
    table = {}
    for figure in FIGURES:
        values = {name: [row[figure] for row in runs] for name, runs in rows.items()}
        ratios = [mine / theirs for mine, theirs in zip(values["ours"], values["save_state"], strict=True)]
        table[figure] = {name: spread(column) for name, column in values.items()} | {"ratio": spread(ratios)}
    return table


def print_table(table: dict[str, dict[str, Row]]) -> None:
    """Print the figures of both sides, median (min - max), and their ratios."""

    def cell(row: Row, digits: int, scale: float = 1.0) -> str:
        median, low, high = (row[key] / scale for key in ("median", "least", "most"))
        return f"{median:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"

    print(f"{'':<14} {'ours':>24} {'save_state':>24} {'ours / save_state':>24}")
    for figure, row in table.items():
        size = figure == "bytes"
        label, scale, digits = ("MB", 1e6, 1) if size else (f"{figure} s", 1.0, 3)
        sides = [f"{cell(row[name], digits, scale):>24}" for name in SIDES]
        print(f"{label:<14} {sides[0]} {sides[1]} {cell(row['ratio'], 3):>24}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a timm model")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one discarded round")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    training = Training(args.model)
    machine, versions = describe_machine(training.device, 1), describe_versions()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.dir) as scratch:
        rows = measure(training, args.rounds, Path(scratch))
        parent = scratch
    table = summarise(rows)
    print(f"{args.model}, AdamW, {args.rounds} rounds, in {Path(parent).parent}, {torch.get_num_threads()} threads")
    print(", ".join(f"{key} {value}" for key, value in (machine | versions).items()))
    print_table(table)
    if args.json:
        about = {"command": sys.argv[1:], "machine": machine, "versions": versions}
        report = {**about, "figures": table, "rounds": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
