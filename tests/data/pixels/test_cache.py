"""Caches of pixels: correct pixels or none, for any writer and after any failure."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import run_processes
from helpers.runs import exit_status, num_kept
from PIL import Image

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.device_cache import DevicePrefetcher
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.pixels.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.pixels.cache import (
    ENTRY,
    HEADER_BYTES,
    PixelCache,
    StoredPixels,
    cache_key,
    list_caches,
    memory_cache,
    open_cache,
    remove_cache,
)
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Source, Split, load_source
from hf_fasttrain.utils.errors import DataError

CPU = torch.device("cpu")
STAMP = (0, 5, 7)
RNG = np.random.default_rng(0)


def pixels_of(row: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (size, size + row % 3, 3), dtype=np.uint8)


def fill(cache: PixelCache, rows: Any, size: int = 12) -> None:
    for row in rows:
        cache.add([StoredPixels(row, STAMP, pixels_of(row, size))])


def read(cache: PixelCache, num_rows: int, stamp: tuple[int, int, int] = STAMP) -> list[np.ndarray | None]:
    return list(cache.read(np.arange(num_rows), lambda row: stamp))


def read_images(images: Images, rows: np.ndarray, events: list[Any] | None = None) -> list[np.ndarray]:
    """Return the pixels of different images."""
    return [pixels for _, pixels in images.pixels(rows, rows.copy(), [] if events is None else events)]


def num_right(cache: PixelCache, num_rows: int, size: int = 12) -> int:
    """Return the number of cached rows; all of them must be correct."""
    found = read(cache, num_rows)
    for row, pixels in enumerate(found):
        assert pixels is None or np.array_equal(pixels, pixels_of(row, size))
    return sum(pixels is not None for pixels in found)


@pytest.fixture(params=["disk", "memory"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., PixelCache]:
    def make(num_rows: int = 20, budget: int = 10**9) -> PixelCache:
        if request.param == "memory":
            return memory_cache(num_rows, budget)
        return open_cache(tmp_path / "kept", num_rows, budget, {"dataset": "flowers"})

    return make


def test_cached_pixels_are_returned(make_cache: Callable[..., PixelCache]) -> None:
    cache = make_cache()
    assert num_right(cache, 20) == 0
    fill(cache, [3, 0, 19])
    assert num_right(cache, 20) == num_kept(cache) == 3
    assert cache.used_bytes() == sum(pixels_of(row).nbytes for row in (3, 0, 19))
    reopened = PixelCache(cache.index_path, cache.pixels_path, 20, 10**9)  # another process of the machine
    assert num_right(reopened, 20) == 3
    fill(reopened, range(20))
    assert num_right(cache, 20) == 20


def test_the_budget_is_respected_and_reported(make_cache: Callable[..., PixelCache]) -> None:
    num_bytes = pixels_of(0).nbytes
    cache = make_cache(20, 3 * num_bytes + 5)
    fill(cache, range(0, 20, 3))  # all of one size
    assert num_right(cache, 20) == 3
    assert cache.used_bytes() <= 3 * num_bytes + 5
    assert cache.problem is not None
    assert "are used up" in cache.problem


def test_a_changed_image_is_decoded_again(make_cache: Callable[..., PixelCache]) -> None:
    cache = make_cache()
    fill(cache, range(20))
    reopened = PixelCache(cache.index_path, cache.pixels_path, 20, 10**9)
    assert read(reopened, 20, stamp=(0, 5, 8)) == [None] * 20
    reopened.add([StoredPixels(4, (0, 5, 8), pixels_of(5))])  # created again
    found = read(reopened, 20, stamp=(0, 5, 8))
    assert [row for row, pixels in enumerate(found) if pixels is not None] == [4]
    assert np.array_equal(found[4], pixels_of(5))


@pytest.mark.parametrize("damage", ["pixels", "truncated", "entry", "shifted", "swapped", "random index"])
def test_a_damaged_cache_is_detected(damage: str, tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "kept", 20, 10**9, {})
    fill(cache, range(20))
    index, data = tmp_path / "kept" / "index", tmp_path / "kept" / "pixels"
    entries = np.fromfile(index, ENTRY, offset=HEADER_BYTES)
    bytes_ = bytearray(data.read_bytes())
    if damage == "pixels":
        for offset in range(0, len(bytes_), 200):
            bytes_[offset] ^= 1
        data.write_bytes(bytes_)
    elif damage == "truncated":
        os.truncate(data, len(bytes_) // 2)
    elif damage == "entry":
        entries["height"], entries["width"] = entries["width"].copy(), entries["height"].copy()
    elif damage == "shifted":
        entries["offset"] += 3
    elif damage == "swapped":
        entries = entries[::-1].copy()
    else:
        entries = np.frombuffer(np.random.default_rng(0).bytes(entries.nbytes), ENTRY).copy()
        entries["length"] %= 2000
    with index.open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(entries.tobytes())
    reopened = open_cache(tmp_path / "kept", 20, 10**9, {})
    assert num_right(reopened, 20) <= 14
    fill(reopened, range(20))
    assert num_right(reopened, 20) == 20


@pytest.mark.parametrize("wrong", [b"", b"nonsense" * 100, b"hfftpix0" + (20).to_bytes(8, "little") + bytes(10_000)])
def test_an_index_of_another_version_is_replaced(wrong: bytes, tmp_path: Path) -> None:
    fill(open_cache(tmp_path / "kept", 20, 10**9, {}), range(20))
    (tmp_path / "kept" / "index").write_bytes(wrong)
    cache = open_cache(tmp_path / "kept", 20, 10**9, {})
    assert num_right(cache, 20) == 0
    fill(cache, range(20))
    assert num_right(open_cache(tmp_path / "kept", 20, 10**9, {}), 20) == 20


def test_a_cache_for_other_rows_is_replaced(tmp_path: Path) -> None:
    fill(open_cache(tmp_path / "kept", 20, 10**9, {}), range(20))
    assert num_right(open_cache(tmp_path / "kept", 21, 10**9, {}), 21) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_cache_deleted_while_in_use_is_reported(tmp_path: Path, image_folder: Path) -> None:
    source = load_source(str(image_folder))
    cache = open_cache(tmp_path / "kept", 24, 10**9, {})
    remove_cache(list_caches(tmp_path)[0])
    events: list[Any] = []
    images = Images(source.train, Preparation(), cache)
    rows = np.arange(4)
    expected = read_images(Images(source.train, Preparation()), rows)
    for _ in range(2):
        pixels = read_images(images, rows, events)
        assert all(np.array_equal(a, b) for a, b in zip(pixels, expected, strict=True))
    (notes_seen,) = events
    assert "data.cache of split 'train': can't be opened: " in notes_seen


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def test_a_writer_killed_half_way_leaves_correct_pixels_or_none(tmp_path: Path) -> None:
    folder, num_rows, size = tmp_path / "kept", 1500, 200

    def write() -> None:
        fill(open_cache(folder, num_rows, 10**9, {}), range(num_rows), size)

    kept = 0
    for seconds in (0.02, 0.05, 0.1):
        child = in_child(write)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = num_right(open_cache(folder, num_rows, 10**9, {}), num_rows, size)
        assert kept < num_rows
    fill(open_cache(folder, num_rows, 10**9, {}), range(num_rows), size)  # nobody holds a lock
    assert num_right(open_cache(folder, num_rows, 10**9, {}), num_rows, size) == num_rows


def test_a_full_disk_is_reported_and_no_wrong_pixels_are_read(tmp_path: Path, image_folder: Path) -> None:
    """The limit on the size of a file stops a write half way, as a full disk does."""
    source = load_source(str(image_folder))
    preparation = Preparation(center=EvalTransform(64))
    plain = np.stack(read_images(Images(source.train, preparation), np.arange(24)))
    cache = open_cache(tmp_path / "kept", 24, 10**9, {})

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        events: list[Any] = []
        images = Images(source.train, preparation, cache)
        for start in range(0, 24, 4):
            rows = np.arange(start, start + 4)
            assert np.array_equal(np.stack(read_images(images, rows, events)), plain[rows])
        notes_seen = [event for event in events if isinstance(event, str)]
        (tmp_path / "told").write_text("\n".join(dict.fromkeys(notes_seen)))

    os.waitpid(in_child(write), 0)
    assert (tmp_path / "told").read_text() == (
        "data.cache of split 'train': can't write to it: File too large; images that are not in it are decoded "
        "every time"
    )
    found = list(cache.read(np.arange(24), source.train.images.stamp))
    assert sum(pixels is not None for pixels in found) == 100_000 // (64 * 64 * 3)
    assert all(pixels is None or np.array_equal(pixels, plain[row]) for row, pixels in enumerate(found))


@pytest.fixture(scope="module")
def digits() -> Source:
    return load_source("digits", eval_fraction=0.02)


def batches(
    split: Split,
    preparation: Preparation,
    transform: TrainTransform | None,
    cache: PixelCache | None,
    *,
    workers: int = 0,
    device: bool = False,
    epochs: int = 2,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pixels and labels of two epochs over the first 60 images."""
    images = ImageBatches(Images(split, preparation, cache), transform)
    prefetcher: Prefetcher = Prefetcher(images, CPU, workers=workers, pin_memory=False)
    if device:
        prefetcher = DevicePrefetcher(images, CPU, 16, workers=workers, pin_memory=False)
    order = [np.random.default_rng(epoch).permutation(60) for epoch in range(epochs)]
    keys = [MicroBatchKey(epoch, part) for epoch in range(epochs) for part in np.split(order[epoch], [16, 32, 48])]
    return [(pixels.clone(), labels.clone()) for pixels, labels in prefetcher.open(keys, 16)]


def equal(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


CROPS = {
    "random_resized": (Preparation(short_side=6), TrainTransform(16, erase_prob=0.5)),
    "stored as JPEG": (Preparation(short_side=6, stored_quality=80), TrainTransform(16)),
    "padded": (Preparation(center=EvalTransform(16, crop_pct=1.0)), TrainTransform(16, crop="padded", erase_prob=0.5)),
    "evaluation": (Preparation(center=EvalTransform(16)), None),
}


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("kind", ["none", "memory", "disk", "device"])
@pytest.mark.parametrize("case", CROPS)
def test_pixels_do_not_depend_on_the_cache(case: str, kind: str, workers: int, digits: Source, tmp_path: Path) -> None:
    preparation, transform = CROPS[case]
    if kind == "device" and preparation.center is None:
        pytest.skip("random crops of images of any size are not made on the device")
    expected = batches(digits.train, preparation, transform, None)
    rows = len(digits.train.images)
    cache = None
    if kind == "memory":
        cache = memory_cache(rows, 10**8)
    elif kind == "disk":
        cache = open_cache(tmp_path / "kept", rows, 10**8, {})
    options = {"workers": workers, "device": kind == "device"}
    assert equal(batches(digits.train, preparation, transform, cache, **options), expected)
    if cache is not None:
        assert num_kept(cache) == 60
        changed = replace(preparation)
        object.__setattr__(changed, "encoded", None)  # nothing is decoded again
        assert equal(batches(digits.train, changed, transform, cache, **options), expected)


def fill_from_process(folder: Path) -> bool:
    """Read all images with 2 workers of this process; another process reads its share."""
    source = load_source("digits", eval_fraction=0.02)
    preparation = Preparation(center=EvalTransform(16))
    cache = open_cache(folder, len(source.train.images), 10**9, {})
    prefetcher = Prefetcher(ImageBatches(Images(source.train, preparation, cache)), CPU, workers=2, pin_memory=False)
    rank = int(os.environ["RANK"])
    keys = [MicroBatchKey(0, np.arange(start, start + 20)) for start in range(20 * rank, 400, 30)]  # they overlap
    plain = ImageBatches(Images(source.train, preparation))
    return all(
        torch.equal(pixels[0], plain.make(key).pixels)
        for pixels, key in zip(prefetcher.open(keys, 20), keys, strict=True)
    )


def test_two_processes_with_two_workers_fill_one_cache(tmp_path: Path, digits: Source) -> None:
    assert run_processes(fill_from_process, tmp_path / "kept") == [True, True]
    cache = open_cache(tmp_path / "kept", len(digits.train.images), 10**9, {})
    images = Images(digits.train, Preparation(center=EvalTransform(16)))
    rows = digits.train.rows_of(np.arange(len(digits.train)))
    found = list(cache.read(rows, digits.train.images.stamp))
    assert sum(pixels is not None for pixels in found) >= 400
    for index, pixels in enumerate(found):
        if pixels is not None:
            (plain,) = read_images(images, np.array([index]))
            assert np.array_equal(pixels, plain)


RECIPE = """
model: {{name: test_resnet}}
data: {{dataset: {folder}, image_size: 32, workers: 1, cache_dir: {cache_dir}}}
augment: {{crop: padded, mixup: 0.2}}
train: {{duration: 3 epochs, batch_size: 8}}
log: {{report: false}}
"""


def train(recipe: Path, output: Path, *overrides: str) -> Trainer:
    trainer = Trainer.from_recipe(recipe, [f"output_dir={output}", *overrides])
    trainer.fit()
    return trainer


def test_training_is_the_same_with_every_cache(image_folder: Path, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(RECIPE.format(folder=image_folder, cache_dir=tmp_path / "kept"))
    weights = {}
    for kind in ("none", "auto", "memory", "disk", "device"):
        trainer = train(recipe, tmp_path / kind, f"data.cache={kind}")
        weights[kind] = torch.cat([p.flatten() for p in trainer.raw_model.parameters()])
        resolved = (tmp_path / kind / "resolved.yaml").read_text()
        chosen = "memory" if kind == "auto" else kind
        assert f"data.cache:\n  value: {chosen}" in resolved
    assert all(torch.equal(w, weights["none"]) for w in weights.values())
    assert len(list_caches(tmp_path / "kept")) == 2  # training and evaluation images

    changed = image_folder / "train" / "red" / "0.jpg"  # the next run sees the new image
    Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(changed)
    uncached = train(recipe, tmp_path / "fresh", "data.cache=none")
    reused = train(recipe, tmp_path / "reused", "data.cache=disk")
    for a, b in zip(uncached.raw_model.parameters(), reused.raw_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(weights["none"], torch.cat([p.flatten() for p in uncached.raw_model.parameters()]))
    assert len(list_caches(tmp_path / "kept")) == 2


def test_a_cache_that_is_too_small_is_reported(image_folder: Path, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(RECIPE.format(folder=image_folder, cache_dir=tmp_path / "kept"))
    trainer = train(recipe, tmp_path / "run", "data.cache=memory", "data.cache_gb=0.00002")
    assert any("data.cache=memory: split 'train' needs" in note for note in trainer.log.notes)
    assert any(
        "20.0 kB are used up (data.cache_gb, hf-fasttrain cache clean); images" in note for note in trainer.log.notes
    )


def test_invalid_folders_and_settings_are_refused(image_folder: Path, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(RECIPE.format(folder=image_folder, cache_dir=tmp_path / "kept"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir .*file: can't be written: .*; choose another, or data.cache"):
        Trainer.from_recipe(
            recipe, ["data.cache=disk", f"data.cache_dir={tmp_path / 'file'}", f"output_dir={tmp_path}/a"]
        )
    with pytest.raises(DataError, match=r"data.cache=device: only crop, flip and erasing run on the device"):
        Trainer.from_recipe(recipe, ["data.cache=device", "augment.trivialaugment=true", f"output_dir={tmp_path}/b"])


def test_other_operating_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fasttrain.data.pixels.cache.ON_DISK", False)
    monkeypatch.setattr("hf_fasttrain.data.pixels.cache.IN_MEMORY", False)
    with pytest.raises(DataError, match=r"data.cache=disk needs Linux or macOS; use none"):
        open_cache(tmp_path / "kept", 2, 100, {})
    with pytest.raises(DataError, match=r"data.cache=memory needs Linux; use disk or none"):
        memory_cache(2, 100)


def train_one_of_two(recipe: Path, output: Path, kind: str) -> tuple[list[torch.Tensor], int]:
    trainer = Trainer.from_recipe(recipe, [f"output_dir={output}", f"data.cache={kind}"])
    trainer.fit()
    cache = trainer.train_loader.prefetcher.images.images.cache
    kept = num_kept(cache) if cache else 0
    trainer.accelerator.wait_for_everyone()  # the cache in memory belongs to the main process and ends with it
    return [p.detach().clone() for p in trainer.raw_model.parameters()], kept


def test_a_full_disk_does_not_hide_cached_pixels(
    image_folder: Path, tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(RECIPE.format(folder=image_folder, cache_dir=tmp_path / "kept"))
    train(recipe, tmp_path / "first", "data.cache=disk")
    monkeypatch.setattr("hf_fasttrain.from_recipe.cache_plan.free_disk_bytes", lambda folder: 0)
    monkeypatch.setattr("hf_fasttrain.from_recipe.cache_plan.free_memory_bytes", lambda: 0)
    trainer = train(recipe, tmp_path / "second")
    assert trainer.train_loader.prefetcher.images.images.cache.pixels_path.startswith(str(tmp_path / "kept"))
    assert any("data.cache=auto: decoded images of split 'train' are kept in " in note for note in trainer.log.notes)
    uncached = train(recipe, tmp_path / "third", "data.short_side=16")  # other pixels, which do not fit
    assert uncached.train_loader.prefetcher.images.images.cache is None


def test_check_creates_no_cache(image_folder: Path, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(RECIPE.format(folder=image_folder, cache_dir=tmp_path / "kept"))
    assert exit_status(["check", str(recipe), "data.cache=disk"]) == 0
    assert not (tmp_path / "kept").exists()


def test_two_processes_share_one_cache_in_memory(image_folder: Path, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(RECIPE.format(folder=image_folder, cache_dir=tmp_path / "kept"))
    plain = run_processes(train_one_of_two, recipe, tmp_path / "plain", "none")
    kept = run_processes(train_one_of_two, recipe, tmp_path / "kept_run", "memory")
    for (weights, _), (expected, _) in zip(kept, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert [number for _, number in kept] == [24, 24]  # both see what either has cached


def test_caches_are_listed_and_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_dir = tmp_path / "pixels"
    names = []
    for short, days in ((100, 40), (200, 2)):
        content = {"short_side": short, "fingerprint": "f"}
        names.append(cache_key(content))
        fill(
            open_cache(cache_dir / names[-1], 20, 10**9, {"dataset": "flowers", "split": "train", **content}), range(20)
        )
        for file in (cache_dir / names[-1]).iterdir():
            os.utime(file, (time.time() - days * 86400,) * 2)
    assert names[0] != names[1]
    (cache_dir / ".hf_fasttrain-new-left").mkdir()
    (cache_dir / "mine").mkdir()  # not a cache, despite a file of that name
    (cache_dir / "mine" / "index").write_text("")
    exit_status(["cache", "--dir", str(cache_dir)])
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()[:3]] == [names[1], names[0], ".hf_fasttrain-new-left"]
    assert "flowers (train, 20 images): short side 100" in output
    assert "incomplete" in output
    for arguments, message in (
        (["clean", "--dir", str(cache_dir)], "no cache selected: give names"),
        (["clean", "--dir", str(cache_dir), "nosuch"], "no cache 'nosuch' in"),
    ):
        assert exit_status(["cache", *arguments]) == 2
        assert message in capsys.readouterr().err
    exit_status(["cache", "clean", "--dir", str(cache_dir), "--unused-days", "30"])
    assert f"deleted {names[0]}: flowers (train, 20 images)" in capsys.readouterr().out
    assert (cache_dir / names[1]).exists()
    exit_status(["cache", "--dir", str(cache_dir), "clean", "--all"])
    assert [path.name for path in cache_dir.iterdir()] == ["mine"]


def test_memory_does_not_grow_over_twenty_epochs(digits: Source) -> None:
    """The private memory of this process and of its workers, at the end of each epoch."""
    transform = TrainTransform(64)
    cache = memory_cache(len(digits.train.images), 10**9)
    images = ImageBatches(Images(digits.train, Preparation(short_side=8), cache), transform)
    prefetcher = Prefetcher(images, CPU, workers=2, pin_memory=False)
    keys = [MicroBatchKey(e, np.arange(s, s + 64)) for e in range(22) for s in range(0, 1728, 64)]
    sizes = []
    for number, _ in enumerate(prefetcher.open(keys, 64)):
        if number % 27 == 26:
            sizes.append(private_bytes())
    assert len(sizes) == 22
    assert sizes[-1] - sizes[1] < 8 << 20  # an epoch's pixels are 21 MB; none of it may remain


def private_bytes() -> int:
    """Return the private memory of this process and its children."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in (os.getpid(), *map(int, children)):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
    return total


def test_the_cache_describes_its_content(tmp_path: Path) -> None:
    open_cache(tmp_path / "kept", 20, 10**9, {"dataset": "flowers", "split": "train", "short_side": 256})
    (entry,) = list_caches(tmp_path)
    assert entry.dataset == "flowers (train, 20 images)"
    assert entry.settings == "short side 256"
    assert json.loads((tmp_path / "kept" / "about.json").read_text())["num_rows"] == 20


@pytest.mark.parametrize("change", [{"num_rows": "many"}, {"center": 3}, {"format": None}, {"dataset": ["x"]}])
def test_a_damaged_description_of_a_cache_is_not_one(tmp_path: Path, change: dict[str, Any]) -> None:
    open_cache(tmp_path / "kept", 20, 10**9, {"dataset": "flowers", "split": "train", "center": None})
    about = tmp_path / "kept" / "about.json"
    assert len(list_caches(tmp_path)) == 1
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    assert list_caches(tmp_path) == []
    about.write_text("[" * 10**5)
    assert list_caches(tmp_path) == []
