"""Threads on a CPU: the recipe's, the user's OMP_NUM_THREADS, or a share of the cores; launchers' own are no wish."""

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
    monkeypatch.setattr(auto, "num_cores", lambda: 2)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 48)  # the host has more than we may use


def set_threads(recipe: Path, *overrides: str) -> tuple[int, str]:
    """Set the threads of a recipe; return their number, and where it came from."""
    loaded = load_recipe(recipe, overrides)
    settings = ResolvedSettings(loaded)
    accelerator._set_threads(resolve_machine(loaded, settings))
    setting = settings.all()["accelerate.cpu_threads"]
    return setting.value, setting.origin


@pytest.mark.parametrize(
    ("value", "found"),
    [("3", 3), ("3,2", 3), (" 3 ", 3), (None, 2), ("", 2), ("0", 2), ("-1", 2), ("many", 2)],
)
def test_threads_are_those_of_omp_num_threads_or_the_cores(
    value: str | None, found: int, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    torch.set_num_threads(1)
    why = "OMP_NUM_THREADS of the user" if found == 3 else "2 cores / 1 processes"
    assert set_threads(write_recipe()) == (found, f"default: {why}")
    assert torch.get_num_threads() == found


def test_the_recipes_threads_go_before_omp_num_threads(write_recipe: Callable[..., Path]) -> None:
    assert set_threads(write_recipe(), "accelerate.cpu_threads=2") == (2, "override")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_processes_of_a_machine_share_its_cores(
    variable: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv(variable, "2")
    assert set_threads(write_recipe()) == (1, "default: 2 cores / 2 processes")


def start_waiting(words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that waits for input; before its first output, its environment could not be read yet."""
    command = ["sh", "-c", "echo started; read line", *words]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("given", "flags", "exported", "found"),
    [
        ({}, [], "1", None),
        ({}, [], "48", None),  # physical cores of the host
        ({}, [], "7", None),
        ({"OMP_NUM_THREADS": "3"}, [], "3", 3),
        ({}, ["--num_cpu_threads_per_process=5"], "5", 5),
    ],
)
@pytest.mark.parametrize("between", [False, True])
def test_what_a_launcher_exports_is_the_users_only_if_the_launcher_had_it_from_there(
    given: dict[str, str],
    flags: list[str],
    exported: str,
    found: int | None,
    between: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real processes stand for the launcher and for one, like mpirun, that it starts ours by."""
    launched = {**LAUNCHED, "OMP_NUM_THREADS": exported}
    started = [(given, flags)] if not between else [(launched, []), (given, flags)]
    above = [start_waiting(words, env) for env, words in started]
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [psutil.Process(one.pid) for one in above])
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    try:
        assert user_threads() == found
    finally:
        for one in above:
            one.communicate(b"")


@pytest.mark.parametrize(("exported", "found"), [("1", None), ("48", None), ("5", 5)])
def test_where_the_launcher_can_not_be_looked_at_its_own_choices_are_known(
    exported: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: psutil.Process) -> dict[str, str]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "environ", refuse)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", exported)
    assert user_threads() == found


def threads_beside_accelerate(recipe: Path, wish: str) -> tuple[int, int, str | None]:
    os.environ.pop("OMP_NUM_THREADS", None)
    loaded: Recipe = load_recipe(recipe, [f"accelerate.cpu_threads={wish}"])
    settings = ResolvedSettings(loaded)
    built = build_accelerator(resolve_machine(loaded, settings), settings)
    assert settings.all()["accelerate.cpu_threads"].value == torch.get_num_threads()
    built.wait_for_everyone()  # the first process has what they meet by
    return built.num_processes, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize(("wish", "found"), [("3", 3), ("auto", 1)])
def test_accelerate_does_not_overrule_threads_where_omp_num_threads_is_unset(
    wish: str, found: int, write_recipe: object
) -> None:
    recipe = write_recipe()  # type: ignore[operator]
    for seen in run_processes(threads_beside_accelerate, recipe, wish):
        assert seen == (2, found, None)
