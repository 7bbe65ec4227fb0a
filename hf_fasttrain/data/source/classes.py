"""Matches labels to class names by meaning: "007" and 7, 1.0 and 1, True and "true" are the same class."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from hf_fasttrain.data.source.multi_label import LabelArray, class_counts
from hf_fasttrain.utils.errors import shortened

_NUMBER = re.compile(r"[+-]?\d{1,25}(\.\d{1,25})?(e[+-]?\d{1,2})?", re.ASCII)


@dataclass(frozen=True)
class NameMatch:
    """The class of each label."""

    numbers: dict[str, int]  # label -> index of its class
    unknown: list[str]  # labels that match no class, or several
    renamed: dict[str, str]  # label -> name of its class, if they are spelled differently

    def describe(self) -> str:
        """Return the different spellings as text."""
        return shortened((f"{label!r} is {name!r}" for label, name in self.renamed.items()), 6)


def match_names(labels: Iterable[str], class_names: Sequence[str]) -> NameMatch:
    """Return which of `class_names` each label is: the same text, else the only one with the same meaning.

    If two labels match the same class, both are unknown, except one that is exactly the name of the class.
    """
    distinct = list(dict.fromkeys(labels))
    exact = {name: number for number, name in enumerate(class_names)}
    numbers = {label: exact[label] for label in distinct if label in exact}
    for key in (_meaning, _meaning_of_flag):
        remaining = [label for label in distinct if label not in numbers]
        if remaining:
            unique = _unique(class_names, key)
            taken = set(numbers.values())
            matches = {label: unique[key(label)] for label in remaining if key(label) in unique}
            counts = Counter(matches.values())
            numbers |= {
                label: number for label, number in matches.items() if number not in taken and counts[number] == 1
            }
    unknown = [label for label in distinct if label not in numbers]
    renamed = {label: class_names[n] for label, n in numbers.items() if class_names[n] != label}
    return NameMatch(numbers, unknown, renamed)


def _unique(names: Sequence[str], key: Callable[[str], str]) -> dict[str, int]:
    """Return the index of each name by its key, without names that share one."""
    keys = [key(name) for name in names]
    last = {value: number for number, value in enumerate(keys)}
    shared = {value for number, value in enumerate(keys) if last[value] != number}
    return {value: number for value, number in last.items() if value not in shared}


def _meaning(name: str) -> str:
    """Normalise a name: equal for names that differ only in spaces, case, encoding of accents or form of numbers."""
    text = unicodedata.normalize("NFC", name.strip()).casefold()
    if not _NUMBER.fullmatch(text):
        return text
    digits = f"{Decimal(text):f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits in ("-0", "0") else digits


def _meaning_of_flag(name: str) -> str:
    """Normalise a name as `_meaning` does, with true and false as 1 and 0."""
    text = _meaning(name)
    return {"true": "1", "false": "0"}.get(text, text)


def similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of names that differ in form only, such as cat and Cat, or 7 and 007."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(_meaning(name), name), name) for name in names]
    return [pair for pair in pairs if pair[0] != pair[1]]


def names_without_images(labels: LabelArray, class_names: Sequence[str]) -> list[str]:
    """Return the classes without images."""
    return [class_names[number] for number in np.flatnonzero(class_counts(labels, len(class_names)) == 0).tolist()]
