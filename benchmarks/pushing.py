"""The cost of pushing while training: without a Hub, and with one that is fast, slow, or hangs.

    python benchmarks/pushing.py [RECIPE] [section.key=value ...] [--rounds 3] [--slow 4] [--json FILE]

Each side is `hf-fasttrain RECIPE` in its own process, with the tests' Hub on loopback in another. The sides take turns,
in a different order each round. A checkpoint is saved every `--every` steps on all sides, and pushed if there is a Hub.
The slow Hub accepts `--slow` MB/s; the one that hangs never answers an upload. Figures are medians over rounds, ratios
medians of the rounds' ratios:

images/s      of training steps (result.json), while uploads are running most of the time
pushed        commits that arrived during training and at the end
end           seconds from the last line of metrics.jsonl to the end of the process: waiting for the upload, which takes
              `hub.wait` if the Hub hangs
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.hub_server import TOKEN, Fault, Handler, running_hub

from hf_fasttrain.hub.worker import lower_priority

SIDES = ("no Hub", "quick", "slow", "hangs")
BLOCK = 1 << 16


class _SlowFile:
    """Reads at a limited number of bytes per second."""

    def __init__(self, file: Any, rate: float) -> None:
        self.file, self.rate = file, rate

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0:
            part = self.file.read(min(size, BLOCK))
            parts.append(part)
            size -= len(part)
            time.sleep(len(part) / self.rate)
        return b"".join(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def serve(pipe: Any, side: str, rate: float) -> None:
    """Run a Hub until it is told to stop, then send the number of its commits. It has low priority."""
    lower_priority()
    with running_hub() as hub:
        if side == "hangs":
            hub.faults = [Fault("PUT /storage", times=10**6, kind="hang")]
        if side == "slow":
            ordinary = Handler.setup

            def slow(self: Handler) -> None:
                ordinary(self)
                reads: Any = _SlowFile(self.rfile, rate)
                self.rfile = reads

            Handler.setup = slow  # type: ignore[assignment,method-assign]
        pipe.send(hub.url)
        pipe.recv()
        pipe.send(sum(len(repo.commits) for repo in hub.repos.values()))


def train(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train once and return its figures."""
    run, env = folder / "run", {**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "hf_fasttrain", arguments.recipe, *arguments.overrides, f"output_dir={run}"]
    command += [f"checkpoint.every={arguments.every} steps", "log.report=false", "evaluate.every=1000000 steps"]
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs, side, arguments.slow * 1e6))
    server.start()
    env |= {"HF_ENDPOINT": ours.recv(), "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    if side != "no Hub":
        hub = f"{{repo: me/bench, every: {arguments.every} steps, wait: {arguments.wait} minutes}}"
        command += [f"hub={hub}"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    ended = time.time()
    if process.returncode:
        sys.exit(f"{side}: the training ended with {process.returncode}:\n{process.stdout}{process.stderr}")
    ours.send("stop")
    pushed = ours.recv()
    server.join()
    result = json.loads((run / "result.json").read_text())
    last = (run / "metrics.jsonl").stat().st_mtime
    return {"images/s": result["images_per_second"], "pushed": pushed, "end": ended - last}


def main() -> None:
    """Measure all sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--slow", type=float, default=4.0, help="MB/s")
    parser.add_argument("--wait", type=float, default=0.5, help="hub.wait in minutes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in (*SIDES[number % 4 :], *SIDES[: number % 4]):
            with tempfile.TemporaryDirectory() as folder:
                rows[side].append(train(side, arguments, Path(folder)))
            print(f"round {number + 1}, {side}: {rows[side][-1]}", file=sys.stderr)
    print("| Hub | images/s | / no Hub (min - max) | pushed | end, s |\n| --- | ---: | ---: | ---: | ---: |")
    for side, side_rows in rows.items():
        ratios = [row["images/s"] / base["images/s"] for row, base in zip(side_rows, rows["no Hub"], strict=True)]
        medians = {key: statistics.median(row[key] for row in side_rows) for key in side_rows[0]}
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"| {side} | {medians['images/s']:.1f} | {spread} | {medians['pushed']:.0f} | {medians['end']:.1f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
