"""Users without a home folder, working folders that are gone, and no folder for temporary files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from helpers.processes import as_unknown_user, can_become_others

from hf_fasttrain.data.pixels.cache import default_cache_dir
from hf_fasttrain.from_recipe.tunings import tunings_dir
from hf_fasttrain.utils import standard_folders
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import expand_user
from hf_fasttrain.utils.standard_folders import (
    require_temporary_folder,
    require_working_folder,
    set_home,
)


@can_become_others
def test_a_user_without_a_home_gets_caches_among_temporary_files_and_is_told(tmp_path: Path) -> None:
    def work() -> tuple[str | None, str, str]:
        note = set_home()
        with pytest.raises(RunError, match=r"^'~/run': there is no such user, or no home folder; write the path out"):
            expand_user("~/run")
        assert str(expand_user("run/~")) == "run/~"
        assert (default_cache_dir().parents[2], tunings_dir().parents[2]) == (Path(os.environ["HOME"]),) * 2
        return note, os.environ["HOME"], str(set_home())

    note, home, again = as_unknown_user(work, tmp_path)
    assert home == f"{tmp_path}/hf_fasttrain-home-65533"
    assert note == again
    assert f"caches are kept in {home}; set HOME" in note
    assert os.stat(home).st_mode & 0o777 == 0o700


@can_become_others
def test_a_home_that_others_could_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf_fasttrain-home-65533").mkdir()

    def work() -> str:
        with pytest.raises(RunError) as caught:
            set_home()
        return str(caught.value)

    assert "is not only theirs; set HOME" in str(as_unknown_user(work, tmp_path))


def test_a_home_that_is_set_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert set_home() is None
    assert expand_user("~/run") == tmp_path / "run"
    monkeypatch.setenv("HOME", "")
    assert set_home() is None
    assert os.environ["HOME"] == str(standard_folders.home_folder())


def test_a_working_folder_that_is_gone_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    require_working_folder()
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunError, match=r"does not exist any more; change to another one \(cd\)"):
        require_working_folder()


@can_become_others
def test_a_working_folder_that_may_not_be_entered_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()

    def work() -> str:
        with pytest.raises(RunError) as caught:
            require_working_folder()
        return str(caught.value)

    before = Path.cwd()
    os.chdir(tmp_path / "closed")
    try:
        Path().chmod(0)
        assert "Permission denied; change to another one (cd)" in str(as_unknown_user(work, tmp_path))
    finally:
        os.chdir(before)


def test_no_folder_for_temporary_files_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    require_temporary_folder()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc", "/nowhere"])
    with pytest.raises(RunError, match=r"^temporary files can't be created in any of /proc, /nowhere: .*set TMPDIR"):
        require_temporary_folder()
