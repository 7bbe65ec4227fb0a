"""Creates the README's pictures from real runs: the terminal during training, a report, and a model card.

    pip install pyte playwright
    python docs/pictures.py terminal RECIPE [section.key=value ...]   -> docs/terminal.png
    python docs/pictures.py report RUN                                -> docs/report.png
    python docs/pictures.py card RUN                                  -> docs/example_card/

The terminal is a pseudo-terminal of 116 columns, captured in the second epoch. The report is opened in Chromium. The
card is that of `hf-fasttrain push` to the tests' Hub on loopback.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
COLUMNS, ROWS = 116, 14
BROWSER = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def terminal(arguments: list[str]) -> None:
    """Train in a pseudo-terminal and draw its content in the second epoch."""
    import pyte
    from rich.console import Console
    from rich.text import Text

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipes").symlink_to(DOCS.parent.resolve() / "recipes")
        command = ["hf-fasttrain", *arguments]
        child, master = pty.fork()
        if not child:
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
            os.chdir(folder)
            os.execvp(command[0], command)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        is_ready = False
        while not is_ready:
            if select.select([master], [], [], 0.2)[0]:
                stream.feed(os.read(master, 65536))
            lines = [line for line in screen.display if line.strip()]
            is_ready = len(lines) > 3 and " 5" in lines[-3] and "epoch 2/" in lines[-3] and "images/s" in lines[-1]
        os.kill(child, 9)
        os.close(master)
        os.waitpid(child, 0)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text(f"$ {' '.join(command)}", style="bold"))
    for number in range(ROWS):
        line = Text()
        for column in range(COLUMNS):
            char = screen.buffer[number][column]
            colour = char.fg if char.fg != "default" else ""
            line.append(char.data, style=COLOURS.get(colour, f"#{colour}" if len(colour) == 6 else ""))
        line.rstrip()
        if line.plain:
            console.print(line, no_wrap=True)
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        picture = Path(folder) / "terminal.svg"
        picture.write_text(console.export_svg(title="hf_fasttrain"))
        page = browser.new_page(viewport={"width": 1430, "height": 380})
        page.goto(picture.as_uri())
        page.screenshot(path=DOCS / "terminal.png")


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        yield browser
        browser.close()


COLOURS = {"brown": "yellow", "brightblack": "bright_black", "red": "red", "magenta": "magenta", "green": "green"}


def report(run: str) -> None:
    """Draw the upper part of a run's report, light next to dark."""
    from PIL import Image

    pictures = []
    with _browser() as browser, tempfile.TemporaryDirectory() as folder:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1100, "height": 1500}, color_scheme=scheme)
            page.goto((Path(run).resolve() / "report.html").as_uri())
            page.wait_for_timeout(3000)
            page.screenshot(path=f"{folder}/{scheme}.png")
            pictures.append(Image.open(f"{folder}/{scheme}.png").convert("RGB"))
    canvas = Image.new("RGB", (2200, 1500))
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (1100 * number, 0))
    canvas.resize((1650, 1125), Image.Resampling.LANCZOS).quantize(192).save(DOCS / "report.png", optimize=True)


def card(run: str) -> None:
    """Push a run to the tests' Hub and save the card and its pictures."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from helpers.hub_server import TOKEN, running_hub

    with running_hub() as hub, tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        push = [sys.executable, "-m", "hf_fasttrain", "push", run, "me/flowers", "--license", "cc-by-2.0"]
        subprocess.run(push, env=env, check=True)
        folder = DOCS / "example_card"
        folder.mkdir(exist_ok=True)
        for name, content in hub.repos["me/flowers"].files.items():
            if name.endswith((".md", ".png")):
                (folder / name).write_bytes(content)


if __name__ == "__main__":
    name, *rest = sys.argv[1:] or [""]
    if name not in ("terminal", "report", "card") or not rest:
        sys.exit(__doc__)
    {"terminal": terminal, "report": lambda r: report(*r), "card": lambda r: card(*r)}[name](rest)
