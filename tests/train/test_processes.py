"""What several training processes ask each other, and one alone itself."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from helpers.processes import run_processes

from hf_fasttrain.train.distributed import Processes


def asked() -> dict[str, Any]:
    processes = Processes(Accelerator(cpu=True))
    processes.wait()
    number = torch.tensor(2.0 * processes.index)
    return {
        "main": (processes.is_main, processes.is_local_main),
        "gathered": processes.gather([processes.index, "said"]),
        "from_local_main": processes.from_local_main({"index": processes.index}),
        "sum": processes.add_up(number).item(),
        "mean": processes.mean(number).item(),
        "largest": processes.largest(processes.index, -processes.index),
        "any": processes.any_process(processes.index == 1),
        "kept": number.item(),
    }


def test_one_process_answers_itself() -> None:
    assert asked() == {
        "main": (True, True), "gathered": [0, "said"], "from_local_main": {"index": 0}, "sum": 0, "mean": 0,
        "largest": [0, 0], "any": False, "kept": 0,
    }  # fmt: skip


def test_several_processes_agree() -> None:
    first, second = run_processes(asked)
    assert (first["main"], second["main"]) == ((True, True), (False, False))
    assert (first["kept"], second["kept"]) == (0, 2)  # sums are new tensors
    for process in (first, second):
        assert {name: process[name] for name in process if name not in ("main", "kept")} == {
            "gathered": [0, "said", 1, "said"], "from_local_main": {"index": 0}, "sum": 2, "mean": 1,
            "largest": [1, 0], "any": True,
        }  # fmt: skip
