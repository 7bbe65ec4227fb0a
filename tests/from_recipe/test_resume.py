"""What `auto` decided when a run began stays when it is resumed, unless the user or the machine says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.from_recipe import auto, resume, tunings
from hf_fasttrain.from_recipe.tunings import Tuning, machine_here, store_tuning, tuning_key
from hf_fasttrain.recipe.resolved import read_settings

# What the rules say of a machine with two cores, and what a tuning says otherwise.
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
    """Return what builds the run's trainer, by default resumed, and returns its settings and notes."""
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
    found = read_settings(tmp_path / "run")
    return {key: found[key].value for key in RULED}


def store(tmp_path: Path) -> None:
    """Let a tuning say otherwise from now on."""
    (recipe,) = tmp_path.glob("*.yaml")
    store_tuning(Tuning(*tuning_key(load_recipe(recipe)), TUNED, "2026-01-02", 100.0, "2 epochs"))


def test_a_resumed_run_keeps_what_rules_decided_whatever_they_say_now(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(resume=False)[0] == RULED
    store(tmp_path)
    monkeypatch.setitem(auto.RULES, "accelerate.channels_last", lambda: auto.Choice(False, "another rule"))
    monkeypatch.setattr(auto, "num_cores", lambda: 1)
    for _ in range(2):  # what was kept is kept again
        found, notes = start()
        assert found == RULED
        assert not any("began" in note or "tuned" in note for note in notes)
        origin = read_settings(tmp_path / "run")["accelerate.channels_last"].origin
        assert origin == "default: seldom slower, as this run began"


def test_what_the_user_gives_on_resume_is_as_given(
    start: Callable[..., tuple[dict[str, Any], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(resume=False)
    given = ["accelerate.mixed_precision=bf16", "accelerate.micro_batch_size=4", "accelerate.cpu_threads=1"]
    found, notes = start(*given)
    changed = {"accelerate.mixed_precision": "bf16", "accelerate.micro_batch_size": 4, "accelerate.cpu_threads": 1}
    assert found == {**RULED, **changed}
    assert not any("began" in note for note in notes)
    found, notes = start("accelerate.cpu_threads=2")  # what was given before stays, and is said
    assert found == {**RULED, **changed, "accelerate.cpu_threads": 2}
    kept_values = "accelerate.micro_batch_size=4, accelerate.mixed_precision=bf16"
    assert f"kept as this run began, though the recipe no longer sets it: {kept_values}" in notes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found, _ = start("accelerate.gradient_accumulation_steps=2", "accelerate.mixed_precision=no")
    assert found == {**RULED, "accelerate.micro_batch_size": 8, "accelerate.cpu_threads": 1}


def test_another_machine_decides_anew_and_says_what_became_of_it(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(resume=False)
    here = machine_here()
    for module in (auto, resume, tunings):
        monkeypatch.setattr(module, "machine_here", lambda: {**here, "processor": "another", "cores": 99})
    store(tmp_path)
    found, notes = start()
    assert found == {**RULED, **TUNED}
    (note,) = (text for text in notes if "began" in text)
    assert note.startswith(f"this run began elsewhere (processor {here['processor']}, now another; cores")
    assert "`auto` is decided again: accelerate.channels_last=false (true before)" in note
    assert not any("began elsewhere" in text for text in start()[1])  # it goes on here now


def test_other_processes_share_a_step_and_the_cores_anew(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("accelerate.mixed_precision=bf16", resume=False)
    path = tmp_path / "run" / "resolved.yaml"
    facts = YAML(typ="safe", pure=True).load(path.read_text())
    facts["machine"]["value"]["processes"] = 2
    facts["accelerate.micro_batch_size"]["value"] = 8
    YAML(typ="safe", pure=True).dump(facts, path)
    found, notes = start()
    assert found == {**RULED, "accelerate.mixed_precision": "bf16"}
    assert (
        "this run began elsewhere (processes 2, now 1): micro-batch and threads are decided again: "
        "accelerate.micro_batch_size=16 (8 before)"
    ) in notes


def test_a_run_that_wrote_no_machine_down_keeps_its_tuning_alone(
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


def test_the_launchers_precision_goes_before_a_tuning_and_after_the_recipe(
    start: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert start(resume=False)[0] == {**RULED, "accelerate.mixed_precision": "bf16"}
    origin = read_settings(tmp_path / "run")["accelerate.mixed_precision"].origin
    assert origin == "default: of the launch configuration"
    found, notes = start("accelerate.mixed_precision=no")
    assert found["accelerate.mixed_precision"] == "no"
    assert "the launch configuration says mixed precision bf16; the recipe's no is used" in notes
    found, notes = start()
    assert found["accelerate.mixed_precision"] == "bf16"
    assert (
        "changed since this run began, by the launcher or OMP_NUM_THREADS: accelerate.mixed_precision=bf16 (no before)"
    ) in notes
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # exported always
    assert start()[0]["accelerate.mixed_precision"] == "bf16"


@pytest.mark.parametrize(("stated", "why"), [("fp16", "which needs a GPU"), ("fp8", "which is not supported")])
def test_a_launchers_precision_that_can_not_be_had_is_said(
    stated: str,
    why: str,
    start: Callable[..., tuple[dict[str, Any], list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", stated)
    found, notes = start(resume=False)
    assert found["accelerate.mixed_precision"] == "no"
    assert f"the launch configuration says mixed precision {stated}, {why}; the recipe's no is used" in notes
