"""CPU threads: the recipe's, the user's OMP_NUM_THREADS, or a share of the cores; launchers' defaults do not count."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from helpers.processes import run_processes

from hf_fasttrain import load_recipe
from hf_fasttrain.from_recipe import accelerator, auto
from hf_fasttrain.from_recipe.accelerator import build_accelerator, user_threads
from hf_fasttrain.from_recipe.auto import resolve_machine
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe

LAUNCHED = {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accelerator, auto):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 48)  # the host has more than we may use


def set_threads(recipe: Path, *overrides: str) -> tuple[int, str]:
    """Set the threads of a recipe; return their number and its origin."""
    loaded = load_recipe(recipe, overrides)
    settings = ResolvedSettings(loaded)
    accelerator._set_threads(resolve_machine(loaded, settings), settings)
    setting = settings.all()["accelerate.cpu_threads"]
    return setting.value, setting.origin


@pytest.mark.parametrize(
    ("value", "expected_threads"),
    [("3", 3), ("3,2", 3), (" 3 ", 3), (None, 2), ("", 2), ("0", 2), ("-1", 2), ("many", 2)],
)
def test_threads_are_omp_num_threads_or_the_number_of_cores(
    value: str | None, expected_threads: int, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    torch.set_num_threads(1)
    origin = "OMP_NUM_THREADS of the user" if expected_threads == 3 else "2 cores / 1 processes"
    assert set_threads(write_recipe()) == (expected_threads, f"default: {origin}")
    assert torch.get_num_threads() == expected_threads


def test_the_recipes_threads_take_precedence_over_omp_num_threads(write_recipe: Callable[..., Path]) -> None:
    assert set_threads(write_recipe(), "accelerate.cpu_threads=2") == (2, "override")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("number", "notes"), [(2, 0), (3, 1)])
def test_more_threads_than_cores_are_noted(number: int, notes: int, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), [f"accelerate.cpu_threads={number}"])
    settings = ResolvedSettings(recipe)
    accelerator._set_threads(recipe, settings)
    assert sum("on 2 cores" in note for note in settings.notes) == notes


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_processes_of_a_machine_share_its_cores(
    variable: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv(variable, "2")
    assert set_threads(write_recipe()) == (1, "default: 2 cores / 2 processes")


def start_waiting(words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that waits for input; its environment can be read only after its first output."""
    command = ["sh", "-c", "echo started; read line", *words]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("given", "flags", "exported", "expected_threads"),
    [
        ({}, [], "1", None),
        ({}, [], "48", None),  # physical cores of the host
        ({}, [], "7", None),
        ({"OMP_NUM_THREADS": "3"}, [], "3", 3),
        ({}, ["--num_cpu_threads_per_process=5"], "5", 5),
    ],
)
@pytest.mark.parametrize("between", [False, True])
def test_omp_num_threads_is_the_users_only_if_the_launcher_inherited_it(
    given: dict[str, str],
    flags: list[str],
    exported: str,
    expected_threads: int | None,
    between: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real processes act as the launcher and, like mpirun, as a process between the launcher and ours."""
    launched = {**LAUNCHED, "OMP_NUM_THREADS": exported}
    started = [(given, flags)] if not between else [(launched, []), (given, flags)]
    above = [start_waiting(words, env) for env, words in started]
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [psutil.Process(one.pid) for one in above])
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    try:
        assert user_threads() == expected_threads
    finally:
        for one in above:
            one.communicate(b"")


@pytest.mark.parametrize(("exported", "expected_threads"), [("1", None), ("48", None), ("5", 5)])
def test_known_defaults_of_launchers_are_recognised(
    exported: str, expected_threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: psutil.Process) -> dict[str, str]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "environ", refuse)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", exported)
    assert user_threads() == expected_threads


def threads_beside_accelerate(recipe: Path, omp_num_threads: str) -> tuple[int, int, str | None]:
    os.environ.pop("OMP_NUM_THREADS", None)
    loaded: Recipe = load_recipe(recipe, [f"accelerate.cpu_threads={omp_num_threads}"])
    settings = ResolvedSettings(loaded)
    built = build_accelerator(resolve_machine(loaded, settings), settings)
    assert settings.all()["accelerate.cpu_threads"].value == torch.get_num_threads()
    built.wait_for_everyone()  # the first process has the address at which they meet
    return built.num_processes, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize(("omp_num_threads", "expected_threads"), [("3", 3), ("auto", 1)])
def test_accelerate_does_not_overrule_threads_where_omp_num_threads_is_unset(
    omp_num_threads: str, expected_threads: int, write_recipe: object
) -> None:
    recipe = write_recipe()  # type: ignore[operator]
    for seen in run_processes(threads_beside_accelerate, recipe, omp_num_threads):
        assert seen == (2, expected_threads, None)
