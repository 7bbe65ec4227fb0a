"""Seconds until the first step: a new run, and `--resume` in the middle of an epoch of 1,280,000 images.

    python benchmarks/resume_start.py [--rounds 5] [--workers 0 2] [--json FILE] [section.key=value ...]

fresh   an empty run folder; the first step is step 0
resume  a run folder with a checkpoint of step 10,000 of 20,000 in the first epoch; the first step is step 10,000

The clock starts before `Trainer.from_recipe`, with everything imported and the dataset loaded, and stops after the
first step. Each start has its own process and run folder; the two take turns. `built` is the part until `from_recipe`
returns: model, labels, order, and the restored checkpoint.

The dataset is one Arrow chunk of 1,000 noisy PNGs, repeated 1,280 times without copying. The model is timm's smallest
ResNet at 32 px, so that it does not hide the cost of resuming. The checkpoint comes from a run of three steps whose
step is set to 10,000 before it saves. This changes only the weights: order and augmentation depend on the step's number
alone.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Row = dict[str, float]
ARMS = ("fresh", "resume")
CHUNK, REPEATS, CLASSES, SIZE, BATCH = 1_000, 1_280, 10, 32, 64
MIDDLE = CHUNK * REPEATS // BATCH // 2  # step in the middle of the first epoch
AIM = 1.2  # most resume / fresh


def make_chunk() -> tuple[Any, Any]:
    """Return an Arrow array of encoded images and one of their labels, always the same ones."""
    import datasets
    import numpy as np
    import pyarrow as pa
    from PIL import Image

    rng = np.random.default_rng(0)
    encoded = []
    for pixels in rng.integers(0, 256, (CHUNK, SIZE, SIZE, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    images = pa.array(encoded, type=datasets.Image().pa_type)
    return images, pa.array(rng.integers(0, CLASSES, CHUNK), type=pa.int64())


def make_dataset() -> Any:
    """Return a `DatasetDict` of 1,280,000 training and 1,000 evaluation images that takes the memory of 1,000."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    images, labels = make_chunk()
    names = [str(number) for number in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def repeated(times: int) -> Any:
        columns = [pa.chunked_array([array] * times) for array in (images, labels)]
        table = pa.Table.from_arrays(columns, schema=features.arrow_schema)
        info = datasets.DatasetInfo(features=features)
        return datasets.Dataset(InMemoryTable(table), info=info, fingerprint=f"resume_start_{times}")

    return datasets.DatasetDict(train=repeated(REPEATS), validation=repeated(1))


def recipe_text(run: Path, workers: int) -> str:
    """Return the recipe of all runs."""
    return (
        f"output_dir: {run}\n"
        "model: {name: test_resnet}\n"
        f"data: {{dataset: handed over, image_size: {SIZE}, workers: {workers}, cache: none}}\n"
        f"train: {{duration: 2 epochs, batch_size: {BATCH}}}\n"
        "evaluate: {every: 2 epochs}\n"
        "checkpoint: {every: 2 epochs}\n"
    )


def start(arm: str, run: Path, workers: int, overrides: list[str]) -> None:
    """Build a trainer and train as many steps as the arm needs; print the figures as JSON."""
    import datasets
    import timm

    import hf_fasttrain.from_recipe.parts  # all that from_recipe would import on the clock
    from hf_fasttrain import Trainer

    assert all((datasets, timm, hf_fasttrain.from_recipe.parts))  # imported for their own sake
    dataset = make_dataset()
    recipe = run.with_suffix(".yaml")
    recipe.write_text(recipe_text(run, workers), encoding="utf-8")

    start = time.perf_counter()
    trainer = Trainer.from_recipe(recipe, overrides, dataset=dataset, resume=arm == "resume")
    built = time.perf_counter()
    steps: list[int] = []
    with trainer.running():
        for step in trainer.iterate():
            step.loss.item()  # waits for the device
            if not steps:
                first = time.perf_counter()
            steps.append(step.step - 1)
            if len(steps) == (3 if arm == "prepare" else 1):
                break
    if arm == "prepare":
        trainer.state.step = trainer.state.updates = MIDDLE
        trainer.save()
        assert trainer.checkpoints is not None
        if not trainer.checkpoints.wait():
            raise SystemExit(f"no checkpoint: {trainer.checkpoints.failed}")
    expected = MIDDLE if arm == "resume" else 0
    if steps[0] != expected:
        raise SystemExit(f"{arm}: the first step was {steps[0]}, expected {expected}")
    print(json.dumps({"seconds": first - start, "built": built - start}), flush=True)


def start_arm(arm: str, run: Path, workers: int, overrides: list[str]) -> Row:
    """Return the seconds of one start in a new process."""
    command = [sys.executable, __file__, *overrides, "--arm", arm, "--run", str(run), "--workers", str(workers)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode:
        raise SystemExit(f"{arm} failed:\n{process.stdout}{process.stderr}")
    row: Row = json.loads(process.stdout.splitlines()[-1])
    print(f"{workers} workers {arm:<8} {row['seconds']:8.3f} s", file=sys.stderr, flush=True)
    return row


def measure(rounds: int, workers: int, overrides: list[str]) -> dict[str, list[Row]]:
    """Return arm -> its starts."""
    rows: dict[str, list[Row]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="resume-start-") as scratch:
        prepared, run = Path(scratch, "prepared"), Path(scratch, "run")
        start_arm("prepare", prepared, workers, overrides)
        for number in range(rounds):
            turn = number % len(ARMS)
            for arm in ARMS[turn:] + ARMS[:turn]:
                if arm == "resume":
                    shutil.copytree(prepared, run)
                rows[arm].append(start_arm(arm, run, workers, overrides))
                shutil.rmtree(run)
    return rows


def spread(values: list[float]) -> Row:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summarise(rows: dict[str, list[Row]]) -> dict[str, Row]:
    """Return arm -> median, minimum and maximum seconds, and those of the ratios and differences resume - fresh."""
    table = {arm: spread([row["seconds"] for row in runs]) for arm, runs in rows.items()}
    table |= {f"{arm}_built": spread([row["built"] for row in runs]) for arm, runs in rows.items()}
    pairs = [(r["seconds"], f["seconds"]) for r, f in zip(rows["resume"], rows["fresh"], strict=True)]
    table["ratio"] = spread([resumed / fresh for resumed, fresh in pairs])
    table["difference"] = spread([resumed - fresh for resumed, fresh in pairs])
    return table


def print_table(table: dict[str, Row], workers: int) -> None:
    """Print the figures, median (min - max), and whether the target is met."""
    for name, row in table.items():
        line = f"{workers} workers  {name:<14} {row['median']:8.3f} ({row['least']:.3f} - {row['most']:.3f})"
        if name == "ratio":
            line += f", aim {AIM}: {'met' if row['median'] <= AIM else 'missed'}"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, action="extend", nargs="+", help="loader processes; default: 0")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--arm", choices=("prepare", *ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    every = args.workers or [0]
    if args.arm:
        start(args.arm, args.run, every[0], args.overrides)
        return 0
    if args.rounds < 1 or min(every) < 0:
        parser.error("--rounds must be at least 1, --workers at least 0")
    rows = {workers: measure(args.rounds, workers, args.overrides) for workers in every}
    tables = {workers: summarise(runs) for workers, runs in rows.items()}

    import torch

    from hf_fasttrain.utils.environment import describe_machine, describe_versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine, versions = describe_machine(device, 1), describe_versions()
    print(f"{CHUNK * REPEATS:,} images, batches of {BATCH}, {args.rounds} rounds, seconds")
    print(", ".join(f"{key} {value}" for key, value in (machine | versions).items()))
    for workers, table in tables.items():
        print_table(table, workers)
    if args.json:
        about = {"command": sys.argv[1:], "machine": machine, "versions": versions}
        args.json.write_text(json.dumps({**about, "figures": tables, "rounds": rows}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
