"""Decisions of `auto` are kept when a run is resumed, unless the user or the machine requires others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.from_recipe import auto, resume, tunings
from hf_fasttrain.from_recipe.tunings import Tuning, current_machine, store_tuning, tuning_key
from hf_fasttrain.recipe.resolved import read_settings

# What the rules decide on a machine with two cores, and what a tuning decides instead.
RULED: dict[str, Any] = {
    "accelerate.mixed_precision": "no",
    "accelerate.channels_last": True,
    "accelerate.compile": False,
    "accelerate.matmul_precision": "high",
    "accelerate.conv_precision": "high",
    "accelerate.micro_batch_size": 16,
    "accelerate.cpu_threads": 2,
    "evaluate.batch_size": 32,
}
TUNED: dict[str, Any] = {
    "accelerate.mixed_precision": "bf16",
    "accelerate.channels_last": False,
    "accelerate.matmul_precision": "medium",
    "accelerate.conv_precision": "medium",
    "accelerate.micro_batch_size": 8,
    "accelerate.cpu_threads": 1,
}


@pytest.fixture
def start(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Return a function that builds the run's trainer, by default resumed, and returns its settings and notes."""
    recipe = write_recipe(
        "model: {name: test_vit}\ndata: {dataset: digits, image_size: 32, workers: 0}\n"
        "train: {duration: 2 steps, batch_size: 16}\n"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(auto, "num_cores", lambda: 2)

    def build(*overrides: str, resume: bool = True) -> tuple[dict[str, Any], list[str]]:
        trainer = Trainer.from_recipe(recipe, [f"output_dir={tmp_path / 'run'}", *overrides], resume=resume)
        assert trainer.accelerator.mixed_precision == settings(tmp_path)["accelerate.mixed_precision"]
        assert trainer.train_loader.micro_batch_size == settings(tmp_path)["accelerate.micro_batch_size"]
        assert torch.get_num_threads() == settings(tmp_path)["accelerate.cpu_threads"]
        return settings(tmp_path), trainer.log.notes

    return build


def settings(tmp_path: Path) -> dict[str, Any]:
    current = read_settings(tmp_path / "run")
    return {key: current[key].value for key in RULED}


def store(tmp_path: Path) -> None:
    """Store a tuning with other values."""
    (recipe,) = tmp_path.glob("*.yaml")
    store_tuning(Tuning(*tuning_key(load_recipe(recipe)), TUNED, "2026-01-02", 100.0, "2 epochs"))


def test_a_resumed_run_keeps_earlier_decisions_of_rules(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(resume=False)[0] == RULED
    store(tmp_path)
    monkeypatch.setitem(auto.RULES, "accelerate.channels_last", lambda: auto.Choice(False, "another rule"))
    monkeypatch.setattr(auto, "num_cores", lambda: 1)
    for _ in range(2):  # what was kept once is kept again
        current, notes = start()
        assert current == RULED
        assert not any("started" in note or "tuned" in note for note in notes)
        origin = read_settings(tmp_path / "run")["accelerate.channels_last"].origin
        assert origin == "default: rarely slower, as this run began"


def test_settings_given_on_resume_take_precedence(
    start: Callable[..., tuple[dict[str, Any], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(resume=False)
    overrides = ["accelerate.mixed_precision=bf16", "accelerate.micro_batch_size=4", "accelerate.cpu_threads=1"]
    current, notes = start(*overrides)
    changed = {"accelerate.mixed_precision": "bf16", "accelerate.micro_batch_size": 4, "accelerate.cpu_threads": 1}
    assert current == {**RULED, **changed}
    assert not any("started" in note for note in notes)
    current, notes = start("accelerate.cpu_threads=2")  # earlier given values stay, and are reported
    assert current == {**RULED, **changed, "accelerate.cpu_threads": 2}
    kept_values = "accelerate.micro_batch_size=4, accelerate.mixed_precision=bf16"
    assert f"kept from this run's first start, though the recipe no longer sets it: {kept_values}" in notes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    current, _ = start("accelerate.gradient_accumulation_steps=2", "accelerate.mixed_precision=no")
    assert current == {**RULED, "accelerate.micro_batch_size": 8, "accelerate.cpu_threads": 1}


def test_another_machine_decides_again_and_reports_the_changes(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(resume=False)
    machine = current_machine()
    for module in (auto, resume, tunings):
        monkeypatch.setattr(module, "current_machine", lambda: {**machine, "processor": "another", "cores": 99})
    store(tmp_path)
    current, notes = start()
    assert current == {**RULED, **TUNED}
    (note,) = (text for text in notes if "started" in text)
    assert note.startswith(f"this run started elsewhere (processor {machine['processor']}, now another; cores")
    assert "`auto` is decided again: accelerate.channels_last=false (true before)" in note
    assert not any("started elsewhere" in text for text in start()[1])  # it continues on this machine


def test_another_number_of_processes_shares_steps_and_cores_again(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("accelerate.mixed_precision=bf16", resume=False)
    path = tmp_path / "run" / "resolved.yaml"
    facts = YAML(typ="safe", pure=True).load(path.read_text())
    facts["machine"]["value"]["processes"] = 2
    facts["accelerate.micro_batch_size"]["value"] = 8
    YAML(typ="safe", pure=True).dump(facts, path)
    current, notes = start()
    assert current == {**RULED, "accelerate.mixed_precision": "bf16"}
    assert (
        "this run started elsewhere (processes 2, now 1): micro-batch and threads are decided again: "
        "accelerate.micro_batch_size=16 (8 before)"
    ) in notes


def test_a_run_without_a_recorded_machine_keeps_only_its_tuning(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path)
    start("accelerate.channels_last=true", resume=False)
    path = tmp_path / "run" / "resolved.yaml"
    facts = YAML(typ="safe", pure=True).load(path.read_text())
    del facts["machine"]
    YAML(typ="safe", pure=True).dump(facts, path)
    for tuning in (tmp_path / "tunings").iterdir():
        tuning.unlink()
    monkeypatch.setitem(auto.RULES, "accelerate.channels_last", lambda: auto.Choice(False, "another rule"))
    assert start()[0] == {**RULED, **TUNED}


def test_the_launchers_precision_ranks_between_recipe_and_tuning(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert start(resume=False)[0] == {**RULED, "accelerate.mixed_precision": "bf16"}
    origin = read_settings(tmp_path / "run")["accelerate.mixed_precision"].origin
    assert origin == "default: of the launch configuration"
    current, notes = start("accelerate.mixed_precision=no")
    assert current["accelerate.mixed_precision"] == "no"
    assert "the launch configuration says mixed precision bf16; the recipe's no is used" in notes
    current, notes = start()
    assert current["accelerate.mixed_precision"] == "bf16"
    assert (
        "changed since this run started, by the launcher or OMP_NUM_THREADS: "
        "accelerate.mixed_precision=bf16 (no before)"
    ) in notes
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # always exported
    assert start()[0]["accelerate.mixed_precision"] == "bf16"


@pytest.mark.parametrize(("stated", "reason"), [("fp16", "which needs a GPU"), ("fp8", "which is not supported")])
def test_an_unavailable_precision_of_the_launcher_is_reported(
    stated: str,
    reason: str,
    start: Callable[..., tuple[dict[str, Any], list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", stated)
    current, notes = start(resume=False)
    assert current["accelerate.mixed_precision"] == "no"
    assert f"the launch configuration says mixed precision {stated}, {reason}; the recipe's no is used" in notes
