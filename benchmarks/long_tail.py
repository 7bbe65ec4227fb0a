"""A long tail of classes: balanced accuracy with class weights, balanced sampling and focal loss, beside uniform.

    python benchmarks/long_tail.py --data DIR --weights FILE --json FILE [--seeds 5] [--sides uniform weights ...]

DIR is an image folder, with or without splits: all photos of a class are pooled, and put into an order by a hash of
their names. The classes, in alphabetical order, train with the first 200, 80, 30, 12 and 5 photos of theirs (--counts).
The last ones of each class evaluate, equally many of each: as many as are left of the largest class.

uniform   `hf-fasttrain finetune`, each photo once an epoch
weights   the same with train.class_weights=balanced
balanced  with train.sampling=balanced
focal     with train.loss=focal
sqrt, effective_number, focal_weights    others, on request

Each row is printed as it is measured, and appended to FILE; a row that FILE has already is not measured again, so the
command continues where it was stopped, and --print only prints the tables of what is there. Differences to uniform are
paired by seed; their 95 % intervals are Student's. All seeds train and evaluate on the same photos: the intervals tell
the spread of trainings, not that of other photos.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune import machine

SIDES: dict[str, list[str]] = {
    "uniform": [],
    "weights": ["train.class_weights=balanced"],
    "balanced": ["train.sampling=balanced"],
    "focal": ["train.loss=focal"],
    "sqrt": ["train.sampling=sqrt"],
    "effective_number": ["train.class_weights=effective_number"],
    "focal_weights": ["train.loss=focal", "train.class_weights=balanced"],
}
DEFAULT_SIDES = ("uniform", "weights", "balanced", "focal")
SPLITS = ("train", "training", "validation", "val", "valid", "dev", "test")
CONFIDENCE = 0.95


def pooled(folder: Path) -> dict[str, list[Path]]:
    """Return class -> all its photos, in the order of a hash of their names."""
    roots = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.lower() in SPLITS] or [folder]
    photos: dict[str, list[Path]] = {}
    for kind in (entry for root in roots for entry in root.iterdir() if entry.is_dir()):
        photos.setdefault(kind.name, []).extend(file for file in kind.rglob("*") if file.is_file())
    return {
        name: sorted(photos[name], key=lambda file: (hashlib.sha256(file.name.encode()).hexdigest(), str(file)))
        for name in sorted(photos)
    }


def cut(folder: Path, counts: Sequence[int], target: Path) -> dict[str, tuple[int, int]]:
    """Write links to the training and evaluation photos below `target`; return class -> their numbers."""
    photos = pooled(folder)
    if len(photos) != len(counts):
        raise SystemExit(f"{folder} has {len(photos)} classes, and --counts {len(counts)} numbers; give one for each")
    pairs = list(zip(photos.items(), counts, strict=True))
    held = min(len(files) - count for (_, files), count in pairs)
    if held < 1:
        raise SystemExit(f"{folder}: a class has no photos left to evaluate with --counts {list(counts)}")
    for (name, files), count in pairs:
        for split, chosen in (("train", files[:count]), ("validation", files[-held:])):
            (target / split / name).mkdir(parents=True)
            for number, file in enumerate(chosen):
                (target / split / name / f"{number:05d}_{file.name}").symlink_to(file.resolve())
    return {name: (count, held) for (name, _), count in pairs}


def train(side: str, seed: int, folder: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train once in a separate process; return its metrics and seconds."""
    run = scratch / f"{side}_{seed}"
    overrides = {
        "data.dataset": folder,
        "data.image_size": args.size,
        "model.name": args.model,
        "model.pretrained": args.weights,
        "train.duration": f"{args.epochs} epochs",
        "evaluate.every": f"{args.epochs} epochs",
        "evaluate.metrics": "[loss, accuracy, balanced_accuracy, f1_macro, recall_macro]",
        "checkpoint.every": f"{args.epochs} epochs",
        "log.report": "false",
        "accelerate.cpu_threads": args.threads,
        "seed": seed,
        "output_dir": run,
    }
    words = [f"{key}={value}" for key, value in overrides.items()] + SIDES[side] + args.override
    environment = {"HF_FASTTRAIN_CACHE": f"{scratch}/pixels", "HF_FASTTRAIN_TUNINGS": f"{scratch}/tunings"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "hf_fasttrain", "finetune", *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    if done.returncode:
        raise SystemExit(f"{side}, seed {seed}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    seconds = time.perf_counter() - start
    return {**key_of(side, seed, args), "metrics": result["metrics"], "seconds": round(seconds, 1)}


def key_of(side: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what identifies a row: rows of other data or settings in the same file are left alone."""
    settings = {"model": args.model, "size": args.size, "epochs": args.epochs, "override": args.override}
    return {"side": side, "seed": seed, "data": args.data.resolve().name, "counts": args.counts, **settings}


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row as a line of its own, also after a line that was cut short."""
    with path.open("a+b") as file:
        is_open_line = file.tell() > 0 and not _ends_with_newline(path)
        file.write((b"\n" if is_open_line else b"") + json.dumps(row).encode() + b"\n")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def interval(differences: Sequence[float]) -> str:
    """Return the mean of paired differences with Student's interval."""
    from scipy import stats

    n, mean = len(differences), statistics.mean(differences)
    if n < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(differences) / n**0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table, a row for each side."""
    by_side: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_side.setdefault(row["side"], {})[row["seed"]] = row
    print("| training | seeds | balanced accuracy | paired difference to uniform | accuracy | F1 macro | s a run |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for side in (side for side in SIDES if side in by_side):
        runs, base = by_side[side], by_side.get("uniform", {})
        common = sorted(runs.keys() & base.keys())
        pairs = [
            runs[seed]["metrics"]["balanced_accuracy"] - base[seed]["metrics"]["balanced_accuracy"] for seed in common
        ]
        values = {
            name: [run["metrics"][name] for run in runs.values()]
            for name in ("balanced_accuracy", "accuracy", "f1_macro")
        }
        spread = f" +- {statistics.stdev(values['balanced_accuracy']):.3f}" if len(runs) > 1 else ""
        cells = [
            side,
            str(len(runs)),
            f"{statistics.mean(values['balanced_accuracy']):.3f}{spread}",
            interval(pairs) if pairs and side != "uniform" else "",
            f"{statistics.mean(values['accuracy']):.3f}",
            f"{statistics.mean(values['f1_macro']):.3f}",
            f"{statistics.median(run['seconds'] for run in runs.values()):.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def parse() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rows, a line each")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 80, 30, 12, 5], help="training photos by class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(DEFAULT_SIDES))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--override", action="append", default=[], help="section.key=value for the recipe")
    parser.add_argument("--print", action="store_true", help="train nothing, print the table of the rows in FILE")
    args = parser.parse_args()
    args.weights = args.weights.resolve()
    return args


def row_of(key: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of a key, None if it was not measured yet."""
    return next((row for row in rows if {name: row.get(name) for name in key} == key), None)


def main() -> None:
    args = parse()
    rows, wanted = stored_rows(args.json), []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        turn = seed % len(args.sides)
        wanted += [key_of(side, seed, args) for side in args.sides[turn:] + args.sides[:turn]]
    with tempfile.TemporaryDirectory(prefix="long-tail-") as scratch:
        numbers = cut(args.data, args.counts, Path(scratch) / "photos")
        for key in wanted if not args.print else []:
            if row_of(key, rows) is None:
                rows.append(train(key["side"], key["seed"], Path(scratch) / "photos", Path(scratch), args))
                append(args.json, rows[-1])
                value, seconds = rows[-1]["metrics"]["balanced_accuracy"], rows[-1]["seconds"]
                print(f"{key['side']}, seed {key['seed']}: balanced accuracy {value:.4f}, {seconds:.0f} s", flush=True)
    print(f"{datetime.now(UTC).date()}, {machine()}")
    print(f"{args.model}, {args.size} px, {args.epochs} epochs of finetune.yaml, {args.threads} threads")
    print("photos to train and evaluate: " + ", ".join(f"{name} {a} and {b}" for name, (a, b) in numbers.items()))
    print_table([row for key in wanted if (row := row_of(key, rows)) is not None])


if __name__ == "__main__":
    main()
