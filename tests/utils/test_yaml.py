"""YAML that a stranger may have written: plain values or one error, in little time and memory."""

from __future__ import annotations

import math

import pytest

from hf_fasttrain.utils.yaml import MAX_CHARACTERS, MAX_REPEATED, InvalidYaml, read_yaml, write_yaml

SHARED = "a: &a {x: 1, y: 2}\n"


def unfolded(number: int, merge: str = "") -> str:
    """Return a text whose values are `number` levels of four aliases each."""
    levels = "".join(
        f"a{n}: &a{n} {{{'<<: ' if merge else 'k: '}[*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n"
        for n in range(1, number)
    )
    return "a0: &a0 {x: 1}\n" + levels


def test_plain_values_and_the_lines_of_their_keys() -> None:
    tree, lines = read_yaml("a: 1e-3\nb:\n  - no\n  - 2020-01-01\nc: {d: ~, e: 0x1f, f: true}\n")
    assert tree == {"a": 1e-3, "b": ["no", "2020-01-01"], "c": {"d": None, "e": 31, "f": True}}
    assert lines == {("a",): 1, ("b",): 2, ("c",): 5, ("c", "d"): 5, ("c", "e"): 5, ("c", "f"): 5}
    assert read_yaml("") == (None, {})
    assert math.isnan(read_yaml(".nan")[0])


def test_aliases_and_merge_keys() -> None:
    assert read_yaml(f"{SHARED}b: {{<<: *a, y: 3}}\nc: {{<<: [{{y: 4}}, *a]}}\nd: *a")[0] == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 4}, "d": {"x": 1, "y": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (unfolded(30), r"its aliases repeat more than 10\*\*12 values; allowed are 5,000"),
        (unfolded(30, merge="<<"), r"its aliases repeat more than 10\*\*12 values"),
        ("a: &a [1]\nb: [" + "*a, " * MAX_REPEATED + "]", "its aliases repeat 10,000 values"),
        ("a: &a [*a]", "an alias stands for a value that holds it at line 1, column 4"),
        ("a: {<<: 1}", "<< merges a mapping"),
        ("a: *b", "found undefined alias"),
        ("a: " + "[" * 100_000, "is nested more than 64 levels deep"),
        ("{a: " * 100_000, "is nested more than 64 levels deep"),
        ("- " * 100_000, "is nested more than 64 levels deep"),
        (" " * (MAX_CHARACTERS + 1), "has 500,001 characters; allowed are 500,000"),
        ("a: !!int x", "'x' is not a value of type int at line 1, column 4"),
        ("a: !!float ''", "'' is not a value of type float"),
        ("a: !!bool x", "'x' is not a value of type bool"),
        ("a: " + "9" * 5000, r"'9+\.\.\. is not a value of type int"),
        ("a: 0x" + "f" * 5000, "an integer of more than 40 digits"),
        ("a: !!binary x", "the tag tag:yaml.org,2002:binary is not allowed"),
        ("a: !!set {b}", "the tag tag:yaml.org,2002:set is not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "python/object/apply:os.system is not allowed"),
        ("a: !!map 1", "the tag tag:yaml.org,2002:map is not allowed"),
        ("2: 1", "the key 2 is not a text; write it in quotes at line 1, column 1"),
        ("? [a]\n: 1", "the key a list or mapping is not a text"),
        ("a: 1\na: 2", "found duplicate key 'a' at line 2, column 1"),
        ('a: "\\ud800"', r"holds half of a character"),
        ("a: \x00", "unacceptable character"),
        ("a: 1\n---\nb: 1", "another document"),
        ("%YAML 9.9\n---\na: 1", "incompatible YAML document"),
    ],
)
def test_anything_else_is_one_error(text: str, problem: str) -> None:
    with pytest.raises(InvalidYaml, match=problem) as error:
        read_yaml(text)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_what_is_written_is_read() -> None:
    tree = {"a": [1, {"b": None}], "c": "x: 'y'\n# z", "d": {}, "e": "2020-01-01", "f": "1"}
    assert read_yaml(write_yaml(tree))[0] == tree
    assert list(read_yaml(write_yaml(tree))[0]) == list(tree)
