"""How OpenMP's threads should wait: images/s alone, and next to a process that keeps one core busy.

    python benchmarks/threads.py [--models test_vit ...] [--threads 1 2] [--workers 0 2] [--rounds 3] [--json FILE]
    python benchmarks/threads.py --table FILE

An idle OpenMP thread spins for a while before it sleeps. Spinning is fastest if every thread has its own core; if
another process needs the core, spinning takes time from the thread that is waited for. libgomp, which PyTorch's wheels
for Linux include, reads from the environment how long to spin when torch is loaded.

arms: unset, OMP_WAIT_POLICY=PASSIVE, and GOMP_SPINCOUNT of --spins. Each is a process that has loaded torch with its
environment and trains cells (model, threads, workers) on the handwritten digits as `hf-fasttrain ablate` does, with a
new `Trainer.fit` in each round: first alone, then next to a process that counts. The small model has 4 micro-batches
per step. In each round all arms train a cell one after the other, in a different order each time. Ratios are medians
of the rounds' ratios: alone / unset alone, and busy / the same arm alone.

The load of other programs is measured: a turn in which they took more than a tenth of a core is repeated, and left out
of the table if no attempt was better. With --json, runs are appended to a file, so that a table can be measured in
parts; --table prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SIZES = {"test_vit": (160, 32, 4), "resnet50": (64, 16, 1), "tf_efficientnet_lite0": (96, 16, 1)}  # px, batch, pieces
QUIET = 0.1  # cores that other programs may take during a turn
TRIES = 3  # turns, until one is quiet
Cell = tuple[str, int, int]  # model, threads, workers
Row = dict[str, Any]


def overrides(cell: Cell) -> list[str]:
    """Return the recipe overrides of a cell."""
    model, threads, workers = cell
    size, batch, pieces = SIZES[model]
    values = {
        "model.name": model,
        "data.image_size": size,
        "data.workers": workers,
        "data.cache": "none",
        "train.batch_size": batch,
        "accelerate.gradient_accumulation_steps": pieces,
        "accelerate.cpu_threads": threads,
    }
    return [f"{key}={value}" for key, value in values.items()]


def serve() -> None:
    """Train the cells requested on stdin, with torch loaded in this process's environment."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the training's messages
    for line in sys.stdin:
        cell, seconds = json.loads(line)
        print(json.dumps(train(cell, seconds)), file=answers, flush=True)


def train(cell: Cell, seconds: float) -> Row:
    """Return images/s of a training alone and next to a busy process, and the cores that other programs took."""
    from hf_fasttrain import load_recipe
    from hf_fasttrain.study.messages import Report, Turn, to_arm_request
    from hf_fasttrain.study.trial import Trial

    row: Row = {}
    turn, others, tries = Turn(min_steps=3, seconds=seconds), Others(), 0
    with ExitStack() as stack:

        def next_turn(report: Report | None) -> Turn | None:
            nonlocal tries
            if report is None:
                return Turn(min_steps=4, seconds=1.0, drain=True)
            if tries:
                kind, taken = ("busy" if "alone" in row else "alone"), others.taken()
                if taken <= QUIET or tries == TRIES:
                    row.update({kind: report.images / report.seconds, f"others_{kind}": taken})
                    tries = 0
                    if kind == "busy":
                        return None
                    stack.enter_context(busy())
            tries += 1
            others.watch()
            return turn

        Trial(to_arm_request(load_recipe("quickstart", overrides(cell)))).run(next_turn)
    return row


class Others:
    """Measures how many cores other programs take, including a virtual machine's neighbours."""

    def watch(self) -> None:
        """Start to measure."""
        self._began, self._used = time.perf_counter(), self._seconds()

    def taken(self) -> float:
        """Return the cores that others have taken since `watch`."""
        return (self._seconds() - self._used) / (time.perf_counter() - self._began)

    @staticmethod
    def _seconds() -> float:
        """Return the processor time of everything but this process and those that it has started."""
        used, me = psutil.cpu_times(), psutil.Process()
        own = [process.cpu_times() for process in (me, *me.children(recursive=True))]
        return used.user + used.nice + used.system + used.steal - sum(times.user + times.system for times in own)


class Server:
    """A process that has loaded torch with an arm's environment."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        # KMP_BLOCKTIME, which libgomp does not read, says that the user has decided: the package sets nothing then.
        settings = {**inherited, "KMP_BLOCKTIME": "200", **environment}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, cell: Cell, seconds: float) -> Row:
        """Return the result of `train` in that process; SystemExit if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([cell, seconds]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: exit status {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def busy() -> Iterator[None]:
    """Keep a core busy with a process that counts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)  # it has started
        yield
    finally:
        process.kill()
        process.wait()


def arms(spins: Sequence[int]) -> dict[str, dict[str, str]]:
    """Return name -> environment of each arm."""
    return {
        "unset": {},
        "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        **{f"SPINCOUNT {number:,}": {"GOMP_SPINCOUNT": str(number)} for number in spins},
    }


def print_table(rows: list[Row]) -> None:
    """Print a Markdown table: a row for each model, threads, workers and arm."""
    import torch

    from hf_fasttrain.utils.environment import (
        describe_machine,  # not above: the arms load torch with their own environment
    )

    machine = describe_machine(torch.device("cpu"), 1)
    quiet = [row for row in rows if max(row["others_alone"], row["others_busy"]) <= QUIET]
    print(f"{datetime.now(UTC).date()}, {machine['processor']}, {machine['cores']} cores; ", end="")
    print(f"{len(rows) - len(quiet)} of {len(rows)} runs excluded: other programs used more than {QUIET} of a core\n")
    print("| model | threads | workers | arm | rounds | alone, images/s | / unset | busy, images/s | busy / alone |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for cell in dict.fromkeys(tuple(row["cell"]) for row in quiet):
        own = [row for row in quiet if tuple(row["cell"]) == cell]
        for name in sorted({row["arm"] for row in own}, key=position):
            print_row(cell, name, own)


def print_row(cell: Sequence[Any], name: str, rows: list[Row]) -> None:
    """Print an arm's medians, and those of its ratios to the rounds' `unset`."""
    arm_rows = [row for row in rows if row["arm"] == name]
    unset = {row["round"]: row["alone"] for row in rows if row["arm"] == "unset"}
    ratios = [row["alone"] / unset[row["round"]] for row in arm_rows if row["round"] in unset]
    to_unset = f"{statistics.median(ratios):.2f}" if ratios else ""
    alone, busy = (statistics.median(row[kind] for row in arm_rows) for kind in ("alone", "busy"))
    to_alone = statistics.median(row["busy"] / row["alone"] for row in arm_rows)
    cells = [*cell, name, len(arm_rows), f"{alone:.1f}", to_unset, f"{busy:.1f}", f"{to_alone:.2f}"]
    print(f"| {' | '.join(map(str, cells))} |")


def position(arm: str) -> int:
    """Return an arm's position in the table."""
    return {"unset": -2, "PASSIVE": -1}.get(arm) or int(arm.split()[-1].replace(",", ""))


def run(args: argparse.Namespace) -> list[Row]:
    """Return the rows of all cells and rounds."""
    rows = []
    cells = [(model, threads, workers) for model in args.models for threads in args.threads for workers in args.workers]
    with ExitStack() as stack:
        servers = [Server(name, environment) for name, environment in arms(args.spins).items()]
        for server in servers:
            stack.callback(server.close)
        for cell in cells * args.rounds:
            number = time.time()
            for server in random.sample(servers, len(servers)):
                row = {"round": number, "cell": cell, "arm": server.name, **server.train(cell, args.seconds)}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                if args.json:
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--spins", type=int, nargs="*", default=[0, 100, 1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="minimum length of a turn")
    parser.add_argument("--json", type=Path, help="append each run to this file, as a line")
    parser.add_argument("--table", type=Path, help="only print the table of a file written by --json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
    elif args.table:
        print_table([json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()])
    else:
        print_table(run(args))


if __name__ == "__main__":
    main()
