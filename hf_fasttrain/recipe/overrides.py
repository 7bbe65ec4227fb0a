"""Overrides: `section.key=value` to a change of a recipe's tree, or to a message that says how one is written."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_fasttrain.recipe.validate import Tree, all_keys, hint_for
from hf_fasttrain.utils.clean import cut, one_line
from hf_fasttrain.utils.errors import RecipeError
from hf_fasttrain.utils.yaml import MAX_DEPTH, InvalidYaml, read_yaml

FORM = "must look like section.key=value, such as train.batch_size=64"


def apply_overrides(tree: Tree, overrides: Sequence[str], origins: dict[str, str]) -> None:
    """Set the values of overrides in a recipe's tree, and their origins. Raises RecipeError with all malformed ones."""
    malformed = []
    for number, override in enumerate(overrides):
        try:
            key, value = _parsed(override)
        except RecipeError as error:
            malformed.append(str(error))
            if written := _as_one_word(overrides, number):
                malformed[-1] = f"{named(override)}: an override has no spaces outside quotes: write {written}"
                break  # the words that follow belong to it
        else:
            _set(tree, key, value, origins)
    if malformed:
        raise RecipeError("\n".join(malformed))


def named(override: str) -> str:
    """Return an override for the start of a message, whatever was typed."""
    return f"override '{one_line(cut(override, 200))}'"


def leaves(tree: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted keys of a tree's values."""
    for key, value in tree.items():
        dotted = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{dotted}.")
        else:
            yield dotted


def _parsed(override: str) -> tuple[str, Any]:
    """Return the key and the value of an override. Raises RecipeError for a malformed one."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")) or key.startswith("-") or key.count(".") > MAX_DEPTH:
        raise RecipeError(f"{named(override)}: {FORM}{_meant(override)}")
    if re.search(r",\s*\w+(\.\w+)+=", text):
        raise RecipeError(f"{named(override)}: overrides are separated by spaces, not by commas")
    try:
        return key, read_yaml(text)[0]
    except InvalidYaml as error:
        raise RecipeError(f"{named(override)}: the value is not valid YAML: {error.problem}") from None


def _meant(word: str) -> str:
    """Return a hint for a word that is not an override, "" if nothing is likely."""
    key, _, value = word.lstrip("-").partition(":")
    if key in all_keys():
        return f". Did you mean {shlex.quote(f'{key}={value.strip()}') if value else f'{key}=VALUE'}?"
    if word.endswith((".yaml", ".yml")):
        return "; a training has one recipe"
    if os.path.exists(word):
        return f". Did you mean {shlex.quote(f'data.dataset={word}')}?"
    return "." + hint if (hint := hint_for(word)) and "." not in word else ""


def _as_one_word(overrides: Sequence[str], number: int) -> str:
    """Return the override that a malformed one is a part of, quoted for a shell; "" if there is none."""
    for start in (number, max(0, number - 1)):
        following = [*itertools.takewhile(lambda word: "=" not in word[1:], overrides[start + 1 :])]
        found = re.fullmatch(r"([\w.]+)(?:\s*=\s*|\s+)([^=]+)", " ".join([overrides[start], *following]))
        if following and found is not None and found[1] in all_keys():
            return shlex.quote(f"{found[1]}={found[2].strip()}")
    return ""


def _set(tree: Tree, key: str, value: Any, origins: dict[str, str]) -> None:
    *sections, last = key.split(".")
    node = tree
    for depth, section in enumerate(sections, 1):
        if not isinstance(node.get(section), dict):
            node[section] = {}
        origins.pop(".".join(sections[:depth]), None)  # a plain value, which the override makes a section
        node = node[section]
    node[last] = value
    for old in [o for o in origins if o == key or o.startswith(f"{key}.")]:
        del origins[old]
    for leaf in leaves({key: value}):
        origins[leaf] = "override"
