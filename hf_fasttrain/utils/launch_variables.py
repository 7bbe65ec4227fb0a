"""The variables by which a launcher tells each process which one of how many it is.

They may be left over from another job, or be set by a scheduler for something else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hf_fasttrain.utils.errors import RunError, shown

# Of torchrun and accelerate first, then those of mpirun; accelerate takes the first one that is set.
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_NUMBERS = (*PROCESSES, *LOCAL_PROCESSES, *_RANKS, *_LOCAL_RANKS, "MASTER_PORT")
_ADVICE = "start the processes with torchrun or accelerate launch, or unset {} to train in one process"


def require_launch_variables() -> None:
    """Raise RunError if variables of launchers are no numbers, or can't be those of one job: nothing could start."""
    for name in _NUMBERS:
        value = os.environ.get(name, "0")
        if not value.removeprefix("-").isdecimal():
            raise RunError(f"variable {name} is {shown(value)}: launchers set it to a whole number; unset it")
    size, rank, local = _first(PROCESSES, 1), _first(_RANKS, 0), _first(LOCAL_PROCESSES, 1)
    if rank >= max(1, size):
        raise RunError(f"variables say that this is process {rank} of {size}, counted from 0; {_advice(_RANKS)}")
    if size > 1 and local != size and not os.environ.get("MASTER_ADDR"):
        raise RunError(
            f"variables say that {size} processes train together, but not where to meet (MASTER_ADDR); "
            f"{_advice(PROCESSES)}"
        )


def _first(names: Sequence[str], default: int) -> int:
    """Return the first number that is set and not negative, as accelerate does."""
    found = (int(os.environ[name]) for name in names if name in os.environ)
    return next((number for number in found if number >= 0), default)


def _advice(names: Sequence[str]) -> str:
    return _ADVICE.format(next((name for name in names if name in os.environ), names[0]))
