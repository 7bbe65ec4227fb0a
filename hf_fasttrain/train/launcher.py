"""How many processes a launcher has started, and an Accelerator that knows all of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.environment import get_int_from_env
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from hf_fasttrain.data.loading.loader import TrainLoader
from hf_fasttrain.utils.errors import RunError

# Variables of torchrun and accelerate first, then those of mpirun that accelerate knows.
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def num_processes() -> int:
    """Return the number of training processes on all machines together."""
    return max(1, get_int_from_env(PROCESSES, 1))


def uses_gpu() -> bool:
    """Return whether training runs on a GPU: one is available, and the launcher does not ask for the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def accelerator_for(given: Accelerator | None, accumulation_steps: int, train_loader: Any) -> Accelerator:
    """Return the given Accelerator, or a new one, which all launched processes share.

    Under `torchrun` accelerate looks for other processes on a CPU only if it is told that it is one. Raises RunError
    for an Accelerator that does not know the other processes: each would train a model of its own.
    """
    accelerator = given or Accelerator(cpu=num_processes() > 1 and not uses_gpu())
    if accelerator.num_processes != num_processes():
        raise RunError(
            f"a launcher has started {num_processes()} processes, and the Accelerator knows of "
            f"{accelerator.num_processes}: each would train a model of its own; make it before anything else of "
            "accelerate is used, on a CPU as Accelerator(cpu=True), or leave it to Trainer"
        )
    steps = accelerator.gradient_accumulation_steps
    if steps not in (1, accumulation_steps) and not isinstance(train_loader, TrainLoader):
        raise RunError(
            f"accelerator: its gradient_accumulation_steps={steps} has no effect, since a batch of train_loader is one "
            f"whole step; accumulation_steps={steps} splits it into {steps}"
        )
    return accelerator


def shared_data_note(name: str, loader: Any, processes: int) -> str | None:
    """Return a note on a DataLoader that gives every one of several processes all images, else None."""
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if processes == 1 or type(sampler) not in (RandomSampler, SequentialSampler):
        return None
    return (
        f"{name}: its DataLoader gives each of {processes} processes all images of its data set; unless that is "
        "this process's part already, give it sampler=DistributedSampler(dataset)"
    )
