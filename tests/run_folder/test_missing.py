"""A run is finished when model, result.json, predictions and report exist; --resume writes what is missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import reset_accelerate
from helpers.runs import RECIPE, exit_status

from hf_fasttrain.models.saved import model_folder
from hf_fasttrain.run_folder.file_names import LOCK_FILE, SPEC_FILE
from hf_fasttrain.run_folder.lock import acquire
from hf_fasttrain.run_folder.metrics_file import drop_lines_after
from hf_fasttrain.run_folder.missing import describe_missing, is_pushed
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils import files
from hf_fasttrain.utils.files import exchange, new_folder, write_atomically
from hf_fasttrain.utils.json_lines import append_line

SMALL = ["data.eval_fraction=0.05", "train.duration=1 step", "log.report=true"]
OWED = ["model", "result.json", "predictions.safetensors", "report.html"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run whose report has only a head."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(RECIPE)
    reset_accelerate()
    with pytest.MonkeyPatch.context() as patched:
        quick(patched)
        Trainer.from_recipe(folder / "small.yaml", [*SMALL, f"output_dir={folder / 'run'}"]).fit()
    return folder / "run"


def quick(patched: pytest.MonkeyPatch) -> None:
    """Write reports without charts and pictures."""
    patched.setattr("hf_fasttrain.report.report.DRAWINGS", {})
    patched.setattr("hf_fasttrain.report.report.to_html", lambda page, mark: f"<html>{mark}</html>")
    patched.setattr("hf_fasttrain.report.report._require_replaceable", lambda path, **options: None)


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    quick(monkeypatch)
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def resume(run: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return a function that resumes the run by the command line and returns its messages."""

    def command() -> str:
        assert exit_status(["train", str(write_recipe()), *SMALL, f"output_dir={run}", "--resume"]) == 0
        return capsys.readouterr().out

    return command


def fails_for(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Make writing fail for files whose path contains a text."""
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_WRONLY and part in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)


def test_a_complete_run_needs_nothing(run: Path, resume: Callable[[], str]) -> None:
    assert "this run is finished (1 steps); nothing to do" in resume()


@pytest.mark.parametrize("name", OWED)
def test_resume_writes_missing_results(run: Path, resume: Callable[[], str], name: str) -> None:
    before = {path: path.read_bytes() for path in (run / "model").iterdir()}
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    messages = resume()
    assert f"trained to the end; now writing what is missing: {name}" in messages
    assert all((run / name).exists() for name in OWED)
    assert {path: path.read_bytes() for path in (run / "model").iterdir()} == before
    assert "nothing to do" in resume()


def test_a_report_that_is_a_fifo_is_written_again(run: Path, resume: Callable[[], str]) -> None:
    (run / "report.html").unlink()
    os.mkfifo(run / "report.html")
    assert "now writing what is missing: report.html" in resume()
    assert (run / "report.html").is_file()


def test_resume_writes_results_that_a_full_disk_prevented(
    run: Path, resume: Callable[[], str], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", str(write_recipe()), *SMALL, f"output_dir={run}", "--resume"]
    shutil.rmtree(run / "model")
    with monkeypatch.context() as patched:
        patched.setattr("hf_fasttrain.train.checkpointing.sync_files", no_space)
        assert exit_status(command) == 74
    assert not (run / "model").exists()
    assert "No space left" in json.loads((run / "result.json").read_text())["not_written"][0]
    assert "missing: model" in resume()
    assert json.loads((run / "result.json").read_text())["not_written"] == []
    assert (run / "model" / SPEC_FILE).exists()


def test_a_training_without_a_checkpoint_is_not_promised_to_resume(tmp_path: Path) -> None:
    messages = describe_missing(tmp_path, [f"{tmp_path / 'model'}: No space left on device"], 5, 5, report=True)
    assert messages.splitlines()[1:] == [
        f"  {tmp_path / 'model'}: No space left on device",
        "nothing else is on disk either",
        "no checkpoint is on disk: after freeing space, --resume trains from scratch",
    ]
    other = describe_missing(tmp_path, [f"{tmp_path / 'model'}: Is a directory"], 5, 5, report=True)
    assert "after removing the cause, --resume trains from scratch" in other
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000003" / "COMPLETE").touch()
    assert "--resume continues from step 3 and writes what is missing" in describe_missing(
        tmp_path, [], 5, 5, report=True
    )


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["predictions.safetensors", "report.html", "result.json"])
def test_a_full_disk_ends_with_status_74_for_any_lost_file(
    run: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (run / name).unlink()
    fails_for(monkeypatch, f".{name}.partial")
    assert exit_status(["train", str(write_recipe()), *SMALL, f"output_dir={run}", "--resume"]) == 74
    messages = capsys.readouterr().out
    assert f"not everything is on disk:\n  {run / name}: No space left on device" in messages
    assert "\n  on disk: model, " in messages
    assert messages.endswith("with --resume writes what is missing; nothing is trained again\n")
    if name != "result.json":
        assert name in json.loads((run / "result.json").read_text())["not_written"][0]


def test_an_outdated_report_is_written_again(run: Path, resume: Callable[[], str]) -> None:
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "notes": ["another end"]}))
    assert "writing what is missing: report.html" in resume()


def test_the_folder_stays_locked_until_the_last_file_is_written(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_fasttrain.report.callback import Publish
    from hf_fasttrain.run_folder import lock

    locked = []
    monkeypatch.setattr(Publish, "publish", lambda *_: locked.append(len(lock._locks)))
    reset_accelerate()
    before = len(lock._locks)
    Trainer.from_recipe(write_recipe(), [*SMALL, f"output_dir={tmp_path / 'run'}"]).fit()
    assert (locked, len(lock._locks)) == ([before + 1], before)


def test_an_outstanding_push_is_recorded(run: Path) -> None:
    assert not is_pushed(run, "me/x", 1)
    (run / "hub.json").write_text(json.dumps({"repo": "me/x", "step": 1, "finished": False}))
    assert not is_pushed(run, "me/x", 1)  # a checkpoint of that step was
    (run / "hub.json").write_text(json.dumps({"repo": "me/x", "step": 1, "finished": True}))
    assert is_pushed(run, "me/x", 1)
    assert not is_pushed(run, "me/y", 1)


def write(folder: Path, text: str) -> None:
    with new_folder(folder) as partial:
        (partial / "text").write_text(text)


def test_a_folder_exists_at_any_moment_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "model", []
    write(folder, "old")
    for name in ("rename", "rmdir", "unlink"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, **k: (seen.append((folder / "text").exists()), real(*a, **k))
        )
    write(folder, "new")
    assert (folder / "text").read_text() == "new"
    assert all(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_folders_are_exchanged_atomically(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize("again", ["read", "write"])
def test_a_kill_between_two_renames_loses_no_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, again: str
) -> None:
    monkeypatch.setattr(files, "exchange", lambda a, b: False)  # a system without it
    real, calls = os.rename, []

    def rename(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            os._exit(9)
        real(*args)

    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "rename", rename)
        write(run / "model", "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (run / "model").exists()
    if again == "read":
        assert model_folder(run) == run / "model"
        assert (run / "model" / "model.safetensors").exists()
    else:
        write(run / "model", "newer")
        assert (run / "model" / "text").read_text() == "newer"
    assert not (run / ".model.old").exists()


def test_a_link_is_followed_only_to_a_folder_of_the_same_kind(tmp_path: Path) -> None:
    letters, link = tmp_path / "letters", tmp_path / "run"
    write(letters, "mine")
    link.symlink_to(letters)
    with (
        pytest.raises(OSError, match=r"a link to .*letters, which holds"),
        new_folder(link, marks=["mark"]),
    ):
        pass
    assert (letters / "text").read_text() == "mine"
    with new_folder(link, marks=["mark", "text"]) as partial:
        (partial / "text").write_text("new")
    assert (letters / "text").read_text() == "new"
    link.unlink()
    (tmp_path / "letter.txt").write_text("mine")
    link.symlink_to(tmp_path / "letter.txt")
    with pytest.raises(NotADirectoryError), new_folder(link, marks=["letter.txt"]):
        pass


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("mine")
    for name in (".result.json.partial", "bad_images.jsonl", LOCK_FILE):
        (tmp_path / name).symlink_to(letter)
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "result.json", "{}")
    with pytest.raises(OSError, match="symbolic links"):
        append_line(tmp_path / "bad_images.jsonl", "{}")
    with pytest.raises(OSError, match="symbolic links"):
        drop_lines_after(tmp_path / "bad_images.jsonl", 0)
    with pytest.raises(OSError, match="symbolic links"):
        acquire(tmp_path)
    assert letter.read_text() == "mine"
