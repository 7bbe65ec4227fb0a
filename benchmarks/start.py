"""Seconds to open an image folder: `load_dataset("imagefolder")`, for the first time and later, and ours.

    python benchmarks/start.py [--files 100000] [--classes 100] [--rounds 3] [--json FILE]

imagefolder_first  `load_dataset` with an empty cache folder, as for a new dataset; measured once, because it is slow
imagefolder_later  the same again, with its Arrow file in the cache folder
ours               `hf_fasttrain.data.source.opening.open_splits`: reads file names, stores nothing on disk
ours_source        `load_source`: the same and what training needs in addition: labels, and 1 % held out

Creates a temporary folder of small JPEGs. Each run has its own process, and the arms take turns. The clock starts after
the imports. Memory is the growth of the resident memory since then. Afterwards columns, rows, class names, labels and
the order of files are compared.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memory import OwnGrowth

from hf_fasttrain.data.source.columns import forms_of
from hf_fasttrain.data.source.file_split import FileSplit

Row = dict[str, Any]
COMPARED = ("columns", "rows", "class_names", "labels", "files")


def imagefolder(folder: Path) -> Callable[[], Any]:
    """Return a function that opens the folder with `datasets`, with everything imported."""
    import datasets
    import datasets.packaged_modules.imagefolder.imagefolder
    import torch  # noqa: F401 - which load_dataset would import on the clock

    datasets.disable_progress_bars()
    return lambda: datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")


def ours(folder: Path) -> Callable[[], Any]:
    """Return a function that opens the folder with this package, with everything imported, without `datasets`."""
    import torch  # noqa: F401

    from hf_fasttrain.data.source.opening import open_splits

    return lambda: open_splits(str(folder))["train"]


def ours_source(folder: Path) -> Callable[[], Any]:
    """Return a function that prepares the folder for training with this package, with everything imported."""
    ours(folder)
    from hf_fasttrain.data.source.dataset import load_source

    return lambda: load_source(str(folder), eval_fraction=0.01)


ARMS = {"imagefolder_first": imagefolder, "imagefolder_later": imagefolder, "ours": ours, "ours_source": ours_source}


def run_arm(name: str, folder: Path) -> None:
    """Open the folder once and print time, memory and a description of the dataset as JSON."""
    start = ARMS[name](folder)
    growth = OwnGrowth()
    start_time = time.perf_counter()
    opened = start()
    row: Row = {"seconds": time.perf_counter() - start_time, "growth_mib": growth.peak_mib()}
    if name != "ours_source":  # which is no longer one dataset
        row |= describe(opened)
    print(json.dumps(row), flush=True)


def describe(dataset: Any) -> Row:
    """Return the properties that must agree, long ones as digests."""
    if isinstance(dataset, FileSplit):
        paths = [dataset.images["image"][row]["path"] for row in range(len(dataset))]
        labels, names = dataset.columns["label"].tolist(), dataset.class_names or []
    else:
        import datasets

        records = dataset.cast_column("image", datasets.Image(decode=False))
        paths = [record["path"] for record in records["image"]]
        labels, names = dataset["label"], dataset.features["label"].names
    return {
        "columns": {name: form.text for name, form in forms_of(dataset).items()},
        "rows": len(dataset),
        "class_names": digest(names),
        "labels": digest(map(str, labels)),
        "files": digest(os.path.realpath(path) for path in paths),
    }


def digest(words: Any) -> str:
    """Return a short hash of a sequence of words."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def make_folder(root: Path, files: int, classes: int) -> None:
    """Write `root/train/<class>/<number>.jpg`, a few hundred bytes each, spread evenly over the classes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (120, 80, 40)).save(buffer, "JPEG")
    for label in range(classes):
        folder = root / "train" / f"class{label:04d}"
        folder.mkdir(parents=True)
        for number in range(label, files, classes):
            (folder / f"{number:07d}.jpg").write_bytes(buffer.getvalue())


def start_arm(name: str, folder: Path, cache: Path) -> Row:
    """Return the figures of one run in a new process."""
    command = [sys.executable, __file__, "--arm", name, "--folder", str(folder)]
    environment = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    row = json.loads(process.stdout.splitlines()[-1])
    print(f"{name:<18} {row['seconds']:8.3f} s", file=sys.stderr, flush=True)
    return row


def measure(files: int, classes: int, rounds: int) -> dict[str, list[Row]]:
    """Return arm -> its runs."""
    rows: dict[str, list[Row]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory(prefix="start-") as scratch:
        folder, cache = Path(scratch, "images"), Path(scratch, "cache")
        make_folder(folder, files, classes)
        first, *others = ARMS
        rows[first].append(start_arm(first, folder, cache))
        for index in range(rounds):
            turn = index % len(others)
            for name in others[turn:] + others[:turn]:
                rows[name].append(start_arm(name, folder, cache))
    return rows


def summarise(rows: dict[str, list[Row]]) -> dict[str, Row]:
    """Return arm -> median, minimum and maximum seconds, peak memory, and its seconds / those of `ours`."""
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in rows.items()}
    table = {}
    for name, runs in rows.items():
        seconds = [run["seconds"] for run in runs]
        spread = {"median": medians[name], "least": min(seconds), "most": max(seconds)}
        growth = max(run["growth_mib"] for run in runs)
        table[name] = spread | {"growth_mib": growth, "ratio": medians[name] / medians["ours"]}
    return table


def differences(rows: dict[str, list[Row]]) -> list[str]:
    """Return in which properties ours differs from `load_dataset`."""
    reference = rows["imagefolder_first"][0]
    ours_rows = [run for name in ("imagefolder_later", "ours") for run in rows[name]]
    return [field for field in COMPARED if any(run[field] != reference[field] for run in ours_rows)]


def print_table(table: dict[str, Row], differing: list[str]) -> None:
    """Print seconds, memory and ratios, and whether all properties agree."""
    print(f"{'arm':<18} {'seconds':>8} {'(min - max)':>18} {'growth MiB':>10} {'/ours':>7}")
    for name, row in table.items():
        spread = f"({row['least']:.3f} - {row['most']:.3f})"
        print(f"{name:<18} {row['median']:8.3f} {spread:>18} {row['growth_mib']:10.0f} {row['ratio']:7.1f}")
    same = f"DIFFERENT: {', '.join(differing)}" if differing else "the same"
    print(f"columns, rows, class names, labels and files in order: {same}")


def report(table: dict[str, Row], args: argparse.Namespace, differing: list[str]) -> Row:
    """Return the content of the JSON file."""
    import torch

    from hf_fasttrain.utils.environment import describe_machine, describe_versions

    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(torch.device("cpu"), 1),
        "versions": describe_versions(),
        "options": {"files": args.files, "classes": args.classes, "rounds": args.rounds},
        "differing": differing,
    }
    return table | {"about": about}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        run_arm(args.arm, args.folder)
        return 0
    if args.rounds < 1 or not 1 <= args.classes <= args.files:
        parser.error("--rounds and --classes must be at least 1, --files at least --classes")
    rows = measure(args.files, args.classes, args.rounds)
    table, differing = summarise(rows), differences(rows)
    print(f"{args.files:,} files in {args.classes:,} classes, {args.rounds} rounds")
    print_table(table, differing)
    if args.json:
        args.json.write_text(json.dumps(report(table, args, differing), indent=2) + "\n", encoding="utf-8")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
