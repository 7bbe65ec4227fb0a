"""Callbacks: called on every process in their order, saved with checkpoints, and named when they fail."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import run_processes
from helpers.runs import steps_of
from helpers.small_trainer import small_trainer

from hf_fasttrain import Trainer
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, load_checkpoint, read_state
from hf_fasttrain.run_folder.result import Result
from hf_fasttrain.train.callbacks import METHODS, Callback, CallbackError, StepReport
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.utils.errors import RunError, Stopped

CALLED: list[tuple[Any, ...]] = []


class Recorder(Callback):
    """Records its calls."""

    name = "a"

    def before_step(self, trainer: Trainer, at: At) -> None:
        assert (at.updates, at.epoch, at.num_steps) == (at.step - 1, (at.step - 1) // 3, trainer.num_steps)
        CALLED.append((self.name, "before_step", at.step))

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        assert report.loss.shape == ()
        assert report.grad_norm is not None
        CALLED.append((self.name, "after_step", report.step, report.num_images, report.lr))

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        assert trainer.state.metrics is metrics
        CALLED.append((self.name, "after_evaluation", trainer.state.step))

    def after_save(self, trainer: Trainer, path: Path) -> None:
        assert path in complete_checkpoints(path.parent)
        CALLED.append((self.name, "after_save", path.name))

    def finished(self, trainer: Trainer, result: Result) -> None:
        assert trainer.output_dir is not None
        assert json.loads((trainer.output_dir / "result.json").read_text())["steps"] == result.steps
        CALLED.append((self.name, "finished", result.steps))

    def failed(self, trainer: Trainer, error: BaseException) -> None:
        CALLED.append((self.name, "failed", type(error).__name__))

    def close(self) -> None:
        CALLED.append((self.name, "close"))


class OtherRecorder(Recorder):
    """Another class of callback."""

    name = "b"


def calls(folder: Path) -> list[tuple[Any, ...]]:
    CALLED.clear()
    options = {"checkpoint_every": "2 steps", "evaluate_every": "3 steps"}
    small_trainer(folder, steps=3, callbacks=[Recorder(), OtherRecorder()], **options).fit()
    return list(CALLED)


def test_callbacks_are_called_in_order_on_every_process(tmp_path: Path) -> None:
    single = calls(tmp_path / "one")
    first, second = run_processes(calls, tmp_path / "two")
    assert [name for name, *_ in single[:4]] == ["a", "b", "a", "b"]
    assert [call[1:] for call in single if call[0] == "a"] == [call[1:] for call in single if call[0] == "b"]
    calls_of_a = [call[1:] for call in single if call[0] == "a" and call[1] != "after_save"]
    steps = [(("before_step", n), ("after_step", n, 8, 0.1)) for n in (1, 2, 3)]
    assert calls_of_a == [*sum(steps, ()), ("after_evaluation", 3), ("finished", 3), ("close",)]
    assert first == second
    images = [(*call[:3], 16, 0.1) if call[1] == "after_step" else call for call in single if call[1] != "after_save"]
    assert [call for call in first if call[1] != "after_save"] == images
    for run_calls in (single, first):  # once they are on disk, which may be a step later
        assert [call[2] for call in run_calls if call[:2] == ("a", "after_save")] == ["step_00000002", "step_00000003"]


class Counting:
    """Counts steps; not a subclass of Callback."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.steps.append(report.step)
        if report.step == 3 and not trainer.state.resumed_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class ResumableList(list[Any]):
    """A loader that can be resumed."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def counted(folder: Path, *callbacks: Any, resume: bool = False) -> Trainer:
    data = [(torch.randn(8, 3, 2, 2), torch.arange(8) % 3)] * 3
    trainer = small_trainer(folder, callbacks=callbacks, checkpoint_every="6 steps", train_loader=ResumableList(data))
    if resume:
        trainer.restore()
    return trainer


def test_the_state_of_callbacks_is_resumed(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    with pytest.raises(Stopped):
        counted(tmp_path, first, second).fit()
    saved = complete_checkpoints(tmp_path / "checkpoints")[-1]
    state = {"steps": [1, 2, 3]}  # the evaluation after them was interrupted
    assert read_state(saved)["callbacks"] == ["Counting", "Counting 2"]
    assert load_checkpoint(saved).training["callbacks"] == [{"Counting": state, "Counting 2": state}]
    resumed, other = Counting(), Counting()
    counted(tmp_path, resumed, other, resume=True).fit()
    assert resumed.steps == other.steps == [1, 2, 3, 4, 5, 6]


class Observer(Counting):
    """Counts steps without taking part in training."""

    takes_part = False


def test_a_callback_that_only_observes_may_be_added_or_removed(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        counted(tmp_path, Observer()).fit()
    assert read_state(complete_checkpoints(tmp_path / "checkpoints")[-1])["callbacks"] == []
    trainer = counted(tmp_path, resume=True)
    assert trainer.log.notes == [
        "callback Observer: the checkpoint has a state of it, but it is not among the trainer's callbacks"
    ]
    trainer.fit()
    resumed_callback = Observer()
    trainer = counted(tmp_path, resumed_callback, resume=True)
    assert trainer.log.notes == ["callback Observer: the checkpoint has no state of it; it starts without one"]
    assert resumed_callback.steps == []


def test_a_run_is_resumed_with_the_callbacks_that_took_part_in_it(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        counted(tmp_path, Counting()).fit()
    for callbacks, message in (
        ([], r"trained with the callback Counting, which may change training .*callbacks=\[Counting\(\.\.\.\)\]"),
        ([Counting(), Counting()], "the callback Counting 2 may change training, and the run was trained without"),
        ([Recorder()], r"Counting, which may change .* the callback Recorder may change .* takes_part = False"),
    ):
        with pytest.raises(RunError, match=message):
            counted(tmp_path, *callbacks, resume=True)
    counted(tmp_path, Counting(), resume=True).fit()


@pytest.mark.parametrize("method", ["before_step", "after_step", "after_evaluation", "after_save", "state_dict"])
def test_a_callback_that_fails_while_training_is_named_and_ends_it(method: str, tmp_path: Path) -> None:
    CALLED.clear()
    methods = {"load_state_dict": lambda *_: None} if method == "state_dict" else {}
    failing = type("Broken", (), {method: lambda *_: {}["a key"], **methods})()
    with pytest.raises(CallbackError) as error:
        small_trainer(
            tmp_path, callbacks=[failing, Recorder()], checkpoint_every="2 steps", evaluate_every="2 steps"
        ).fit()
    assert str(error.value) == f"callback Broken.{method} failed: KeyError: 'a key'"
    assert isinstance(error.value.__cause__, KeyError)
    assert error.value.status == 1
    assert CALLED[-2:] == [("a", "failed", "CallbackError"), ("a", "close")]
    assert small_trainer().fit().steps == 6


@pytest.mark.parametrize("method", ["finished", "close"])
def test_a_run_is_finished_before_a_failing_callback_ends_the_program(method: str, tmp_path: Path) -> None:
    CALLED.clear()
    failing = type("Broken", (), {method: lambda *_: {}["a key"]})()
    with pytest.raises(CallbackError, match=rf"callback Broken.{method} failed: KeyError: 'a key'"):
        small_trainer(tmp_path, callbacks=[failing, Recorder()], report=True).fit()
    assert (tmp_path / "report.html").exists()
    assert CALLED[-2:] == [("a", "finished", 6), ("a", "close")]
    assert steps_of(tmp_path)[-1] == 6


def test_a_callback_that_fails_after_an_error_does_not_hide_it(tmp_path: Path) -> None:
    failing = type("Broken", (), dict.fromkeys(("failed", "close"), lambda *_: {}["a key"]))()
    ending = type("Ending", (), {"before_step": lambda *_: (_ for _ in ()).throw(ZeroDivisionError)})()
    trainer = small_trainer(tmp_path, callbacks=[failing, ending])
    with pytest.raises(CallbackError, match=r"Ending.before_step failed: ZeroDivisionError"):
        trainer.fit()
    assert [note for note in trainer.log.notes if "callback" in note] == [
        f"callback Broken.{method} failed: KeyError: 'a key'" for method in ("failed", "close")
    ]


@pytest.mark.parametrize("method", ["failed", "close"])
def test_ctrl_c_in_a_callback_is_raised_after_the_others_were_called(method: str, tmp_path: Path) -> None:
    called = []

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    first = type("First", (), {method: interrupted, "before_step": lambda *_: {}["a key"]})()
    second = type("Second", (), {each: lambda *_, each=each: called.append(each) for each in ("failed", "close")})()
    trainer = small_trainer(tmp_path, callbacks=[first, second])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert called == ["failed", "close"]
    assert trainer.checkpoints is not None
    assert small_trainer(tmp_path / "other").fit().steps == 6  # no lock or handler is held


def test_a_state_that_only_pickle_could_save_is_refused(tmp_path: Path) -> None:
    methods = {"state_dict": lambda *_: {"a": [Path()]}, "load_state_dict": lambda *_: None}
    with pytest.raises(CallbackError, match=r"Broken.state_dict failed: RunError: can't save its state.a.0 of type"):
        small_trainer(tmp_path, callbacks=[type("Broken", (), methods)()]).fit()
    with pytest.raises(RunError, match=r"callbacks\[0\] is Half, which has only one of state_dict and load_state_dict"):
        small_trainer(callbacks=[type("Half", (), {"state_dict": lambda *_: {}})()])


def test_an_object_without_callback_methods_is_refused() -> None:
    class Misspelt(Callback):
        def after_evaluate(self) -> None:
            """Does nothing."""

    for wrong in (Misspelt(), print):
        with pytest.raises(RunError, match=r"callbacks\[1\] is \w+, which has none of the methods of a callback"):
            small_trainer(callbacks=[Recorder(), wrong])
    assert METHODS == (
        "before_step", "after_step", "after_evaluation", "after_save", "finished", "failed", "close", "state_dict",
        "load_state_dict",
    )  # fmt: skip


def test_a_recipe_is_trained_with_callbacks(write_recipe: Any, tmp_path: Path) -> None:
    CALLED.clear()
    Trainer.from_recipe(write_recipe(), [f"output_dir={tmp_path / 'run'}"], callbacks=[Recorder()]).fit()
    assert CALLED[-2:] == [("a", "finished", 2), ("a", "close")]
