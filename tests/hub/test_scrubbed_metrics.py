"""The pushed copy of metrics.jsonl: the same bytes as scrubbed at once, but only new lines are scrubbed again."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from helpers.hub_server import Hub
from helpers.written_run import write_run

from hf_fasttrain.hub.push import push_run
from hf_fasttrain.hub.scrubbed_metrics import POSITION_FILE, scrubbed_copy
from hf_fasttrain.run_folder.scrub import Scrubber
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.json_lines import MAX_LINE

SCRUB = Scrubber(["/home/me/data"])
TOKEN = "hf_" + "a" * 30


def line(step: int, **more: object) -> str:
    return json.dumps({"kind": "train", "step": step, "loss": 1 / (step + 1), **more}) + "\n"


def at_once(content: bytes, scrub: Scrubber = SCRUB) -> bytes:
    """Return what a push of a file as a whole has been."""
    scrubbed = b"".join(scrub.json(each) for each in content.splitlines(keepends=True))
    return without_secrets(scrubbed.decode(errors="replace")).encode()


@pytest.fixture
def scrubbed_lines(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list of the lines that are scrubbed from here on."""
    lines: list[bytes] = []
    real = Scrubber.json
    monkeypatch.setattr(Scrubber, "json", lambda self, content: lines.append(content) or real(self, content))
    return lines


@pytest.mark.parametrize(
    "content",
    [
        line(1) + line(2, note="/home/me/data/x.png and ../y") + line(3, note=TOKEN),
        line(1, note="/home/me/data/x") + '{"kind": "train", "note": "/home/me/data/cut sho',
        "no json /home/me/x\n\n\r\n" + line(2) + "a\r/home/me/b\n\r",
        "\udcff/home/me/data\udce4\n" + line(3, loss=float("nan")),
        "",
    ],
)
def test_the_copy_is_what_scrubbing_at_once_gives(content: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(content.encode(errors="surrogateescape"))
    for _ in range(2):
        assert scrubbed_copy(source, tmp_path, SCRUB).read_bytes() == at_once(source.read_bytes())


def test_later_pushes_scrub_new_lines_alone(tmp_path: Path, scrubbed_lines: list[bytes]) -> None:
    source = tmp_path / "source"
    source.write_text("".join(map(line, range(1000))))
    scrubbed_copy(source, tmp_path, SCRUB)
    assert len(scrubbed_lines) == 1000
    with source.open("a") as file:
        file.write(line(1000) + '{"step": 10')
    scrubbed_copy(source, tmp_path, SCRUB)
    assert scrubbed_lines[1000:] == [line(1000).encode(), b'{"step": 10']
    with source.open("a") as file:
        file.write('01, "folder": "/home/me/data/x"}\n' + line(1002))
    copy = scrubbed_copy(source, tmp_path, SCRUB)
    assert len(scrubbed_lines) == 1004  # the line that was not complete, and the next one
    assert copy.read_bytes() == at_once(source.read_bytes())
    assert b'{"step": 1001, "folder": "x"}' in copy.read_bytes()


def test_a_file_that_a_resumed_run_has_cut_is_scrubbed_anew(tmp_path: Path, scrubbed_lines: list[bytes]) -> None:
    source = tmp_path / "source"
    whole = [line(step) for step in range(100)]
    continued = [line(step, again="/home/me/data") for step in range(40, 90)]
    for lines in (whole, whole[:40], whole[:40] + continued, whole[:40] + continued + whole):
        source.write_text("".join(lines))
        before = len(scrubbed_lines)
        copy = scrubbed_copy(source, tmp_path, SCRUB)
        number = len(scrubbed_lines) - before
        assert copy.read_bytes() == at_once(source.read_bytes())
        assert number == {100: 100, 40: 40, 90: 50, 190: 100}[len(lines)]


@pytest.mark.parametrize("damage", ["copy", "position", "other scrubber"])
def test_a_damaged_copy_and_other_paths_are_no_reason_to_push_other_bytes(damage: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text(line(1, note="/home/me/data/x") + line(2, note="at home/pictures"))
    copy = scrubbed_copy(source, tmp_path, SCRUB)
    scrub = SCRUB
    if damage == "copy":
        copy.write_bytes(copy.read_bytes()[:10])
    elif damage == "position":
        (tmp_path / POSITION_FILE).write_text("9 9")
    else:
        scrub = Scrubber([], ["home/pictures"])
    assert scrubbed_copy(source, tmp_path, scrub).read_bytes() == at_once(source.read_bytes(), scrub)


def test_lines_are_parsed_only_if_they_hold_what_paths_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    real = json.loads
    monkeypatch.setattr("hf_fasttrain.run_folder.scrub.json.loads", lambda text: parsed.append(text) or real(text))
    same = [line(1, split="held-out 10%", note="~ . .. a:b"), line(2, note="\u00fc"), line(3, **{"a/b": "photos"})]
    expected = {each: each for each in same}
    expected |= {line(4, note="/a/b"): line(4, note="b"), line(5, note="C:\\a\\b"): line(5, note="b")}
    assert {each: SCRUB.json(each.encode()).decode() for each in expected} == expected
    assert len(parsed) == 4
    assert Scrubber([], ["a:b"]).json(b'{"data": "a:b"}\n') == b'{"data": "b"}\n'


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("".join(line(step, values=[0.1] * 20) for step in range(5_000)))
    tracemalloc.start()
    try:
        scrubbed_copy(source, tmp_path, SCRUB)
        scrubbed_copy(source, tmp_path, SCRUB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000 < source.stat().st_size


def test_the_copy_ends_before_a_line_that_no_run_writes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text(line(1) + "x" * MAX_LINE + "\n" + line(2))
    for _ in range(2):
        assert scrubbed_copy(source, tmp_path, SCRUB).read_text() == line(1)


def test_pushes_of_a_training_share_the_copy_and_a_later_push_leaves_none(
    hub: Hub, tmp_path: Path, scrubbed_lines: list[bytes]
) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    number = len((run / "metrics.jsonl").read_bytes().splitlines())
    for _ in range(2):
        push_run(run, "me/flowers", original=str(run))
    lines = [each for each in scrubbed_lines if b'"kind"' in each]
    assert len(lines) == number
    assert (run / ".hub" / "metrics.jsonl").is_file()
    push_run(run, "me/other")
    assert hub.repos["me/other"].files["metrics.jsonl"] == hub.repos["me/flowers"].files["metrics.jsonl"]
