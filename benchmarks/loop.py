"""What the training loop itself costs: steps/s of a trivial model on in-memory batches, beside bare PyTorch.

    python benchmarks/loop.py [--steps 1500] [--rounds 5] [--accum 1] [--json FILE]

Three arms, one after the other in each round, each round beginning with another one:

bare        plain PyTorch with its DataLoader over single images and its default AdamW
bare_same   plain PyTorch with the loader and the optimizer (fused AdamW) of `ours`: the loop's cost alone
ours        `hf_fasttrain.Trainer`, logging every 10 steps into a silent log

The clock counts the loop, not the building of model, loader and trainer; each arm's first run is thrown away.
One CPU thread, fp32.
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

from hf_fasttrain import Trainer
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.schedule import Cosine
from hf_fasttrain.utils.environment import describe_machine, describe_versions

BATCH, SIZE, CLASSES, LR = 32, 32, 10, 1e-3
AIMS = {"bare": 1.05, "bare_same": 0.97}  # least ratio ours / arm


class Images(Dataset):
    """In-memory images, one by one: what a DataLoader has to collate."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [(self.images[i], self.labels[i]) for i in indices]


class Batches:
    """The same images in shuffled batches, each cut out by one indexing."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(len(self.images)).split(BATCH):
            yield self.images[indices], self.labels[indices]


def build_model() -> nn.Module:
    """Return a linear classifier: next to no arithmetic, so that the loop is what is measured."""
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


def ours(images: Tensor, labels: Tensor, accum: int) -> float:
    """Return the seconds of `Trainer.fit`, its logging and its result included."""
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
    )
    start = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - start


ARMS: dict[str, Callable[[Tensor, Tensor, int], float]] = {"bare": bare, "bare_same": bare_same, "ours": ours}


def measure(steps: int, rounds: int, accum: int) -> dict[str, list[float]]:
    """Return arm -> steps/s of each round."""
    torch.manual_seed(0)
    images, labels = torch.randn(steps * BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (steps * BATCH,))
    for run in ARMS.values():
        run(images, labels, accum)
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    for index in range(rounds):
        names = list(ARMS)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            rates[name].append(steps / ARMS[name](images, labels, accum))
    return rates


def summarise(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return arm -> median, least and most steps/s and, for the bare arms, the ratios ours / arm of the rounds."""
    table = {}
    for name, values in rates.items():
        row = {"median": statistics.median(values), "least": min(values), "most": max(values)}
        if name in AIMS:
            ratios = [mine / theirs for mine, theirs in zip(rates["ours"], values, strict=True)]
            row |= {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)}
        table[name] = row
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Print steps/s and ratios, median (least to most)."""
    print(f"{'arm':<10} {'steps/s':>8} {'(least - most)':>16}   ours / arm")
    for name, row in table.items():
        line = f"{name:<10} {row['median']:8.0f} {row['least']:8.0f} - {row['most']:5.0f}"
        if name in AIMS:
            verdict = "met" if row["ratio"] >= AIMS[name] else "missed"
            spread = f"{row['ratio_least']:.3f} - {row['ratio_most']:.3f}"
            line += f"   {row['ratio']:.3f} ({spread}), aim {AIMS[name]:.2f}: {verdict}"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accum", type=int, default=1, help="micro-batches into which each batch is split")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1 or not 1 <= args.accum <= BATCH // 2 or BATCH % (2 * args.accum):
        parser.error(f"--steps and --rounds are at least 1, --accum one of 1, 2, 4, ... {BATCH // 2}")
    torch.set_num_threads(1)
    rates = measure(args.steps, args.rounds, args.accum)
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
