"""How time and memory grow with the work: start, hold-out, evaluation, resume, report, push and predict.

    python benchmarks/growth.py [--only NAME ...] [--sizes N ...] [--json FILE]

start        files of an image folder: from the recipe to the first step
hold-out     images, in a class for every 25 of them: `hold_out`
evaluation   images of 2,000 classes, with predictions kept: `Evaluator`
resume       lines of metrics.jsonl: `--resume` to the next step
report       lines of metrics.jsonl: report.html
report-k     classes, 10 images of each: report.html
push         lines of metrics.jsonl: what the first push of a training prepares; nothing is sent
push-again   lines of metrics.jsonl: what a push prepares after 100 further lines
predict      image files: `hf-fasttrain predict --json-lines`

Each size has its own process, whose clock starts after the imports. Time is CPU time (user and system, loader processes
included), which other programs disturb least; memory is the peak of the process's resident memory since its start
(VmHWM), imports included.

Every name has a baseline, a size at which the fixed start is all there is. What is above the baseline's figures is
compared with the size above the baseline's: the exponent is the steepest step between two neighbouring sizes,
log(figure / figure) / log(size / size), where a figure below the noise counts as the noise: 0.2 s or a quarter of
the baseline's time, 16 MB or 2 % of its memory. 1 is linear, 2 quadratic, "flat" means that nothing rises above the
noise. A row above 1.1 is measured once more, and the smaller figure of each size counts: other programs only add to it.
Exits with status 1 and names the rows that are still above.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, float]
LIMIT = 1.1  # largest exponent
NOISE = {"seconds": (0.2, 0.25), "megabytes": (16.0, 0.02)}  # at least, and as a share of the baseline's figure
NUM_CLASSES = 2_000  # of evaluation
BATCH = 64
LINES_LATER = 100  # of push-again
RECIPE = "model: {name: test_vit}\nlog: {every: 1, report: false}\naccelerate: {cpu_threads: 1}\n"
DIGITS = "data: {dataset: digits, image_size: 32, workers: 0}\ntrain: {duration: 10 steps, batch_size: 16}\n"


@dataclass(frozen=True)
class Work:
    """What is measured: `prepare` makes its files in a folder, `load` imports and returns the function on the clock."""

    what: str  # that is counted
    baseline: int
    sizes: tuple[int, int, int]
    prepare: Callable[[Path, int], None]
    load: Callable[[Path, int], Callable[[], Any]]


def write_images(folder: Path, number: int, classes: int) -> None:
    """Write class folders of hard links to 100 small JPEGs."""
    import numpy as np
    from PIL import Image

    rng, names = np.random.default_rng(0), []
    for index in range(100 if number else 0):
        names.append(folder / f"base_{index}.jpg")
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(names[-1], quality=80)
    for label in range(classes):
        (folder / "images" / f"class_{label:05d}").mkdir(parents=True)
    for index in range(number):
        os.link(names[index % 100], folder / "images" / f"class_{index % classes:05d}" / f"{index:07d}.jpg")


def prepare_start(folder: Path, size: int) -> None:
    """Write an image folder and its recipe."""
    write_images(folder, size, 10)
    data = f"data: {{dataset: {folder / 'images'}, image_size: 32, cache: none}}\n"
    train = "train: {duration: 2 epochs, batch_size: 16}\n"  # no evaluation after the first step
    (folder / "recipe.yaml").write_text(f"output_dir: {folder / 'run'}\n{RECIPE}{data}{train}")


def first_step(recipe: Path, overrides: Sequence[str] = (), *, resume: bool = False) -> Callable[[], Any]:
    """Return a function that makes a trainer and its first step."""
    import timm

    import hf_fasttrain.from_recipe.parts  # what from_recipe would import on the clock
    from hf_fasttrain import Trainer

    assert all((timm, hf_fasttrain.from_recipe.parts))

    def work() -> None:
        trainer = Trainer.from_recipe(recipe, list(overrides), resume=resume)
        with trainer.running():
            next(iter(trainer.iterate())).loss.item()

    return work


def load_hold_out(folder: Path, size: int) -> Callable[[], Any]:
    """Return the hold-out of a tenth of the images."""
    import numpy as np

    from hf_fasttrain.data.source.array_records import ArrayRecords
    from hf_fasttrain.data.source.dataset import Split, hold_out

    labels = np.random.default_rng(0).permutation(np.arange(size) // 25)
    split = Split("train", ArrayRecords.__new__(ArrayRecords), labels)  # no image is read
    return lambda: hold_out(split, 0.1, 0)


def load_evaluation(folder: Path, size: int) -> Callable[[], Any]:
    """Return an evaluation of random images, whose predictions are saved."""
    import torch
    from accelerate import Accelerator

    from hf_fasttrain.train.evaluation import Evaluator

    class Images:
        rows = range(size)

        def __iter__(self) -> Any:
            for start in range(0, size, BATCH):
                number = min(BATCH, size - start)
                yield torch.rand(number, 64), torch.randint(NUM_CLASSES, (number,))

    evaluator, model = Evaluator(Accelerator(cpu=True), NUM_CLASSES), torch.nn.Linear(64, NUM_CLASSES)
    evaluator.collects = True

    def work() -> None:
        evaluator(model, Images())
        predictions = evaluator.predictions(0, "validation", Images.rows)
        assert predictions is not None
        predictions.save(folder / "predictions.safetensors")

    return work


def prepare_run(folder: Path, size: int) -> None:
    """Write a finished run whose metrics.jsonl has `size` lines of training and one of evaluation for 100 of them."""
    from hf_fasttrain import Trainer

    recipe = folder / "recipe.yaml"
    recipe.write_text(f"output_dir: {folder / 'run'}\n{RECIPE}{DIGITS}")
    with contextlib.redirect_stdout(sys.stderr):
        Trainer.from_recipe(recipe).fit()
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, size, lines, steps=10)


def prepare_long_run(folder: Path, size: int) -> None:
    """Write a finished run whose steps are its lines of metrics.jsonl."""
    prepare_run(folder, 100)
    path, result = folder / "run" / "metrics.jsonl", folder / "run" / "result.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, size, lines, steps=size)
    result.write_text(json.dumps({**json.loads(result.read_text()), "steps": size}))


def write_lines(path: Path, size: int, lines: list[dict[str, Any]], steps: int) -> None:
    """Write `size` lines of training, and those of evaluations, by repeating a run's; the last is of step `steps`."""
    train, evaluation = ([line for line in lines if line["kind"] == kind] for kind in ("train", "evaluation"))
    with path.open("w") as file:
        for number in range(1, size + 1):
            step = max(1, number * steps // size)
            at = {"step": step, "epoch": step / 100}
            file.write(json.dumps({**train[number % len(train)], **at}) + "\n")
            if number % 100 == 0:
                file.write(json.dumps({**evaluation[0], **at}) + "\n")


def load_resume(folder: Path, size: int) -> Callable[[], Any]:
    """Return `--resume` of a run that goes on."""
    return first_step(folder / "recipe.yaml", ["train.duration=20 steps"], resume=True)


def prepare_classes(folder: Path, size: int) -> None:
    """Write a finished run of `size` classes with predictions for 10 images of each, some of them wrong."""
    import numpy as np
    import torch

    from hf_fasttrain.run_folder.predictions import Predictions

    prepare_run(folder, 10)
    spec = folder / "run" / "model" / "hf_fasttrain.json"
    names = [f"a class with the number {number}" for number in range(size)]
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "class_names": names}))
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(size), 10)
    predicted = np.where(rng.random(len(labels)) < 0.2, rng.integers(0, size, len(labels)), labels)
    confidence = rng.random(len(labels), np.float32)
    columns = (np.arange(len(labels)), labels, predicted, confidence, 1 - confidence, predicted)
    Predictions(10, "validation", *map(torch.from_numpy, columns)).save(folder / "run" / "predictions.safetensors")


def load_report(folder: Path, size: int) -> Callable[[], Any]:
    """Return the making of a report."""
    from hf_fasttrain.report.report import write_report

    return lambda: write_report([folder / "run"])


def load_push(folder: Path, size: int) -> Callable[[], Any]:
    """Return the preparation of a push; the model card's pictures are not drawn, as while training."""
    from hf_fasttrain.hub.push import files_to_push
    from hf_fasttrain.run_folder.finished import read_run

    result, copies = folder / "run" / "result.json", folder / "copies"
    result.write_text(json.dumps({**json.loads(result.read_text()), "num_steps": 20}))
    copies.mkdir()
    return lambda: files_to_push(read_run(folder / "run"), "me/run", copies)


def load_push_again(folder: Path, size: int) -> Callable[[], Any]:
    """Return the preparation of a second push, after further lines were logged."""
    prepare = load_push(folder, size)
    prepare()
    path = folder / "run" / "metrics.jsonl"
    with path.open() as lines:
        later = [line for line, _ in zip(lines, range(LINES_LATER), strict=False)]
    with path.open("a") as file:
        file.writelines(later)
    return prepare


def prepare_predict(folder: Path, size: int) -> None:
    """Write a run and images."""
    prepare_run(folder, 10)
    write_images(folder, size, 1)


def load_predict(folder: Path, size: int) -> Callable[[], Any]:
    """Return the command `predict`, which prints to a file."""
    import timm

    import hf_fasttrain.inference
    from hf_fasttrain.cli import main

    assert all((timm, hf_fasttrain.inference))

    def work() -> None:
        command = ["predict", str(folder / "run"), str(folder / "images"), "--json-lines"]
        with (folder / "out.jsonl").open("w") as out, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main(command)
        with (folder / "out.jsonl").open() as out:
            assert sum(1 for _ in out) == size

    return work


def nothing(folder: Path, size: int) -> None:
    """Prepare nothing."""


LINES = (100, (2_000, 20_000, 200_000))
WORKS = {
    "start": Work("files", 100, (2_000, 20_000, 100_000), prepare_start, lambda at, _: first_step(at / "recipe.yaml")),
    "hold-out": Work("images", 1_000, (20_000, 200_000, 2_000_000), nothing, load_hold_out),
    "evaluation": Work("images", 128, (2_000, 10_000, 50_000), nothing, load_evaluation),
    "resume": Work("lines", *LINES, prepare_run, load_resume),
    "report": Work("lines", *LINES, prepare_long_run, load_report),
    "report-k": Work("classes", 1_000, (2_000, 6_000, 20_000), prepare_classes, load_report),
    "push": Work("lines", *LINES, prepare_run, load_push),
    "push-again": Work("lines", *LINES, prepare_run, load_push_again),
    "predict": Work("images", 300, (1_000, 3_000, 10_000), prepare_predict, load_predict),
}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def measure_here(work: Work, folder: Path, size: int) -> Row:
    """Return the figures of one size in this process."""
    from memory import kilobytes

    run = work.load(folder, size)
    started, cpu = time.perf_counter(), cpu_seconds()
    run()
    return {
        "size": size,
        "seconds": cpu_seconds() - cpu,
        "wall": time.perf_counter() - started,
        "megabytes": kilobytes(Path("/proc/self/status"), "VmHWM") / 1e3,
    }


def in_process(name: str, size: int, folder: Path, part: str) -> str:
    """Run a part of a size in a process of its own and return what it prints last."""
    command = [sys.executable, __file__, "--only", name, "--part", part, "--sizes", str(size), "--folder", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode:
        raise SystemExit(f"{name}, size {size}: {part} failed:\n{process.stdout}{process.stderr}")
    return (process.stdout.splitlines() or [""])[-1]


def measure(name: str, size: int) -> Row:
    """Return the figures of one size, measured in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    try:
        in_process(name, size, folder, "prepare")
        row: Row = json.loads(in_process(name, size, folder, "measure"))
    finally:
        shutil.rmtree(folder)
    print(
        f"{name:<11}{size:>10,} {WORKS[name].what:<8}{row['seconds']:8.2f} s CPU{row['wall']:8.2f} s"
        f"{row['megabytes']:9,.0f} MB",
        flush=True,
    )
    return row


def measure_all(name: str, sizes: Sequence[int]) -> list[Row]:
    """Return the figures of the baseline and of all sizes; twice measured, the smaller ones, if they grow too fast."""
    every = (WORKS[name].baseline, *sorted(sizes))
    rows = [measure(name, size) for size in every]
    if not too_steep({name: rows}):
        return rows
    print(f"{name}: measured once more")
    again = [measure(name, size) for size in every]
    return [{key: min(row[key], other[key]) for key in row} for row, other in zip(rows, again, strict=True)]


def exponent(rows: Sequence[Row], figure: str) -> float | None:
    """Return the exponent of a figure's growth; None if nothing rises above the noise. The first row is the baseline.

    It is the steepest step between neighbouring sizes: a mean over all would hide a part that grows late.
    """
    base, (least, share) = rows[0], NOISE[figure]
    noise = max(least, share * base[figure])
    excess = [(row["size"] - base["size"], row[figure] - base[figure]) for row in rows[1:]]
    if all(above <= noise for _, above in excess):
        return None
    points = [(math.log(size), math.log(max(above, noise))) for size, above in excess]
    return max((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.pairwise(points))


def too_steep(table: dict[str, list[Row]]) -> list[str]:
    """Return a line for each figure that grows faster than the limit."""
    found = {(name, figure): exponent(rows, figure) for name, rows in table.items() for figure in NOISE}
    return [
        f"{name}: {figure} grow with exponent {value:.2f}, the limit is {LIMIT}"
        for (name, figure), value in found.items()
        if value is not None and value > LIMIT
    ]


def print_exponents(table: dict[str, list[Row]]) -> None:
    """Print the exponents of all rows."""
    for name, rows in table.items():
        values = [exponent(rows, figure) for figure in NOISE]
        time_text, memory_text = ("flat" if value is None else f"{value:.2f}" for value in values)
        print(f"{name:<11} by {WORKS[name].what:<8} time {time_text:>5}   memory {memory_text:>5}")


def run_part(part: str, name: str, folder: Path, size: int) -> None:
    """Prepare or measure a size in this process."""
    if part == "prepare":
        WORKS[name].prepare(folder, size)
    else:
        print(json.dumps(measure_here(WORKS[name], folder, size)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="what to measure")
    parser.add_argument("--sizes", type=int, nargs="+", help="sizes instead of the usual three")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--part", choices=("prepare", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.only[0], args.folder, args.sizes[0])
        return 0
    if args.sizes and len(args.sizes) < 2:
        parser.error("--sizes needs at least two, of which one grows from the other")
    table = {name: measure_all(name, args.sizes or WORKS[name].sizes) for name in args.only}
    print_exponents(table)
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv[1:], "rows": table}, indent=2) + "\n")
    steep = too_steep(table)
    print("\n".join(steep) or f"no exponent is above {LIMIT}")
    return 1 if steep else 0


if __name__ == "__main__":
    sys.exit(main())
