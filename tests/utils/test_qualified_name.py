"""Names of functions and objects that are the same in another start of the program."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_fasttrain.utils.qualified_name import qualified_name

HERE = __name__


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, value: float) -> float:
        return self.factor * value

    def twice(self, value: float) -> float:
        return 2 * self(value)


def maker(factor: int) -> Any:
    def inner(value: int) -> int:
        return factor * value

    return inner


def test_functions_classes_and_objects_are_identified_by_module_and_name() -> None:
    assert qualified_name(maker) == f"{HERE}.maker"
    assert qualified_name(maker(1)) == f"{HERE}.maker.<locals>.inner"
    assert qualified_name(Scaled) == qualified_name(Scaled(2.0)) == f"{HERE}.Scaled"
    assert qualified_name(Scaled(1.0).twice) == f"{HERE}.Scaled.twice"
    assert qualified_name(nn.Linear(1, 1)) == "torch.nn.modules.linear.Linear"
    assert qualified_name(np.flip) == "numpy.flip"
    assert qualified_name(len) == "builtins.len"


def test_partials_are_identified_by_their_arguments_too() -> None:
    assert qualified_name(functools.partial(maker, 3)) == f"partial({HERE}.maker, 3)"
    assert qualified_name(functools.partial(maker, factor=(1, "a"))) == f"partial({HERE}.maker, factor=[1, 'a'])"
    assert qualified_name(functools.partial(maker, Scaled(1.0))) == f"partial({HERE}.maker, {HERE}.Scaled)"


def test_a_lambda_is_identified_by_its_source() -> None:
    first, second = (lambda pixels, rng: pixels[::-1]), (lambda pixels, rng: pixels[:, ::-1])
    nested = lambda pixels, rng: [  # noqa: E731
        (lambda value: value + 1)(each) for each in pixels
    ]
    assert qualified_name(first) == f"{HERE}: lambda pixels, rng: pixels[::-1]"
    assert qualified_name(second) == f"{HERE}: lambda pixels, rng: pixels[:, ::-1]"
    assert qualified_name(nested) == f"{HERE}: lambda pixels, rng: [(lambda value: value + 1)(each) for each in pixels]"
    without_file = [eval("lambda x: x + 3"), eval("lambda x: x + 3"), eval("lambda x: x + 4")]
    names = list(map(qualified_name, without_file))
    assert names[0] == names[1] != names[2]


def test_the_program_itself_has_the_name_of_its_file(tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    program.write_text(
        "from hf_fasttrain.utils.qualified_name import qualified_name\n"
        "def strong(): pass\n"
        "if __name__ == '__main__': print(qualified_name(strong))\n"
    )
    process = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "mine.strong"
