"""Signals, time limits and dying launchers: the step is finished, the state saved, and the processes agree."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import steps_of, weights
from torch import Tensor

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.data.loading.prefetch import ImageBatches
from hf_fasttrain.run_folder.checkpoint import read_state
from hf_fasttrain.train import stop
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.stop import StopRequests, StopSignals
from hf_fasttrain.utils.errors import Stopped

SMALL = ["model.name=test_vit", "data.eval_fraction=0.05", "augment.mixup=0.5", "log.every=1", "ema={decay: 0.9}"]
RARELY = ["checkpoint.every=1000 steps", "evaluate.every=1000 steps"]


class Signalled(Trainer):
    """Sends signals to itself in the middle of a step."""

    at: dict[int, list[int]] = {}  # noqa: RUF012 - step index -> signals
    process = 0

    def train_step(self, step: Step) -> Tensor:
        if self.accelerator.process_index == self.process:
            for number in self.at.get(step.index, []):
                os.kill(os.getpid(), number)
        return super().train_step(step)


def signalled(
    recipe: Path, run: Path, at: dict[int, list[int]], *overrides: str, resume: bool = False, process: int = 0
) -> Trainer:
    reset_accelerate()
    Signalled.at, Signalled.process = at, process
    return Signalled.from_recipe(recipe, [*SMALL, *overrides, f"output_dir={run}"], resume=resume)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_a_signal_finishes_the_step_and_saves_and_resume_continues(
    number: int, code: int, write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train.duration=6 steps", *RARELY]
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(Stopped) as error:
        signalled(write_recipe(), tmp_path / "cut", {3: [number]}, *options).fit()
    assert error.value.status == code
    assert error.value.step == 4
    assert steps_of(tmp_path / "cut") == [4]
    assert before == {n: signal.getsignal(n) for n in before}
    assert (
        "after step 4 of 6; its state is saved: resume=True (or Trainer.restore()) continues" in capsys.readouterr().out
    )
    assert not (tmp_path / "cut" / "result.json").exists()
    result = signalled(write_recipe(), tmp_path / "cut", {}, *options, resume=True).fit()
    assert result.resumed_at == [4]
    signalled(write_recipe(), tmp_path / "whole", {}, *options).fit()
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("where", ["in a step", "in an evaluation"])
def test_images_that_never_arrive_do_not_keep_a_signal_from_saving(
    where: str, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a file server that is gone. The half-done step has changed batch norm's statistics."""
    monkeypatch.setattr(stop, "MOST_WAIT", 0.2)
    make, calls = ImageBatches.make, itertools.count(1)

    def stuck(self: ImageBatches, key: Any, buffer: Any = None) -> Any:
        is_training = self.transform is not None
        if is_training == (where == "in a step") and next(calls) == (12 if is_training else 2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return make(self, key, buffer)

    options = ["model.name=test_resnet", "accelerate.micro_batch_size=4", "train.duration=4 steps"]
    options += ["checkpoint.every=1000 steps", "evaluate.batch_size=32"]
    options += [f"evaluate.every={2 if where == 'in an evaluation' else 1000} steps"]
    monkeypatch.setattr(ImageBatches, "make", stuck)
    began = time.monotonic()
    with pytest.raises(Stopped) as caught:
        signalled(write_recipe(), tmp_path / "cut", {}, *options).fit()
    assert time.monotonic() - began < 20
    assert caught.value.status == Stopped.RESUMABLE
    assert steps_of(tmp_path / "cut") == [2]
    if where == "in an evaluation":
        return
    monkeypatch.setattr(ImageBatches, "make", make)
    signalled(write_recipe(), tmp_path / "cut", {}, *options, resume=True).fit()
    signalled(write_recipe(), tmp_path / "whole", {}, *options).fit()
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def in_child(work: Callable[[], None]) -> int:
    """Return the exit status of `work` in a forked process; negative for a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except Stopped as error:
            status = error.status
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_ctrl_c_stops_at_once(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    at = {1: [signal.SIGINT, signal.SIGINT]}
    assert in_child(lambda: signalled(write_recipe(), tmp_path / "run", at, *RARELY) and None) == 0
    assert in_child(lambda: signalled(write_recipe(), tmp_path / "two", at, *RARELY).fit() and None) == -signal.SIGINT
    assert steps_of(tmp_path / "two") == []


def test_ctrl_c_works_during_a_long_operation(tmp_path: Path) -> None:
    """Python's handlers run only after it; the second Ctrl-C must not wait."""
    child = os.fork()
    if not child:
        size = 6000  # one thread needs many seconds for the product; the factors are created before
        left, right = torch.ones(size, size), torch.ones(size, 4 * size)
        with StopSignals(lambda cause: (tmp_path / "told").write_text(cause) and None):
            (tmp_path / "ready").touch()
            torch.mm(left, right)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(child, signal.SIGINT)
    time.sleep(0.5)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "told").read_text() == "Ctrl-C"


def test_a_signal_to_all_processes_lets_workers_finish_the_step(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Terminals send Ctrl-C, and schedulers SIGTERM, to the loader's workers too."""

    class Group(Signalled):
        def train_step(self, step: Step) -> Tensor:
            if step.index == 2:
                os.killpg(os.getpgid(0), signal.SIGTERM)
                time.sleep(0.2)
            return super().train_step(step)

    def work() -> None:
        os.setsid()
        overrides = [*SMALL, *RARELY, "train.duration=60 steps", "data.workers=2", f"output_dir={tmp_path / 'run'}"]
        Group.from_recipe(write_recipe(), overrides).fit()

    assert in_child(work) == 75
    assert steps_of(tmp_path / "run") == [3]


def stop_one_of_two(recipe: str, run: str, at: int) -> tuple[int, int]:
    options = ["train.duration=80 steps", "train.batch_size=8", *RARELY]
    try:
        signalled(Path(recipe), Path(run), {at: [signal.SIGTERM]}, *options, process=1).fit()
    except Stopped as stopped:
        return stopped.step, stopped.status
    raise AssertionError("not stopped")


def test_processes_stop_after_the_same_step_at_most_ten_after_the_signal(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = run_processes(stop_one_of_two, str(write_recipe()), str(tmp_path / "run"), 13)
    assert first == second
    assert first[1] == 75
    assert 14 <= first[0] <= 24
    assert steps_of(tmp_path / "run") == [first[0]]


def wait_in_vain(recipe: str, run: str, who: int) -> tuple[str, int, float]:
    """Both processes are signalled in their third step, for which the images of one of them never arrive."""
    make, calls = ImageBatches.make, itertools.count(1)

    def stuck(self: ImageBatches, key: Any, buffer: Any = None) -> Any:
        if self.transform is not None and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60 if int(os.environ["RANK"]) == who else 0)
        return make(self, key, buffer)

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop, "MOST_WAIT", 0.2)
        patch.setattr(ImageBatches, "make", stuck)
        with pytest.raises(Stopped) as caught:
            signalled(Path(recipe), Path(run), {}, *RARELY, "train.duration=4 steps").fit()
    return str(caught.value), caught.value.status, time.monotonic() - began


@pytest.mark.parametrize("who", [0, 1], ids=["main", "other"])
def test_the_main_process_saves_alone_if_the_images_of_one_never_arrive(
    who: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, cut, whole = str(write_recipe()), str(tmp_path / "cut"), str(tmp_path / "whole")
    ended = run_processes(wait_in_vain, recipe, cut, who)

    assert ended[0][0].startswith("stopped by SIGTERM after step 2 of 4; its state is saved")
    assert [status for _, status, _ in ended] == [75, 75]
    assert max(seconds for *_, seconds in ended) < 20
    assert steps_of(Path(cut)) == [2]
    if who == 0:
        return
    assert run_processes(train_to_the_end, recipe, cut, True) == [4, 4]
    run_processes(train_to_the_end, recipe, whole, False)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def train_to_the_end(recipe: str, run: str, resume: bool) -> int:
    return signalled(Path(recipe), Path(run), {}, *RARELY, "train.duration=4 steps", resume=resume).fit().steps


def stop_in_the_middle(recipe: str, run: str, at: int | None, resume: bool) -> int:
    """Two processes with batch norm, whose running statistics differ between averagings."""
    options = ["model.name=test_resnet", "train.duration=8 steps", "evaluate.every=4 steps", "checkpoint.every=4 steps"]
    signals = {} if at is None else {at: [signal.SIGTERM]}
    trainer = signalled(Path(recipe), Path(run), signals, *options, resume=resume)
    try:
        return trainer.fit().steps
    except Stopped as stopped:
        return stopped.step


def test_an_unscheduled_save_changes_no_statistics(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, stopped_run = str(write_recipe()), str(tmp_path / "cut")
    run_processes(stop_in_the_middle, recipe, str(tmp_path / "whole"), None, False)
    (stopped, _) = run_processes(stop_in_the_middle, recipe, stopped_run, 1, False)
    assert stopped not in (4, 8)
    assert run_processes(stop_in_the_middle, recipe, stopped_run, None, True) == [8, 8]
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert any("running_var" in name for name in expected)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_saving_every_some_minutes(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("hf_fasttrain.train.stop.time.monotonic", lambda: now[0])

    class Slow(Trainer):
        def train_step(self, step: Step) -> Tensor:
            now[0] += 25
            return super().train_step(step)

    overrides = [*SMALL, "train.duration=7 steps", "evaluate.every=7 steps", f"output_dir={tmp_path / 'run'}"]
    Slow.from_recipe(write_recipe(), [*overrides, "checkpoint={every: 1 minute, keep: 9}"]).fit()
    assert steps_of(tmp_path / "run") == [3, 6, 7]


def save_by_clock_of_main(recipe: str, run: str) -> None:
    class Slow(Trainer):
        def train_step(self, step: Step) -> Tensor:
            if self.accelerator.is_main_process:
                time.sleep(0.05)
            return super().train_step(step)

    overrides = [*SMALL, "train.duration=30 steps", "evaluate.every=30 steps", f"output_dir={run}"]
    Slow.from_recipe(recipe, [*overrides, "checkpoint={every: 0.008 minutes, keep: 9}"]).fit()


def test_the_main_processs_clock_decides(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run_processes(save_by_clock_of_main, str(write_recipe()), str(tmp_path / "run"))
    assert 2 <= len(steps_of(tmp_path / "run")) <= 9


def test_an_interrupted_evaluation_is_repeated_first_on_resume(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.duration=6 steps", "evaluate.every=3 steps", "checkpoint.every=100 steps"]
    signalled(write_recipe(), tmp_path / "whole", {}, *options).fit()
    trainer = signalled(write_recipe(), tmp_path / "cut", {}, *options)
    evaluate = Evaluator.__call__

    def interrupted(self: Evaluator, *args: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        with pytest.raises(Stopped) as error:
            trainer.fit()
    assert error.value.step == 3
    signalled(write_recipe(), tmp_path / "cut", {}, *options, resume=True).fit()
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    resumed = read_state(tmp_path / "cut" / "checkpoints" / "step_00000003")
    assert resumed["state"]["evaluated_at"] == 3  # saved again, with the result
    evaluations = [[(line["step"], line["loss"]) for line in run if line["kind"] == "evaluation"] for run in lines]
    assert evaluations[0] == evaluations[1]
    assert [step for step, _ in evaluations[0]] == [3, 6]
    best = [json.loads((tmp_path / run / "result.json").read_text())["best"] for run in ("whole", "cut")]
    assert best[0] == best[1]


def test_a_launcher_that_dies_counts_as_a_signal(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """`accelerate launch` does not forward SIGTERM: its training process would continue unnoticed."""
    status = tmp_path / "status"

    def train() -> None:
        overrides = [*SMALL, *RARELY, "train.duration=500 steps", f"output_dir={tmp_path / 'run'}"]
        trainer = Trainer.from_recipe(write_recipe(), overrides)
        trainer.stop.signals.watch_launcher()
        (tmp_path / "ready").touch()
        trainer.fit()

    def launcher() -> None:
        if not os.fork():
            try:
                train()
            except Stopped as error:
                status.write_text(str(error.status))
            finally:
                os._exit(0)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)

    assert in_child(launcher) == 0
    for _ in range(600):
        if status.exists() and status.read_text():
            break
        time.sleep(0.1)
    assert status.read_text() == "75"
    assert len(steps_of(tmp_path / "run")) == 1


def test_launched_processes_know_their_parent() -> None:
    signals = StopSignals()
    assert signals._parent is None
    signals.watch_launcher()
    assert signals._parent == os.getppid()
    assert signals.received == 0


def test_fit_again_continues_with_the_next_batch_of_a_user_loader() -> None:
    seen: list[int] = []

    class Numbered(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            seen.append(index)
            return torch.randn(2, 3, 2, 2), torch.tensor([0, 1])

    class Once(Trainer):
        def train_step(self, step: Step) -> Tensor:
            if step.index == 2 and not self.state.resumed_at:
                self.state.resumed_at.append(2)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(step)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    loader = torch.utils.data.DataLoader(Numbered(), batch_size=None)
    options: dict[str, Any] = {"duration": "9 steps", "log": RunLog(show=False)}
    trainer = Once(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with pytest.raises(Stopped):
        trainer.fit()
    trainer.fit()
    assert seen == [0, 1, 2, 3, 4, 5, 0, 1, 2]


class Two:
    """Two processes, one of which never requests anything."""

    is_distributed, is_main, number, index = True, True, 2, 0

    def __init__(self) -> None:
        self.exchanges = 0

    def largest(self, *numbers: int) -> list[int]:
        self.exchanges += 1
        return list(numbers)


def test_processes_agree_after_each_slow_step_and_at_most_every_ten_fast_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("hf_fasttrain.train.stop.time.monotonic", lambda: now[0])
    for seconds, max_exchanges in ((3.0, 30), (0.001, 5)):
        two = Two()
        requests = StopRequests(two, StopSignals())  # type: ignore[arg-type]
        exchanged_at = []
        for step in range(1, 31):
            now[0] += seconds
            before = two.exchanges
            assert not requests.at_step(step)
            if two.exchanges > before:
                exchanged_at.append(step)
        assert len(exchanged_at) <= max_exchanges
        assert max(b - a for a, b in zip([0, *exchanged_at], [*exchanged_at, 31], strict=True)) <= 10
