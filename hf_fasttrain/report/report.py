"""Writes the report: one HTML file about a run, or a comparison of several; it loads nothing from the network.

Its sections: sections.py; charts: charts.py; tables: tables.py; scripts and style: page/.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hf_fasttrain.report.pictures import DRAWINGS
from hf_fasttrain.report.record import read_record
from hf_fasttrain.report.sections import Page, page_of_run, page_of_runs
from hf_fasttrain.run_folder.file_names import GALLERY_FOLDER, REPORT_FILE
from hf_fasttrain.run_folder.missing import result_mark
from hf_fasttrain.utils.clean import printable_tree, without_secrets
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import kind_of_file, reason, write_atomically

TEMPLATE, STYLE, SCRIPTS = "page.html.jinja", "style.css", ("matrix.js", "charts.js", "tables.js")
GENERATOR_TAG = '<meta name="generator" content="hf_fasttrain report">'


Tell = Callable[[str], None]


def write_report(runs: Sequence[Path], output: Path | None = None, tell: Tell = lambda _: None) -> Path:
    """Write the report of a run, or of several beside each other, and return its path.

    The report of one run is RUN/report.html, with its pictures as PNG in RUN/report; of several it is report.html in
    the current directory. With `output`, only the page is written, to that file. `tell` is called with sentences
    that say whether the runs differ. Raises RunError for a folder that is not a run, for a run given twice, and if the
    page can't be written or would replace a file that is not a report.
    """
    try:
        return write_page(runs, output, tell)
    except OSError as error:
        path = _output_path(runs, output)
        raise RunError(f"{path}: the report could not be written: {reason(error)}; choose another output") from None


def write_page(runs: Sequence[Path], output: Path | None = None, tell: Tell = lambda _: None) -> Path:
    """Do what `write_report` does; raises OSError if the page can't be written.

    The page is written last: if it exists, so do the pictures.
    """
    _require_different(runs)
    marks = [result_mark(run) for run in runs]
    records = [read_record(run) for run in runs]
    path = _output_path(runs, output)
    _require_replaceable(path, is_of_run=output is None)
    if output is None and len(records) == 1:
        folder = runs[0] / GALLERY_FOLDER
        folder.mkdir(exist_ok=True)
        for name, draw in DRAWINGS.items():
            draw(records[0], folder / name)
    page = page_of_run(records[0]) if len(records) == 1 else page_of_runs(records)
    write_html(path, page, marks[0] if len(marks) == 1 else "", is_of_run=output is None)
    for line in page.summary:
        tell(line)
    return path


def write_html(path: Path, page: Page, mark: str = "", *, is_of_run: bool) -> None:
    """Write a page in place of an earlier report. Raises RunError for another file, and OSError."""
    _require_replaceable(path, is_of_run=is_of_run)
    write_atomically(path, to_html(page, mark))


def _output_path(runs: Sequence[Path], output: Path | None) -> Path:
    if output is not None:
        return output.absolute()
    return runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE)


def _require_different(runs: Sequence[Path]) -> None:
    if not runs:
        raise RunError("report: no run folder given; give one, or several to compare")
    seen = set()
    for run in runs:
        real = os.path.realpath(run)
        if real in seen:
            raise RunError(f"{run}: is given twice; give different run folders")
        seen.add(real)


def _require_replaceable(path: Path, *, is_of_run: bool) -> None:
    """Raise RunError if the path is something else than a report: as root, even /dev/null would be replaced.

    In a run's folder, a FIFO or device is replaced.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # there is nothing, or writing will say why not
        return
    if stat.S_ISREG(mode):
        with path.open(encoding="utf-8", errors="replace") as file:
            found = "" if GENERATOR_TAG in file.read(2000) else "not a report"
    else:
        found = "" if is_of_run or stat.S_ISDIR(mode) else kind_of_file(mode)  # a folder can't be replaced
    if found:
        raise RunError(f"{path}: is {found} and would be overwritten; move it or choose another output")


def to_html(page: Page, mark: str = "") -> str:
    """Return the page as one self-contained HTML text; `mark` is added to its head."""
    from plotly.offline import get_plotlyjs

    folder = files("hf_fasttrain.report") / "page"
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in (TEMPLATE, STYLE, *SCRIPTS)}
    template = Environment(
        autoescape=True, finalize=printable_tree, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    charts = {chart.id: chart.figure for section in page.sections for chart in section.charts}
    long_tables = {
        table.id: table.columns_of_all for section in page.sections for table in section.tables if table.columns_of_all
    }
    rendered = template.from_string(parts[TEMPLATE]).render(
        page=page,
        generator=Markup(GENERATOR_TAG + mark),
        style=Markup(parts[STYLE]),
        scripts=[Markup(parts[name]) for name in SCRIPTS],
        figures=_in_script(charts),
        long_tables=_in_script(long_tables),
        plotly=Markup("PLOTLY"),
    )
    # Inserted last, so that its 5 MB are not searched for secrets and not escaped.
    before, after = without_secrets(rendered).split("<script>PLOTLY</script>", 1)
    return f"{before}<script>{get_plotlyjs() if charts else ''}</script>{after}"


def _in_script(value: Any) -> Markup:
    """Return JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(printable_tree(value), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
