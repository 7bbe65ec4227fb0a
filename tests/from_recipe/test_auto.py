"""The rules of `auto`: one table, one record of decisions, the same value everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import exit_status
from PIL import Image

from hf_fasttrain import Recipe, Trainer, load_recipe
from hf_fasttrain.data.pixels.bad_images import BadImages
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.pixels.rgb import ValueRange
from hf_fasttrain.from_recipe import cache_plan, memory
from hf_fasttrain.from_recipe.auto import DECIDED_ELSEWHERE, RULES, decide, reduced_decode
from hf_fasttrain.from_recipe.cache_plan import estimated_bytes
from hf_fasttrain.from_recipe.loaders import Loaders, train_preparation
from hf_fasttrain.from_recipe.parts import build_parts
from hf_fasttrain.from_recipe.trainer import build_loaders, build_trainer_without_folder
from hf_fasttrain.inference import evaluate_run, predict_images
from hf_fasttrain.models.saved import read_spec
from hf_fasttrain.recipe.load import flatten
from hf_fasttrain.recipe.resolved import Decision, ResolvedSettings, Setting, read_settings
from hf_fasttrain.utils.errors import DataError

GB = 10**9


@pytest.fixture
def settings() -> ResolvedSettings:
    """Return the settings of a recipe with only its required keys."""
    sections = {"model": {"name": "a"}, "data": {"dataset": "b"}, "train": {"duration": "1 step", "batch_size": 2}}
    return ResolvedSettings(Recipe.model_validate({**sections, "early_stopping": {}}))


def test_every_key_that_may_be_auto_has_a_rule(settings: ResolvedSettings) -> None:
    keys = {key for key in flatten(settings.recipe) if settings.is_open(key)}
    assert keys == {*RULES, *DECIDED_ELSEWHERE}
    assert "accelerate.micro_batch_size" in keys


def test_a_rule_decides_once_and_its_reason_is_recorded(settings: ResolvedSettings) -> None:
    assert decide(settings, "data.workers", gpu=True, cores=12, processes=4) == 3
    assert decide(settings, "data.workers", gpu=False, cores=12, processes=4) == 3
    recorded = Setting(3, "default: the cores of each training process, at most 16", "speed", "auto")
    assert settings.all()["data.workers"] == recorded


def test_given_and_earlier_values_take_precedence_over_the_rule(settings: ResolvedSettings) -> None:
    recipe = settings.recipe.model_copy(update={"data": settings.recipe.data.model_copy(update={"workers": 7})})
    explicit = ResolvedSettings(recipe)
    assert decide(explicit, "data.workers", gpu=False, cores=1, processes=1) == 7
    settings.decisions["data.workers"] = Decision(5, "tuned on 2026-01-02", "tuned").keep()
    assert decide(settings, "data.workers", gpu=False, cores=1, processes=1) == 5
    assert settings.all()["data.workers"].origin == "default: tuned on 2026-01-02, as this run began"


def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which evaluations append their batch sizes."""
    sizes: list[int] = []
    real = Loaders.eval_loader

    def eval_loader(self: Loaders, split: Any, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        return real(self, split, batch_size, **options)

    monkeypatch.setattr(Loaders, "eval_loader", eval_loader)
    return sizes


def test_training_and_evaluate_share_the_rule_for_the_evaluation_batch_size(
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


def test_loaders_leave_memory_for_evaluation_batches(write_recipe: Callable[..., Path]) -> None:
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
    """They had other tags and recorded the origin of a value only as text."""
    (tmp_path / "resolved.yaml").write_text(OLD)
    settings = read_settings(tmp_path)
    assert [(s.tag, s.kind, s.kept) for s in settings.values()] == [
        ("speed", "recipe", False),
        ("result", "override", False),
        ("output", "recipe", False),
        ("speed", "default", False),
        ("speed", "auto", True),
        ("speed", "tuned", False),
        ("speed", "default", True),
        ("fact", "fact", False),
    ]
    assert settings["accelerate.mixed_precision"].decision == Decision("bf16", "tuned on 2026-01-02", "tuned")
    assert settings["accelerate.channels_last"].decision.keep().reason == "seldom slower, as this run began"


@pytest.mark.parametrize("text", ["", "[1]", "{", "a: 3"])
def test_unreadable_settings_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "resolved.yaml").write_text(text)
    assert read_settings(tmp_path) == {}


def test_the_cache_is_not_limited_by_what_a_sample_of_images_needs(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([11 * GB, 8 * GB, 5 * GB])  # others take memory meanwhile
    monkeypatch.setattr(cache_plan, "free_memory_bytes", lambda: next(free))
    monkeypatch.setattr(cache_plan, "estimated_bytes", lambda split, preparation: 1000)  # all of the sample are icons
    parts = build_parts(load_recipe(write_recipe(), ["data.cache=memory"]))
    loaders = build_loaders(parts, BadImages(None, 0.0, print), keep_pixels=False)
    options: dict[str, Any] = {"passes": 3, "batchable": False}
    first = loaders.planner.plan(parts.source.train, Preparation(), key="data.cache", evaluated=GB, **options)
    assert 4 * GB < first.budget < 4.6 * GB  # half of what is free, but for the memory of training
    assert loaders.planner.memory_bytes < 2 << 20  # what it is expected to take
    second = loaders.planner.plan(parts.source.evaluation, Preparation(), key="cache of evaluation images", **options)
    assert second.budget == cache_plan.with_margin(1000) < GB
    assert float(second.reason.rpartition(", ")[2].split()[0]) > 4  # GB to spare: the training images need little


@pytest.mark.parametrize(
    ("kind", "lowest", "highest", "value"),
    [
        ("integers", 0, 255, [0, 255]),
        ("integers", 3, 4095, [0, 4095]),
        ("integers", 0, 4096, [0, 16383]),
        ("integers", 0, 60_000, "auto"),  # as integers are taken to be in any case
        ("integers", -1000, 900, "auto"),
        ("integers", 0, 70_000, "auto"),
        ("integers", 0, 0, "auto"),
        ("floats", 0.2, 1.005, "auto"),
        ("floats", -0.3, 254.7, [0, 255]),
        ("floats", -2.1, 2.3, "auto"),
        ("floats", 0, 5000.5, [0, 16383]),
        ("floats", -2.1, 60.0, "auto"),
        ("both", 0, 1, "auto"),
    ],
)
def test_the_range_of_deep_grey_is_the_least_usual_one_that_holds_a_sample(
    kind: str, lowest: float, highest: float, value: Any
) -> None:
    choice = RULES["data.value_range"](kind=kind, number=3, lowest=lowest, highest=highest)
    assert choice.value == value
    assert f"3 sampled images have values from {lowest:g} to {highest:g}" in choice.reason


def test_scans_of_twelve_bits_are_bright_in_training_check_and_prediction(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("clear", "spotted"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for number in range(8):
            scan = np.random.default_rng(number).integers(0, 4096, (24, 24)).astype(np.uint16)
            Image.fromarray(scan).save(tmp_path / "scans" / name / f"{number}.png")
    settings = [f"data.dataset={tmp_path / 'scans'}", f"output_dir={tmp_path / 'run'}", "train.duration=1 step"]
    recipe = str(write_recipe())
    assert exit_status(["check", recipe, *settings, "--images"]) == 0
    printed = capsys.readouterr().out
    assert "note: data.value_range=auto: 0 is black and 4,095 white (" in printed
    assert "grey images of more than 8 bits have integers from 0 to 4,095; 0 is black and 4,095 white" in printed
    trainer = Trainer.from_recipe(recipe, settings)
    trainer.fit()
    assert read_settings(tmp_path / "run")["data.value_range"].value == [0, 4095]
    spec = read_spec(tmp_path / "run" / "model" / "hf_fasttrain.json")
    assert spec.preprocessing is not None
    assert spec.preprocessing.value_range == ValueRange(0, 4095, clips=False)
    images, _ = next(iter(trainer.evaluation.eval_loader))
    assert images.max() > 0.5  # normalised: nearly black ones would be below -0.8
    whole = tmp_path / "whole.png"
    Image.fromarray(np.full((24, 24), 60_000, np.uint16)).save(whole)
    with pytest.raises(DataError, match=r"integers are from 60000 to 60000, .* from 0 \(black\) to 4095 \(white\)"):
        predict_images(tmp_path / "run", [str(whole)])
    assert evaluate_run(tmp_path / "run", ["data.value_range=[0, 65535]"])["loss"] > 0


RULE = {"size": 224, "crop": "random_resized", "scale": (0.08, 1), "ratio": (3 / 4, 4 / 3), "short_side": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 915),  # 224 / sqrt(0.08 * 3 / 4)
        ({"scale": (0.25, 1), "ratio": (1, 1)}, 448),
        ({"ratio": (1, 4)}, 1584),
        ({"short_side": 256}, 512),
        ({"crop": "center"}, False),
        ({"scale": (0, 1)}, False),
    ],
)
def test_sides_keep_what_the_smallest_crop_needs(changes: dict[str, Any], expected: object) -> None:
    assert reduced_decode(**{**RULE, **changes}).value == expected


def large_photos(folder: Path) -> Path:
    """Return a folder of two classes of photos of 320 x 240 pixels."""
    for number in range(8):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (320, 240), (30 * number, 0, 0)).save(path)
    return folder / "photos"


@pytest.mark.parametrize(("value", "shape"), [("auto", (120, 160)), ("false", (240, 320)), ("60", (60, 80))])
def test_large_photos_are_decoded_at_a_fraction_for_training_but_not_for_evaluation(
    write_recipe: Callable[..., Path], tmp_path: Path, value: str, shape: tuple[int, int]
) -> None:
    data = ["data.dataset=" + str(large_photos(tmp_path)), "data.image_size=16", "data.workers=0", "data.cache=none"]
    changes = [*data, "augment.crop=random_resized", f"data.reduced_decode={value}", "model.name=test_vit"]
    parts = build_parts(load_recipe(write_recipe(), [*changes, "train.batch_size=2"]))
    loaders = build_loaders(parts, BadImages(None, 0.5, print))
    training = loaders.train_loader(parts.source.train, parts.sampling_plan, 1, 2).prefetcher.images.images
    assert training.preparation.encoded(parts.source.train.records([0])[0])[0].shape[:2] == shape
    assert estimated_bytes(parts.source.train, training.preparation) == 3 * shape[0] * shape[1] * len(
        parts.source.train
    )
    assert loaders.eval_loader(parts.source.evaluation, 2).prefetcher.images.images.preparation.at_least is None
    assert train_preparation(parts.recipe, parts.spec.preprocessing) == training.preparation


def test_a_run_that_began_with_full_decoding_continues_with_it(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    photos, run = large_photos(tmp_path), tmp_path / "run"
    data = [f"data.dataset={photos}", "data.image_size=16", "data.workers=0", "augment.crop=random_resized"]
    changes = [*data, "model.name=test_vit", "train.batch_size=2", f"output_dir={run}", "train.duration=1 step"]
    Trainer.from_recipe(write_recipe(), [*changes, "data.reduced_decode=false"]).fit()
    trainer = Trainer.from_recipe(write_recipe(), [*changes, "train.duration=2 steps"], resume=True)
    assert trainer.train_loader.prefetcher.images.images.preparation.at_least is None
    trainer.fit()
    assert read_settings(run)["data.reduced_decode"].value is False
