"""A user's loop over `running` and `iterate`: after any exit nothing is held and the next one starts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import torch
from helpers.processes import reset_accelerate
from helpers.runs import steps_of, weights
from helpers.small_trainer import small_trainer
from nbclient import NotebookClient

from hf_fasttrain import Trainer
from hf_fasttrain.run_folder import lock
from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.callbacks import CallbackError
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.utils.errors import Interrupted, RunError, Stopped

SMALL = ["model.name=test_vit", "data.eval_fraction=0.05", "train.duration=4 steps", "evaluate.every=4 steps"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)


def process_state() -> list[Any]:
    """Return the process-wide state that a running trainer changes, as comparable values."""
    threads = [thread.name for thread in threading.enumerate() if thread.name in ("checkpoint", "hub")]
    children = [child.pid for child in psutil.Process().children()]
    return [dict(lock._locks), [signal.getsignal(number) for number in SIGNALS], threads, children]


def test_a_users_loop_trains_as_fit_does(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    Trainer.from_recipe(write_recipe(), [*SMALL, f"output_dir={tmp_path / 'fit'}"]).fit()
    reset_accelerate()
    trainer = Trainer.from_recipe(write_recipe(), [*SMALL, f"output_dir={tmp_path / 'loop'}"])
    seen = []
    with trainer.running():
        for step in trainer.iterate():
            seen.append((step.step, step.num_images, float(step.loss)))
        result = trainer.finish()
    assert [number for number, _, _ in seen] == [1, 2, 3, 4]
    assert result.steps == 4
    assert not result.stopped_early
    expected, actual = weights(tmp_path / "fit"), weights(tmp_path / "loop")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_step_is_yielded_after_evaluation_and_saving(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run", checkpoint_every="2 steps", evaluate_every="2 steps")
    with trainer.running():
        for step in trainer.iterate():
            assert trainer.state.step == step.step
            assert trainer.state.evaluated_at == step.step - step.step % 2 or step.step < 2
            assert trainer.checkpoints is not None
            trainer.checkpoints.wait()
            assert steps_of(tmp_path / "run")[-1:] == [step.step - step.step % 2][: step.step // 2]


class UserLoopError(Exception):
    """What a loop raises."""


@pytest.mark.parametrize("exit_kind", ["break", "exception", "Ctrl-C", "SIGTERM"])
def test_after_any_exit_from_a_loop_the_next_trainer_starts(
    exit_kind: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    before = process_state()
    trainer = Trainer.from_recipe(write_recipe(), [*SMALL, "data.workers=1", f"output_dir={tmp_path / 'run'}"])
    raised: dict[str, type[BaseException]] = {
        "exception": UserLoopError,
        "Ctrl-C": KeyboardInterrupt,
        "SIGTERM": Stopped,
    }
    caught: BaseException | None = None
    try:
        with trainer.running():
            assert process_state() != before
            for step in trainer.iterate():
                if step.step == 2 and exit_kind == "break":
                    break
                if step.step == 2 and exit_kind == "exception":
                    raise UserLoopError
                if step.step == 2:
                    os.kill(os.getpid(), signal.SIGINT if exit_kind == "Ctrl-C" else signal.SIGTERM)
                assert step.step < 3  # the next step is made and saved
    except (UserLoopError, KeyboardInterrupt, Stopped) as error:
        caught = error  # with its traceback, as a notebook keeps it
    assert isinstance(caught, raised.get(exit_kind, type(None)))
    assert process_state() == before
    if isinstance(caught, Stopped):
        assert steps_of(tmp_path / "run") == [3]
        assert (caught.step, caught.status) == (3, 130 if exit_kind == "Ctrl-C" else 75)
        assert caught.result is not None
        assert caught.result.steps == 3
        assert str(caught).startswith(f"stopped by {exit_kind} after step 3 of 4; its state is saved: resume=True")
    assert small_trainer(tmp_path / "next").fit().steps == 6
    del trainer, caught


def test_a_loop_left_by_break_can_be_finished(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run", checkpoint_every="6 steps", evaluate_every="6 steps")
    with trainer.running():
        for step in trainer.iterate():
            if step.step == 2:
                break
        for step in trainer.iterate():  # continues where the first loop was left
            assert step.step == 3
            break
        result = trainer.finish()
    assert (result.steps, result.stopped_early, steps_of(tmp_path / "run")) == (3, True, [3])
    assert result.metrics["accuracy"] >= 0
    assert torch.equal(weights(tmp_path / "run")["1.weight"], trainer.raw_model[1].weight)
    assert (tmp_path / "run" / "result.json").exists()


def test_fit_continues_where_a_loop_was_left() -> None:
    trainer, uninterrupted = small_trainer(), small_trainer()
    with trainer.running():
        for step in trainer.iterate():
            if step.step == 3:
                break
    assert trainer.fit().steps == 6
    uninterrupted.fit()
    assert torch.equal(trainer.raw_model[1].weight, uninterrupted.raw_model[1].weight)


def test_trainers_run_one_after_the_other(tmp_path: Path) -> None:
    first, second = small_trainer(tmp_path / "first"), small_trainer()
    with first.running():
        with pytest.raises(
            RunError, match=r"is running in this process already \(output_dir .*first\); end its running\(\)"
        ):
            second.fit()
        with pytest.raises(RunError, match="is running in this process already"), first.running():
            pass
        assert first.finish().steps == 0
    assert second.fit().steps == 6


def test_a_loop_outside_of_running_is_refused() -> None:
    trainer = small_trainer()
    for call in (trainer.iterate, trainer.finish):
        with pytest.raises(RunError, match=rf"{call.__name__}\(\) outside of running\(\): use it as `with trainer"):
            call()
    with trainer.running():
        trainer.finish()
        with pytest.raises(RunError, match=r"iterate\(\) after finish\(\), which has ended the run"):
            trainer.iterate()


def test_a_signal_after_the_last_step_is_passed_on() -> None:
    trainer = small_trainer()
    with pytest.raises(KeyboardInterrupt) as error, trainer.running():  # noqa: PT012 - a loop
        for step in trainer.iterate():
            if step.step == 6:
                os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(error.value, Interrupted)


def test_fit_raises_stopped_and_says_how_to_resume(tmp_path: Path) -> None:
    """No SystemExit: the user's program decides what to do next."""

    class Signalled:
        def before_step(self, trainer: Trainer, at: At) -> None:
            if at.step == 3:  # the end of an epoch, from which the loader can be resumed
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as error:
        small_trainer(tmp_path / "run", callbacks=[Signalled()]).fit()
    assert not isinstance(error.value, SystemExit | KeyboardInterrupt)
    assert str(error.value) == (
        "stopped by SIGTERM after step 3 of 6; its state is saved: resume=True (or Trainer.restore()) continues"
    )
    assert error.value.result is not None
    assert (error.value.cause, error.value.step, error.value.result.steps) == ("SIGTERM", 3, 3)


def test_steps_not_yet_logged_are_logged_at_the_end(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run", steps=20, evaluate_every="20 steps", checkpoint_every="20 steps")
    with trainer.running():
        for step in trainer.iterate():
            if step.step == 14:
                break
        trainer.finish()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [10, 14]
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [10, 14, 20]


def test_a_second_finish_is_refused() -> None:
    trainer = small_trainer()
    with trainer.running():
        for _ in trainer.iterate():
            pass
        trainer.finish()
        for method in (trainer.finish, trainer.iterate):
            with pytest.raises(RunError, match=r"\(\) after finish\(\), which has ended the run: leave running\(\)"):
                method()
    with trainer.running():
        trainer.finish()


def loop_until_interrupted(pipe: int) -> None:
    """Loop until Ctrl-C and write what happened."""
    trainer = small_trainer()
    try:
        with trainer.running():
            for step in trainer.iterate():
                os.write(pipe, b"%d\n" % step.step)
                while step.step == 3 and not trainer.stop.signals.received:
                    time.sleep(0.01)
    except KeyboardInterrupt as error:
        os.write(pipe, f"{type(error).__name__}: {error}\n".encode())


def test_ctrl_c_is_raised_in_the_loop() -> None:
    read_end, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            loop_until_interrupted(writes)
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(read_end) as lines:
        assert [next(lines) for _ in range(3)] == ["1\n", "2\n", "3\n"]
        os.kill(child, signal.SIGINT)
        output = lines.read()
    os.waitpid(child, 0)
    assert output == "Interrupted: stopped by Ctrl-C after step 4 of 6; nothing is saved without an output_dir\n"


CELLS = [
    """
import os, signal, threading
import torch
from hf_fasttrain import Trainer

def make():
    model = torch.nn.Linear(4, 2)
    data = [(torch.randn(8, 4), torch.arange(8) % 2)] * 6
    return Trainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1))

handler, trainer = signal.getsignal(signal.SIGINT), make()
""",
    """
with trainer.running():
    for step in trainer.iterate():
        os.kill(os.getpid(), signal.SIGINT)
""",
    """
assert signal.getsignal(signal.SIGINT) == handler
assert trainer.state.step == 2
print("steps:", make().fit().steps)
""",
]


def test_ctrl_c_in_a_notebook_is_a_keyboard_interrupt_and_the_next_cell_trains() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=60).execute()
    outputs = [[output for output in cell.outputs if output.get("name") != "stderr"] for cell in notebook.cells]
    assert [output["evalue"] for output in outputs[1] if output["output_type"] == "error"] == [
        "stopped by Ctrl-C after step 2 of 6; nothing is saved without an output_dir"
    ]
    assert not [output for cell in (outputs[0], outputs[2]) for output in cell if output["output_type"] == "error"]
    assert "steps: 6" in "".join(output.get("text", "") for output in outputs[2])


def test_after_a_finish_with_the_best_weights_training_continues_from_the_last_and_is_saved(
    tmp_path: Path, rising_loss: None
) -> None:
    uninterrupted = small_trainer(tmp_path / "whole", evaluate_every="1 step")
    uninterrupted.final = "last"
    uninterrupted.fit()
    every: dict[str, Any] = {"evaluate_every": "1 step", "checkpoint_every": "1 step"}
    trainer = small_trainer(tmp_path / "run", best=Watch("loss"), **every)
    trainer.final = "best"
    with trainer.running():
        for step in trainer.iterate():
            if step.step == 4:
                break
        assert trainer.finish().model["step"] == 1
    trainer.final = "last"
    assert trainer.fit().model["step"] == 6
    assert steps_of(tmp_path / "run") == [1, 5, 6]
    for ours, theirs in zip(trainer.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("at", ["loss", "callback"])
def test_a_failed_step_does_not_affect_the_next_training(tmp_path: Path, at: str) -> None:
    uninterrupted, calls = small_trainer(), itertools.count(1)
    uninterrupted.fit()

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 8 and at == "loss":  # the second micro-batch of a step, after two calls of the search
            raise ZeroDivisionError
        return torch.nn.functional.cross_entropy(logits, labels)

    class Fails:
        def before_step(self, trainer: Trainer, place: At) -> None:
            if at == "callback" and place.step == 3 and next(calls) < 100:
                next(itertools.islice(calls, 100, None))
                raise ZeroDivisionError

    accumulation: dict[str, Any] = {"accumulation_steps": 4} if at == "loss" else {}
    trainer = small_trainer(loss=loss, callbacks=[Fails()], **accumulation)
    with pytest.raises((ZeroDivisionError, CallbackError)):
        trainer.fit()
    trainer.fit()
    for ours, theirs in zip(trainer.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_second_pass_starts_without_gradients(tmp_path: Path) -> None:
    class TwoPasses(Trainer):
        def train_step(self, step: Any) -> torch.Tensor:
            self.step.gradients(step)
            loss = self.step.gradients(step)
            self.step.update()
            return loss

    one, two = small_trainer(), small_trainer(kind=TwoPasses)
    one.fit()
    two.fit()
    for ours, theirs in zip(two.model.parameters(), one.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_a_step_adds_are_not_divided_by_the_accumulation() -> None:
    """Also by accelerate's backward, which would divide by an Accelerator's accumulation steps."""

    class Decays(Trainer):
        def train_step(self, step: Any) -> torch.Tensor:
            loss = self.step.gradients(step)
            self.accelerator.backward(sum(parameter.square().sum() for parameter in self.raw_model.parameters()) / 2)
            self.step.update()
            return loss

    ours, theirs = small_trainer(accumulation_steps=4), small_trainer(kind=Decays, accumulation_steps=4)
    ours.optimizer.param_groups[0]["weight_decay"] = 1.0
    ours.fit()
    theirs.fit()
    assert theirs.state.updates == 6
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_an_update_without_gradients_is_refused() -> None:
    class Skips(Trainer):
        def train_step(self, step: Any) -> torch.Tensor:
            self.step.update()
            return torch.zeros(())

    with pytest.raises(RunError, match=r"step.update\(\) without step.gradients\(step\) before it"):
        small_trainer(kind=Skips).fit()


def test_a_broken_gives_one_message_without_a_recipe() -> None:
    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, labels) + torch.tensor(0.0).log() * 0

    with pytest.raises(RunError, match=r"the loss is nan at step 1, lr 0.1: check the loss .*, lower the lr, or set"):
        small_trainer(loss=broken).fit()


def test_restoring_within_a_loop_is_refused(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run")
    with trainer.running(), pytest.raises(RunError, match=r"restore\(\) inside running\(\): call it before"):
        trainer.restore()


def test_a_run_that_was_saved_before_its_first_step_trains(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run")
    trainer.save()
    assert trainer.checkpoints is not None
    trainer.checkpoints.wait()
    assert trainer.fit().steps == 6
