"""When a run folder is free: what a run that saved nothing leaves does not count, what any other leaves does."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fasttrain.run_folder.folder import is_unsaved, remove_unsaved, require_free, resume_command
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
