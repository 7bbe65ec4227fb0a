"""Checks in a few minutes that everything that needs an NVIDIA GPU is correct, and then measures the speed.

    python benchmarks/gpu_check.py --out DIR [--minutes 6] [--only T3,T7] [--wheels FOLDER]
    python benchmarks/gpu_check.py --out DIR --plant T7,T8     whether planted defects are detected; `all`: every row
    python benchmarks/gpu_check.py --out DIR --dry-run         run on the CPU the rows that can

The rows are those of tests/gpu/gpu_rows.py: first those that decide whether the figures are valid, last
benchmarks/gpu.py with the remaining minutes. Each row's outcome is a line of DIR/results.jsonl, written as soon as it
is known; a second call with the same DIR skips green rows. Rows run in children of this process, which imports
everything and does not touch the GPU: a child that dies or hangs is one red row. Nothing is downloaded; `--wheels` is a
folder of benchmarks/gpu_wheels.sh, from which missing packages are installed into a temporary folder.

The exit status is 0 if no row is red; with --plant, if each planted defect has turned its row red.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "tests" / "gpu")) if folder not in sys.path]

from gpu_children import NO_TIME, Outcome, can_fork, import_everything, run_group
from gpu_packages import install_missing
from gpu_rows import BENCHMARK, BY_NAME, ROWS, Row

START_SECONDS, CHILD_SECONDS = 15, 5  # until everything is imported; until a child's first test
LEAST_BENCHMARK = 40  # seconds


class Results:
    """The outcomes in a folder: results.jsonl, and complete tracebacks in failures.txt."""

    def __init__(self, folder: Path, mode: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.mode = folder, mode
        self.path = folder / "results.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]

    def green(self) -> set[str]:
        """Return the rows that were green before, in the same mode."""
        ours = [line for line in self.lines if line.get("mode") == self.mode and "plant" not in line]
        return {line["row"] for line in ours if line["status"] == "green"}

    def about(self, facts: dict[str, Any]) -> None:
        """Write the conditions of the outcomes, unless they are already there."""
        if {"about": facts} not in self.lines:
            self._append({"about": facts})

    def add(self, outcome: Outcome, **more: Any) -> None:
        """Write an outcome and print it."""
        line = {"row": outcome.row, "mode": self.mode, "status": outcome.status, "seconds": round(outcome.seconds, 2)}
        error = {"error": outcome.error} if outcome.error else {}
        facts = {"facts": outcome.facts} if outcome.facts else {}
        self._append({**line, **more, **error, **facts})
        if outcome.text and "plant" not in more:
            with (self.folder / "failures.txt").open("a") as file:
                file.write(f"{'=' * 20} {outcome.row}: {outcome.status}\n{outcome.text}\n")
        first = outcome.error.splitlines()[:4] if outcome.status != "green" else []
        print(
            f"{outcome.row:<5} {outcome.status:<16} {outcome.seconds:6.1f} s  {BY_NAME[outcome.row].says}", flush=True
        )
        for text in first:
            print(f"          {text[:150]}", flush=True)

    def _append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Clock:
    """The time budget of a call."""

    def __init__(self, minutes: float) -> None:
        self.ends = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self.ends - time.monotonic()

    def limit(self, row: str) -> float:
        """Return how many seconds a row that starts now may take; 0 if it can't end in time."""
        if self.left < BY_NAME[row].seconds:
            return 0.0
        return min(BY_NAME[row].limit_seconds, self.left)


def chosen_rows(only: str) -> list[Row]:
    """Return the requested rows in their order; SystemExit for an unknown name."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise SystemExit(f"unknown row: {', '.join(unknown)}; allowed: {', '.join(BY_NAME)}")
    return [row for row in ROWS if not names or row.name in names]


def groups_of(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield the names of consecutive rows that share a process."""
    for _, group in groupby(rows, key=lambda row: row.group):
        yield [row.name for row in group]


def num_gpus() -> int:
    """Return the number of GPUs from the driver, without touching CUDA."""
    return _output("nvidia-smi", "-L").count("GPU ")


def print_plan(rows: Sequence[Row], green: set[str], minutes: float, *, gpus: int) -> None:
    """Print when each row would start on an H100, and which do not fit; without `gpus` what a CPU can run."""
    at, group = float(START_SECONDS), ""
    print(f"plan for {minutes:g} minutes; {START_SECONDS} s to import everything; times of one H100")
    for row in rows:
        note = ""
        if row.name in green:
            note = "green already"
        elif not gpus and not row.on_cpu:
            note = "needs a GPU"
        elif 0 < gpus < row.gpus:
            note = f"needs {row.gpus} GPUs"
        elif row.name == BENCHMARK:
            note = f"in the remaining {max(0.0, 60 * minutes - at):.0f} s"
        else:
            at += CHILD_SECONDS * (row.group != group)
            note = f"at {at:3.0f} s" if at + row.seconds <= 60 * minutes or not gpus else "no time left"
            at += row.seconds * (note != "no time left")
            group = row.group
        print(f"  {row.name:<5} {row.group:<13} {row.seconds:4.0f} s  {note:<22} {row.says}")


def run_rows(rows: Sequence[Row], results: Results, clock: Clock, *more: str, dry_run: bool, fork: bool) -> int:
    """Run rows and write their outcomes; return how many are red. `more`: options of the benchmark."""
    red = 0
    for names in groups_of(rows):
        outcomes = run_group(names, dry_run=dry_run, limit=clock.limit, fork=fork)
        if names == [BENCHMARK]:
            outcomes = iter([run_benchmark(results.folder, clock, *more, dry_run=dry_run)])
        for outcome in outcomes:
            results.add(outcome)
            red += outcome.status == "red"
    return red


def run_benchmark(folder: Path, clock: Clock, *more: str, dry_run: bool) -> Outcome:
    """Run the quick benchmark with `more` options in the remaining time; its table goes to gpu.json and gpu.txt."""
    seconds = clock.left - 10
    if seconds < LEAST_BENCHMARK:
        return Outcome(BENCHMARK, NO_TIME)
    table = folder / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--json", str(table)]
    command += ["--budget-seconds", str(int(seconds)), *(["--dry-run"] if dry_run else []), *more]
    start = time.monotonic()
    with (folder / "gpu.txt").open("w") as log:
        try:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds + 5).returncode
        except subprocess.TimeoutExpired:
            status = None
    elapsed = time.monotonic() - start
    last = "\n".join((folder / "gpu.txt").read_text().splitlines()[-6:])
    if status != 0:
        ending = "did not end in time" if status is None else f"ended with status {status}"
        return Outcome(BENCHMARK, "red", elapsed, f"benchmarks/gpu.py {ending}\n{last}", text=last)
    rows = json.loads(table.read_text())["rows"]
    failed = [f"{row['row']}: {row['status']}" for row in rows if row["status"].startswith(("failed", "out of memory"))]
    return Outcome(BENCHMARK, "red" if failed else "green", elapsed, "\n".join(failed), text="\n".join(failed))


def run_planted(rows: Sequence[Row], results: Results, clock: Clock, *, dry_run: bool, fork: bool) -> int:
    """Plant each defect of the rows and check that its row turns red; return how many were not detected."""
    from gpu_plants import PLANTS

    unseen = 0
    for row in rows:
        for plant in PLANTS.get(row.name, []):
            if not (plant.on_cpu and row.on_cpu if dry_run else plant.on_gpu):
                results.add(
                    Outcome(row.name, "skipped", error="needs a GPU" if dry_run else "CPU only"), plant=plant.name
                )
                continue
            planted = f"{row.name}/{plant.name}"
            for outcome in run_group([row.name], dry_run=dry_run, plant=planted, limit=clock.limit, fork=fork):
                seen = outcome.status == "red" and re.search(plant.says, outcome.error)
                outcome.status = {"green": "not seen", "red": "seen" if seen else "red by another"}.get(
                    outcome.status, outcome.status
                )
                unseen += not seen and outcome.status not in ("skipped", NO_TIME)
                results.add(outcome, plant=plant.name)
                print(f"          planted: {plant.name}", flush=True)
    return unseen


def describe(dry_run: bool) -> dict[str, Any]:
    """Return versions and GPU, without touching CUDA in this process."""
    import torch

    from hf_fasttrain.utils.environment import describe_versions

    facts = {
        **describe_versions(),
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }
    if not dry_run:
        facts["card"] = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return facts


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results (at most 4 files)")
    parser.add_argument("--minutes", type=float, default=6.0, help="time limit of the complete run")
    parser.add_argument("--only", default="", metavar="T3,T7", help="run only these rows")
    parser.add_argument(
        "--plant",
        default="",
        metavar="T7",
        help="plant the defects of these rows (without a value: of all) and expect them to fail",
    )
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU the rows that can")
    parser.add_argument("--cifar10", help="folder with CIFAR-10's parquet files, for benchmarks/gpu.py")
    parser.add_argument("--wheels", type=Path, help="folder of benchmarks/gpu_wheels.sh, for packages that are missing")
    return parser.parse_args()


def set_environment(*, dry_run: bool) -> None:
    """Set the environment of this process, its children and the programs that they start."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms; read when cuBLAS starts
    if dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> int:
    args = parse()
    rows, clock = chosen_rows(args.only or ("" if args.plant == "all" else args.plant)), Clock(args.minutes)
    if args.plant:
        rows = [row for row in rows if row.name != BENCHMARK]
    results = Results(args.out, "cpu" if args.dry_run else "gpu")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as site:
        missing = install_missing(args.wheels, Path(site))
        if missing:
            return 2
        set_environment(dry_run=args.dry_run)
        green = set() if args.plant else results.green()
        print_plan(rows, green, args.minutes, gpus=0 if args.dry_run else num_gpus())
        import_everything()
        import torch

        if not args.dry_run and not torch.cuda.device_count():
            print(
                "benchmarks/gpu_check.py needs an NVIDIA GPU, and PyTorch finds none here; see --dry-run",
                file=sys.stderr,
            )
            return 2
        fork = args.dry_run or can_fork()
        results.about({**describe(args.dry_run), "children": "forked" if fork else "started anew"})
        left = [row for row in rows if row.name not in green]
        if args.plant:
            failures = run_planted(left, results, clock, dry_run=args.dry_run, fork=fork)
        else:
            more = ("--cifar10", args.cifar10) if args.cifar10 else ()
            failures = run_rows(left, results, clock, *more, dry_run=args.dry_run, fork=fork)
    print_sum(results, rows, planted=bool(args.plant))
    return 1 if failures else 0


def print_sum(results: Results, rows: Sequence[Row], *, planted: bool) -> None:
    """Print how many rows, or planted defects, ended in which way."""
    last = {
        (line["row"], line.get("plant")): line["status"] for line in results.lines if line.get("mode") == results.mode
    }
    names = {row.name for row in rows}
    statuses = [status for (row, plant), status in last.items() if row in names and (plant is not None) == planted]
    print(", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses))), f"; {results.path}")


if __name__ == "__main__":
    sys.exit(main())
