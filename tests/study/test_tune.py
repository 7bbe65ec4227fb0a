"""Tuning on a fake clock: the search, the guard on precision, the budget, and the tuned recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import require_accepted, suggested
from helpers.fake_arms import FACTS, Fakes, ready
from helpers.runs import exit_status

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.recipe.load import flatten, tag_of
from hf_fasttrain.study import tune_space as space
from hf_fasttrain.study.bench import Arm, ArmFailed
from hf_fasttrain.study.techniques import Hardware
from hf_fasttrain.study.tune import Candidate, Tuner, TuneResult, parse_budget
from hf_fasttrain.study.tune_guard import LossCurve, compare
from hf_fasttrain.study.tune_recipe import default_path, print_tuning, require_new_file, tuned_text, write_tuned
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.terminal import Terminal

CPU = Hardware(gpu=False, bf16=True, compiler=True)
GPU = Hardware(gpu=True, bf16=True, compiler=True)


def speed_of(**faster: float) -> Callable[[dict[str, str]], float]:
    """Return a speed function from `section__key__value=factor` of each setting that changes it."""

    def speed(settings: dict[str, str]) -> float:
        seconds = 0.02
        for name, factor in faster.items():
            *key, value = name.split("__")
            if settings.get(".".join(key)) == value:
                seconds /= factor
        return seconds

    return speed


def search(
    fakes: Fakes, budget: float = 600.0, hardware: Hardware = CPU, messages: list[str] | None = None
) -> TuneResult:
    note = messages.append if messages is not None else lambda text: None
    return Tuner(fakes, budget, hardware, 2, note=note, clock=fakes.clock).run()


def test_the_fastest_settings_are_found() -> None:
    fakes = Fakes(
        speed_of(
            accelerate__mixed_precision__bf16=2.0,
            accelerate__channels_last__false=1.2,
            accelerate__micro_batch_size__16=1.1,
            data__workers__2=1.15,
            data__cache__memory=1.3,
        )
    )
    result = search(fakes)
    best = result.best.config
    assert best["accelerate.mixed_precision"] == "bf16"
    assert best["accelerate.channels_last"] is False
    assert best["accelerate.micro_batch_size"] == 16
    assert best["data.workers"] == 2
    assert best["data.cache"] == "memory"
    assert result.speed_up.median == pytest.approx(2 * 1.2 * 1.1 * 1.15 * 1.3, rel=0.01)
    assert fakes.alive == 0


def test_settings_that_help_only_together_are_found_in_layouts() -> None:
    """bf16 is slower by itself and faster with the other memory layout."""

    def speed(settings: dict[str, str]) -> float:
        bf16, last = settings.get("accelerate.mixed_precision") == "bf16", settings.get("accelerate.channels_last")
        return 0.024 if bf16 and last != "false" else 0.01 if bf16 else 0.02

    assert search(Fakes(speed)).best.config["accelerate.mixed_precision"] == "bf16"


def test_slower_settings_are_not_chosen() -> None:
    result = search(Fakes(speed_of(accelerate__mixed_precision__bf16=0.7, accelerate__channels_last__false=0.5)))
    assert result.best is result.baseline
    assert result.speed_up is None


def test_noise_is_not_taken_for_speed() -> None:
    """Twice as fast in one turn and slower in the next is no gain."""
    rng = np.random.default_rng(0)
    result = search(Fakes(lambda settings: 0.02 * float(rng.uniform(0.9, 1.1))))
    assert result.best is result.baseline


def test_settings_are_compared_within_rounds_when_the_machine_changes_its_speed() -> None:
    """Everything gets eight times as fast from the fourth second on: the recipe's own settings seem slow before."""
    fakes = Fakes(lambda settings: 0.0)

    def speed(settings: dict[str, str]) -> float:
        return speed_of(channels_last=0.8)(settings) * (8 if fakes.clock.now < 4.0 else 1)

    fakes.speed = speed
    result = Tuner(fakes, 180, CPU, 2, note=lambda text: None, clock=fakes.clock).run()
    assert result.baseline is not None
    measured = [candidate for candidate in result.tried if candidate.measurement.is_measured]
    rates = {candidate.measurement.arm.name: candidate.images_per_second for candidate in measured}
    assert max(rates.values()) == result.best.images_per_second >= rates["as it is"]
    slower = [c for c in measured if c is not result.best and c.speed_up().median < 1.01]
    assert all(candidate.images_per_second < 1.01 * rates["as it is"] for candidate in slower)


def test_a_precision_that_does_not_train_as_fp32_is_refused() -> None:
    fakes, messages = Fakes(speed_of(accelerate__mixed_precision__bf16=2.0)), []
    rng = np.random.default_rng(0)
    fakes.gradient = lambda settings: (
        rng.normal(size=8).astype(np.float32)
        if settings.get("accelerate.mixed_precision") == "bf16"
        else np.ones(8, np.float32)
    )
    result = search(fakes, messages=messages)
    assert result.best.config["accelerate.mixed_precision"] == "no"
    assert any("mixed_precision=bf16: gradient cosine" in text and "not used" in text for text in messages)


def test_a_precision_whose_loss_diverges_from_fp32_is_refused() -> None:
    fakes = Fakes(speed_of(accelerate__mixed_precision__bf16=2.0))
    fakes.losses = lambda settings: 2.2 if settings.get("accelerate.mixed_precision") == "bf16" else 2.0
    assert search(fakes).best.config["accelerate.mixed_precision"] == "no"


def test_the_guard_needs_finite_losses() -> None:
    fine = LossCurve(np.ones(4, np.float32), (2.0, 1.0))
    assert compare(fine, fine).is_good
    assert not compare(LossCurve(np.zeros(4, np.float32), (2.0, 1.0)), fine).is_good
    assert not compare(LossCurve(np.ones(4, np.float32), (2.0, float("nan"))), fine).is_good
    tilted = LossCurve(np.array([1, 1, 1, 1.3], np.float32), (2.0, 1.0))
    assert compare(tilted, fine).cosine == pytest.approx(4.3 / (2 * np.sqrt(3 + 1.69)), abs=1e-6)
    assert compare(LossCurve(fine.gradient, (2.1, 1.0)), fine).loss_difference == pytest.approx(0.1 / 3)


def test_a_requested_precision_needs_no_guard() -> None:
    fakes = Fakes(
        speed_of(accelerate__mixed_precision__bf16=2.0),
        ready=ready(settings={**FACTS, "accelerate.mixed_precision": "bf16"}),
    )
    fakes.gradient = lambda settings: np.zeros(8, np.float32)
    assert search(fakes).best.config["accelerate.mixed_precision"] == "bf16"


def test_compilation_is_chosen_if_it_pays_off() -> None:
    faster = speed_of(accelerate__compile__true=1.5)
    long_budget = search(Fakes(faster), budget=900)
    assert long_budget.best.config["accelerate.compile"] is True
    assert long_budget.best.forecast() == pytest.approx(100 * 1000 * 0.02 / 1.5 + 2 * 60, rel=0.01)  # two shapes
    short = search(Fakes(faster, ready=ready(steps=32)), budget=900)
    assert short.best.config["accelerate.compile"] is False
    assert any("too short to pay for it" in text for text in short.skipped)


def test_compilation_that_takes_longer_than_it_saves_is_not_chosen() -> None:
    result = search(Fakes(speed_of(accelerate__compile__true=1.1), compiling=100, ready=ready(steps=1600)), budget=900)
    assert result.best.config["accelerate.compile"] is False
    assert any(candidate.config["accelerate.compile"] for candidate in result.tried)


@pytest.mark.parametrize("budget", [30.0, 60.0, 180.0, 900.0])
@pytest.mark.parametrize(("image_seconds", "start"), [(0.002, 2.0), (0.02, 6.0), (0.01, 9.0)])
def test_the_budget_is_kept(budget: float, image_seconds: float, start: float) -> None:
    fakes = Fakes(lambda settings: image_seconds, start_seconds=start)
    result = search(fakes, budget=budget)
    assert fakes.clock.now <= 1.2 * budget, result.skipped
    assert result.seconds == fakes.clock.now
    if budget < 100:
        assert result.skipped


def test_compilation_that_does_not_end_does_not_break_the_budget() -> None:
    fakes = Fakes(speed_of(accelerate__compile__true=3.0), compiling=10_000.0)
    result = search(fakes, budget=300)
    assert fakes.clock.now <= 1.2 * 300
    assert result.best.config["accelerate.compile"] is False
    assert any("not done after" in candidate.measurement.failed for candidate in result.tried)


def test_a_budget_that_is_too_short_is_one_message() -> None:
    with pytest.raises(RunError, match=r"own first steps took 56\.4 s; give at least 8m"):
        search(Fakes(lambda settings: 1.0), budget=60)


@pytest.mark.parametrize(
    ("text", "seconds"), [("3m", 180), ("90s", 90), ("180", 180), ("1h", 3600), ("0.5m", 30), (" 2 m ", 120)]
)
def test_budgets_are_times(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


def test_invalid_budgets_are_refused() -> None:
    with pytest.raises(RunError, match="--budget soon: must be a time such as 3m, 90s or 1h"):
        parse_budget("soon")
    with pytest.raises(RunError, match="--budget 5s: too short to measure anything; give at least 20s"):
        parse_budget("5s")


def test_a_recipe_that_cant_run_here_is_one_message() -> None:
    def speed(settings: dict[str, str]) -> float:
        raise ArmFailed("data.dataset: no such folder")

    with pytest.raises(RunError, match=r"could not be measured here: data\.dataset: no such folder"):
        search(Fakes(speed))


def memory_for(images: int) -> Callable[[dict[str, str]], float]:
    def speed(settings: dict[str, str]) -> float:
        size = settings.get("accelerate.micro_batch_size", "null")
        return 0.02 if size != "null" and int(size) <= images else -1.0

    return speed


def test_a_smaller_micro_batch_is_found_if_the_recipe_does_not_fit() -> None:
    fakes = Fakes(memory_for(8))
    plain = fakes.speed

    def before(arm: Arm) -> None:
        settings = dict(override.partition("=")[::2] for override in arm.overrides)
        if plain(settings) < 0:
            raise ArmFailed("out of memory with micro-batches of 32 images", out_of_memory=True)

    fakes.before_turn = before
    result = search(fakes)
    assert result.baseline is None
    assert result.best.config["accelerate.micro_batch_size"] == 8


def test_a_model_that_does_not_fit_at_all_is_one_message() -> None:
    fakes = Fakes(lambda settings: 0.02)

    def before(arm: Arm) -> None:
        raise ArmFailed("out of memory with micro-batches of 32 images", out_of_memory=True)

    fakes.before_turn = before
    with pytest.raises(RunError, match="could not be measured here: out of memory"):
        search(fakes)


def test_an_arm_that_fails_is_excluded() -> None:
    def speed(settings: dict[str, str]) -> float:
        if settings.get("accelerate.channels_last") == "false":
            raise ArmFailed("RuntimeError: no such kernel")
        return 0.01 if settings.get("accelerate.mixed_precision") == "bf16" else 0.02

    result = search(Fakes(speed))
    assert result.best.config["accelerate.mixed_precision"] == "bf16"
    assert any(candidate.measurement.failed == "RuntimeError: no such kernel" for candidate in result.tried)


def test_an_arm_may_fail_in_its_first_measured_turn() -> None:
    fakes, turns = Fakes(speed_of(accelerate__channels_last__false=1.5)), []

    def before(arm: Arm) -> None:
        turns.append(arm.name)
        if arm.name == "mixed_precision=bf16" and turns.count(arm.name) == 2:
            raise ArmFailed("its process ended (signal 11)")

    fakes.before_turn = before
    result = search(fakes)
    assert result.best.config["accelerate.channels_last"] is False
    assert any(candidate.measurement.failed for candidate in result.tried)


def test_ctrl_c_gives_the_best_so_far() -> None:
    fakes = Fakes(speed_of(accelerate__mixed_precision__bf16=2.0, data__cache__memory=1.5))

    def before(arm: Arm) -> None:
        if "micro_batch_size=" in arm.name:
            raise KeyboardInterrupt

    fakes.before_turn = before
    result = search(fakes)
    assert not result.complete
    assert result.best.config["accelerate.mixed_precision"] == "bf16"
    assert result.best.config["data.cache"] == "none"
    assert fakes.alive == 0


def test_a_gpu_has_other_settings_to_try() -> None:
    fakes = Fakes(speed_of(accelerate__mixed_precision__fp16=2.0, data__pin_memory__true=1.3))
    result = search(fakes, hardware=GPU)
    assert result.best.config["accelerate.mixed_precision"] == "fp16"
    assert result.best.config["data.pin_memory"] is True
    assert all("cpu_threads" not in arm.name for arm in fakes.started)


def test_one_epoch_needs_no_cache() -> None:
    config = space.first_config(ready())
    assert space.caches(config, ready(steps=32)) == []
    assert [c["data.cache"] for c in space.caches(config, ready())] == ["memory"]


def test_requested_accumulation_may_be_removed() -> None:
    request = ready(settings={**FACTS, "accelerate.gradient_accumulation_steps": 4}, micro_batch_size=8)
    config = space.first_config(request)
    assert config["accelerate.micro_batch_size"] == 8
    assert [c["accelerate.micro_batch_size"] for c in space.micro_batches(config, request)] == [None, 4]


def test_the_forecast_counts_the_first_pass_separately() -> None:
    result = search(Fakes(lambda settings: 0.02))
    measurement = replace(result.baseline.measurement, ready=ready(keeps_pixels=True), first_pass_seconds=0.5)
    candidate = Candidate(result.baseline.config, measurement, measurement)
    assert candidate.forecast() == pytest.approx(1000 * 0.5 + 99_000 * 0.02)


RECIPE = """# Mine.
model: {name: test_resnet}
data: {dataset: digits, image_size: 32}
train: {duration: 4 epochs, batch_size: 32}
accelerate: {gradient_accumulation_steps: 2}
optimizer: {lr: 2e-3}
"""


def found_with_bf16() -> TuneResult:
    return search(Fakes(speed_of(accelerate__mixed_precision__bf16=2.0, accelerate__micro_batch_size__16=1.5)))


def test_the_tuned_recipe_differs_in_machine_keys_only(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(RECIPE), ["optimizer.lr=3e-3"])
    path = tmp_path / "small.tuned.yaml"
    write_tuned(recipe, found_with_bf16(), path, command="hf-fasttrain tune small.yaml", store=False)
    tuned = load_recipe(path)
    before, after = flatten(recipe), flatten(tuned)
    changed = {key for key in before if before[key] != after[key]}
    assert changed
    assert {tag_of(key) for key in changed} == {"speed"}
    assert after["optimizer.lr"] == 3e-3
    assert after["accelerate.mixed_precision"] == "bf16"
    assert after["accelerate.micro_batch_size"] == 16
    assert after["accelerate.gradient_accumulation_steps"] == "auto"


def test_the_header_says_what_was_measured_and_marks_what_changes_rounding(write_recipe: Callable[..., Path]) -> None:
    text = tuned_text(load_recipe(write_recipe(RECIPE)), found_with_bf16(), command="hf-fasttrain tune small.yaml")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert "tuned for" in header[0]
    assert "`hf-fasttrain tune small.yaml`" in header[1]
    assert "torch 2." in header[2]
    assert any("times as fast" in line for line in header)
    lines = {line.strip().partition(":")[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert "# changes rounding: gradient cosine 1.0000" in lines["mixed_precision"]
    assert "# changes batch-norm statistics" in lines["micro_batch_size"]
    assert "#" not in lines["channels_last"]


def test_a_model_without_batch_norm_has_no_mark(write_recipe: Callable[..., Path]) -> None:
    fakes = Fakes(speed_of(accelerate__micro_batch_size__16=1.5), ready=ready(has_batch_norm=False))
    text = tuned_text(load_recipe(write_recipe(RECIPE)), search(fakes), command="x")
    assert "batch-norm" not in text


def test_an_existing_output_is_kept(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(RECIPE)
    with pytest.raises(RunError, match="exists already; give another --output"):
        require_new_file(path)
    with pytest.raises(RunError, match=r"can't be written: .* is not a folder"):
        require_new_file(tmp_path / "missing" / "x.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("small.tuned.yaml", "small.tuned.2.yaml", "small.tuned.3.yaml"):
        assert default_path(load_recipe(path)) == Path(name)
        Path(name).touch()


def test_what_was_tried_is_printed(tmp_path: Path) -> None:
    console = Terminal(width=160, record=True, file=(tmp_path / "x").open("w"))
    print_tuning(console, found_with_bf16(), tmp_path / "t.yaml")
    text = console.export_text()
    assert "mixed_precision=bf16" in text
    assert "best" in text


def test_the_command_line_tunes(
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    forked_arms: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real arms, for some seconds; the tuned recipe trains, and `auto` uses the stored tuning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_fasttrain.study.tune.MIN_BUDGET", 1.0)
    text = "model: {name: test_resnet}\ndata: {dataset: digits, image_size: 32}\n"
    recipe = write_recipe(f"{text}train: {{duration: 3 steps, batch_size: 16}}\n")
    if exit_status(["tune", str(recipe), "--budget", "8s"]):  # others use the machine
        assert "the recipe's own first steps took" in capsys.readouterr().err
        assert exit_status(["tune", str(recipe), "--budget", "60s"]) == 0
    tuned = tmp_path / "small.tuned.yaml"
    printed = capsys.readouterr().out
    assert ["train", "small.tuned.yaml"] in suggested(printed)
    for command in suggested(printed):
        require_accepted(command)
    assert load_recipe(tuned).train.batch_size == 16
    assert "mixed_precision" in tuned.read_text()
    assert len(list((tmp_path / "tunings").iterdir())) == 1
    exit_status(["check", str(recipe)])
    assert "note: auto, tuned on" in capsys.readouterr().out
    assert Trainer.from_recipe(tuned).fit().steps == 3
    assert exit_status(["tune", str(recipe), "--output", str(tuned)]) == 2
    assert "exists already" in capsys.readouterr().err
