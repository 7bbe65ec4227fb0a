"""When a run folder is free: what a run that saved nothing leaves does not count, what any other leaves does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.processes import as_unknown_user, can_become_others

from hf_fasttrain.run_folder.folder import is_unsaved, remove_unsaved, require_free, resume_command
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError, on_command_line


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Return the folder of a run that was killed before its first checkpoint."""
    folder = tmp_path / "my run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "resolved.yaml", "metrics.jsonl", "checkpoints/.lock", "notes.txt"):
        (folder / name).write_text("")
    return folder


def test_a_run_that_saved_nothing_does_not_block_its_folder(killed: Path) -> None:
    require_free(killed, resume=False)
    assert remove_unsaved(killed) == ["recipe.yaml", "resolved.yaml", "metrics.jsonl"]
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoints", "notes.txt"]


@pytest.mark.parametrize("saved", ["result.json", "report.html", "checkpoints/step_00000003"])
def test_whatever_a_run_saved_blocks_its_folder(killed: Path, saved: str) -> None:
    (killed / saved).touch()
    assert not is_unsaved(killed)
    with pytest.raises(RunError, match="holds a run already"):
        require_free(killed, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_no_run_replaces_the_report_of_a_cross_validation(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "crossval.json").touch()
    with pytest.raises(RunError, match="holds a cross-validation"):
        require_free(tmp_path, resume=resume)


def test_a_finished_run_whose_checkpoints_are_gone_is_not_begun_anew(killed: Path) -> None:
    require_free(killed, resume=True)
    (killed / "result.json").touch()
    with pytest.raises(RunError, match="its checkpoints have been removed"):
        require_free(killed, resume=True)
    (killed / "checkpoints" / "step_00000003").mkdir()
    require_free(killed, resume=True)


@pytest.mark.parametrize("absent", ["resolved.yaml", "checkpoints/.lock"])
def test_files_that_a_run_may_not_have_written_block_a_folder(killed: Path, absent: str) -> None:
    (killed / absent).unlink()
    with pytest.raises(RunError, match=r"holds a run already \(recipe.yaml"):
        require_free(killed, resume=False)


def test_the_command_that_resumes_a_run_is_complete(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resume_command(killed) is None  # in a Python program
    with on_command_line():
        assert resume_command(killed) == f"hf-fasttrain '{killed}' --resume"
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert resume_command(killed) is None


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a FIFO"),
        (link("nowhere"), "a link to nowhere: No such file or directory"),
        (link("metrics.jsonl"), "a link to metrics.jsonl: Too many levels of symbolic links"),
        (link("/dev/full"), "a device"),
    ],
)
def test_something_else_in_the_place_of_a_runs_file_is_named_before_training(
    killed: Path, make: Callable[[Path], object], what: str, resume: bool
) -> None:
    (killed / "metrics.jsonl").unlink()
    make(killed / "metrics.jsonl")
    with pytest.raises(RunError, match=rf"my run: metrics.jsonl is {what}; remove it, or choose another output_dir$"):
        require_free(killed, resume=resume)
    log = RunLog(killed, show=False)  # as if it had come while training
    log.resume_line(1, "step_00000001", 1)
    assert what == "a link to nowhere: No such file or directory" or "metrics.jsonl: " in log.lost[0]


def test_lines_are_not_appended_through_a_link(killed: Path, tmp_path: Path) -> None:
    (killed / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (killed / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(RunError, match=r"metrics.jsonl is a link to .*elsewhere, which is not written to; remove it"):
        require_free(killed, resume=False)
    log = RunLog(killed, show=False)  # as if it had become a link while training
    log.resume_line(1, "step_00000001", 1)
    assert log.lost
    assert (tmp_path / "elsewhere").read_bytes() == before


@can_become_others
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111, 0o222])
def test_a_folder_without_permissions_is_one_message(killed: Path, mode: int) -> None:
    def work() -> str:
        with pytest.raises(RunError) as caught:
            require_free(killed, resume=False)
        return str(caught.value)

    killed.chmod(mode)
    message = as_unknown_user(work, killed.parent)
    assert message == f"output_dir {killed}: can't be used: Permission denied; choose another output_dir"
