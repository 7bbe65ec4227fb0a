"""Collective operations on several processes and on one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from helpers.processes import run_processes
from helpers.runs import exit_status

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.report.callback import Publish
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.utils.errors import RunError, Stopped


def collective_results() -> dict[str, Any]:
    processes = Processes(Accelerator(cpu=True))
    processes.wait()
    number = torch.tensor(2.0 * processes.index)
    return {
        "main": (processes.is_main, processes.is_local_main),
        "gathered": processes.gather([processes.index, "said"]),
        "from_local_main": processes.from_local_main({"index": processes.index}),
        "sum": processes.reduce_sum(number).item(),
        "mean": processes.mean(number).item(),
        "largest": processes.largest(processes.index, -processes.index),
        "any": processes.any_process(processes.index == 1),
        "kept": number.item(),
    }


def test_collectives_work_with_one_process() -> None:
    assert collective_results() == {
        "main": (True, True), "gathered": [0, "said"], "from_local_main": {"index": 0}, "sum": 0, "mean": 0,
        "largest": [0, 0], "any": False, "kept": 0,
    }  # fmt: skip


def test_collectives_agree_on_several_processes() -> None:
    first, second = run_processes(collective_results)
    assert (first["main"], second["main"]) == ((True, True), (False, False))
    assert (first["kept"], second["kept"]) == (0, 2)  # sums must be new tensors
    for process in (first, second):
        assert {name: process[name] for name in process if name not in ("main", "kept")} == {
            "gathered": [0, "said", 1, "said"], "from_local_main": {"index": 0}, "sum": 2, "mean": 1,
            "largest": [1, 0], "any": True,
        }  # fmt: skip


def stop_at_once(trainer: Trainer, step: Step) -> torch.Tensor:
    if trainer.processes.is_main:
        os.kill(os.getpid(), signal.SIGTERM)
    loss = trainer.step.gradients(step)
    trainer.step.update()
    return loss


def fail(trainer: Trainer, step: Step) -> torch.Tensor:
    raise RunError("planted")


def run_command(arguments: list[str]) -> dict[str, Any]:
    """Return how and when a command ended in this process."""
    status, ended_at = exit_status(arguments), time.monotonic()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads = [name for name in names if "gloo" in name]
    return {"status": status, "when": ended_at, "threads": threads, "group": dist.is_initialized()}


ENDS: dict[str, tuple[Callable[..., torch.Tensor] | None, int]] = {
    "finished": (None, 0),
    "stopped": (stop_at_once, Stopped.RESUMABLE),
    "failed": (fail, RunError.status),
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads")
@pytest.mark.parametrize("ending", ENDS)
def test_processes_end_together_and_leave_no_thread_of_their_group(
    ending: str, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that drops a tensor while the interpreter is shutting down would abort the process."""
    train_step, status = ENDS[ending]
    published = tmp_path / "published"

    def publish(self: Publish, *arguments: Any) -> None:
        time.sleep(1.0)
        published.write_text(str(time.monotonic()))

    monkeypatch.setattr(Publish, "publish", publish)
    if train_step is not None:
        monkeypatch.setattr(Trainer, "train_step", train_step)
    command = [str(write_recipe()), "data.eval_fraction=0.02", "log.report=true", f"output_dir={tmp_path / 'run'}"]
    processes = run_processes(run_command, command)
    for process in processes:
        assert (process["status"], process["threads"], process["group"]) == (status, [], False)
    if ending == "finished":
        assert min(process["when"] for process in processes) > float(published.read_text())
