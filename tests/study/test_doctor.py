"""doctor: planted delays are found, phases add up, and verdicts match the measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import require_accepted, suggested
from helpers.fake_arms import FACTS, ready
from helpers.runs import exit_status

from hf_fasttrain.data.loading import prefetch
from hf_fasttrain.data.pixels import augment, prepare
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.study import doctor as study
from hf_fasttrain.study import trial
from hf_fasttrain.study.arm_process import Starter
from hf_fasttrain.study.bench import Arm, Measurement
from hf_fasttrain.study.doctor import ROUNDING, Doctor, doctor, lines, print_diagnosis
from hf_fasttrain.study.doctor_diagnosis import Diagnosis, best_advice, split_loading, split_step
from hf_fasttrain.study.load import free_share, rough_note
from hf_fasttrain.study.messages import ArmOptions, ArmRequest, Report, Turn
from hf_fasttrain.study.stopwatch import PHASES, STAGES
from hf_fasttrain.study.techniques import Hardware
from hf_fasttrain.study.trial import Trial
from hf_fasttrain.train.update import Update
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.terminal import Terminal

CPU = Hardware(gpu=False, bf16=True, compiler=True)
TEXT = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 32, workers: 1, cache: none}
augment: {mixup: 0.2}
train: {duration: 2 epochs, batch_size: 16}
"""
DELAY = 0.02


def slow(function: Callable[..., Any], seconds: float = DELAY) -> Callable[..., Any]:
    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slower


def watch(*overrides: str, steps: int = 4) -> Report:
    """Return the report of a profiled training's second turn."""
    profiled = Trial(ArmRequest(TEXT, "small.yaml", "small", overrides), ArmOptions(profiled=True))
    reports: list[Report] = []

    def next_turn(report: Report | None) -> Turn | None:
        if report is not None:
            reports.append(report)
        return [Turn(min_steps=3), Turn(min_steps=steps, max_steps=steps), None][len(reports)]

    profiled.run(next_turn)
    return reports[-1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("stage", "owner", "name", "per_image"),
    [
        ("decode", prepare, "read_pixels", True),
        ("augment", augment.TrainTransform, "_crop", True),
        ("collate", prefetch, "pixel_buffer", False),
    ],
)
def test_a_delay_in_the_loader_is_found(
    stage: str, owner: Any, name: str, per_image: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, slow(getattr(owner, name), DELAY if per_image else 8 * DELAY))
    report = watch(f"data.workers={workers}", "train.batch_size=8")
    stages = split_loading(report)
    assert max(stages, key=lambda each: stages[each]) == stage
    assert 0.95 * DELAY <= stages[stage] < 2 * DELAY
    if per_image or not workers:  # otherwise a worker would be ahead
        assert report.wait_seconds > 0.3 * report.seconds


def test_a_delay_in_the_optimizer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Update, "__call__", slow(Update.__call__, 10 * DELAY))
    _, phases = split_step(watch(steps=2))
    assert max(phases, key=lambda name: phases[name]) == "optimizer"
    assert 10 * DELAY <= phases["optimizer"] < 20 * DELAY


def test_phases_add_up_to_the_step() -> None:
    report = watch(steps=12)
    seconds, phases = split_step(report)
    assert sum(phases.values()) == pytest.approx(seconds, rel=0.05)
    assert set(phases) == set(PHASES)
    assert phases["other"] < 0.25 * seconds
    assert min(phases[name] for name in ("copy", "forward", "backward", "optimizer")) > 0
    assert set(report.stages) == set(STAGES)
    assert report.stage_images >= 12 * 16 - 16


def test_cached_pixels_are_read_not_decoded() -> None:
    profiled = Trial(
        ArmRequest(TEXT, "small.yaml", "small", ("data.cache=memory", "data.workers=0")), ArmOptions(profiled=True)
    )
    reports: list[Report] = []

    def next_turn(report: Report | None) -> Turn | None:
        if report is not None:
            reports.append(report)
        return [Turn(min_steps=profiled.ready.period), Turn(min_steps=4), None][len(reports)]

    profiled.run(next_turn)
    first, later = map(split_loading, reports)
    assert first["decode"] > first["read"]
    assert later["decode"] == 0
    assert later["read"] > 0


def measurement(name: str, seconds: float, **values: Any) -> Measurement:
    rounds = {number: seconds * (1 + 0.001 * number) for number in range(6)}
    arm = Arm(name, (name,) if "=" in name else ())
    return Measurement(arm, ready=ready(), rounds=rounds, host_bytes=2**30, **values)


def diagnosis(**changes: Any) -> Diagnosis:
    base = measurement("as it is", 1 / 700)
    measurements = [measurement("data.cache=memory", 1 / 5200), measurement("data.workers=4", 1 / 705)]
    values: dict[str, Any] = {
        "ready": ready(settings={**FACTS, "data.workers": 2}),
        "images_per_second": base.images_per_second,
        "step_seconds": 0.045,
        "images_per_step": 32.0,
        "phases": {
            "wait": 0.028,
            "copy": 0.001,
            "forward": 0.005,
            "backward": 0.009,
            "optimizer": 0.001,
            "other": 0.001,
        },
        "stages": {"read": 0.0002, "decode": 0.002, "augment": 0.0006, "collate": 0.0},
        "loader_alone": 700.0,
        "compute_alone": 1900.0,
        "wait_fraction": 0.63,
        "device_bytes": 0,
        "host_bytes": 2**30,
        "total_seconds": base.forecast(base.seconds_per_image),
        "tried": tuple(measurements),
        "baseline": base,
        "advice": tuple(best_advice(base, measurements, {"data.cache=memory": "from the second epoch on"})),
    }
    return Diagnosis(**{**values, **changes})


def test_a_slow_loader_is_named_as_the_bottleneck() -> None:
    assert diagnosis().verdict == (
        "The model processes 1,900 images/s, the loader delivers 700 on 2 workers: 63% waiting, most of the loader's "
        "time for decoding (2.00 ms per image, 71%); `data.cache=memory` gives 5,190 here."
    )


def test_a_slow_model_is_named_as_the_bottleneck() -> None:
    result = diagnosis(wait_fraction=0.01, compute_alone=710.0, loader_alone=4000.0, advice=())
    assert result.verdict == (
        "The model is the bottleneck: it processes 710 images/s, the loader could deliver 4,000 on 2 workers; "
        "1% waiting, most of "
        "a step for the backward pass (9.0 of 45.0 ms); none of 2 overrides that were tried is clearly faster."
    )


def test_loader_and_model_that_slow_each_other_down_are_recognised() -> None:
    result = diagnosis(wait_fraction=0.0, compute_alone=1500.0, loader_alone=1200.0, advice=())
    assert "; together they reach only 698: they share the processor's cores; none of 2 overrides" in result.verdict


def test_forecasts_follow_from_the_measured_rates() -> None:
    result = diagnosis()
    assert result.epoch_seconds == pytest.approx(1000 / 700, rel=0.01)
    assert result.total_seconds == pytest.approx(100 * 1000 / 700, rel=0.01)
    text = "\n".join(lines(result))
    assert "Memory: 1.07 GB of the host" in text
    assert "data.cache=memory (from the second epoch on): 5,190 images/s, 7.43 (7.43 - 7.43) times as fast" in text
    assert "Tried without clear gain: data.workers=4: 703 images/s" in text
    assert "GB of the GPU" in "\n".join(lines(replace(result, device_bytes=2**31)))


def test_differences_within_noise_are_no_advice() -> None:
    base = measurement("as it is", 0.01)
    noisy = measurement("data.workers=8", 0.01)
    noisy.rounds = dict(enumerate([0.008, 0.012, 0.007, 0.013, 0.009, 0.0095]))
    failed = replace(measurement("data.workers=9", 0.001), failed="out of memory")
    clear_gains = [measurement(f"data.workers={n}", 0.01 / n) for n in (2, 3, 4)]
    result = best_advice(base, [noisy, failed, *clear_gains], {})
    assert [advice.text for advice in result] == ["data.workers=4", "data.workers=3"]


def test_the_result_consists_of_plain_values() -> None:
    values = json.loads(json.dumps(diagnosis().as_json()))
    assert values["advice"][0]["overrides"] == ["data.cache=memory"]
    assert sum(values["phases_seconds"].values()) == pytest.approx(values["step_seconds"])


def test_tables_are_printed(tmp_path: Path) -> None:
    console = Terminal(width=160, record=True, file=(tmp_path / "x").open("w"))
    print_diagnosis(console, diagnosis())
    text = console.export_text()
    assert "waiting for images" in text
    assert "decoding" in text


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the measurements of doctor."""
    for name, turn in (("PROFILE_TURN", Turn(3, 0.4)), ("PART_TURN", Turn(3, 0.2)), ("TRIAL_TURN", Turn(2, 0.1))):
        monkeypatch.setattr(study, name, turn)
    monkeypatch.setattr(study, "MAX_ROUNDS", 4)


def test_a_slow_decoder_is_found_by_doctor(
    forked_arms: None, short_turns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real processes, forked from this one so that they have the planted delay; it must advise caching pixels."""
    monkeypatch.setattr(prepare, "read_pixels", slow(prepare.read_pixels))
    monkeypatch.setattr(trial, "SAMPLE_IMAGES", 64)
    request = ArmRequest(TEXT, "small.yaml", "small", ("train.batch_size=4", "model.name=test_vit"))
    with Starter(request, on_gpu=False) as start:
        result = Doctor(start, CPU, 2, seconds=20.0, note=lambda text: None).examine()
    assert result.is_waiting
    assert result.largest_stage == "decode"
    assert "waiting, most of the loader's time for decoding" in result.verdict
    assert ("data.cache=memory",) in [advice.overrides for advice in result.advice]
    assert result.loader_alone < 1 / DELAY * 1.2  # one worker
    assert result.compute_alone > result.loader_alone
    assert result.speed_up_of(result.tried[0]).median > 1
    for overrides in [*(measurement.arm.overrides for measurement in result.tried), *map(str.split, result.not_tried)]:
        load_recipe(request.load(), overrides)
    for command in suggested("\n".join([*lines(result), ROUNDING])):
        require_accepted(command)


def test_without_time_for_more_a_training_is_profiled_and_no_override_tried(
    forked_arms: None, short_turns: None
) -> None:
    request = ArmRequest(TEXT, "small.yaml", "small", ("train.batch_size=4",))
    with Starter(request, on_gpu=False) as start:
        result = Doctor(start, CPU, 2, seconds=0.1, note=lambda text: None, free_share=lambda: 0.6).examine()
    assert not result.tried
    assert "data.workers=2" in result.not_tried
    assert sum(result.phases.values()) == pytest.approx(result.step_seconds)
    assert result.images_per_step / result.step_seconds == pytest.approx(result.images_per_second.median)
    assert lines(result)[-2].startswith("Not tried for lack of time (--seconds; the start and the first steps took ")
    assert lines(result)[-1].startswith("Rough: other programs used the cores meanwhile (busy threads got 60% of")


def test_figures_are_rough_only_where_others_use_the_cores() -> None:
    assert not rough_note([])
    assert not rough_note([1.0, 0.95, 0.98])
    assert rough_note([1.0, 0.6, 0.5])
    assert 0 < free_share() <= 1


def test_a_recipe_that_cant_run_here_is_one_message(forked_arms: None) -> None:
    request = ArmRequest(TEXT, "small.yaml", "small", ("model.name=no_such_model",))
    with (
        Starter(request, on_gpu=False) as start,
        pytest.raises(RunError, match=r"could not be profiled here: .*"),
    ):
        Doctor(start, CPU, 2, seconds=1.0, note=lambda text: None).examine()


def test_a_trace_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"--trace .*: .* is not a folder; give another file"):
        doctor(None, CPU, seconds=1, note=print, trace=tmp_path / "missing" / "t.json")  # type: ignore[arg-type]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunError, match=r"--trace .*: can't be written; give another file"):
        doctor(None, CPU, seconds=1, note=print, trace=tmp_path / "t.json")  # type: ignore[arg-type]


def test_the_command_line_runs_doctor(
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    forked_arms: None,
    short_turns: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, trace = str(write_recipe(TEXT)), tmp_path / "trace.json"
    assert exit_status(["doctor", recipe, "--seconds", "1", "--json", "--trace", str(trace)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["compute_alone_images_per_second"] > 0
    assert "traceEvents" in trace.read_text()
    assert exit_status(["doctor", recipe, "accelerate.mixed_precision=fp16"]) == 2
    printed = capsys.readouterr().err
    assert "fp16 needs a GPU" in printed
    assert "Traceback" not in printed
