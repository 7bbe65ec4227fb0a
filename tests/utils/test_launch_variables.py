"""Variables of launchers that are left over, incomplete, or no numbers: one message before anything is started."""

from __future__ import annotations

import pytest

from hf_fasttrain.before_torch import launched_rank
from hf_fasttrain.cli import main
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.launch_variables import require_launch_variables


def set_only(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


REFUSED = [
    ({"RANK": "abc"}, "variable RANK is 'abc': launchers set it to a whole number; unset it"),
    ({"RANK": ""}, "variable RANK is ''"),
    ({"WORLD_SIZE": "2.0"}, "variable WORLD_SIZE is '2.0'"),
    ({"LOCAL_RANK": "x"}, "variable LOCAL_RANK is 'x'"),
    ({"MASTER_PORT": "http"}, "variable MASTER_PORT is 'http'"),
    ({"RANK": "1"}, "process 1 of 1, counted from 0; start the processes with torchrun or accelerate launch, or unset"),
    ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "3"}, "process 3 of 3, .* or unset OMPI_COMM_WORLD_RANK"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, r"2 processes train together, but not where to meet \(MASTER_ADDR\); "),
]


@pytest.mark.parametrize(("variables", "expected"), REFUSED)
def test_variables_that_make_no_sense_are_refused(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_only(monkeypatch, variables)
    with pytest.raises(RunError, match=expected):
        require_launch_variables()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},  # accelerate meets on this machine
    ],
)
def test_those_of_launchers_are_accepted(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, variables)
    require_launch_variables()
    assert launched_rank() == int(variables.get("RANK", 0))


def test_the_command_line_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    set_only(monkeypatch, {"RANK": "abc"})
    with pytest.raises(SystemExit) as ended:
        main(["check", "quickstart"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: variable RANK is 'abc'")
