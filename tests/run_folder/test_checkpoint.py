"""A checkpoint is restored exactly, or the one before it, for any failure of the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hf_fasttrain.run_folder.checkpoint import (
    SAFETENSORS_TYPES,
    Checkpoint,
    Snapshot,
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    write_safetensors,
)
from hf_fasttrain.train.optim import restore_optimizer
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import NewFile, digest_of
from hf_fasttrain.utils.json_lines import append_line
from hf_fasttrain.utils.tensor_tree import pack, unpack

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(trees)
def test_a_state_is_restored_from_json_and_tensors(tree: Any) -> None:
    import json

    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack({"a": [tree, torch.arange(3)]}, tensors)))
    back = unpack(packed, tensors)
    assert back["a"][0] == tree
    assert type(back["a"][0]) is type(tree)
    assert torch.equal(back["a"][1], torch.arange(3))


def test_random_states_and_arrays_are_restored() -> None:
    import random

    tensors: dict[str, torch.Tensor] = {}
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "set": {1, 2}}
    back = unpack(pack(state, tensors), tensors)
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    assert back["python"] == state["python"]
    assert back["set"] == {1, 2}


def test_states_that_only_pickle_could_save_are_refused() -> None:
    with pytest.raises(RunError, match=r"can't save \.a\.0 of type function; keep plain values and tensors in it"):
        pack({"a": [lambda: 0]}, {})


def test_safetensors_reads_our_files(tmp_path: Path) -> None:
    tensors = {f"{kind}": torch.ones(3, 5).to(kind) for kind in SAFETENSORS_TYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.arange(7, dtype=torch.uint8)}
    with NewFile(tmp_path / "x.safetensors") as file:
        write_safetensors(file, tensors)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
    assert back["scalar"] == 2.5


def test_an_optimizer_of_channels_last_weights_continues_bitwise() -> None:
    """Its state is saved contiguous; a fused kernel would combine the wrong elements if it stayed so."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    uninterrupted, optimizer = build()
    steps(uninterrupted, optimizer, range(4))
    restored, optimizer = build()
    steps(restored, optimizer, range(2))
    saved = Snapshot(2, {}, {"model": restored.state_dict()}, {"optimizer": optimizer.state_dict()}).to_host()
    resumed, optimizer = build()
    resumed.load_state_dict(saved.tensors["model"])
    restore_optimizer(optimizer, unpack(saved.state["training"], saved.tensors["training"])["optimizer"])
    steps(resumed, optimizer, range(2, 4))
    assert torch.equal(resumed.weight, uninterrupted.weight)


def test_names_of_tensors_do_not_collide() -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    back = unpack(pack(tree, tensors), tensors)
    assert [float(t) for t in (back["a"]["b"], back["a.b"], back[1], back["1"])] == [0, 1, 2, 3]


def test_damaged_checkpoints_of_later_steps_do_not_displace_good_ones(tmp_path: Path) -> None:
    """A resume has skipped step 200: later saves must not be deleted in its favour."""
    for step in (100, 200):
        save_checkpoint(tmp_path, snapshot(step))
    (tmp_path / "step_00000200" / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "step_00000170").mkdir()  # killed before its marker was written
    save_checkpoint(tmp_path, snapshot(150))
    prune_checkpoints(tmp_path, 1, None, step=150)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000150", "step_00000200"]
    newest = newest_checkpoint(tmp_path, lambda text: None)
    assert newest is not None
    assert newest.state["step"] == 150


def test_a_checkpoint_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(3))
    path.rename(tmp_path / ".step_00000003.old")
    path.mkdir()  # killed between the renames, or before the new marker
    newest = newest_checkpoint(tmp_path, lambda text: None)
    assert is_whole(newest)


def snapshot(step: int) -> Snapshot:
    weights = {"model": {"w": torch.full((64,), float(step)), "b": torch.tensor(step)}, "ema": {"w": torch.ones(3)}}
    training = {"optimizer": {"state": {0: torch.full((5,), float(step))}}, "scaler": None, "own": [{"loader": None}]}
    return Snapshot(step, {"learnt": {}, "state": {"step": step}}, weights, training).to_host()


def is_whole(checkpoint: Checkpoint | None) -> bool:
    """Return whether all parts of a checkpoint belong to its step."""
    assert checkpoint is not None
    step = checkpoint.state["step"]
    model, state = checkpoint.weights["model"], checkpoint.training["optimizer"]["state"][0]
    return bool((model["w"] == step).all() and model["b"] == step and (state == step).all())


def save_and_prune(folder: Path, step: int) -> None:
    save_checkpoint(folder, snapshot(step))
    prune_checkpoints(folder, 2, best_step=1, step=step)


os_write = os.write
CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@contextmanager
def at_call(number: int, action: Callable[..., Any]) -> Iterator[list[str]]:
    """Replace the operating system's call `number` (from 0) by something else; yields the names of the calls."""
    real = {name: getattr(os, name) for name in CALLS}
    calls: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == number:
                return action(real[name], *args)
            return real[name](*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield calls
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


def fails_with(code: int) -> Callable[..., Any]:
    def action(real: Callable[..., Any], *args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return action


def writes_half(real: Callable[..., Any], *args: Any) -> Any:
    """Write a part and return its length; a call that writes nothing fails."""
    if real is os_write:
        return real(args[0], args[1][: max(1, len(args[1]) // 2)])
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def writes_half_and_fails(real: Callable[..., Any], *args: Any) -> Any:
    if real is os_write:
        real(args[0], args[1][: len(args[1]) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {
    "no space": fails_with(errno.ENOSPC),
    "input/output error": fails_with(errno.EIO),
    "short write": writes_half,
    "short write, then no space": writes_half_and_fails,
}


def prepared(folder: Path) -> Path:
    """Return a folder with three checkpoints, of which the first is the best."""
    pristine = folder.with_name("pristine")
    if not pristine.exists():
        for step in (1, 2, 3):
            save_checkpoint(pristine, snapshot(step))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    return folder


def calls_of_a_save(folder: Path) -> list[str]:
    prepared(folder)
    with at_call(-1, fails_with(errno.EIO)) as calls:
        save_and_prune(folder, 4)
    return list(calls)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_whatever_call_of_a_save_fails_the_newest_checkpoint_loads(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    calls = calls_of_a_save(folder)
    assert len(calls) > 30
    for number in range(len(calls)):
        prepared(folder)
        failed = False
        with at_call(number, FAULTS[fault]):
            try:
                save_and_prune(folder, 4)
            except OSError:
                failed = True
        newest = newest_checkpoint(folder, lambda text: None)
        assert is_whole(newest), f"{calls[number]}, call {number}"
        assert newest is not None
        assert newest.state["step"] == 4 or (failed and newest.state["step"] == 3)
        assert is_whole(load_checkpoint(folder / "step_00000001"))  # the best
        save_and_prune(folder, 5)  # and it does not affect the next save
        assert {path.name for path in complete_checkpoints(folder)} >= {"step_00000001", "step_00000005"}
        assert not list(folder.glob(".step*"))


def test_killed_at_any_call_of_a_save_the_newest_checkpoint_loads(tmp_path: Path) -> None:
    def kill(real: Callable[..., Any], *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    folder = tmp_path / "checkpoints"
    for number in range(len(calls_of_a_save(folder))):
        prepared(folder)
        child = os.fork()
        if not child:
            with at_call(number, kill):
                save_and_prune(folder, 4)
            os._exit(1)  # must not be reached
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        newest = newest_checkpoint(folder, lambda text: None)
        assert is_whole(newest)
        assert newest is not None
        assert newest.state["step"] in (3, 4)
        save_and_prune(folder, 5)
        assert not list(folder.glob(".step*"))


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_line_is_appended_completely_or_not_at_all(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, '{"n": 1}')
    for number in range(2):  # open, write
        with at_call(number, FAULTS[fault]):
            try:
                append_line(path, '{"n": 2}')
            except OSError:
                assert path.read_text().splitlines()[-1] == '{"n": 1}'
        append_line(path, '{"n": 1}')
        assert path.read_text().endswith('{"n": 1}\n')
        assert all(len(line) == len('{"n": 1}') for line in path.read_text().splitlines())


def test_names_in_a_marker_cannot_leave_the_folder(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    (tmp_path / "elsewhere").write_text("secret")
    marker = (path / "COMPLETE").read_text().replace("model.safetensors", "../elsewhere")
    (path / "COMPLETE").write_text(marker)
    with pytest.raises(RunError, match=r"is corrupt \('../elsewhere' is outside of its folder\)"):
        load_checkpoint(path)


OTHERS = ["step_notes", "step_1", "step_00000001x", "step_-0000001", "step_000000010", ".step_notes.old", ".step_x"]


def test_only_folders_of_our_own_form_are_pruned_and_read(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for name in OTHERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "COMPLETE").write_text("{}")
        (folder / name / "mine.txt").write_text("mine")
    save_checkpoint(elsewhere, snapshot(1))
    (folder / "step_00000001").symlink_to(elsewhere / "step_00000001")
    (folder / "step_00000002").write_text("a file")
    for step in (3, 4):
        save_checkpoint(folder, snapshot(step))
    (folder / "step_00000000").mkdir()
    (folder / ".step_00000001.partial").mkdir()
    prune_checkpoints(folder, 1, None, step=4)
    left = {path.name for path in folder.iterdir()}
    assert left == {*OTHERS, "step_00000001", "step_00000002", "step_00000004"}
    assert all((folder / name / "mine.txt").is_file() for name in OTHERS)
    assert (elsewhere / "step_00000001" / "COMPLETE").is_file()
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000004"]
    shutil.rmtree(folder / "step_00000004")
    assert newest_checkpoint(folder, lambda text: None) is None


def rehash(path: Path) -> None:
    """Let a checkpoint's marker list its files as they are now."""
    files = {p.name: {"bytes": p.stat().st_size, "xxh3": digest_of(p)} for p in path.iterdir() if p.name != "COMPLETE"}
    (path / "COMPLETE").write_text(json.dumps({"format": 1, "files": files}))


def _change_state(path: Path, **values: Any) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, **values}))
    rehash(path)


def _as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty marker": lambda path: (path / "COMPLETE").write_text(""),
    "marker is a list": lambda path: (path / "COMPLETE").write_text("[1]"),
    "marker is deep": lambda path: (path / "COMPLETE").write_text("[" * 100_000),
    "marker is a long number": lambda path: (path / "COMPLETE").write_text("9" * 6000),
    "marker is binary": lambda path: (path / "COMPLETE").write_bytes(b"\xff\xfe\x00"),
    "marker lists nothing": lambda path: (path / "COMPLETE").write_text('{"format": 1, "files": {}}'),
    "marker lists a list": lambda path: (path / "COMPLETE").write_text('{"format": 1, "files": []}'),
    "marker lists a number": lambda path: (path / "COMPLETE").write_text('{"format": 1, "files": {"state.json": 1}}'),
    "marker of another version": lambda path: (path / "COMPLETE").write_text('{"format": 99, "files": {"a": 1}}'),
    "marker is a folder": lambda path: ((path / "COMPLETE").unlink(), (path / "COMPLETE").mkdir()),
    "marker is a FIFO": lambda path: _as_fifo(path / "COMPLETE"),
    "state is a FIFO": lambda path: _as_fifo(path / "state.json"),
    "state is gone": lambda path: (path / "state.json").unlink(),
    "state is a list": lambda path: ((path / "state.json").write_text("[]"), rehash(path)),
    "state is deep": lambda path: ((path / "state.json").write_text('{"a":' * 50_000), rehash(path)),
    "state of another step": lambda path: _change_state(path, step=1),
    "no step": lambda path: _change_state(path, state={}),
    "a step of text": lambda path: _change_state(path, state={"step": "x"}),
    "unknown state": lambda path: _change_state(path, state={"step": 2, "x": 1}),
    "a huge number": lambda path: _change_state(path, state={"step": 2, "images": 10**400}),
    "a seed of text": lambda path: _change_state(path, state={"step": 2, "seed": "x"}),
    "metrics in a list": lambda path: _change_state(path, state={"step": 2, "metrics": []}),
    "no training": lambda path: _change_state(path, training={}),
    "training is a list": lambda path: _change_state(path, training=[]),
    "an unknown tensor": lambda path: _change_state(path, training={"tensor": "x"}),
    "no loader": lambda path: _change_state(path, training={"dict": [["optimizer", {"dict": []}], ["scaler", None]]}),
    "an array of objects": lambda path: _change_state(path, training={"array": "x", "dtype": "object"}),
    "weights cut short": lambda path: ((path / "model.safetensors").write_bytes(b"\x01"), rehash(path)),
    "weights not listed": lambda path: ((path / "model.safetensors").unlink(), rehash(path)),
    "weights elsewhere": lambda path: ((path / "model.safetensors").unlink(),
                                       (path / "model.safetensors").symlink_to("/dev/zero")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_of_any_kind_is_passed_over(damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step))
    DAMAGES[damage](tmp_path / "step_00000002")
    notes: list[str] = []
    newest = newest_checkpoint(tmp_path, notes.append)
    assert newest is not None
    assert newest.state["step"] == 1
    assert len(notes) == 1
    assert "step_00000002 is" in notes[0]
    assert notes[0].endswith(": skipped")


def test_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refused(*args: Any, **options: Any) -> Any:
        raise AssertionError("pickle")

    path = save_checkpoint(tmp_path, snapshot(1))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    assert is_whole(load_checkpoint(path))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ""}
