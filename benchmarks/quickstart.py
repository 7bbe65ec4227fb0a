"""The quickstart as shipped, over several seeds and threads: the accuracy in the README, and the time it takes.

    python benchmarks/quickstart.py [--seeds 5] [--threads 1 2] [--json FILE] [section.key=value ...]

Each training runs in its own process, `python -m hf_fasttrain quickstart`, one after the other. Seconds are those of
the training steps (result.json); they are only meaningful if nothing else runs at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def train(seed: int, threads: int, overrides: list[str]) -> dict[str, Any]:
    """Train once; return accuracy and seconds."""
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        run = Path(folder) / "run"
        settings = [f"seed={seed}", f"output_dir={run}", f"accelerate.cpu_threads={threads}", *overrides]
        environment = {"OMP_NUM_THREADS": str(threads), "HF_FASTTRAIN_TUNINGS": f"{folder}/tunings"}
        command = [sys.executable, "-m", "hf_fasttrain", "quickstart", *settings]
        subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "threads": threads,
        "accuracy": result["metrics"]["accuracy"],
        "train_seconds": result["train_seconds"],
        "machine": f"{result['machine']['processor']}, {result['machine']['cores']} cores",
        "torch": result["versions"]["torch"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="append each run to this file, as a line")
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        for threads in args.threads:
            runs.append(train(seed, threads, args.overrides))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    print(f"{datetime.now(UTC).date()}, {runs[0]['machine']}, torch {runs[0]['torch']}")
    print("| threads | seeds | accuracy, mean | min | max | training s, median |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for threads in args.threads:
        selected = [run for run in runs if run["threads"] == threads]
        accuracies = [run["accuracy"] for run in selected]
        seconds = statistics.median(run["train_seconds"] for run in selected)
        print(
            f"| {threads} | {len(selected)} | {statistics.mean(accuracies):.4f} "
            f"| {min(accuracies):.4f} | {max(accuracies):.4f} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
