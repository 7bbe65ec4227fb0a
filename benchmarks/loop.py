"""The overhead of the training loop: steps/s of a trivial model on in-memory batches, compared with bare PyTorch.

    python benchmarks/loop.py [--steps 1500] [--rounds 5] [--accum 1] [--seams] [--json FILE]

Three arms (seven with --seams) run alternately, each round starting with another one:

bare        plain PyTorch with its DataLoader over single images and its default AdamW
bare_same   plain PyTorch with the loader and the optimizer (fused AdamW) of `ours`: shows the loop's overhead alone
ours        `hf_fasttrain.Trainer`, logging every 10 steps into a silent log
step_loss   `ours` with the same loss as a `step_loss` that also returns a value to log
callback    `ours` with a callback that has `before_step` and `after_step`
evaluation  `ours` that evaluates the first 1,024 images every 100 steps
metrics     `evaluation` with a metric of the user's, a function of logits and labels

Only the loop is timed, not the building of model, loader and trainer; each arm's first run is discarded. One CPU
thread, fp32.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

from hf_fasttrain import Callback, Trainer
from hf_fasttrain.train.callbacks import StepReport
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.schedule import Cosine
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.utils.environment import describe_machine, describe_versions

BATCH, SIZE, CLASSES, LR = 32, 32, 10, 1e-3
AIMS = {"bare": 1.05, "bare_same": 0.97}  # least ratio ours / arm
SEAMS_AIM = 0.98  # least ratio of a seam's arm to the arm without it
WITHOUT = {"step_loss": "ours", "callback": "ours", "metrics": "evaluation"}  # seam -> the arm without it
EVALUATED, EVALUATE_EVERY = 1024, "100 steps"


class Images(Dataset):
    """In-memory images, one by one, for a DataLoader to collate."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [(self.images[i], self.labels[i]) for i in indices]


class Batches:
    """The same images in shuffled batches, each selected by one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(len(self.images)).split(BATCH):
            yield self.images[indices], self.labels[indices]


def build_model() -> nn.Module:
    """Return a linear classifier, which needs so little arithmetic that the loop dominates."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))


def bare_loop(model: nn.Module, optimizer: Optimizer, loader: Any, accum: int) -> float:
    """Return the seconds of one epoch of plain PyTorch: micro-batches, clipping, a cosine."""
    scheduler = CosineAnnealingLR(optimizer, len(loader))
    start = time.perf_counter()
    for images, labels in loader:
        for part, part_labels in zip(images.chunk(accum), labels.chunk(accum), strict=True):
            loss = F.cross_entropy(model(part), part_labels) / accum
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def bare(images: Tensor, labels: Tensor, accum: int) -> float:
    """Return the seconds of plain PyTorch as it is usually written."""
    model = build_model()
    return bare_loop(
        model, AdamW(model.parameters(), LR), DataLoader(Images(images, labels), BATCH, shuffle=True), accum
    )


def bare_same(images: Tensor, labels: Tensor, accum: int) -> float:
    """Return the seconds of plain PyTorch with the loader and the optimizer of `ours`."""
    model = build_model()
    return bare_loop(model, AdamW(model.parameters(), LR, fused=True), Batches(images, labels), accum)


def ours(images: Tensor, labels: Tensor, accum: int, **parts: Any) -> float:
    """Return the seconds of `Trainer.fit` with additional arguments `parts`, including its logging and its result."""
    model, loader = build_model(), Batches(images, labels)
    trainer = Trainer(
        model=model,
        train_loader=loader,
        optimizer=AdamW(model.parameters(), LR, fused=True),
        schedule=Cosine(len(loader)),
        clip_norm=1.0,
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=accum),
        accumulation_steps=accum,
        log=RunLog(None, show=False),
        **parts,
    )
    start = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - start


def cross_entropy(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss, and a value to log."""
    loss = F.cross_entropy(model(images), targets)
    return loss, {"entropy": loss.detach()}


class Counter(Callback):
    """Counts the steps that have begun and ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def before_step(self, trainer: Trainer, at: At) -> None:
        """Count a step that begins."""
        self.begun += 1

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Count a step that has ended."""
        self.ended += 1


def with_step_loss(images: Tensor, labels: Tensor, accum: int) -> float:
    """Return the seconds of `ours` with a `step_loss`."""
    return ours(images, labels, accum, step_loss=cross_entropy)


def with_callback(images: Tensor, labels: Tensor, accum: int) -> float:
    """Return the seconds of `ours` with a callback at each step."""
    return ours(images, labels, accum, callbacks=[Counter()])


def with_evaluation(images: Tensor, labels: Tensor, accum: int, **parts: Any) -> float:
    """Return the seconds of `ours` with evaluations, and additional arguments `parts`."""
    split = Batches(images[:EVALUATED], labels[:EVALUATED])
    return ours(images, labels, accum, eval_loader=split, num_classes=CLASSES, evaluate_every=EVALUATE_EVERY, **parts)


def error_rate(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified wrongly."""
    return float((logits.argmax(1) != labels).float().mean())


def with_metrics(images: Tensor, labels: Tensor, accum: int) -> float:
    """Return the seconds of `ours` with evaluations and a metric of the user's."""
    return with_evaluation(images, labels, accum, metrics={"error_rate": error_rate})


Arm = Callable[[Tensor, Tensor, int], float]
ARMS: dict[str, Arm] = {"bare": bare, "bare_same": bare_same, "ours": ours}
SEAMS: dict[str, Arm] = {
    "step_loss": with_step_loss,
    "callback": with_callback,
    "evaluation": with_evaluation,
    "metrics": with_metrics,
}


def measure(arms: dict[str, Arm], steps: int, rounds: int, accum: int) -> dict[str, list[float]]:
    """Return arm -> steps/s of each round."""
    torch.manual_seed(0)
    images, labels = torch.randn(steps * BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (steps * BATCH,))
    for run in arms.values():
        run(images, labels, accum)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            rates[name].append(steps / arms[name](images, labels, accum))
    return rates


def sides_of(name: str) -> tuple[str, str] | None:
    """Return the arms whose ratio is an arm's: ours / a bare one, a seam / the one without it; None if it has none."""
    return ("ours", name) if name in AIMS else (name, WITHOUT[name]) if name in WITHOUT else None


def ratio_of(name: str, rates: dict[str, list[float]]) -> list[float]:
    """Return an arm's ratio in each round; none for an arm without one."""
    if (sides := sides_of(name)) is None:
        return []
    return [first / second for first, second in zip(*(rates[side] for side in sides), strict=True)]


def summarise(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return arm -> median, minimum and maximum steps/s, and the same of its ratios to `ours`."""
    table = {}
    for name, values in rates.items():
        row = {"median": statistics.median(values), "least": min(values), "most": max(values)}
        if ratios := ratio_of(name, rates):
            row |= {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)}
        table[name] = row
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Print steps/s and ratios, median (min - max)."""
    print(f"{'arm':<10} {'steps/s':>8} {'(min - max)':>16}   ratio")
    for name, row in table.items():
        line = f"{name:<10} {row['median']:8.0f} {row['least']:8.0f} - {row['most']:5.0f}"
        if "ratio" in row:
            of, aim = " / ".join(sides_of(name) or ()), AIMS.get(name, SEAMS_AIM)
            verdict = "met" if row["ratio"] >= aim else "missed"
            spread = f"{row['ratio_least']:.3f} - {row['ratio_most']:.3f}"
            line += f"   {of} {row['ratio']:.3f} ({spread}), aim {aim:.2f}: {verdict}"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accum", type=int, default=1, help="micro-batches into which each batch is split")
    parser.add_argument(
        "--seams", action="store_true", help="time a step_loss, a callback, evaluations and a metric too"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1 or not 1 <= args.accum <= BATCH // 2 or BATCH % (2 * args.accum):
        parser.error(f"--steps and --rounds must be at least 1, --accum one of 1, 2, 4, ... {BATCH // 2}")
    torch.set_num_threads(1)
    rates = measure(ARMS | (SEAMS if args.seams else {}), args.steps, args.rounds, args.accum)
    table = summarise(rates)
    print(f"linear model, batch {BATCH}, {SIZE} px, {args.steps} steps, accum {args.accum}, {args.rounds} rounds")
    print_table(table)
    if args.json:
        about = {"command": sys.argv[1:], "machine": describe_machine(torch.device("cpu"), 1)}
        report = {**about, "versions": describe_versions(), "arms": table, "steps_per_second": rates}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
