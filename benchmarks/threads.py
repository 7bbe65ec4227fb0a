"""How OpenMP's threads should wait for each other: images/s alone, and beside a process that keeps a core busy.

    python benchmarks/threads.py [--models test_vit ...] [--threads 1 2] [--workers 0 2] [--rounds 3] [--json FILE]

A worker thread of OpenMP that has nothing to do spins for a while before it sleeps. Spinning is quickest where every
thread has a core of its own; where something else needs the core, it takes time from the thread that is waited for.
libgomp, which PyTorch's wheels for Linux bring along, reads how long to spin from the environment when torch is loaded.

arms: unset, OMP_WAIT_POLICY=PASSIVE, and GOMP_SPINCOUNT of --spins. Each run is a process of its own that trains a
model on handwritten digits, steps of 32 images; the small model in 4 micro-batches. The arms take turns, alone and
beside a process that counts. Ratios are medians of the rounds' ratios: alone / unset alone, and busy / the same alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SIZES = {"test_vit": (160, 4, 48), "resnet50": (64, 1, 12), "tf_efficientnet_lite0": (96, 1, 12)}  # px, pieces, steps
BATCH, LAPS = 32, 4


def train(model: str, threads: int, workers: int, scratch: Path) -> float:
    """Return images/s of a training in this process."""
    from hf_fasttrain import Trainer

    size, pieces, steps = SIZES[model]
    overrides = {
        "model.name": model,
        "data.image_size": size,
        "data.workers": workers,
        "data.cache": "none",
        "train.duration": f"{steps} steps",
        "accelerate.gradient_accumulation_steps": pieces,
        "accelerate.cpu_threads": threads,
        "train.batch_size": BATCH,
        "log.every": steps // LAPS,
        "evaluate.every": f"{steps} steps",
        "data.eval_fraction": 0.01,
        "log.report": "false",
        "output_dir": scratch / "run",
    }
    trainer = Trainer.from_recipe("quickstart", [f"{key}={value}" for key, value in overrides.items()])
    trainer.fit()
    lines = map(json.loads, (scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    laps = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    return BATCH / statistics.median(laps[1:])  # without the first, which is a warm-up


@contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """Keep a core busy with a process that counts, if asked."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def run(arm: dict[str, str], cell: tuple[str, int, int], *, is_busy: bool) -> float:
    """Return images/s of a training in a process of its own."""
    model, threads, workers = cell
    given = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    # KMP_BLOCKTIME, which libgomp does not read, says that the user has decided: the package sets nothing then.
    environment = {**given, "KMP_BLOCKTIME": "200", "OMP_NUM_THREADS": str(threads), **arm}
    with tempfile.TemporaryDirectory(prefix="threads-") as scratch, busy(is_busy):
        command = [sys.executable, __file__, "--cell", model, str(threads), str(workers), scratch]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} {cell}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def arms(spins: list[int]) -> dict[str, dict[str, str]]:
    """Return name -> environment of each arm."""
    return {
        "unset": {},
        "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        **{f"SPINCOUNT {number:,}": {"GOMP_SPINCOUNT": str(number)} for number in spins},
    }


def print_table(rounds: list[dict[str, Any]]) -> None:
    """Print a Markdown table: a row for each model, threads, workers and arm."""
    print("| model | threads | workers | arm | alone, images/s | / unset | busy, images/s | busy / alone |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    cells = dict.fromkeys(tuple(row["cell"]) for row in rounds)
    for cell in cells:
        own = [row for row in rounds if tuple(row["cell"]) == cell]
        for name in dict.fromkeys(row["arm"] for row in own):
            mine = {row["round"]: row for row in own if row["arm"] == name}
            unset = {row["round"]: row for row in own if row["arm"] == "unset"}
            alone = statistics.median(row["alone"] for row in mine.values())
            beside = statistics.median(row["busy"] for row in mine.values())
            to_unset = statistics.median(row["alone"] / unset[number]["alone"] for number, row in mine.items())
            to_alone = statistics.median(row["busy"] / row["alone"] for row in mine.values())
            model, threads, workers = cell
            print(
                f"| {model} | {threads} | {workers} | {name} | {alone:.1f} | {to_unset:.2f} | {beside:.1f} "
                f"| {to_alone:.2f} |"
            )


def main() -> None:
    if sys.argv[1:2] == ["--cell"]:
        model, threads, workers, scratch = sys.argv[2:]
        print(json.dumps(train(model, int(threads), int(workers), Path(scratch))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--spins", type=int, nargs="*", default=[0, 100, 1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append each run to this file, as a line")
    args = parser.parse_args()
    rows = []
    cells = [(model, threads, workers) for model in args.models for threads in args.threads for workers in args.workers]
    for number in range(args.rounds):
        for cell in cells:
            names = list(arms(args.spins))
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                row = {"round": number, "cell": cell, "arm": name}
                for kind in ("alone", "busy"):
                    row[kind] = run(arms(args.spins)[name], cell, is_busy=kind == "busy")
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                if args.json:
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "an unknown processor",
    )
    print(f"{datetime.now(UTC).date()}, {processor}, {len(os.sched_getaffinity(0))} cores")
    print_table(rows)


if __name__ == "__main__":
    main()
