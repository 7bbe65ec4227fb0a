"""The table of GPU tests: their order, files and durations. Imports nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME = re.compile(r"test_([tm])0*(\d+)(b?)_")


@dataclass(frozen=True)
class Row:
    """A row of the table. Its tests are the functions of `file` whose names begin with test_t07_ for T7.

    Rows of a group share a process. `seconds`: its approximate duration on one H100.
    """

    name: str
    says: str
    file: str
    group: str
    seconds: float
    on_cpu: bool = True  # whether it can run, at least in part, on a CPU
    gpus: int = 1

    @property
    def limit_seconds(self) -> float:
        """Time limit of the row."""
        return 20 + 3 * self.seconds


STEPS, FEEDS, MEMORY, RUNS, PROCESSES = (
    f"test_gpu_{name}.py" for name in ("steps", "feeds", "memory", "runs", "processes")
)
BENCHMARK = "T22"  # benchmarks/gpu.py, in the remaining time

# In the order in which they run: first the checks on which all measurements depend, long ones last.
ROWS = (
    Row("T14", "fp32 flags can be read; products are as precise as asked", STEPS, "first", 2),
    Row("T1", "a step does not wait for the GPU", STEPS, "first", 8),
    Row("T1b", "small copies don't wait for what is queued before them", FEEDS, "first", 3, on_cpu=False),
    Row("T2", "batches copied ahead are the host's bytes", FEEDS, "first", 8),
    Row("T3", "images kept on the GPU give the host's bytes", FEEDS, "first", 6),
    Row("T6", "fp16: overflow is skipped; no memory in the first forward", MEMORY, "first", 8),
    Row("T7", "micro-batches that don't fit are halved", MEMORY, "first", 12),
    Row("T8", "a first update without memory is undone and made again", MEMORY, "first", 5),
    Row("T4", "fp32 weights after 3 steps are a CPU's", STEPS, "second", 6),
    Row("T5", "gradients of 4 micro-batches are those of 1", STEPS, "second", 5),
    Row("T9", "evaluation without memory goes on in smaller batches", MEMORY, "second", 4),
    Row("T10", "checkpoints hold the live tensors; a resumed run ends alike", RUNS, "second", 14),
    Row("T11", "a moving average made before the model is moved follows it", STEPS, "second", 2),
    Row("T12", "activations are channels_last all the way", STEPS, "second", 8),
    Row("T15", "the share of time lost by waiting for data", FEEDS, "second", 5),
    Row("T16", "the stopwatch's phases add up to the step", RUNS, "second", 5),
    Row("T20", "the device has an index; dropout repeats after resume", STEPS, "second", 3),
    Row("T21", "peak_memory_bytes; images on the GPU up to their share", MEMORY, "second", 2),
    Row("T19", "which kernels run, launches, host and GPU time", RUNS, "second", 25),
    Row("T18", "one process over NCCL, two over gloo", PROCESSES, "processes", 40),
    Row("T17", "a study's arms stand still, go on, and leave memory", RUNS, "study", 35),
    Row("T13", "compiling: one shape after another, none left uncompiled", RUNS, "compile", 60),
    Row("M1", "2 processes over NCCL end with the weights of 1", PROCESSES, "several GPUs", 20, gpus=2),
    Row("M2", "one of 2 processes runs out of memory", PROCESSES, "several GPUs", 30, gpus=2),
    Row("M3", "a signal to one of 2 processes stops both, saved", PROCESSES, "several GPUs", 15, gpus=2),
    Row("M4", "own loaders of 2 processes: a step does not wait", PROCESSES, "several GPUs", 10, False, 2),
    Row(BENCHMARK, "benchmarks/gpu.py --quick", "", "benchmark", 165),
)
BY_NAME = {row.name: row for row in ROWS}


def row_of(function: str) -> str:
    """Return the name of a test function's row, "" if it has none."""
    match = NAME.match(function)
    return f"{match[1].upper()}{match[2]}{match[3]}" if match else ""
