"""Machine settings set to `auto`: rules, stored tunings, what overrides them, and what a resumed run keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.from_recipe.accelerator import set_fp32_precision
from hf_fasttrain.from_recipe.auto import resolve_machine
from hf_fasttrain.from_recipe.parts import build_parts
from hf_fasttrain.from_recipe.resume import read_first_start
from hf_fasttrain.from_recipe.tunings import Tuning, find_tuning, store_tuning, tuning_key
from hf_fasttrain.recipe.load import flatten, with_values
from hf_fasttrain.recipe.resolved import ResolvedSettings, read_settings
from hf_fasttrain.recipe.schema import Recipe

VALUES: dict[str, Any] = {
    "accelerate.mixed_precision": "bf16",
    "accelerate.channels_last": False,
    "accelerate.compile": False,
    "accelerate.matmul_precision": "high",
    "accelerate.conv_precision": "medium",
    "accelerate.micro_batch_size": 8,
    "accelerate.cpu_threads": 1,
    "data.workers": 1,
    "data.cache": "memory",
    "data.pin_memory": False,
}


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        "model: {name: test_resnet}\ndata: {dataset: digits, image_size: 32}\n"
        "train: {duration: 2 epochs, batch_size: 16}\n"
    )


def store(recipe: Path, **changes: Any) -> None:
    store_tuning(Tuning(*tuning_key(load_recipe(recipe)), {**VALUES, **changes}, "2026-01-02", 100.0, "2 epochs"))


def resolved(recipe: Path, *overrides: str) -> tuple[Recipe, ResolvedSettings]:
    loaded = load_recipe(recipe, overrides)
    settings = ResolvedSettings(loaded)
    return resolve_machine(loaded, settings), settings


def by_rule(settings: ResolvedSettings) -> bool:
    return settings.all()["accelerate.mixed_precision"].kind == "auto"


def test_without_a_tuning_rules_decide(recipe: Path) -> None:
    plan, settings = resolved(recipe)
    assert (plan.accelerate.channels_last, plan.accelerate.compile) == (True, False)
    assert (plan.accelerate.matmul_precision, plan.accelerate.conv_precision) == ("high", "high")
    assert plan.data.workers == "auto"  # resolved with the device
    assert settings.notes == []
    assert settings.all()["accelerate.channels_last"].origin == "default: rarely slower"


def test_a_stored_tuning_decides_what_is_auto(recipe: Path) -> None:
    store(recipe)
    plan, settings = resolved(recipe)
    values = flatten(plan)
    assert {key: values[key] for key in VALUES} == VALUES
    (note,) = settings.notes
    assert note.startswith("auto, tuned on 2026-01-02: accelerate.mixed_precision=bf16")
    assert settings.all()["data.workers"].origin == "default: tuned on 2026-01-02"


def test_parts_are_built_from_the_tuning_and_report_it(recipe: Path) -> None:
    store(recipe)
    parts = build_parts(recipe)
    assert parts.accelerator.mixed_precision == "bf16"
    assert parts.sampling_plan.micro_batch_size == 8
    assert torch.get_num_threads() == 1
    fact = parts.settings.all()["accelerate.micro_batch_size"]
    assert (fact.value, "tuned on 2026-01-02" in fact.origin) == (8, True)


@pytest.mark.parametrize(
    "override",
    [
        "model.name=test_vit",
        "data.image_size=48",
        "train.batch_size=32",
        "data.dataset=elsewhere",
        "augment.flip=false",
    ],
)
def test_a_tuning_applies_only_to_its_model_step_and_data(recipe: Path, override: str) -> None:
    store(recipe)
    plan, settings = resolved(recipe, override)
    assert plan.accelerate.mixed_precision == "no"
    assert by_rule(settings)
    assert settings.notes == []


def test_a_tuning_applies_with_other_learning_settings(recipe: Path) -> None:
    store(recipe)
    plan, _ = resolved(recipe, "optimizer.lr=0.1", "train.duration=9 epochs", "seed=3")
    assert plan.accelerate.mixed_precision == "bf16"


@pytest.mark.parametrize(("duration", "kept"), [("3 epochs", True), ("1 epoch", False), ("100 steps", False)])
def test_settings_that_pay_off_late_apply_only_to_trainings_as_long(recipe: Path, duration: str, kept: bool) -> None:
    store(recipe, **{"accelerate.compile": True})
    plan, _ = resolved(recipe, f"train.duration={duration}")
    assert plan.accelerate.mixed_precision == "bf16"
    assert (plan.accelerate.compile, plan.data.cache) == ((True, "memory") if kept else (False, "auto"))


def test_a_tuning_applies_only_to_its_machine_and_versions(recipe: Path) -> None:
    machine, versions, model, data = tuning_key(load_recipe(recipe))
    store_tuning(Tuning({**machine, "cores": 999}, versions, model, data, VALUES, "2026-01-02", 1.0, "2 epochs"))
    store_tuning(Tuning(machine, {**versions, "torch": "1.0"}, model, data, VALUES, "2026-01-02", 1.0, "2 epochs"))
    assert by_rule(resolved(recipe)[1])


def test_keys_set_in_the_recipe_take_precedence(recipe: Path) -> None:
    store(recipe)
    plan, settings = resolved(recipe, "accelerate.channels_last=true", "accelerate.gradient_accumulation_steps=1")
    assert plan.accelerate.channels_last is True
    assert plan.accelerate.micro_batch_size is None
    assert plan.accelerate.mixed_precision == "bf16"
    assert "channels_last" not in settings.notes[0]


def test_several_processes_use_the_settings_that_apply_to_them(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan, _ = resolved(recipe)
    assert plan.accelerate.mixed_precision == "bf16"
    assert (plan.accelerate.micro_batch_size, plan.data.workers) == (None, "auto")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"values": 3}'])
def test_a_damaged_tuning_is_ignored(recipe: Path, damage: str, tmp_path: Path) -> None:
    store(recipe)
    (path,) = (tmp_path / "tunings").iterdir()
    path.write_text(damage)
    assert find_tuning(*tuning_key(load_recipe(recipe))) is None
    assert by_rule(resolved(recipe)[1])


def test_a_resumed_run_keeps_its_settings(recipe: Path, tmp_path: Path) -> None:
    """A tuning that is stored or deleted later does not change a run that has started."""
    run = f"output_dir={tmp_path / 'run'}"
    store(recipe, **{"data.cache": "none"})
    first = Trainer.from_recipe(recipe, [run, "train.duration=2 steps", "schedule.name=constant"])
    first.fit()
    assert read_settings(tmp_path / "run")["accelerate.mixed_precision"].value == "bf16"
    store(recipe, **{"accelerate.mixed_precision": "no", "data.cache": "none"})
    longer = [run, "train.duration=4 steps", "schedule.name=constant"]
    second = Trainer.from_recipe(recipe, longer, resume=True)
    assert second.accelerator.mixed_precision == "bf16"
    assert second.train_loader.micro_batch_size == 8
    second.fit()
    fact = read_settings(tmp_path / "run")["accelerate.mixed_precision"]
    assert (fact.value, fact.origin) == ("bf16", "default: tuned on 2026-01-02, as this run began")


def test_a_run_without_tuning_uses_none_when_resumed(recipe: Path, tmp_path: Path) -> None:
    run = f"output_dir={tmp_path / 'run'}"
    Trainer.from_recipe(recipe, [run, "train.duration=2 steps", "schedule.name=constant"]).fit()
    store(recipe)
    resumed = Trainer.from_recipe(recipe, [run, "train.duration=4 steps", "schedule.name=constant"], resume=True)
    assert resumed.accelerator.mixed_precision == "no"
    assert not any("tuned" in fact.origin for fact in read_settings(tmp_path / "run").values())
    assert read_first_start(tmp_path / "nowhere") is None


def test_values_are_set_in_a_recipe(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    changed = with_values(loaded, {"data.workers": 3, "seed": 5, "accelerate.compile": True})
    assert (changed.data.workers, changed.seed, changed.accelerate.compile) == (3, 5, True)
    assert loaded.data.workers == "auto"
    assert changed.source == loaded.source


def test_matmul_precision_is_set_as_requested() -> None:
    try:
        set_fp32_precision("medium", "medium")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
        set_fp32_precision("highest", "highest")
        assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        set_fp32_precision("high", "high")


WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    ("user_environment", "spins"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ({"KMP_BLOCKTIME": "0"}, "None"),
    ],
)
def test_commands_limit_spinning_unless_the_user_configured_it(user_environment: dict[str, str], spins: str) -> None:
    program = (
        "import os, sys, hf_fasttrain, hf_fasttrain.__main__ as module; print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "try: module.main(['--help'])\n"
        "except SystemExit: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | user_environment
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    messages = process.stdout.splitlines()
    assert messages[0] == user_environment.get("GOMP_SPINCOUNT", "None")  # importing sets nothing
    assert messages[-1] == f"{spins} False"
