"""Removes paths of this machine from texts and settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import PureWindowsPath
from typing import Any

import xxhash

from hf_fasttrain.utils.yaml import InvalidYaml, read_yaml, write_yaml

CLASS_KEYS = {"class_names", "label_names", "id2label", "label2id"}  # may look like paths, and must not change
_PATH_END = r"[^\s'\"`,;:=()\[\]{}<>|]+"
# /x, ~/x, ./x, ../x, file:///x and C:\x, but not a/b, images/s and https://x
_PATH_IN_TEXT = re.compile(
    rf"(?<!\w)[A-Za-z]:[\\/](?!/){_PATH_END}"
    rf"|(?:file://|(?<![\w./~:\\-])|(?<=\w:)(?!//))(?:~\w*|\.{{1,2}})?/{_PATH_END}"
)
_SEPARATOR = re.compile(rb"[/\\]")
_PREFIX = re.compile(r"(?:transformers|local-dir):")


def is_local_path(value: str) -> bool:
    """Return whether a setting is a path of this machine: by its form, or because it exists."""
    if value.startswith((".", "/", "~", "file://")) or re.match(r"[A-Za-z]:[\\/](?!/)", value):
        return True
    return ("/" in value or os.sep in value) and os.path.exists(value)


def _last_component(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\")).name or "."


class Scrubber:
    """Cuts local paths to their last component; those among the `known` strings also inside longer texts."""

    def __init__(self, known: list[str], local: Collection[str] = ()) -> None:
        """`local` are settings that were paths where the run was trained, though they may not look like paths here."""
        self._local = {_PREFIX.sub("", text, count=1) for text in local}
        self._has_drive = any(":" in text for text in self._local)  # a:b is cut to b
        bare = {_PREFIX.sub("", text, count=1) for text in known}
        local = {text.rstrip("/") for text in bare if is_local_path(text) and "/" in text.strip("/.~")}
        local |= {text.rstrip("/") for text in self._local if "/" in text.strip("/")}
        words = "|".join(re.escape(text) for text in sorted(local, key=len, reverse=True))
        self._known = re.compile(rf"(?<![\w./~-])(?:{words})(?:/{_PATH_END})?(?![\w-])/?") if words else None
        self.digest = xxhash.xxh3_128(repr((words, sorted(self._local))).encode(errors="surrogatepass")).hexdigest()

    def value(self, value: str) -> str:
        """Return a setting or text without local paths."""
        prefix = match.group() if (match := _PREFIX.match(value)) else ""
        bare = value.removeprefix(prefix)
        if bare in self._local or (is_local_path(bare) and "\n" not in value):
            return prefix + _last_component(value.removeprefix(prefix))
        return self.text(value)

    def text(self, text: str) -> str:
        """Return a text in which each local path is cut to its last component."""
        if self._known is not None:
            text = self._known.sub(lambda match: _last_component(match.group()), text)
        return _PATH_IN_TEXT.sub(lambda match: _last_component(match.group()), text)

    def tree(self, tree: Any) -> Any:
        """Return a JSON or YAML tree without local paths; class names stay."""
        if isinstance(tree, str):
            return self.value(tree)
        if isinstance(tree, list):
            return [self.tree(value) for value in tree]
        if isinstance(tree, dict):
            return {key: value if key in CLASS_KEYS else self.tree(value) for key, value in tree.items()}
        return tree

    def json(self, content: bytes) -> bytes:
        """Return a JSON text without local paths; the same bytes if there are none.

        Most lines of metrics.jsonl have no character that paths are made of, and are not parsed.
        """
        if content.isascii() and not _SEPARATOR.search(content) and not self._has_drive:
            return content
        try:
            tree = json.loads(content)
            clean = self.tree(tree)
        except (ValueError, RecursionError):  # a line cut short when the run was killed
            return self.text(content.decode(errors="replace")).encode()
        if clean == tree or json.dumps(clean) == json.dumps(tree):  # NaN is not equal to itself
            return content
        return (json.dumps(clean, indent=2 if content.count(b"\n") > 1 else None) + "\n").encode()

    def yaml(self, text: str, tree: dict[str, Any]) -> str:
        """Return a YAML text without local paths; comments stay unless cutting would change other values."""
        clean, wanted = self.text(text), self.tree(tree)
        with suppress(InvalidYaml):
            if read_yaml(clean)[0] == wanted:
                return clean
        return write_yaml(wanted)


def strings(tree: Any) -> Iterator[str]:
    """Yield every string in a tree of settings, except class names."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key not in CLASS_KEYS:
                yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
