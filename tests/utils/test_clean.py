"""Texts of strangers in a terminal and in Markdown, and access tokens."""

from __future__ import annotations

import io

import pytest
from rich.progress import Progress, TextColumn

from hf_fasttrain.utils.clean import (
    MESSAGE_LENGTH,
    holds_secret,
    markdown,
    markdown_block,
    markdown_code,
    message,
    one_line,
    printable,
    without_secrets,
)
from hf_fasttrain.utils.printing import echo, echo_json
from hf_fasttrain.utils.terminal import Terminal, build_table

JWT = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJlLXNpZ25hdHVyZQ"
TOKENS = {
    "hf_" + "aB3" * 12: "hf_***",
    "api_org_" + "aB3" * 12: "api_org_***",
    f"hf_oauth_{JWT}": "hf_oauth_***",
    f"hf_jwt_{JWT}": "hf_jwt_***",
    JWT: "eyJ***",
    JWT.rpartition(".")[0] + ".": "eyJ***.",
    "ghp_" + "a1" * 18: "ghp_***",
    "github_pat_" + "a1_" * 12: "github_pat_***",
    "https://me:pass-word@example.com/x": "https://me:***@example.com/x",
}
HOSTILE = "\x1b]0;title\x07\x1b]52;c;aGk=\x07\x9b31m\u202egpj\u2066\u200b\r\x08\x7f\udce4\ud800\U000e0041"


@pytest.mark.parametrize(("token", "blotted"), TOKENS.items())
def test_tokens_are_found_and_blotted_out(token: str, blotted: str) -> None:
    for text in (token, f"x={token}", f"my_{token}", f'"{token}"', f"a {token}, b"):
        if "://" in token and text.startswith("my_"):
            continue
        assert holds_secret(text)
        assert without_secrets(text) == text.replace(token, blotted)


@pytest.mark.parametrize(
    "text",
    ["hf_fasttrain", "hf_internal_testing/tiny_random_vit_for_image_classification", "hf_hub_download", "eyJ.eyJ",
     "https://huggingface.co/a/b@c", "user@example.com", "a" * 40, "timm/vit_base_patch16_clip_224.openai_ft_in12k"],
)  # fmt: skip
def test_names_are_no_tokens(text: str) -> None:
    assert not holds_secret(text)
    assert without_secrets(text) == text


def test_no_unprintable_character_is_left_and_none_is_lost() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert shown == (r"\x1b]0;title\x07\x1b]52;c;aGk=\x07\x9b31m\u202egpj\u2066\u200b\x0d\x08\x7f\xe4\ud800\U000e0041")
    ordinary = "Käse 猫 می\u200cخواهم 👩\u200d🔬 a\tb\nc"
    assert printable(ordinary) == ordinary
    assert one_line("a\nb\tc\x1b") == r"a\nb c\x1b"


def test_every_control_and_format_character_is_printable_afterwards() -> None:
    import unicodedata

    joiners = {0x200C, 0x200D, 0x0A, 0x09}
    shown = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")]
    assert all(printable(letter).isprintable() for letter in shown if ord(letter) not in joiners)
    turning = [chr(code) for code in range(0x110000) if unicodedata.bidirectional(chr(code)) in BIDI_CONTROLS]
    assert all(printable(letter).isprintable() for letter in turning)


BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_a_message_has_one_first_line_and_no_secrets() -> None:
    token = "hf_" + "a" * 34
    text = message(f"{token} in\nerror: forged\n  listed\n\rnote: forged")
    assert text.splitlines() == ["hf_*** in", "  error: forged", "  listed", r"  \x0dnote: forged"]
    assert len(message("x" * 3_000_000)) < MESSAGE_LENGTH + 100
    assert "2,990,000 characters left out" in message("x" * 3_000_000)


def test_all_that_prints_cleans(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    echo_json({HOSTILE: [HOSTILE, JWT]})
    written = io.StringIO()
    terminal = Terminal(file=written, force_terminal=True, width=60, color_system=None)
    terminal.print(HOSTILE)
    terminal.print_line(f"[bold]x[/bold] :smile: {HOSTILE}")
    terminal.print(build_table((HOSTILE,), [(HOSTILE,), (JWT,)], title=HOSTILE))
    with Progress(TextColumn("{task.description}", markup=False), console=terminal) as progress:
        progress.add_task(HOSTILE)
    out = "".join(capsys.readouterr())
    assert out.replace("\n", "").isprintable()
    assert JWT not in out
    shown = written.getvalue()
    assert r"\u202e" in shown
    assert "[bold]x[/bold] :smile:" in shown
    assert not any(letter in shown for letter in "\x07\x9b\u202e\u2066\x08\x7f\udce4")
    assert "\x1b]" not in shown
    assert "eyJhbGci" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "![x](http://e/x.png)",
        "a | b", "`code`", "**bold**", "# title", "_x_", "https://evil.example", "www.evil.example", "a@b.c", "$x$",
        "a\n\n# forged", "&lt;script&gt;", "~~x~~", "\\", "<!-- x", "[a]: http://e",
    ],
)  # fmt: skip
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    import html
    import re

    shown = markdown(text)
    assert html.unescape(shown) == text.replace("\n", "\\n")
    assert not re.search(r"[\\`*\[\]<>|~$@]|://|www\.|\n", re.sub(r"&#\d+;", "", shown).replace("\\n", ""))


def test_markdown_of_ordinary_names_is_themselves() -> None:
    for name in ("f1_macro", "golden retriever", "a/b-c (1.5%)", "猫"):
        assert markdown(name) == name


def test_markdown_code_and_blocks_end_where_they_should() -> None:
    assert markdown_code("a") == "`a`"
    assert markdown_code("a``b`") == "``` a``b` ```"
    block = markdown_block("a: |\n  ```\n  <script>\n  ````\n", "yaml")
    assert block.startswith("`````yaml\n")
    assert block.endswith("\n`````")
