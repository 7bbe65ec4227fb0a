"""Faults around training: losses that are not finite, full disks, deleted folders, two runs in one folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import steps_of
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.cli import main
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, load_checkpoint
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError, Stopped, UserError

SMALL = ["data.eval_fraction=0.05", "train.duration=6 steps", "evaluate.every=6 steps", "log.every=3"]


def make(recipe: Path, run: Path, *overrides: str, resume: bool = False, kind: type[Trainer] = Trainer) -> Trainer:
    reset_accelerate()
    return kind.from_recipe(recipe, [*SMALL, *overrides, f"output_dir={run}"], resume=resume)


class Broken(Trainer):
    """Makes the loss or a gradient NaN in one step."""

    at, gradient = 4, False

    def train_step(self, step: Step) -> Tensor:
        if step.index == self.at:
            kind = nn.Module.register_full_backward_hook if self.gradient else nn.Module.register_forward_hook
            hook = (lambda m, i, o: (i[0] * float("nan"),)) if self.gradient else (lambda m, i, o: o * float("nan"))
            last = list(self.raw_model.modules())[-1]
            with kind(last, hook):
                return super().train_step(step)
        return super().train_step(step)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loss_or_gradient_that_is_not_finite_names_step_lr_and_images(
    gradient: bool, workers: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    kind = type("BrokenHere", (Broken,), {"gradient": gradient})
    options = ["checkpoint.every=2 steps", "log.every=6", f"data.workers={workers}", "accelerate.micro_batch_size=6"]
    trainer = make(write_recipe(), tmp_path / "run", *options, kind=kind)
    expected = trainer.train_loader.image_indices(4)
    problem = r"the gradients' norm is nan" if gradient else r"the loss is nan"
    with pytest.raises(RunError, match=rf"{problem} at step 5, lr 0\.00025: lower optimizer\.lr") as error:
        trainer.fit()
    images = str(error.value).split("by row: ")[1]
    assert [int(row) for row in images.split(", ")] == expected.tolist()
    assert len(expected) == 16
    assert steps_of(tmp_path / "run") == [2, 4]
    for path in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(torch.isfinite(v).all() for v in load_checkpoint(path).weights["model"].values())


def broken_on_one(recipe: str, run: str) -> str:
    """The loss is NaN on one process only; all of them stop with the same message."""

    class One(Broken):
        at = 2

        def train_step(self, step: Step) -> Tensor:
            return super().train_step(step) if self.processes.index else Trainer.train_step(self, step)

    trainer = make(Path(recipe), Path(run), kind=One)
    with pytest.raises(RunError) as error:
        trainer.fit()
    return str(error.value)


def test_processes_stop_together(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    first, second = run_processes(broken_on_one, str(write_recipe()), str(tmp_path / "run"))
    assert first == second
    assert first.startswith("the loss is nan at step 3, ")


def test_ordinary_steps_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads nothing from the device between two log lines: neither .item() nor a bool of a tensor."""
    reads: list[str] = []
    for name in ("item", "__bool__", "__float__", "tolist", "cpu", "numpy"):
        real = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            reads.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(Tensor, name, counted)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.ones(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))] * 30
    seen: list[int] = []

    class Counting(Trainer):
        def train_step(self, step: Step) -> Tensor:
            before = len(reads)
            loss = super().train_step(step)
            seen.append(len(reads) - before)
            return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    Counting(model, data, optimizer, clip_norm=1.0, log=RunLog(show=False), log_every=30).fit()
    assert sum(seen) == 0
    assert reads  # at the end


def test_fp16_that_keeps_overflowing_is_one_message() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.full((4, 3, 2, 2), float("inf")), torch.tensor([0, 1, 2, 0]))] * 40
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    trainer = Trainer(model, data, optimizer, log=RunLog(show=False), log_every=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trainer.accelerator.scaler = scaler
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    trainer.step.updater.optimizer = wrapped
    with pytest.raises(RunError, match=r"fp16 overflows at step 13 even with a loss scale of 0\.00195"):
        trainer.fit()


def full_below(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Make opening files whose path contains `part` for writing fail."""
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and part in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("part", ["step_", "metrics.jsonl", "result.json"])
def test_a_full_disk_does_not_stop_training_and_is_reported_at_the_end(
    part: str,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    make(write_recipe(), run, "train.duration=2 steps").fit()
    full_below(monkeypatch, part)
    reset_accelerate()
    arguments = [str(write_recipe()), *SMALL, "checkpoint.every=1 steps", f"output_dir={run}", "--resume"]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 74
    printed = capsys.readouterr().out
    assert "trained to the end, but not everything is on disk:" in printed
    assert "No space left on device" in printed
    if part == "step_":
        assert "checkpoint of step 3 not written: No space left on device; the newest is" in printed
        assert steps_of(run) == [2]
    if part != "result.json":
        written = json.loads((run / "result.json").read_text())
        assert written["steps"] == 6
        assert "No space left on device" in written["not_written"][0]
    monkeypatch.undo()
    result = make(write_recipe(), run, "train.duration=7 steps", resume=True).fit()
    assert result.not_written == []
    gap = "metrics.jsonl has no lines for steps 3 to 6: they did not reach the disk"
    assert (gap in result.notes) == (part == "metrics.jsonl")


def test_a_model_that_cannot_be_written_keeps_the_old_one(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    make(write_recipe(), run, "train.duration=2 steps").fit()
    before = (run / "model" / "model.safetensors").read_bytes()
    trainer = make(write_recipe(), run, resume=True)

    def fail_half_way(model: nn.Module, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"to")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    trainer.export = fail_half_way
    result = trainer.fit()
    assert [text.split(": ")[1] for text in result.not_written] == ["Input/output error"]
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert not list(run.glob(".model*"))


def test_older_checkpoints_are_deleted_when_the_disk_is_full(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for two checkpoints, while three are to be kept."""
    run = tmp_path / "run"
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_WRONLY and ".step_" in str(path) and len(steps_of(run)) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    best = "best: {metric: accuracy}"
    result = make(write_recipe(), run, f"checkpoint={{every: 1 steps, keep: 3, {best}}}").fit()
    assert result.not_written == []
    assert steps_of(run) == [5, 6]


def test_a_deleted_output_folder_is_reported(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Vanishing(Trainer):
        def train_step(self, step: Step) -> Tensor:
            if step.index == 3:
                assert self.checkpoints is not None
                self.checkpoints.wait()
                shutil.rmtree(tmp_path / "run")
            return super().train_step(step)

    result = make(write_recipe(), tmp_path / "run", "checkpoint.every=2 steps", kind=Vanishing).fit()
    assert steps_of(tmp_path / "run") == [4, 6]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    missing = ["metrics.jsonl: No such file or directory", "recipe.yaml: is gone", "resolved.yaml: is gone"]
    assert [text.rpartition("/")[2] for text in result.not_written] == missing
    assert json.loads((tmp_path / "run" / "result.json").read_text())["not_written"] == result.not_written


def test_the_best_checkpoint_stays_until_a_better_one_is_on_disk(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", os.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_WRONLY and ".step_00000003" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    losses = iter([3.0, 2.0, 1.0, 5.0, 6.0, 7.0])  # the third is the best and can't be written
    monkeypatch.setattr(Trainer, "evaluate", lambda self, loader: {"loss": next(losses)})
    best = "checkpoint={every: 1 steps, keep: 1, best: {metric: loss, mode: min}}"
    result = make(write_recipe(), run, best, "evaluate.every=1 steps").fit()
    assert result.best is not None
    assert result.best["step"] == 3
    assert steps_of(run) == [2, 6]


def test_a_closed_pipe_does_not_stop_training(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """As in `hf-fasttrain RECIPE | head -1`."""
    read_end, writes = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(read_end)
            os.dup2(writes, 1)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            make(write_recipe(), tmp_path / "run", "log.every=1").fit()
            status = 0
        finally:
            os._exit(status)
    os.close(writes)
    os.read(read_end, 1)
    os.close(read_end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert steps_of(tmp_path / "run") == [6]


def test_a_terminal_that_hangs_up_leaves_the_right_status(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The progress bar's terminal no longer exists when SIGHUP arrives."""
    child, terminal = os.forkpty()
    if not child:
        status = 1
        try:
            sys.stdout = os.fdopen(1, "w", buffering=1)
            os.environ["TERM"] = "xterm"
            overrides = ["train.duration=5000 steps", "log.every=1", "evaluate.every=5000 steps"]
            make(write_recipe(), tmp_path / "run", *overrides, "checkpoint.every=5000 steps").fit()
        except Stopped as stopped:
            status = stopped.status
        finally:
            os._exit(status)
    seen = b""
    while b"epoch" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert len(steps_of(tmp_path / "run")) == 1


def test_a_closed_terminal_does_not_stop_training(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(write_recipe(), tmp_path / "run")

    def fail_write(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(trainer.log.console, "print", fail_write)
    assert trainer.fit().steps == 6


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_alive(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run, ready = tmp_path / "run", tmp_path / "ready"

    class Waiting(Trainer):
        def train_step(self, step: Step) -> Tensor:
            if step.index == 2:
                ready.touch()
                time.sleep(60)
            return super().train_step(step)

    child = os.fork()
    if not child:
        make(write_recipe(), run, "checkpoint.every=1 steps", "data.workers=1", kind=Waiting).fit()
        os._exit(0)
    while not ready.exists():
        assert not os.waitpid(child, os.WNOHANG)[0]
        time.sleep(0.05)
    for resume in (False, True):
        refused = (
            rf"another process is training or writing results in it \(process {child} on .*, since 20.*\); wait for"
            if resume
            else "holds"
        )
        with pytest.raises(RunError, match=refused):
            make(write_recipe(), run, resume=resume)
    os.kill(child, signal.SIGKILL)  # its loader process lives a moment longer
    os.waitpid(child, 0)
    assert make(write_recipe(), run, resume=True).fit().steps == 6


def test_a_file_system_without_locks_is_reported_and_used(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    result = make(write_recipe(), tmp_path / "run").fit()
    assert any("its file system has no locks" in note for note in result.notes)


def test_a_run_that_could_not_start_unlocks_its_folder(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.class_weights"):
        make(write_recipe(), tmp_path / "run", "train.class_weights=[1.0]")
    assert make(write_recipe(), tmp_path / "run").fit().steps == 6


TOKEN = "hf_" + "aBcDeFgHiJ" * 3


def test_a_token_is_refused_in_a_recipe_and_shown_nowhere(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main([str(write_recipe()), f"model.args={{token: {TOKEN}}}", f"output_dir={tmp_path / 'run'}"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "model contains an access token; remove it: log in with `hf auth login`" in message
    with pytest.raises(SystemExit):
        main([f"data.dataset={TOKEN}"])
    assert TOKEN not in message + capsys.readouterr().err


def test_notes_contain_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    log.note(f"refused by the Hub: {TOKEN}")
    assert log.notes == ["refused by the Hub: hf_***"]
    assert TOKEN not in capsys.readouterr().out


def test_code_of_a_model_is_not_run_unless_the_recipe_allows_it(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from hf_fasttrain.utils.errors import ModelError

    folder, marker = tmp_path / "model", tmp_path / "was_run"
    folder.mkdir()
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own-kind", "auto_map": auto}))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('seen')\n")
    with pytest.raises(ModelError, match=r"needs its own Python code, which is not run unless the recipe sets"):
        make(write_recipe(), tmp_path / "run", f"model.name=transformers:{folder}")
    assert not marker.exists()
    with pytest.raises(ModelError, match="ImportError: seen"):
        make(write_recipe(), tmp_path / "run", f"model.name=transformers:{folder}", "model.trust_remote_code=true")
    assert marker.exists()


def test_yaml_creates_no_objects(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from hf_fasttrain.utils.errors import RecipeError

    marker = tmp_path / "was_run"
    text = f"model: !!python/object/apply:os.system ['touch {marker}']\n"
    with pytest.raises(RecipeError):
        make(write_recipe(text), tmp_path / "run")
    assert not marker.exists()


def test_images_of_a_step_do_not_depend_on_processes(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = make(write_recipe(), tmp_path / "run", "accelerate.micro_batch_size=4")
    order = trainer.train_loader.sampling_plan
    plan = order.plan(7)
    assert np.array_equal(
        trainer.train_loader.image_indices(7), np.concatenate([k.indices for k in plan.micro_batches])
    )
