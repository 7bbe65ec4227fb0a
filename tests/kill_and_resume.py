"""Kills trainings by SIGKILL at random moments, resumes them, and compares the results with uninterrupted ones.

    python tests/kill_and_resume.py [--kills 8] [--seed 0] [--only NAME]

Every kind of run below is trained once without a stop, and once killed `--kills` times: at a random moment, or a
random moment after a checkpoint began to be written. All files of tensors of the last checkpoint (weights, moving
average, optimizer, loss) and of the model folder must be the same bytes. `test_resume.py` runs a short form of it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

RECIPE = """
model: {name: test_vit, drop_path: 0.1, args: {drop_rate: 0.1}}
data: {dataset: digits, image_size: 32, eval_fraction: 0.05, workers: 0, cache: none}
augment: {mixup: 0.5, cutmix: 0.5, erase: 0.2}
train: {duration: 24 steps, batch_size: 16}
accelerate: {gradient_accumulation_steps: 2, mixed_precision: "no"}
ema: {decay: 0.9}
evaluate: {every: 6 steps}
checkpoint: {every: 2 steps}
log: {every: 1, report: false}
"""
WITH_LOSS = "a loss with weights and a teacher"
KINDS: dict[str, tuple[int, list[str]]] = {  # name -> processes, overrides
    "plain": (1, []),
    "two workers": (1, ["data.workers=2"]),
    "two workers, cache in memory": (1, ["data.workers=2", "data.cache=memory"]),
    "cache on disk": (1, ["data.cache=disk"]),
    "batch norm": (1, ["model.name=test_resnet", "model.args={}", "model.drop_path=0"]),
    "bf16": (1, ["accelerate.mixed_precision=bf16"]),
    "bf16, two workers": (1, ["accelerate.mixed_precision=bf16", "data.workers=2"]),
    "every step saved": (1, ["checkpoint.every=1 step"]),
    "two processes with two workers": (2, ["data.workers=2"]),
    "two processes, batch norm, bf16": (
        2,
        ["model.name=test_resnet", "model.args={}", "model.drop_path=0", "accelerate.mixed_precision=bf16"],
    ),
    WITH_LOSS: (1, ["data.workers=2"]),
    f"two processes, {WITH_LOSS}": (2, ["data.workers=2"]),
}


@dataclass
class Report:
    """What happened to a run."""

    kills: int = 0
    while_writing: int = 0  # kills that left an incomplete checkpoint
    resumed_from: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


def import_everything() -> None:
    """Import what a training needs, so that forked children start at once; one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import conftest  # noqa: F401
    import datasets  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import transformers  # noqa: F401

    import hf_fasttrain.from_recipe.parts  # noqa: F401


def start(recipe: Path, kind: str, overrides: Sequence[str], log: Path, *, resume: bool) -> list[int]:
    """Fork processes that train and return their ids; they start at once, since everything is imported."""
    from helpers.processes import free_port

    port, processes = free_port(), KINDS[kind][0]
    return [_fork(recipe, kind, overrides, rank, port, log, resume) for rank in range(processes)]


def _fork(recipe: Path, kind: str, overrides: Sequence[str], rank: int, port: int, log: Path, resume: bool) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        from helpers.momentum_loss import MomentumLoss
        from helpers.processes import join_processes, reset_accelerate

        from hf_fasttrain import Trainer

        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, 1)
        os.dup2(written, 2)
        reset_accelerate()
        if KINDS[kind][0] > 1:
            join_processes(rank, KINDS[kind][0], port)
        parts = {"step_loss": MomentumLoss()} if WITH_LOSS in kind else {}
        Trainer.from_recipe(recipe, list(overrides), resume=resume, **parts).fit()
        status = 0
    except BaseException:  # noqa: BLE001 - shown in the log
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def poll(child: int) -> int | None:
    """Return the exit status of a process, None if it still runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def finish(children: list[int], log: Path) -> None:
    """Wait for processes, which must succeed."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * len(children), f"{statuses}\n{log.read_text()[-3000:]}"


def kill(children: list[int], rng: random.Random) -> None:
    """Kill processes, at once or shortly after one another."""
    for child in rng.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
        time.sleep(rng.choice([0.0, 0.05]))
    for child in children:
        os.waitpid(child, 0)


def kill_after(children: list[int], seconds: float, due: Callable[[], bool], rng: random.Random, log: Path) -> bool:
    """Kill the processes `seconds` after `due` is true; return False if they ended before."""
    due_at: float | None = None
    while due_at is None or time.monotonic() - due_at < seconds:
        if due_at is None and due():
            due_at = time.monotonic()
        if (status := poll(children[0])) is not None:
            assert status == 0, f"exit status {status}\n{log.read_text()[-3000:]}"
            for child in children[1:]:
                os.waitpid(child, 0)
            return False
        time.sleep(0.0005)
    kill(children, rng)
    return True


def train_with_kills(name: str, folder: Path, kills: int, seed: int, steps: int = 24) -> Report:
    """Train a kind of run without and with kills; return what happened and which files differ."""
    recipe, log, rng = folder / "recipe.yaml", folder / "log.txt", random.Random(f"{name} {seed}")
    recipe.write_text(RECIPE)
    overrides = [f"train.duration={steps} steps", f"data.cache_dir={folder / 'cache'}", *KINDS[name][1]]
    plain_run, killed_run = folder / "whole", folder / "cut"
    began = time.monotonic()
    finish(start(recipe, name, [*overrides, f"output_dir={plain_run}"], log, resume=False), log)
    duration = time.monotonic() - began
    report, checkpoints = Report(), killed_run / "checkpoints"
    while report.kills < kills:
        children = start(recipe, name, [*overrides, f"output_dir={killed_run}"], log, resume=killed_run.exists())
        if rng.random() < 0.5:
            killed = kill_after(children, rng.uniform(0.3, 0.9) * duration, lambda: True, rng, log)
        else:  # a random moment of writing a random checkpoint
            first = max(steps_of(checkpoints, "step_*"), default=0) + rng.randint(1, steps // 3)
            killed = kill_after(children, rng.uniform(0, 0.01), partial(is_writing, checkpoints, first), rng, log)
        report.while_writing += bool(steps_of(checkpoints, ".step_*.partial"))
        report.kills += killed
        if not killed:  # it finished; start another one
            report.differing += differing(plain_run, killed_run, steps)
            shutil.rmtree(killed_run)
    finish(start(recipe, name, [*overrides, f"output_dir={killed_run}"], log, resume=killed_run.exists()), log)
    report.resumed_from = [int(step) for step in re.findall(r"resumed from \S*: step (\d+) of", log.read_text())]
    report.differing += differing(plain_run, killed_run, steps)
    return report


def steps_of(checkpoints: Path, pattern: str) -> list[int]:
    """Return the steps of the checkpoint folders that match a pattern."""
    return [int(re.sub(r"\D", "", path.name)) for path in checkpoints.glob(pattern)]


def is_writing(checkpoints: Path, first: int) -> bool:
    """Return whether a checkpoint of step `first` or later is being written."""
    return max(steps_of(checkpoints, ".step_*.partial"), default=0) >= first


def differing(plain_run: Path, killed_run: Path, steps: int) -> list[str]:
    """Return the tensor files that differ between two runs."""
    last = f"checkpoints/step_{steps:08d}"
    names = ["model/model.safetensors", *(f"{last}/{kind}.safetensors" for kind in ("model", "ema", "training"))]
    names += [f"{last}/loss.safetensors"] * (plain_run / last / "loss.safetensors").exists()
    return [name for name in names if (plain_run / name).read_bytes() != (killed_run / name).read_bytes()]


def main() -> None:
    """Test every kind of run and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    options = parser.parse_args()
    import_everything()
    total = writing = wrong = 0
    for name in [options.only] if options.only else list(KINDS):
        with tempfile.TemporaryDirectory() as folder:
            report = train_with_kills(name, Path(folder), options.kills, options.seed)
        total, writing = total + report.kills, writing + report.while_writing
        wrong += bool(report.differing)
        outcome = f"DIFFERS: {', '.join(report.differing)}" if report.differing else "the same bytes"
        print(
            f"{name:34} {report.kills:3} kills, {report.while_writing:2} of them while writing a checkpoint, "
            f"resumed from steps {report.resumed_from}: {outcome}",
            flush=True,
        )
    print(f"{total} kills, {writing} while a checkpoint was being written, {wrong} kinds of run that differ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
