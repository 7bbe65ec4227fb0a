"""Caches that no run uses go by themselves: after a month, or when all of them take too much of the disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.processes import in_child
from helpers.runs import exit_status

from hf_fasttrain.data.pixels import cache as caches
from hf_fasttrain.data.pixels.cache import PixelCache, StoredPixels, list_caches, open_cache
from hf_fasttrain.data.pixels.cache_limits import limit_bytes, make_room, remove_unused, room_for, write_limit
from hf_fasttrain.data.pixels.cache_locks import is_in_use
from hf_fasttrain.from_recipe.trainer import build_trainer

Make = Callable[..., PixelCache]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes a cache of one image of 256 KB in tmp_path, last used some days ago."""

    def make(name: str, days: float, dataset: str = "other") -> PixelCache:
        cache = open_cache(tmp_path / name, 1, 1 << 30, {"dataset": dataset, "split": "train", "fingerprint": name})
        pixels = np.random.default_rng(0).integers(0, 256, (64, 1365, 3), dtype=np.uint8)
        cache.add([StoredPixels(0, (0, 0, 0), pixels)])
        for file in (tmp_path / name).iterdir():
            os.utime(file, (time.time() - days * 86400,) * 2)
        return cache

    return make


def names(folder: Path) -> set[str]:
    return {entry.path.name for entry in list_caches(folder)}


def same(dataset: str) -> Callable[[caches.CacheEntry], bool]:
    return lambda entry: entry.about.get("dataset") == dataset


def test_caches_of_other_data_go_after_30_days(make: Make, tmp_path: Path) -> None:
    for name, days, dataset in (("old", 31, "other"), ("new", 29, "other"), ("mine", 99, "own"), ("own", 99, "own")):
        make(name, days, dataset)
    note = make_room(tmp_path, tmp_path / "own", 0, 1 << 40, same("own"))
    assert names(tmp_path) == {"new", "mine", "own"}
    assert note is not None
    assert note.startswith("decoded pixels kept on disk were deleted, 2")
    assert "1 cache not used for 30 days (other (train, 1 images)); `hf-fasttrain cache`" in note
    assert make_room(tmp_path, tmp_path / "own", 0, 1 << 40, same("own")) is None


def test_a_cache_that_is_open_stays_whatever_its_age(make: Make, tmp_path: Path) -> None:
    kept = [make("old", 99)]
    assert is_in_use(tmp_path / "old")
    assert remove_unused(list_caches(tmp_path)) == []
    write_limit(tmp_path, 0.0)
    assert make_room(tmp_path, tmp_path / "own", 1000, 1 << 40, same("own")) is None
    in_child(lambda: kept[0].num_rows)  # the end of a loader process is not that of the run
    assert is_in_use(tmp_path / "old")
    kept.clear()
    assert not is_in_use(tmp_path / "old")
    assert len(remove_unused(list_caches(tmp_path))) == 1


def test_a_cache_that_is_open_in_another_process_stays(make: Make, tmp_path: Path) -> None:
    make("old", 99)

    def check() -> None:
        opened = open_cache(tmp_path / "old", 1, 1, {})
        assert opened.lock is not None
        child = os.fork()
        if child == 0:
            os._exit(len(remove_unused(list_caches(tmp_path))))
        assert os.waitpid(child, 0)[1] == 0

    in_child(check)
    os.utime(tmp_path / "old" / "about.json", (0, 0))
    assert len(remove_unused(list_caches(tmp_path))) == 1


def test_beyond_the_total_the_least_recently_used_go_first(make: Make, tmp_path: Path) -> None:
    for days in (1, 2, 3):
        make(f"used {days} days ago", days)
    make("of the same data", 4, "own")
    size = list_caches(tmp_path)[0].num_bytes
    write_limit(tmp_path, 3.5 * size / 1e9)
    note = make_room(tmp_path, tmp_path / "own", size, 1 << 40, same("own"))
    assert names(tmp_path) == {"used 1 days ago", "of the same data"}
    assert "2 caches beyond " in (note or "")
    make_room(tmp_path, tmp_path / "own", 3 * size, 1 << 40, same("own"))
    assert names(tmp_path) == set()


def test_all_caches_share_half_of_what_is_free_and_kept(make: Make, tmp_path: Path) -> None:
    free = 4 << 20
    own = tmp_path / "own"
    assert room_for(tmp_path, own, free) == free // 2
    kept = make("other", 1)
    size = list_caches(tmp_path)[0].num_bytes
    assert limit_bytes(tmp_path, list_caches(tmp_path), free) == (free + size) // 2
    assert room_for(tmp_path, own, free) == (free + size) // 2 - size  # it is open
    del kept
    assert room_for(tmp_path, own, free) == (free + size) // 2
    assert room_for(tmp_path, tmp_path / "other", free) == (free + size) // 2 - size
    write_limit(tmp_path, 1e-3)
    assert room_for(tmp_path, own, free) == 1_000_000
    write_limit(tmp_path, None)
    assert room_for(tmp_path, own, free) == (free + size) // 2


def test_a_cache_that_is_deleted_while_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = caches.lock_shared, []

    def delete_first(folder: Path) -> Any:
        calls.append(folder)
        lock = real(folder)
        if len(calls) == 1:
            shutil.rmtree(folder)
        return lock

    monkeypatch.setattr(caches, "lock_shared", delete_first)
    cache = open_cache(tmp_path / "new", 3, 1000, {"dataset": "d"})
    assert len(calls) == 2
    assert is_in_use(tmp_path / "new")
    assert list(cache.read(np.arange(3), lambda _: (0, 0, 0))) == [None] * 3


def test_unfinished_caches_go_after_a_day(tmp_path: Path) -> None:
    for name, days in ((".hf_fasttrain-new-a", 0.5), (".hf_fasttrain-new-b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index").write_text("")
        os.utime(tmp_path / name / "index", (time.time() - days * 86400,) * 2)
    assert [entry.path.name for entry in remove_unused(list_caches(tmp_path))] == [".hf_fasttrain-new-b"]


def test_a_run_that_keeps_pixels_on_disk_says_what_it_has_deleted(
    make: Make, tmp_path: Path, image_folder: Path, write_recipe: Any
) -> None:
    make("old", 31)
    recipe = write_recipe(
        f"model: {{name: test_resnet}}\ndata: {{dataset: '{image_folder}', image_size: 32, workers: 0, cache_dir: "
        f"'{tmp_path}'}}\ntrain: {{duration: 2 epochs, batch_size: 16}}\n"
    )
    assert exit_status(["check", str(recipe), "data.cache=disk"]) == 0
    assert "old" in names(tmp_path)
    trainer = build_trainer(str(recipe), [f"output_dir={tmp_path / 'run'}", "data.cache=disk"])
    assert "old" not in names(tmp_path)
    assert any("1 cache not used for 30 days" in note for note in trainer.log.notes)
    assert all(is_in_use(entry.path) for entry in list_caches(tmp_path))


def test_the_limit_is_listed_set_and_kept(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = make("a", 1)
    make("b", 2)
    exit_status(["cache", "--dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert "in use  other (train, 1 images)" in output
    assert "(half of what is free and kept); a run that keeps pixels deletes what was not used for 30 days" in output
    assert exit_status(["cache", "--dir", str(tmp_path), "--max-gb", "0.0001"]) == 0
    output = capsys.readouterr().out
    assert "deleted b: other (train, 1 images)" in output
    assert "at most 100 kB (set by --max-gb)" in output
    assert names(tmp_path) == {"a"}  # open
    assert exit_status(["cache", "--dir", str(tmp_path), "--max-gb", "auto"]) == 0
    assert "half of what is free" in capsys.readouterr().out
    assert exit_status(["cache", "--dir", str(tmp_path), "--max-gb", "some"]) == 2
    assert "--max-gb is 'some'; give a number of GB, such as 200, or auto" in capsys.readouterr().err
    assert kept.num_rows == 1
