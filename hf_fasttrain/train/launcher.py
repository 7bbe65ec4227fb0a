"""The number of processes that a launcher started, and the Accelerator of a Trainer."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.environment import get_int_from_env
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from hf_fasttrain.data.loading.loader import TrainLoader
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.launch_variables import PROCESSES, require_launch_variables


def num_processes() -> int:
    """Return the number of training processes on all machines together."""
    return max(1, get_int_from_env(PROCESSES, 1))


def uses_gpu() -> bool:
    """Return whether training runs on a GPU: one is available, and the launcher does not ask for the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def resolve_accelerator(
    user_accelerator: Accelerator | None, accumulation_steps: int, train_loader: Any
) -> Accelerator:
    """Return the user's Accelerator, or a new one for all launched processes.

    Under `torchrun` on a CPU, accelerate finds the other processes only with `cpu=True`. Raises RunError for an
    Accelerator that does not know the other processes (each would train its own model), and for variables of launchers
    that make no sense.
    """
    require_launch_variables()
    accelerator = user_accelerator or Accelerator(cpu=num_processes() > 1 and not uses_gpu())
    if accelerator.num_processes != num_processes():
        raise RunError(
            f"a launcher has started {num_processes()} processes, but the Accelerator knows of "
            f"{accelerator.num_processes}: each would train its own model; create it before using anything else of "
            "accelerate, on a CPU as Accelerator(cpu=True), or let Trainer create it"
        )
    steps = accelerator.gradient_accumulation_steps
    if steps not in (1, accumulation_steps) and not isinstance(train_loader, TrainLoader):
        raise RunError(
            f"accelerator: its gradient_accumulation_steps={steps} has no effect, since a batch of train_loader is a "
            f"complete step; pass accumulation_steps={steps} to split it into {steps} micro-batches"
        )
    return accelerator


def shared_data_note(name: str, loader: Any, processes: int) -> str | None:
    """Return a note on a DataLoader that gives each of several processes all images, else None."""
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if processes == 1 or type(sampler) not in (RandomSampler, SequentialSampler):
        return None
    return (
        f"{name}: its DataLoader gives each of {processes} processes all images of its dataset; unless the dataset is "
        "already this process's part, pass sampler=DistributedSampler(dataset) to it"
    )
