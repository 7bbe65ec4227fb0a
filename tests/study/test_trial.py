"""Trial trainings: the measured steps are those of training, and arms are processes stopped between turns."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers.runs import num_kept

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.data.loading.sampler import SamplingPlan
from hf_fasttrain.study import arm_process
from hf_fasttrain.study.arm_process import Starter, require_one_process
from hf_fasttrain.study.bench import Arm, ArmFailed
from hf_fasttrain.study.messages import ArmOptions, ArmRequest, Report, Turn, to_arm_request
from hf_fasttrain.study.trial import Passes, Trial
from hf_fasttrain.utils.errors import RunError

TEXT = """
model: {name: test_resnet, drop_path: 0.0}
data: {dataset: digits, image_size: 32, workers: 0, cache: none}
augment: {mixup: 0.2}
train: {duration: 3 steps, batch_size: 16}
schedule: {name: onecycle}
"""


def arm_request(*overrides: str) -> ArmRequest:
    return ArmRequest(TEXT, "small.yaml", "small", overrides)


def reports_of(trial: Trial, turns: list[Turn]) -> list[Report]:
    reports: list[Report] = []

    def next_turn(report: Report | None) -> Turn | None:
        if report is not None:
            reports.append(report)
        return turns[len(reports)] if len(reports) < len(turns) else None

    trial.run(next_turn)
    return reports


def test_a_trial_makes_the_same_steps_as_training(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    """The same losses, and the same weights, as the ordinary training of the same recipe."""
    trainer = Trainer.from_recipe(write_recipe(TEXT), ["log.every=1", f"output_dir={tmp_path / 'run'}"])
    trainer.fit()
    plain = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
    trial = Trial(arm_request())
    first, second = reports_of(trial, [Turn(min_steps=1, max_steps=1), Turn(min_steps=2, max_steps=2)])
    assert (first.images, second.images) == (16, 32)
    assert len(second.step_seconds) == len(second.losses) == 2
    for name, value in trial.trainer.raw_model.state_dict().items():
        assert torch.equal(value, plain[name]), name


def test_turns_last_as_long_as_requested() -> None:
    trial = Trial(arm_request())
    turns = [Turn(min_steps=5, seconds=0.0), Turn(min_steps=1, seconds=0.3), Turn(min_steps=1, seconds=9, max_steps=2)]
    steps, seconds, capped = reports_of(trial, turns)
    assert len(steps.step_seconds) == 5
    assert seconds.seconds >= 0.3
    assert len(capped.step_seconds) == 2
    assert sum(seconds.step_seconds) == pytest.approx(seconds.seconds, rel=0.05)


def test_the_ready_message_has_the_resolved_settings() -> None:
    ready_message = Trial(arm_request("train.duration=2 epochs", "accelerate.gradient_accumulation_steps=2")).ready
    assert ready_message.settings["accelerate.mixed_precision"] == "no"
    assert (ready_message.micro_batch_size, ready_message.has_batch_norm, ready_message.is_jpeg) == (8, True, False)
    assert ready_message.steps == 2 * ready_message.steps_per_epoch
    assert ready_message.short_last_step


def test_a_pass_is_short_if_pixels_are_cached() -> None:
    cached = Trial(arm_request("data.cache=memory", "train.duration=3 epochs"))
    assert cached.ready.keeps_pixels
    assert cached.ready.period == 256 // 16
    first, later = reports_of(cached, [Turn(min_steps=3, drain=True), Turn(min_steps=2)])
    assert first.fill_seconds > 0
    assert later.fill_seconds is None
    assert first.images == 48  # the images that filled the cache were not trained on
    assert num_kept(cached.loader.prefetcher.images.images.cache) == 256


def test_prefetched_batches_are_used_up() -> None:
    trial = Trial(arm_request("data.workers=1"))
    original_make = trial.loader.prefetcher.images.make

    def slow(*args: Any) -> Any:
        time.sleep(0.2)  # much longer than a step
        return original_make(*args)

    trial.loader.prefetcher.images.make = slow
    warm, later = reports_of(trial, [Turn(min_steps=3, drain=True), Turn(min_steps=4)])
    assert later.wait_seconds > 0.5 * later.seconds  # from the first step on
    assert warm.images == 48


def test_passes_are_the_first_steps_again_with_other_randomness() -> None:
    order = Passes(num_images=100, batch_size=10, micro_batch_size=10, period=3)
    plain = SamplingPlan(num_images=100, batch_size=10, micro_batch_size=10)
    for step in range(6):
        (key,), (plain_key,) = order.plan(step).micro_batches, plain.plan(step % 3).micro_batches
        assert np.array_equal(key.indices, plain_key.indices)
        assert key.epoch == step // 3


def test_out_of_memory_ends_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(arm_request())

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(trial.trainer.step.accumulation, "step_loss", short)
    with pytest.raises(RunError, match="out of memory with micro-batches of 16 images"):
        reports_of(trial, [Turn()])


def test_loader_and_model_are_measured_alone() -> None:
    trial = Trial(arm_request("data.workers=1"))
    loader = trial.loader_alone(Turn(min_steps=4, seconds=0.1))
    compute = trial.compute_alone(Turn(min_steps=3, seconds=0.1))
    assert loader.images >= 4 * 16
    assert compute.images >= 3 * 16
    assert compute.wait_seconds == 0


def test_the_first_gradient_is_written(tmp_path: Path) -> None:
    path = tmp_path / "gradient.npy"
    trial = Trial(arm_request(), ArmOptions(gradient_to=str(path), full_lr=True, without_dropout=True))
    (report,) = reports_of(trial, [Turn(min_steps=3, max_steps=3)])
    gradient = np.load(path)
    assert gradient.shape == (sum(p.numel() for p in trial.trainer.step.parameters),)
    assert np.isfinite(gradient).all()
    assert np.linalg.norm(gradient) > 0
    assert len(report.losses) == 3
    assert trial.trainer.state.lr == trial.trainer.lr


def test_dropout_is_disabled_for_comparisons() -> None:
    trial = Trial(arm_request("model.name=test_vit", "model.drop_path=0.3"), ArmOptions(without_dropout=True))
    rates = [m.drop_prob for m in trial.trainer.raw_model.modules() if hasattr(m, "drop_prob")]
    assert rates
    assert not any(rates)


@pytest.fixture
def starter(forked_arms: None) -> Any:
    """Return a starter of real arms."""
    with Starter(arm_request(), on_gpu=False) as start:
        yield start


def states(pid: int) -> set[str]:
    parent = psutil.Process(pid)
    return {process.status() for process in [parent, *parent.children(recursive=True)]}


def test_an_arm_and_its_loader_processes_are_stopped_between_turns(starter: Starter) -> None:
    arm = starter(Arm("a", ("data.workers=2",)), ArmOptions())
    pid = arm._process.pid
    try:
        for _ in range(2):
            report = arm.turn(Turn(min_steps=3))
            assert report.images >= 48
            assert report.host_bytes > 10**7
            time.sleep(0.1)
            assert states(pid) == {psutil.STATUS_STOPPED}
        assert len(psutil.Process(pid).children(recursive=True)) == 2
    finally:
        arm.close()
    assert not psutil.pid_exists(pid)


def test_an_error_in_an_arm_is_one_line(starter: Starter) -> None:
    for overrides, text in (
        (("train.batch_size=0",), "train.batch_size is 0"),
        (("model.name=no_such_model",), "no_such_model"),
        (("accelerate.mixed_precision=fp16",), "fp16 needs a GPU"),
    ):
        with pytest.raises(ArmFailed, match=text):
            starter(Arm("wrong", overrides), ArmOptions())


def test_the_death_of_an_arm_is_recognised(starter: Starter) -> None:
    arm = starter(Arm("a"), ArmOptions())
    os.kill(arm._process.pid, signal.SIGKILL)
    with pytest.raises(ArmFailed, match="killed, possibly out of memory"):
        arm.turn(Turn())
    arm.close()


def test_a_turn_has_a_time_limit(starter: Starter) -> None:
    arm = starter(Arm("a"), ArmOptions())
    try:
        with pytest.raises(ArmFailed, match="not done after 0 s, which is all the time it had"):
            arm.turn(Turn(min_steps=10**6), limit_seconds=0.2)
    finally:
        arm.close()
    assert not multiprocessing.active_children()


def test_a_starter_removes_what_arms_wrote(starter: Starter) -> None:
    arm = starter(Arm("a", ("data.cache=disk", "train.duration=2 epochs")), ArmOptions())
    arm.turn(Turn(min_steps=20))
    arm.close()
    folder = starter.folder
    assert any((folder / "pixels").iterdir())
    starter.__exit__()
    assert not folder.exists()


def test_a_cache_on_the_device_is_filled_by_the_passes_alone() -> None:
    """Most images are in no pass; fetching must end nevertheless."""
    trial = Trial(
        arm_request("data.cache=device", "data.workers=0", "augment={crop: padded}", "train.duration=3 epochs")
    )
    first, later = reports_of(trial, [Turn(min_steps=3, drain=True), Turn(min_steps=2)])
    assert trial.loader.prefetcher.is_loaded.all()
    assert (first.images, later.images) == (48, 32)


def test_if_not_all_pixels_fit_the_cache_it_is_measured_without_one() -> None:
    trial = Trial(arm_request("data.cache=memory", "data.cache_gb=0.0001", "train.duration=3 epochs"))
    assert not trial.ready.keeps_pixels
    assert trial.ready.period > 80
    assert "not all pixels would be kept here: measured as if none were" in trial.ready.notes


PARENT = """
import sys, time
from hf_fasttrain.study.bench import Arm
from hf_fasttrain.study import arm_process
from hf_fasttrain.study.arm_process import Starter
from hf_fasttrain.study.messages import ArmOptions, ArmRequest, Turn
with Starter(ArmRequest(sys.argv[1], "small.yaml", "small"), on_gpu=False) as start:
    arms = [start(Arm(str(number), ("data.workers=1",)), ArmOptions()) for number in range(2)]
    for arm in arms:
        arm.turn(Turn(min_steps=2))
    print(*(arm._process.pid for arm in arms), flush=True)
    time.sleep(100)
"""


def test_arms_end_when_their_parent_is_killed() -> None:
    """Stopped ones too: the kernel wakes them."""
    with subprocess.Popen([sys.executable, "-c", PARENT, TEXT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    until = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_trace_is_written(starter: Starter, tmp_path: Path) -> None:
    arm = starter(Arm("a"), ArmOptions(profiled=True))
    try:
        arm.turn(Turn())
        arm.trace(tmp_path / "trace.json", 1)
    finally:
        arm.close()
    assert '"traceEvents"' in (tmp_path / "trace.json").read_text()


def test_studies_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="it measures on one device; start it without a launcher"):
        require_one_process()


def test_studies_need_processes_that_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGSTOP")
    with pytest.raises(RunError, match="needs to stop processes"):
        require_one_process()


def test_the_request_has_the_recipes_overrides(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), ["train.batch_size=8"])
    assert to_arm_request(recipe).load().train.batch_size == 8


def test_a_fork_server_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_that_ends.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(arm_process, "IMPORTED", ["module_that_ends"])
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server._stop()  # one of an earlier test has imported something else
    try:
        with (
            Starter(ArmRequest(TEXT, "small.yaml", "small"), on_gpu=False) as start,
            pytest.raises(ArmFailed, match="the fork server, which has imported everything, has ended; it may have"),
        ):
            start(Arm("as it is"), ArmOptions())
    finally:
        server._stop()
