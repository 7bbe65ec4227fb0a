"""The rules of `auto`: one table of them, one place that records what they decide, one number wherever it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_fasttrain import Recipe, Trainer, load_recipe
from hf_fasttrain.data.pixels.bad_images import BadImages
from hf_fasttrain.from_recipe import memory
from hf_fasttrain.from_recipe.auto import DECIDED_ELSEWHERE, RULES, decide
from hf_fasttrain.from_recipe.loaders import Loaders
from hf_fasttrain.from_recipe.parts import build_parts
from hf_fasttrain.from_recipe.trainer import build_loaders, build_trainer_without_folder
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.recipe.load import flatten
from hf_fasttrain.recipe.resolved import Decision, ResolvedSettings, Setting, read_settings

GB = 10**9


@pytest.fixture
def settings() -> ResolvedSettings:
    """Return the settings of a recipe that gives nothing but what it must."""
    sections = {"model": {"name": "a"}, "data": {"dataset": "b"}, "train": {"duration": "1 step", "batch_size": 2}}
    return ResolvedSettings(Recipe.model_validate({**sections, "early_stopping": {}}))


def test_every_key_that_may_be_auto_has_its_rule_in_the_table(settings: ResolvedSettings) -> None:
    keys = {key for key in flatten(settings.recipe) if settings.is_open(key)}
    assert keys == {*RULES, *DECIDED_ELSEWHERE}
    assert "accelerate.micro_batch_size" in keys


def test_a_rule_decides_once_and_its_reason_is_recorded(settings: ResolvedSettings) -> None:
    assert decide(settings, "data.workers", gpu=True, cores=12, processes=4) == 3
    assert decide(settings, "data.workers", gpu=False, cores=12, processes=4) == 3
    recorded = Setting(3, "default: the cores of each training process, at most 16", "speed", "auto")
    assert settings.all()["data.workers"] == recorded


def test_what_is_given_or_decided_before_goes_before_the_rule(settings: ResolvedSettings) -> None:
    recipe = settings.recipe.model_copy(update={"data": settings.recipe.data.model_copy(update={"workers": 7})})
    given = ResolvedSettings(recipe)
    assert decide(given, "data.workers", gpu=False, cores=1, processes=1) == 7
    settings.decisions["data.workers"] = Decision(5, "tuned on 2026-01-02", "tuned").keep()
    assert decide(settings, "data.workers", gpu=False, cores=1, processes=1) == 5
    assert settings.all()["data.workers"].origin == "default: tuned on 2026-01-02, as this run began"


def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that is going to have the batch sizes of evaluations."""
    sizes: list[int] = []
    real = Loaders.eval_loader

    def eval_loader(self: Loaders, split: Any, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        return real(self, split, batch_size, **options)

    monkeypatch.setattr(Loaders, "eval_loader", eval_loader)
    return sizes


def test_training_and_evaluate_have_one_rule_of_the_batch_that_is_evaluated(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run, path = evaluated(monkeypatch), tmp_path / "run", write_recipe()
    changes = ["train.batch_size=96", "train.duration=1 step", "model.name=test_vit", "data.cache=none"]
    overrides = [*changes, "accelerate.channels_last=true", "accelerate.mixed_precision=no"]
    Trainer.from_recipe(path, [*overrides, f"output_dir={run}"]).fit()
    evaluate_run(run)
    assert sizes == [96, 96]

    parts = build_parts(load_recipe(path, overrides))
    forecast = parts.forecast
    assert forecast is not None
    state = forecast.gradients + forecast.optimizer + forecast.average
    room = (
        40 * memory.evaluation_memory(parts.model, parts.spec.image_size, parts.accelerator.device)["bytes_per_image"]
    )
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2 * (room + state))
    build_trainer_without_folder(parts, keep_pixels=False)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2 * room)
    evaluate_run(run)
    assert sizes[2] == sizes[3] == 40


def test_loaders_leave_memory_for_the_batches_that_the_recipe_has_evaluated(write_recipe: Callable[..., Path]) -> None:
    needed = []
    for size in ("32", "320"):
        parts = build_parts(load_recipe(write_recipe(), ["data.workers=2", f"evaluate.batch_size={size}"]))
        needed.append(build_loaders(parts, BadImages(None, 0.5, print)).planner.needed_memory)
    assert needed[1] - needed[0] > 3 * parts.spec.image_size**2 * 320


OLD = """
data.workers: {value: 2, origin: 'recipe', tag: machine}
optimizer.lr: {value: 0.1, origin: 'override', tag: learnt}
log.every: {value: 5, origin: 'recipe', tag: machine}
gone.key: {value: 1, origin: 'default', tag: machine}
accelerate.channels_last: {value: true, origin: 'default: seldom slower, as this run began', tag: machine}
accelerate.mixed_precision: {value: bf16, origin: 'default: tuned on 2026-01-02', tag: machine}
accelerate.compile: {value: true, origin: 'default: as this run began', tag: machine}
classes: {value: 10, origin: of the label column, tag: fact}
"""


def test_settings_of_an_older_run_are_read(tmp_path: Path) -> None:
    """They had other tags, and only words said who had decided."""
    (tmp_path / "resolved.yaml").write_text(OLD)
    found = read_settings(tmp_path)
    assert [(s.tag, s.kind, s.kept) for s in found.values()] == [
        ("speed", "recipe", False),
        ("result", "override", False),
        ("output", "recipe", False),
        ("speed", "default", False),
        ("speed", "auto", True),
        ("speed", "tuned", False),
        ("speed", "default", True),
        ("fact", "fact", False),
    ]
    assert found["accelerate.mixed_precision"].decision == Decision("bf16", "tuned on 2026-01-02", "tuned")
    assert found["accelerate.channels_last"].decision.keep().reason == "seldom slower, as this run began"


@pytest.mark.parametrize("text", ["", "[1]", "{", "a: 3"])
def test_settings_that_can_not_be_read_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "resolved.yaml").write_text(text)
    assert read_settings(tmp_path) == {}
