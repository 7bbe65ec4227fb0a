"""Folders as people have them: what is read, as which class and split, and that whatever is left out is said."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.processes import as_unknown_user, can_become_others
from helpers.runs import exit_status
from PIL import Image

from hf_fasttrain.data.pixels.decode import read_pixels
from hf_fasttrain.data.source import folder as folder_module
from hf_fasttrain.data.source import inventory
from hf_fasttrain.data.source.dataset import Source, load_source
from hf_fasttrain.data.source.evaluation_split import load_evaluation_split
from hf_fasttrain.data.source.inventory import TooManyLeftOut, images_below, list_folder
from hf_fasttrain.prediction import image_files
from hf_fasttrain.utils.errors import DataError


def write(root: Path, *paths: str | bytes) -> Path:
    """Write files, empty but for their names, and folders (with a / at their end)."""
    for path in paths:
        full = os.path.join(os.fsencode(root), os.fsencode(path))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        if not full.endswith(b"/"):
            with open(full, "wb") as file:
                file.write(b"x")
    return root


def classes(prefix: str = "", number: int = 4, names: Sequence[str] = ("cat", "dog")) -> list[str]:
    return [f"{prefix}{name}/{i}.jpg" for name in names for i in range(number)]


def rows(source: Source, root: Path) -> dict[str, str]:
    """Return path below the root -> class of all images."""
    found = {}
    for split in (source.train, source.evaluation):
        for record, label in zip(split.records(range(len(split))), split.labels.tolist(), strict=True):
            assert os.path.isfile(record["path"])
            found[os.path.relpath(record["path"], root)] = source.class_names[label]
    return found


def load(root: Path, **options: Any) -> Source:
    return load_source(str(root), eval_fraction=0.25, **options)


PLAIN = classes()
# layout -> (files, images that are read beside PLAIN: path -> class, what a note says)
READ: dict[str, tuple[list[str], dict[str, str], str]] = {
    "suffixes": (
        ["cat/a.jfif", "cat/b.JPE", "dog/c.webp", "dog/d.j2k", "dog/e.PNM"],
        {"cat/a.jfif": "cat", "cat/b.JPE": "cat", "dog/c.webp": "dog", "dog/d.j2k": "dog", "dog/e.PNM": "dog"},
        "",
    ),
    "deeper folders": (
        ["cat/x/1.jpg", "cat/x/y/2.jpg", "dog/0/3.jpg"],
        {"cat/x/1.jpg": "cat", "cat/x/y/2.jpg": "cat", "dog/0/3.jpg": "dog"},
        "3 images in folders within class folders (cat/x/1.jpg): the class is that of the first folder",
    ),
    "tools": (
        [
            *(".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg", "__MACOSX/cat/._0.jpg", "cat/.a.jpg", "lost+found/a.jpg"),
            *("x.lock/", "cat/Thumbs.db", "$RECYCLE.BIN/b.jpg", "cat/@eaDir/0.jpg/thumb.jpg", "~$a.jpg"),
        ],
        {},
        "8 images; left out: 10 names that are hidden or a system's ($RECYCLE.BIN/); `hf-fasttrain check",
    ),
    "other files": (["README.md", "cat/a.txt"], {}, "left out: 2 files that are no images by their names (README.md)"),
    "formats": (["cat/a.heic", "dog/b.NEF"], {}, "left out: 2 images of formats that are not read (cat/a.heic)"),
    "loose images": (["cover.jpg"], {}, "left out: 1 image outside of class folders (cover.jpg)"),
    "a class like a split": (["train/0.jpg"], {"train/0.jpg": "train"}, "though called like splits: train"),
    "such a class with folders": (
        ["train/0.jpg", "train/steam/1.jpg"],
        {"train/0.jpg": "train", "train/steam/1.jpg": "train"},
        "though called like splits: train",
    ),
    "metadata of something else": (["metadata.csv"], {}, "1 table or metadata of something else (metadata.csv: no"),
    "words in names": (
        ["test tube/train.jpg", "cat/val-test.jpg"],
        {"test tube/train.jpg": "test tube", "cat/val-test.jpg": "cat"},
        "",
    ),
    "underscores": (["__background__/0.jpg"], {"__background__/0.jpg": "__background__"}, ""),
    "folders like files": (["c.jpg/0.jpg"], {"c.jpg/0.jpg": "c.jpg"}, ""),
}


@pytest.mark.parametrize("layout", READ)
def test_class_folders(layout: str, tmp_path: Path) -> None:
    files, more, note = READ[layout]
    source = load(write(tmp_path, *PLAIN, *files))
    assert rows(source, tmp_path) == {path: path.split("/")[0] for path in PLAIN} | more
    assert source.class_names == sorted({*("cat", "dog"), *more.values()})
    said = [text for text in source.notes if "has no image of" not in text]
    assert any(note in text for text in said) if note else said == []


# layout -> (files, split of each file that is read, what a note says)
SPLITS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "unpacked in its own name": (classes("photos/"), {"photos/": "train"}, "its only folder is read, photos"),
    "unpacked by a Mac": (
        [*classes("photos/"), "__MACOSX/photos/cat/._0.jpg", "README"],
        {"photos/": "train"},
        "left out: 1 file that is no image by its name (../README), 1 name that is hidden or a system's (../__MACOSX/)",
    ),
    "two wrappers": (classes("data/v1/"), {"data/v1/": "train"}, "its only folder is read, data/v1"),
    "a wrapper of splits": (
        [*classes("data/train/"), *classes("data/val/", 1)],
        {"data/train/": "train", "data/val/": "val"},
        "its only folder is read, data",
    ),
    "splits in their own names": (
        [*classes("train/train/"), *classes("val/val/", 1)],
        {"train/train/": "train", "val/val/": "val"},
        "split 'val' is read from val/val/",
    ),
    "a wrapped test split": ([*classes("Train/"), *classes("VAL/", 1)], {"Train/": "train", "VAL/": "val"}, ""),
    "beside splits": (
        [*classes("train/"), *classes("val/", 1), "raw/a/0.jpg", "README.md"],
        {"train/": "train", "val/": "val"},
        "1 folder beside the splits (raw/: 1 image), 1 file",
    ),
    "a flat validation split": (
        [*classes("train/"), "val/0.jpg", "val/1.jpg"],
        {"train/": "train"},
        "1 folder beside the splits (val/: 2 images, without class folders)",
    ),
    "an unused test split": (
        [*classes("train/"), *classes("val/", 1), "test/cat/", "test/dog/"],
        {"train/": "train", "val/": "val"},
        "has a split 'test' too, which is not used",
    ),
    "a class in one folder": (
        [*classes("train/"), "val/cat/a/0.jpg", "val/cat/b/1.jpg"],
        {"train/": "train", "val/": "val"},
        "(val/cat/a/0.jpg): the class is that of the first folder",
    ),
}


@pytest.mark.parametrize("layout", SPLITS)
def test_splits_and_wrappers(layout: str, tmp_path: Path) -> None:
    files, prefixes, note = SPLITS[layout]
    source = load(write(tmp_path, *files))
    assert source.class_names == ["cat", "dog"]
    expected = {file: split for file in files for prefix, split in prefixes.items() if file.startswith(prefix)}
    found = dict.fromkeys(rows(source, tmp_path), source.train.name)
    if not source.held_out:
        of_eval = [record["path"] for record in source.evaluation.records(range(len(source.evaluation)))]
        found |= dict.fromkeys((os.path.relpath(path, tmp_path) for path in of_eval), source.evaluation.name)
    assert found == expected
    assert source.held_out == (set(prefixes.values()) == {"train"})
    assert not note or any(note in text for text in source.notes), source.notes


REFUSED: dict[str, tuple[list[str], str]] = {
    "an empty class": (
        [*PLAIN, "bird/"],
        r"bird: class folder without images \(.apng, .bmp.*\); add images or remove",
    ),
    "a class of photos that are not read": (
        [*PLAIN, "bird/a.heic"],
        r"bird: .* it has 1 image of a format that is not read \(bird/a.heic\); add",
    ),
    "no classes": (["a.jpg", "b.txt"], r"contains no class folders; .* It has 1 file that is no image .* \(b.txt\)"),
    "flat splits": (["train/0.jpg", "val/0.jpg"], "train: contains no class folders"),
    "a flat training split": ([*classes("val/"), "train/0.jpg"], "train: contains no class folders"),
    "a split twice": ([*classes("train/"), *classes("Train/")], "Train and train are the same split; join them"),
    "a split or a class": (
        ["train/steam/0.jpg", "train/ice/1.jpg", "bus/0.jpg", "car/0.jpg"],
        "train may be a split, and bus, car beside it, or all of them classes; give data.dataset=.*/train to train",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_would_be_guessed_are_refused(layout: str, tmp_path: Path) -> None:
    files, expected = REFUSED[layout]
    with pytest.raises(DataError, match=expected):
        load(write(tmp_path, *files))


def test_links(tmp_path: Path) -> None:
    write(tmp_path, *(f"data/{path}" for path in PLAIN), "store/0.jpg", "store/more/1.jpg", "data/cat/a/5.jpg")
    root = tmp_path / "data"
    for name, target in {
        "cat/z.jpg": "/nowhere",
        "cat/loop.jpg": "loop.jpg",
        "cat/up": "..",
        "cat/out": "../../..",
        "self": ".",
        "dog/b": "../cat/a",
        "dog/c": "../cat/a",
        "bird": "../store",
        "kitten": "cat",
        "cat/zero.jpg": "/dev/zero",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "dog" / "fifo.jpg")
    source = load(root)
    own = {path: path.split("/")[0] for path in [*PLAIN, "cat/a/5.jpg"]}
    linked = {"bird/0.jpg": "bird", "bird/more/1.jpg": "bird", "dog/b/5.jpg": "dog"}
    kitten = {path.replace("cat", "kitten", 1): "kitten" for path in own if path.startswith("cat/")}
    assert rows(source, root) == own | linked | kitten
    assert any("class folders that are links to another class: kitten is cat" in note for note in source.notes)
    assert source.inventory is not None
    said = {(entry.path, entry.reason.value[0]): entry.is_image for entry in source.inventory.all}
    assert said == {
        ("cat/loop.jpg", "link loop"): True,
        ("cat/out/", "link loop"): False,
        ("cat/up/", "link loop"): False,
        ("cat/z.jpg", "dead link"): True,
        ("cat/zero.jpg", "FIFO, device or socket"): True,
        ("dog/c/", "link to a folder that is read already"): False,
        ("dog/fifo.jpg", "FIFO, device or socket"): True,
        **{(f"kitten/{name}", why): True for name, why in [("loop.jpg", "link loop"), ("z.jpg", "dead link")]},
        **{(f"kitten/{name}/", "link loop"): False for name in ("out", "up")},
        ("kitten/zero.jpg", "FIFO, device or socket"): True,
        ("self/", "link loop"): False,
    }


def test_links_among_many_folders_do_not_multiply_them(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(12)]
    write(tmp_path, *PLAIN, *(f"cat/{name}/0.jpg" for name in names))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / "cat" / name / f"to{other}").symlink_to(f"../{other}")
    assert len(rows(load(tmp_path), tmp_path)) == len(PLAIN) + len(names)


def test_a_dead_link_that_may_have_been_a_class_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, *PLAIN) / "bird").symlink_to("/mnt/gone")
    with pytest.raises(DataError, match=r"bird: dead link among the class folders \(links to /mnt/gone\); repair it"):
        load(tmp_path)


def test_names_that_are_not_utf8_and_those_that_have_a_meaning_elsewhere(tmp_path: Path) -> None:
    odd = ["a[1]", "b*?", "c%20d", "e#f", "g:h", "i\nj", "k\\l", "-n", "~o", "{p}", "q::r", " s "]
    root = write(tmp_path / "photos [v2] 100%#1", *(f"{name}/[x] %s {i}.jpg" for name in odd for i in range(2)))
    found = rows(load(root), root)
    assert found == {f"{name}/[x] %s {i}.jpg": name for name in odd for i in range(2)}
    write(tmp_path / "latin", *PLAIN, b"ch\xe2t/0.jpg", b"dog/caf\xe9.jpg")
    source = load(tmp_path / "latin")
    assert source.class_names == ["cat", "ch\\xe2t", "dog"]
    assert rows(source, tmp_path / "latin")[os.fsdecode(b"dog/caf\xe9.jpg")] == "dog"
    assert any("whose names are not UTF-8 are called ch\\xe2t" in note for note in source.notes)
    write(tmp_path, *(b"\xf4/" + path.encode() for path in PLAIN))
    with pytest.raises(DataError, match=r"\\xf4: this path is not UTF-8, so a recipe can't hold it; rename"):
        load_source(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xf4")))


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_whose_accents_are_encoded_in_another_way_is_found(written: str, on_disk: str, tmp_path: Path) -> None:
    write(tmp_path / unicodedata.normalize(on_disk, "été"), *PLAIN)  # type: ignore[arg-type]
    assert len(load(tmp_path / unicodedata.normalize(written, "été")).train) == 6  # type: ignore[arg-type]


def test_paths_that_lead_nowhere_or_to_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("/nowhere")
    os.mkfifo("fifo.parquet")
    expected = {
        "link": "link: is a link to /nowhere, which does not exist",
        "./link": "is a link to /nowhere",
        "./a\0b": "no such file or folder",
        "./" + "a" * 300: "no such file or folder",
        "~no one/x": "'~no one/x': there is no such user, or no home folder; write the path out",
        "/dev/zero": "is a file; allowed are",
        "fifo.parquet": "a FIFO, not a regular file",
    }
    for path, message in expected.items():
        with pytest.raises(DataError, match=message):
            load_source(path)
    write(tmp_path, *(f"~x/{path}" for path in PLAIN), *(f"me/digits/{path}" for path in PLAIN), "digits/cat/0.jpg")
    assert len(load_source("~x", eval_fraction=0.25).train) == len(load_source("me/digits", eval_fraction=0.25).train)
    assert "digits is scikit-learn's data set; ./digits is the folder" in load_source("digits").notes


def test_more_than_max_bad_fraction_left_out_ends_the_run_and_check_lists_all(
    tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "photos", *PLAIN, "notes.txt")
    for number in range(12):
        (root / "cat" / f"l{number:02}.jpg").symlink_to("/nowhere")
    assert len(load(root, max_bad_fraction=0.6).train) == 6  # 12 of 20
    with pytest.raises(TooManyLeftOut, match=r"12 of 20 images of split 'train' are left out \(12 dead links \(cat/l0"):
        load(root, max_bad_fraction=0.59)
    assert exit_status(["check", str(write_recipe()), f"data.dataset={root}"]) == 2
    printed = capsys.readouterr()
    assert "and data.max_bad_fraction is 0.01; repair, convert or move them" in printed.err
    assert all(f"cat/l{number:02}.jpg" in printed.out for number in range(12))
    assert "notes.txt" in printed.out
    assert load_evaluation_split(str(root), multi_label=False, max_bad_fraction=0.6).notes[0].startswith(str(root))
    with pytest.raises(TooManyLeftOut):
        load_evaluation_split(str(root), multi_label=False, max_bad_fraction=0.01)


def test_the_only_folder_is_a_class_where_a_model_knows_it(tmp_path: Path) -> None:
    write(tmp_path, "cat/a/0.jpg", "cat/b/1.jpg")
    assert load_evaluation_split(str(tmp_path), multi_label=False).class_names == ["a", "b"]
    assert load_evaluation_split(str(tmp_path), multi_label=False, model_classes=["cat"]).class_names == ["cat"]


def test_predict_reads_the_images_that_training_reads(tmp_path: Path) -> None:
    write(tmp_path / "shots", "b.png", "a/c.JPE", "a/d.heic", ".thumbnails/b.png", "__MACOSX/._b.png", "notes.txt")
    (tmp_path / "shots" / "dead.png").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "fifo.png")
    notes: list[str] = []
    shots = tmp_path / "shots"
    assert [record["path"] for record in image_files([str(shots)], notes.append)] == [
        str(shots / "a" / "c.JPE"),
        str(shots / "b.png"),
    ]
    assert notes == [
        f"{shots}: 2 images; left out: 1 dead link (dead.png: links to /nowhere), 1 image of a format that is not read "
        "(a/d.heic), 1 file that is no image by its name (notes.txt), 2 names that are hidden or a system's "
        "(.thumbnails/)"
    ]
    (named,) = image_files([str(shots / "notes.txt")], notes.append)  # by the user
    assert named["path"] == str(shots / "notes.txt")
    for path, message in {"fifo.png": "is a FIFO", "shots/dead.png": "a link to /nowhere", "gone": "no such"}.items():
        with pytest.raises(DataError, match=message):
            image_files([str(tmp_path / path)], notes.append)


def test_a_folder_is_listed_once_and_its_files_cost_no_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *classes(number=50), *classes("cat/more/", 20))
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(inventory.os, name, lambda *args, **options: calls.append(name) or real(*args, **options))

    for name in ("scandir", "stat", "lstat", "listdir"):
        counted(name)
    names, left_out = images_below(list_folder(str(tmp_path)))
    assert (len(names), left_out) == (140, [])
    assert calls == ["scandir"] * 6  # of the root, cat, dog, cat/more, and its cat and dog
    calls.clear()
    assert len(load(tmp_path).train) == 105
    assert calls.count("scandir") == 6
    assert len(calls) < 20


def test_tables_of_something_else_and_tables_of_another_split(tmp_path: Path) -> None:
    image = {"bytes": b"x", "path": None}
    write(tmp_path, *(f"train/{path}" for path in PLAIN), "test/", "._x.parquet")
    pq.write_table(pa.table({"image": [image], "label": ["bird"]}), tmp_path / "test" / "0.parquet")
    pq.write_table(pa.table({"embedding": [1.0]}), tmp_path / "train" / "cat" / "embeddings.parquet")
    source = load(tmp_path)
    assert (source.class_names, source.train.name, len(source.train)) == (["cat", "dog"], "train", 6)
    assert any("(train/cat/embeddings.parquet: no column of images)" in note for note in source.notes)
    (tmp_path / "test" / "0.parquet").write_bytes(b"PAR1 no more")  # not opened unless it is used
    assert len(load(tmp_path).train) == 6
    with pytest.raises(DataError, match="can't be read as parquet"):
        load(tmp_path, test_split="test")


def test_pixels_of_class_folders_with_odd_names_are_trained_on(
    tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["a[1]", os.fsdecode(b"ch\xe2t")]):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((12, 12, 3), 100 * number + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "p" / name / f"{name} {i}.png")
    (tmp_path / "p" / "a[1]" / os.fsdecode(b"\xe9.png")).write_bytes(b"bad")
    options = [f"data.dataset={tmp_path / 'p'}", "data.max_bad_fraction=0.2", f"output_dir={tmp_path / 'run'}"]
    assert exit_status(["train", str(write_recipe()), *options, "log.report=true"]) == 0
    assert "ch\\xe2t" in (tmp_path / "run" / "report.html").read_text()
    assert "\\xe9.png" in capsys.readouterr().out


@can_become_others
def test_images_without_read_permission_are_left_out_before_training(tmp_path: Path) -> None:
    write(tmp_path, *classes(number=30))
    for path in [*tmp_path.rglob("*")]:
        path.chmod(0o755)
    for path in sorted(tmp_path.glob("cat/*"))[10:]:
        path.chmod(0)

    def opened() -> tuple[int, list[str], str]:
        source = load(tmp_path)
        with pytest.raises(DataError) as caught:
            load(tmp_path, max_bad_fraction=0.1)
        return len(source.train) + len(source.evaluation), source.notes, str(caught.value)

    total, notes, refused = as_unknown_user(opened, tmp_path)
    assert total == 40
    assert any("40 images; left out: 20 images without read permission (cat/" in note for note in notes)
    assert "20 of 60 images of split 'train' are left out (20 images without read permission" in refused
    assert "; permit to read them (chmod), repair" in refused


@can_become_others
@pytest.mark.parametrize("mode", [0o444, 0o555])
def test_a_class_of_which_no_image_may_be_read_is_one_message(mode: int, tmp_path: Path) -> None:
    """Its folder may be listed, but not entered; or its files have no permission."""
    write(tmp_path, *classes())
    for path in tmp_path.glob("dog/*"):
        path.chmod(0o644 if mode == 0o444 else 0)
    (tmp_path / "dog").chmod(mode)

    def opened() -> tuple[str, str]:
        with pytest.raises(DataError) as caught:
            load(tmp_path)
        with pytest.raises(DataError) as alone:
            read_pixels(str(tmp_path / "dog" / "0.jpg"))
        return str(caught.value), str(alone.value)

    refused, alone = as_unknown_user(opened, tmp_path)
    assert "dog: class folder of which user 65533 may read no image (4 images without" in refused
    assert "can't be decoded: Permission denied; give user 65533 permission to read it (chmod)" in alone


def test_only_a_sample_of_the_permissions_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *classes(number=30))
    looked_at: list[str] = []
    monkeypatch.setattr(inventory.os, "access", lambda path, mode: looked_at.append(path) or True)
    monkeypatch.setattr(folder_module, "PERMISSION_SAMPLE", 10)
    assert len(load(tmp_path).train)
    assert [len([path for path in looked_at if f"/{name}/" in path]) for name in ("cat", "dog")] == [6, 6]
