"""Standard streams that are closed or can't encode a text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.streams import PrintableStream

TEXT = "Löwenzahn 玫瑰"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"L\xf6wenzahn \u73ab\u7470"),
        ("latin-1", b"L\xf6wenzahn " + rb"\u73ab\u7470"),
        ("utf-8", TEXT.encode()),
    ],
)
def test_what_an_encoding_lacks_is_written_as_escapes(
    encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding, errors="strict", write_through=True)
    PrintableStream(stream).write(TEXT)
    assert written.getvalue() == expected
    monkeypatch.setattr(sys, "stdout", stream)
    RunLog().print(TEXT)
    assert written.getvalue() == expected + expected + b"\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_not_taken_by_a_file(closed: str, tmp_path: Path) -> None:
    """What a library writes to stdout or stderr would land in it."""
    script = (
        "import os, sys\n"
        "from hf_fasttrain.utils.streams import repair_standard_streams\n"
        "repair_standard_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('out'); print('err', file=sys.stderr); sys.stdin.read(0)\n"
        "os.write(1, b'library'); os.write(2, b'library')\n"
        "sys.exit(file.fileno() < 3)\n"
    )
    command = f'{sys.executable} -c "$SCRIPT" {closed}'
    assert subprocess.run(command, shell=True, env={**os.environ, "SCRIPT": script}, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""
