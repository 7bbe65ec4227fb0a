"""How many of the labels that were made wrong does `hf-fasttrain mislabeled` list first?

    python benchmarks/flipped_labels.py --data DIR --weights FILE [--share 0.1] [--seeds 5] [--json FILE]

A share of an image folder's labels, drawn by the seed, becomes another class each; the labels go into a table, in which
`mislabeled` (5 folds, features of `finetune.yaml` with the given weights) ranks all images. The figure is the share of
the first 10 % listed whose label was made wrong. Beside it: chance; a ranking by the out-of-sample loss alone; and,
where it can be imported, cleanlab's rankings of the same probabilities: its label issues first (find_label_issues, by
its default and by normalized_margin), then its label quality scores. Photos whose label is wrong in DIR itself count as
right, so that 100 % may be out of reach.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from finetune import machine
from long_tail import SPLITS

FIRST = 0.1  # of the list


def labelled_photos(folder: Path) -> list[tuple[Path, str, str]]:
    """Return (photo, class, split) of an image folder with or without splits, sorted by path."""
    roots = {entry: entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.lower() in SPLITS}
    roots = roots or {folder: "train"}
    return sorted(
        (file, kind.name, split)
        for root, split in roots.items()
        for kind in root.iterdir()
        if kind.is_dir()
        for file in kind.rglob("*")
        if file.is_file()
    )


def write_flipped(photos: list[tuple[Path, str, str]], share: float, seed: int, table: Path) -> set[str]:
    """Write a table in which a share of the labels is another class; return the paths of these photos."""
    rng = np.random.default_rng(seed)
    classes = sorted({label for _, label, _ in photos})
    flipped = set(rng.choice(len(photos), round(share * len(photos)), replace=False).tolist())
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for row, (path, label, split) in enumerate(photos):
            others = [name for name in classes if name != label]
            given = others[int(rng.integers(len(others)))] if row in flipped else label
            writer.writerow([path.resolve(), given, split])
    return {str(photos[row][0].resolve()) for row in flipped}


def cleanlab_rankings(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Return cleanlab's orders of the images, most likely errors first; none where it is not installed."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return {}
    rankings = {}
    for method in ("self_confidence", "normalized_margin"):
        scores = get_label_quality_scores(labels, probabilities, method=method)
        issues = find_label_issues(labels, probabilities, return_indices_ranked_by=method)
        rest = np.setdiff1d(np.argsort(scores, kind="stable"), issues, assume_unique=True)
        rankings[f"cleanlab, {method}"] = np.concatenate([issues, rest])
    return rankings


def measure(args: argparse.Namespace, photos: list[tuple[Path, str, str]], seed: int, scratch: Path) -> dict[str, Any]:
    """Return the figures of one seed."""
    from hf_fasttrain.from_recipe.label_errors import find_in_recipe
    from hf_fasttrain.recipe.load import load_recipe

    table = scratch / f"labels_{seed}.csv"
    wrong = write_flipped(photos, args.share, seed, table)
    overrides = [f"data.dataset={table}", f"data.image_size={args.size}", f"model.name={args.model}"]
    overrides += [f"model.pretrained={args.weights}", f"seed={seed}", f"accelerate.cpu_threads={args.threads}"]
    start = time.perf_counter()
    found, _ = find_in_recipe(load_recipe("finetune", overrides), args.folds)
    assert found is not None
    errors = found.errors
    is_wrong = np.array([found.path(image) in wrong for image in range(len(found))])
    first = round(FIRST * len(found))
    share_of: Callable[[np.ndarray], float] = lambda order: float(is_wrong[order[:first]].mean())  # noqa: E731
    rankings = {"mislabeled": errors.ranked, "out-of-sample loss": np.argsort(-errors.losses, kind="stable")}
    rankings |= cleanlab_rankings(errors.labels, errors.probabilities)
    return {
        "seed": seed,
        "photos": len(found),
        "flipped": int(is_wrong.sum()),
        "chance": float(is_wrong.mean()),
        "first": {name: share_of(order) for name, order in rankings.items()},
        "flagged": int(errors.flagged.sum()),
        "flagged_wrong": float(is_wrong[errors.flagged].mean()),
        "wrong_flagged": float(errors.flagged[is_wrong].mean()),
        "seconds": time.perf_counter() - start,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table, a row for each ranking."""
    spread: Callable[[list[float]], str] = lambda values: (  # noqa: E731
        f"{statistics.mean(values):.1%}" + (f" +- {statistics.stdev(values):.1%}" if len(values) > 1 else "")
    )
    print(f"| ranking | seeds | share of flipped labels among the first {FIRST:.0%} |")
    print("| --- | ---: | ---: |")
    print(f"| chance | {len(rows)} | {spread([row['chance'] for row in rows])} |")
    for name in rows[0]["first"]:
        print(f"| {name} | {len(rows)} | {spread([row['first'][name] for row in rows])} |")
    flagged = statistics.mean(row["flagged"] for row in rows)
    print(
        f"\nflagged: {flagged:.0f} of {rows[0]['photos']:,} photos; {spread([row['flagged_wrong'] for row in rows])} "
        f"of them flipped, {spread([row['wrong_flagged'] for row in rows])} of the flipped flagged"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels that are made wrong")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="append each seed to this file, as a line")
    args = parser.parse_args()
    args.weights = args.weights.resolve()
    photos, rows = labelled_photos(args.data), []
    with tempfile.TemporaryDirectory(prefix="flipped-") as scratch:
        os.environ.setdefault("HF_FASTTRAIN_CACHE", f"{scratch}/cache")
        for seed in range(args.seeds):
            rows.append(measure(args, photos, seed, Path(scratch)))
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    has_cleanlab = "cleanlab" in " ".join(rows[0]["first"])
    beside = f", cleanlab {importlib.metadata.version('cleanlab')}" if has_cleanlab else ""
    print(f"{datetime.now(UTC).date()}, {machine()}{beside}")
    print_table(rows)


if __name__ == "__main__":
    main()
