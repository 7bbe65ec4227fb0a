"""Texts that strangers may have written, made safe to show: in a terminal, in Markdown, without access tokens.

Names of classes, models, files and keys come from data sets, recipes and run folders of others.
"""

from __future__ import annotations

import re
from typing import Any

MESSAGE_LENGTH = 10_000  # characters of a printed message

# Hub tokens, also OAuth's (a JWT after its prefix), JSON Web Tokens, tokens of other services, passwords in addresses.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?P<kept>hf_(?:oauth|jwt)_)[\w.~+/=-]{20,}"
    r"|(?P<hub>hf_|api_org_)[A-Za-z0-9]{20,}"
    r"|(?P<jwt>eyJ)[\w-]{10,}(?:\.[\w-]{10,}){1,4}"
    r"|(?P<other>gh[oprsu]_|github_pat_|glpat-|xox[abprs]-|sk-)[\w-]{20,}"
    r")|(?<=://)(?P<user>[^\s/:@]+:)[^\s/@]+(?=@)"
)
# What a terminal obeys or hides: control characters but tab and newline, marks that turn the direction of text around,
# invisible characters, and bytes of a file name that are not UTF-8 (surrogates). The joiners of Persian and emoji stay.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # but those of white space
# What Markdown reads as markup, HTML, mathematics or a link; an underscore within a word is none of it.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&#$!]|(?<=\w)@(?=\w)|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")


def holds_secret(text: str) -> bool:
    """Return whether a text holds an access token."""
    return _SECRET.search(text) is not None


def without_secrets(text: str) -> str:
    """Return a text with access tokens replaced by *** behind their prefix."""
    return _SECRET.sub(lambda match: f"{''.join(filter(None, match.groups()))}***", text)


def holds_control_character(text: str) -> bool:
    """Return whether a text holds a control character that is not white space."""
    return _CONTROL.search(text) is not None


def printable(text: str) -> str:
    r"""Return a text with its unprintable characters as escapes, such as ``\x1b``; tabs and newlines stay."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def printable_tree(value: Any) -> Any:
    """Return a value with its texts printable, alone and in lists and dicts; HTML that is marked as such stays."""
    if isinstance(value, str):
        return value if hasattr(value, "__html__") else printable(value)
    if isinstance(value, list):
        return [printable_tree(each) for each in value]
    if isinstance(value, dict):
        return {key: printable_tree(each) for key, each in value.items()}
    return value


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str) -> str:
    r"""Return a text as one printable line; newlines become ``\n``."""
    return printable(text).replace("\n", "\\n").replace("\t", " ")


def cut(text: str, limit: int) -> str:
    """Return a text with at most about `limit` characters; a longer one loses its middle, and says how much."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"


def message(text: str) -> str:
    """Return a message as it is printed: printable, without secrets, not too long.

    Every line but the first is indented: a name with newlines can't add lines that look like messages of ours.
    """
    clean = printable(without_secrets(cut(text, MESSAGE_LENGTH)))
    first, *rest = clean.split("\n")
    return "\n".join([first, *(line if line.startswith("  ") or not line else f"  {line}" for line in rest)])


def markdown(text: str) -> str:
    """Return a text for a line or a cell of Markdown, which shows it as it is: with entities for what is markup."""
    return _MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def markdown_code(text: str) -> str:
    """Return a text as Markdown's inline code, whatever backticks it has."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{one_line(text)}{pad}{fence}"


def markdown_block(text: str, language: str) -> str:
    """Return a text as a fenced block of Markdown, whatever fences it has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text)}\n{fence}"
