"""The GPU tests, checked on a CPU: their table, processes and results, and that planted defects are detected."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import GPU_FOLDER, pytest_ignore_collect

sys.path += [str(GPU_FOLDER), str(GPU_FOLDER.parent.parent / "benchmarks")]

import gpu_check
import gpu_packages
from gpu_children import NO_TIME, Outcome, run_group
from gpu_plants import PLANTS, Plant
from gpu_rows import BENCHMARK, ROWS, row_of


def test_each_test_has_a_row_and_each_row_has_tests_and_defects() -> None:
    rows = set()
    for path in GPU_FOLDER.glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            (row,) = [row for row in ROWS if row.name == row_of(name)]
            assert row.file == path.name
            rows.add(row.name)
    assert rows == {row.name for row in ROWS} - {BENCHMARK}
    assert PLANTS.keys() == rows
    for row in ROWS:
        if row.on_cpu and row.name != BENCHMARK:
            assert any(plant.on_cpu for plant in PLANTS[row.name]), row.name


def test_decisive_rows_run_first_and_the_benchmark_last() -> None:
    names = [row.name for row in ROWS]
    assert names[:8] == ["T14", "T1", "T1b", "T2", "T3", "T6", "T7", "T8"]
    assert names[-1] == BENCHMARK
    assert {f"T{number}" for number in range(1, 23)} <= set(names)


def test_ordinary_runs_skip_gpu_tests() -> None:
    assert pytest_ignore_collect(GPU_FOLDER) is True
    assert pytest_ignore_collect(GPU_FOLDER.parent / "test_cli.py") is None


def planted(row: str, name: str) -> Outcome:
    (outcome,) = run_group([row], dry_run=True, plant=f"{row}/{name}")
    return outcome


QUICK = ["T8", "T9", "T11"]


def test_rows_are_green_on_a_cpu() -> None:
    assert {o.row: (o.status, o.error) for o in run_group(QUICK, dry_run=True)} == dict.fromkeys(QUICK, ("green", ""))


@pytest.mark.parametrize(
    ("row", "plant"),
    [(row, plant) for row in ("T2", "T7", "T11") for plant in PLANTS[row] if plant.on_cpu],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_planted_defects_are_detected(row: str, plant: Plant) -> None:
    outcome = planted(row, plant.name)
    assert outcome.status == "red"
    assert re.search(plant.says, outcome.error)


def test_a_row_that_dies_or_hangs_is_red_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_process(patch: pytest.MonkeyPatch) -> None:
        if not os.fork():  # like a loader process, it holds the pipe to the parent
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(patch: pytest.MonkeyPatch) -> None:
        time.sleep(60)

    monkeypatch.setitem(PLANTS, "T11", [Plant("dies", exit_process, ""), Plant("hangs", hang, "")])
    outcomes = list(run_group(["T8", "T11", "T9"], dry_run=True, plant="T11/dies"))
    assert [(o.row, o.status) for o in outcomes] == [("T8", "green"), ("T11", "red"), ("T9", "green")]
    assert outcomes[1].error.startswith("the process ended (signal SIGKILL)")
    limits = {"T8": 20.0, "T11": 0.5}
    monkeypatch.setattr("gpu_rows.Row.limit_seconds", 0.5)
    outcomes = list(run_group(["T8", "T11"], dry_run=True, plant="T11/hangs", limit=limits.__getitem__))
    assert [(o.row, o.status) for o in outcomes] == [("T8", "green"), ("T11", "red")]
    assert "took longer than" in outcomes[1].error


def test_a_second_run_skips_green_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = gpu_check.chosen_rows("T11,T8")
    results = gpu_check.Results(tmp_path, "cpu")
    clock = gpu_check.Clock(minutes=1)
    assert gpu_check.run_rows(rows, results, clock, dry_run=True, fork=True) == 0
    results.add(Outcome("T9", "red", error="E1\nE2", text="all of it"))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["row"], line["status"]) for line in lines] == [("T8", "green"), ("T11", "green"), ("T9", "red")]
    assert lines[2]["error"] == "E1\nE2"
    assert "all of it" in (tmp_path / "failures.txt").read_text()
    reopened = gpu_check.Results(tmp_path, "cpu")
    assert reopened.green() == {"T8", "T11"}
    assert gpu_check.Results(tmp_path, "gpu").green() == set()
    gpu_check.print_plan(gpu_check.chosen_rows(""), reopened.green(), 6, gpus=1)
    plan = capsys.readouterr().out
    assert re.search(r"T11 .*green already", plan)
    assert re.search(r"M1 .*needs 2 GPUs", plan)
    assert re.search(r"T22 .*in the remaining \d+ s", plan)
    with pytest.raises(SystemExit, match="unknown row: T99"):
        gpu_check.chosen_rows("T99")


def test_rows_that_do_not_fit_the_time_are_not_run(tmp_path: Path) -> None:
    results = gpu_check.Results(tmp_path, "cpu")
    clock = gpu_check.Clock(minutes=0.01)
    assert gpu_check.run_rows(gpu_check.chosen_rows("T11,T20,T22"), results, clock, dry_run=True, fork=True) == 0
    assert [line["status"] for line in results.lines] == [NO_TIME] * 3


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Write a wheel that contains only metadata."""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_only_missing_packages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> Any:
        if name in ("pydantic", "annotated-types", "nowhere-else"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "plotly" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    wheel(tmp_path, "pydantic", "2.14.3", "annotated-types>=0.6", "numpy", "nowhere-else; extra == 'mail'")
    wheel(tmp_path, "annotated_types", "0.7.0")
    wheel(tmp_path, "plotly", "7.1.0")  # another version is installed
    wheel(tmp_path, "numpy", "2.4.6")  # is installed
    chosen = {path.name.split("-")[0] for path in gpu_packages.wheels_to_install(tmp_path)}
    assert chosen == {"pydantic", "annotated_types", "plotly"}
    missing = gpu_packages.lacking_with_theirs(gpu_packages.needed())
    assert missing["plotly"].startswith("1.0, required: plotly")
    assert "pydantic" in gpu_packages.install_missing(None, tmp_path)
