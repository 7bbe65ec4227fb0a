"""Programs as cards and exports print them, run where this package is not imported: in a new process, or in a fork."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

Job = tuple[str, Sequence[Sequence[str]]]  # a program, and the arguments of each of its runs
PACKAGES = ("torch", "timm", "transformers")


def run_all(jobs: Sequence[Job]) -> list[str]:
    """Return what each run of each program prints, in order."""
    answers = []
    for code, runs in jobs:
        program = compile(code, "classify.py", "exec")
        for arguments in runs:
            sys.argv, printed = ["classify.py", *arguments], io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, {"__name__": "__main__"})
            answers.append(printed.getvalue())
    return answers


def run_fresh(jobs: Sequence[Job], folder: Path | None = None) -> tuple[list[str], list[str]]:
    """Return what programs print in a new process, and which of PACKAGES were imported: seconds for each of them."""
    command = [sys.executable, "-I", __file__]
    process = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, cwd=folder, check=False)
    assert process.returncode == 0, process.stderr
    answers, imported = json.loads(process.stdout.splitlines()[-1])
    return answers, imported


def run_forked(jobs: Sequence[Job]) -> list[str]:
    """Return what programs print in a fork of this process, which can't import this package but has all others."""
    from helpers.processes import in_child

    def run() -> list[str]:
        for name in [name for name in sys.modules if name.partition(".")[0] == "hf_fasttrain"]:
            del sys.modules[name]
        sys.modules["hf_fasttrain"] = None  # type: ignore[assignment] # so that importing it fails
        return run_all(jobs)

    answers: list[str] = in_child(run)
    return answers


if __name__ == "__main__":
    printed = run_all(json.load(sys.stdin))
    assert "hf_fasttrain" not in sys.modules
    print(json.dumps([printed, [name for name in PACKAGES if name in sys.modules]]))
