"""The run log: progress bars on a terminal, one line per interval elsewhere, nothing from other processes."""

from __future__ import annotations

import io
import itertools
import re

import pytest
import torch

from hf_fasttrain.train import log as runlog
from hf_fasttrain.train import throughput
from hf_fasttrain.train.log import RunLog, _Terminal

VALUES = {
    "loss": 0.25, "lr": 1e-3, "images_per_second": 1234.5, "data_wait_fraction": 0.03, "seconds_per_step": 2.0,
    "epoch": 1.5, "eta_seconds": 130.0, "peak_memory_bytes": 3 * 2**30,
}  # fmt: skip


def terminal(log: RunLog, width: int = 100) -> io.StringIO:
    """Return a stream that the log takes for a terminal."""
    written = io.StringIO()
    log.console = _Terminal(file=written, force_terminal=True, width=width, highlight=False, color_system=None)
    return written


def last_frame(written: io.StringIO) -> str:
    """Return the final content of the terminal without control codes."""
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\x00", written.getvalue()).split("\x00")
    return "\n".join(frame for frame in frames if frame.strip())


def bars_after(step: int) -> str:
    """Return the content of the terminal after a step of 100, in epochs of 40."""
    log = RunLog()
    written = terminal(log)
    with log.progress(num_steps=100, done=0, steps_per_epoch=40):
        log.train_line(step, 100, VALUES)
        log._display.refresh()
    return last_frame(written)


def test_progress_bars_show_epoch_and_run_with_the_remaining_time() -> None:
    bars = bars_after(50)
    assert re.search(r"epoch 2/3 .* 25% 1 min 00 s left", bars), bars  # 30 of 40 steps of 2 s
    assert re.search(r"run +.* 50% 2 min 10 s left", bars)
    assert "loss 0.2500  lr 1.00e-03  1,230 images/s  waiting 3%  3.22 GB" in bars


def test_the_last_epoch_may_be_short() -> None:
    assert re.search(r"epoch 3/3 .* 100%", bars_after(100))


def test_bars_move_between_lines_and_continue_after_resuming() -> None:
    log = RunLog()
    terminal(log)
    with log.progress(num_steps=100, done=30, steps_per_epoch=50):
        display = log._display
        assert [task.completed for task in display.tasks] == [30, 30]
        display._updated_at = 0.0
        log.at_step(31)
        assert [task.completed for task in display.tasks] == [31, 31]
        log.at_step(32)  # within a tenth of a second: not worth drawing
        assert [task.completed for task in display.tasks] == [31, 31]


def test_evaluation_and_saving_are_shown_in_the_progress() -> None:
    log = RunLog()
    terminal(log)
    with log.progress(10, 0, 10):
        log.train_line(5, 10, VALUES)
        with log.activity("evaluating: validation"):
            assert log._display.facts == "evaluating: validation"
        assert log._display.facts.startswith("loss")


def test_a_narrow_terminal_cuts_the_numbers() -> None:
    log = RunLog()
    written = terminal(log, width=40)
    with log.progress(10, 0, 10):
        log.train_line(5, 10, VALUES)
        log._display.refresh()
    assert max(len(line) for line in last_frame(written).splitlines()) <= 40


def test_without_a_terminal_one_line_is_printed_per_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    log = RunLog()
    with log.progress(100, 0, 50):
        for step in range(1, 100):
            now[0] += 1.0
            log.train_line(step, 100, VALUES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == (
        "step 1/100  epoch 1.50  loss 0.2500  lr 1.00e-03  1,230 images/s  waiting 3%  3.22 GB  2 min 10 s left"
    )
    assert lines[1].endswith("left  (a line every 10 s)")
    assert all(line.endswith("left") for line in lines[2:])


def test_the_time_left_is_steady_when_single_laps_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    counts = throughput.Throughput(torch.device("cpu"), lambda: 0.0)
    estimates, laps = [], []
    with counts.running():
        for lap in range(60):
            for _ in range(10):
                now[0] += 0.2 if lap % 2 else 0.6
                counts.add(torch.tensor(1.0), 8)
            laps.append(counts.lap(lambda tensor: tensor)["seconds_per_step"])
            estimates.append(counts.recent_seconds_per_step)
        assert laps[-2:] == pytest.approx([0.6, 0.2])
        assert estimates[0] == pytest.approx(0.6)
        assert all(abs(after - before) < 0.03 for before, after in itertools.pairwise(estimates[20:]))
        assert estimates[-1] == pytest.approx(0.4, abs=0.03)
        for _ in range(2):  # a lasting change is followed within minutes
            now[0] += 100.0
            for _ in range(100):
                counts.add(torch.tensor(1.0), 8)
            counts.lap(lambda tensor: tensor)
    assert counts.recent_seconds_per_step == pytest.approx(1.0, abs=0.1)


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(main=False)
    with log.progress(10, 0, 10), log.activity("evaluating"):
        log.train_line(10, 10, VALUES)
        log.at_step(10)
        log.print("hello")
        log.eval_line(10, 1.0, "validation", {"accuracy": 1.0}, 0.1, 1.0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
