"""YAML of recipes and run folders, which a stranger may have written: plain values only, of bounded size, one error."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from hf_fasttrain.utils.errors import shown
from hf_fasttrain.utils.files import read_text

KeyPath = tuple[str, ...]

MAX_CHARACTERS = 500_000
MAX_DEPTH = 64
MAX_REPEATED = 5_000  # values that aliases and merge keys add to those that are written out
MAX_DIGITS = 40  # of an integer; Python refuses to print one of 4,300

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


class InvalidYaml(ValueError):
    """A text is not YAML, or not YAML that is accepted here; `at` is `, line 3, column 5`, or empty if unknown."""

    def __init__(self, problem: str, mark: Any = None) -> None:
        self.problem = problem
        self.at = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        super().__init__(f"{problem}{self.at.replace(',', ' at', 1)}")


def read_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the value of a YAML text, and the line of each key of its mappings, counted from 1.

    Values are null, booleans, numbers, texts (dates too), lists and mappings with texts as keys. Raises InvalidYaml for
    anything else: other tags, more than MAX_CHARACTERS, nesting beyond MAX_DEPTH, aliases that add more than
    MAX_REPEATED values.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidYaml(f"has {len(text):,} characters; allowed are {MAX_CHARACTERS:,}")
    yaml = _plain_yaml()
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    try:
        root = yaml.compose(text)
        if root is None:
            return None, {}
        _require_few_repeats(root)
        return _Values(yaml.constructor).of(root), dict(_key_lines(root))
    except InvalidYaml:
        raise
    except MarkedYAMLError as error:
        raise _explained(error) from None
    except YAMLError as error:
        raise InvalidYaml(_one_line(str(error))) from None
    except RecursionError:
        raise InvalidYaml(f"is nested more than {MAX_DEPTH} levels deep") from None
    except Exception as error:  # noqa: BLE001 - the parser also raises what its own mistakes come to
        raise InvalidYaml(f"can't be read: {type(error).__name__} {_one_line(str(error))}") from None


def read_yaml_file(path: Path) -> Any:
    """Return the value of a YAML file. Raises OSError, and ValueError (InvalidYaml) as `read_yaml` does."""
    return read_yaml(read_text(path, most=4 * MAX_CHARACTERS))[0]


def write_yaml(tree: Mapping[str, Any]) -> str:
    """Return a mapping of plain values as YAML text."""
    yaml = _plain_yaml()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(dict(tree), stream)
    return stream.getvalue()


def _plain_yaml() -> Any:
    return YAML(typ="safe", pure=True)


# What the parser says -> what a writer of recipes has most likely done, as a template of `re`.
_LIKELY = {
    r"found character '\\t'.*": "a tab: YAML is indented by spaces",
    r"could not find expected ':'": "a key without ':' after it: write `key: value`",
    r"found character .* that cannot start any token": r"\g<0>; write the value in quotes",
    r"mapping values are not allowed here": "a ':' where no key can be: the line above lacks its ':', keys of one "
    "section do not begin in the same column, or a text with ': ' in it is not in quotes",
    r"expected <block end>, but found '<block mapping start>'": "its indentation fits no line above it: keys of one "
    "section begin in the same column",
    r"expected ',' or '(.)'.*": r"a ',' or the closing '\1' is missing before this",
    r"(expected escape sequence|found unknown escape).*": r"\g<0>: in single quotes a backslash is a plain character",
    r"maximum depth.*": f"is nested more than {MAX_DEPTH} levels deep",
}


def _explained(error: MarkedYAMLError) -> InvalidYaml:
    problem = _one_line(error.problem or error.context or "can't be read")
    mark = error.problem_mark or error.context_mark
    for pattern, likely in _LIKELY.items():
        if found := re.search(pattern, problem):
            mark = error.context_mark if "without ':'" in likely else mark  # where the key is
            return InvalidYaml(found.expand(likely), mark)
    return InvalidYaml(problem, mark)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, SequenceNode):
        yield from node.value


def _require_few_repeats(root: Node) -> None:
    """Raise InvalidYaml for a node within itself, and for aliases that add too many values.

    An alias is the same node object a second time. Sizes are computed without going through it again.
    """
    sizes: dict[int, int] = {}  # of nodes with all that is in them, aliases unfolded
    open_nodes: set[int] = set()

    def size_of(node: Node) -> int:
        if id(node) in open_nodes:
            raise InvalidYaml("an alias stands for a value that holds it", node.start_mark)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(map(size_of, _children(node)))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    repeated = size_of(root) - len(sizes)
    if repeated > MAX_REPEATED:
        raise InvalidYaml(f"its aliases repeat {_count(repeated)} values; allowed are {MAX_REPEATED:,}")


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**12 else "more than 10**12"


class _Values:
    """Builds values from nodes; a scalar by the constructor of ruamel.yaml for its tag."""

    def __init__(self, constructor: Any) -> None:
        self._scalars: dict[str, Callable[[Node], Any]] = {
            f"{_TAG}null": constructor.construct_yaml_null,
            f"{_TAG}bool": constructor.construct_yaml_bool,
            f"{_TAG}int": constructor.construct_yaml_int,
            f"{_TAG}float": constructor.construct_yaml_float,
            **dict.fromkeys((f"{_TAG}str", f"{_TAG}timestamp", f"{_TAG}value", _MERGE), constructor.construct_scalar),
        }

    def of(self, node: Node) -> Any:
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        kind = "map" if isinstance(node, MappingNode) else "seq"
        if str(node.tag) != f"{_TAG}{kind}":
            raise _unknown_tag(node)
        if isinstance(node, MappingNode):
            return self._mapping(node)
        return [self.of(value) for value in node.value]

    def _scalar(self, node: ScalarNode) -> Any:
        tag = str(node.tag)
        if tag not in self._scalars:
            raise _unknown_tag(node)
        kind = tag.removeprefix(_TAG)
        try:
            value = self._scalars[tag](node)
        except Exception:  # noqa: BLE001 - int(), float() and indexing fail in several ways
            raise InvalidYaml(f"{shown(node.value)} is not a value of type {kind}", node.start_mark) from None
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise InvalidYaml(f"an integer of more than {MAX_DIGITS} digits", node.start_mark)
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InvalidYaml(f"{shown(value)} holds half of a character (a surrogate)", node.start_mark)
        return value

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        """Return a mapping; keys of its own count before merged ones, of those the first that is merged."""
        values: dict[str, Any] = {}
        merged: list[Node] = []
        for key, value in node.value:
            if str(key.tag) == _MERGE:
                merged += value.value if isinstance(value, SequenceNode) else [value]
                continue
            name = self.of(key) if isinstance(key, ScalarNode) else None
            if not isinstance(name, str):
                shown_key = key.value if isinstance(key, ScalarNode) else "a list or mapping"
                raise InvalidYaml(f"the key {_one_line(shown_key)} is not a text; write it in quotes", key.start_mark)
            if name in values:
                raise InvalidYaml(f"found duplicate key {shown(name)}", key.start_mark)
            values[name] = self.of(value)
        for source in merged:
            if not isinstance(source, MappingNode):
                raise InvalidYaml("<< merges a mapping, or a list of mappings", source.start_mark)
            values = {**self._mapping(source), **values}
        return values


def _unknown_tag(node: Node) -> InvalidYaml:
    return InvalidYaml(f"the tag {_one_line(str(node.tag))} is not allowed: only plain values are", node.start_mark)


def _key_lines(node: Node, above: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            path = (*above, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, path)
