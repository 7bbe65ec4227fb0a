"""The output of `ablate`: a table in the terminal, ablation.json, .md, .png, .svg and a self-contained HTML page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from hf_fasttrain.study.ablate import Ablation, Row
from hf_fasttrain.utils.clean import markdown, markdown_code, printable_tree, without_secrets
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason, write_atomically
from hf_fasttrain.utils.format import format_bytes, format_duration, format_interval, format_percent, format_rate
from hf_fasttrain.utils.terminal import Terminal, build_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = {"baseline": "#999999", "again": "#999999", "alone": "#0072B2", "everything": "#009E73", "removed": "#E69F00"}
LEGEND = {
    "baseline": "baseline, twice",
    "alone": "one technique alone",
    "everything": "everything",
    "removed": "everything but one",
}
HEADER = ("arm", "images/s", "speed-up (interval)", "waiting", "first step", "memory")
FULL_HEADER = ("accuracy", "F1", "training", "speed-up", "to baseline's accuracy")


def row_cells(row: Row, *, full: bool) -> list[str]:
    """Return a row of the table as text."""
    if row.images_per_second is None:
        figures = [row.status if row.status == "n/a" else "failed", row.reason.splitlines()[0], "", "", ""]
    else:
        figures = [
            format_rate(row.images_per_second.median),
            _interval(row),
            format_percent(row.wait_fraction, 0),
            f"+{format_duration(row.first_step_seconds)}",
            _memory(row),
        ]
    return [row.name, *figures, *(_full_cells(row) if full else [])]


def _interval(row: Row) -> str:
    speed_up = row.speed_up
    if speed_up is None:
        return ""
    if row.kind == "baseline":
        return "1"
    return format_interval(speed_up.median, speed_up.low, speed_up.high)


def _memory(row: Row) -> str:
    host = format_bytes(row.host_bytes or 0)
    return host if row.device_bytes is None else f"{format_bytes(row.device_bytes)} GPU, {host} host"


def _full_cells(row: Row) -> list[str]:
    full = row.full
    if full is None:
        return ["", "", "", "", ""]
    until = "-" if full.seconds_to_target is None else format_duration(full.seconds_to_target)
    spread = "" if full.accuracy_std is None else f" +- {full.accuracy_std:.4f}"
    return [
        "" if full.accuracy is None else f"{full.accuracy:.4f}{spread}",
        "" if full.f1_macro is None else f"{full.f1_macro:.4f}",
        f"{format_duration(full.train_seconds)} +- {format_duration(full.train_seconds_std)}",
        "" if full.speed_up is None else f"{full.speed_up:.2f}",
        f"{until} ({full.seeds_at_target} of {full.seeds} seeds)",
    ]


def _has_full(ablation: Ablation) -> bool:
    return any(row.full for row in ablation.rows)


def _header(ablation: Ablation) -> tuple[str, ...]:
    return (*HEADER, *FULL_HEADER) if _has_full(ablation) else HEADER


def _confidence(ablation: Ablation) -> str:
    speed_up = next((row.speed_up for row in ablation.rows if row.speed_up), None)
    return (
        f"{format_percent(speed_up.confidence, 0)} intervals over {ablation.rounds} rounds"
        if speed_up
        else f"{ablation.rounds} rounds"
    )


def _machine(ablation: Ablation) -> str:
    machine, versions = ablation.machine, ablation.versions
    gpu = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['processor']}, {machine['cores']} cores{gpu}; torch {versions['torch']}, timm {versions['timm']}"


def print_ablation(terminal: Terminal, ablation: Ablation) -> None:
    """Print the table."""
    full, header = _has_full(ablation), _header(ablation)
    title = f"{ablation.recipe}: {_confidence(ablation)}; {_machine(ablation)}"
    rows = [row_cells(row, full=full) for row in ablation.rows]
    ends = [number for number, row in enumerate(ablation.rows) if row.kind in ("again", "everything")]
    terminal.print(build_table(header, rows, title=title, right=range(1, len(header)), ends=ends))
    for note in ablation.notes:
        terminal.print(f"note: {note}")


def to_markdown(ablation: Ablation) -> str:
    """Return the table with its explanation, as Markdown."""
    header, full = _header(ablation), _has_full(ablation)
    lines = [
        f"# What makes {markdown(ablation.recipe)} fast here",
        "",
        f"{markdown_code(ablation.command)}, {ablation.date}. {markdown(_machine(ablation))}. {_confidence(ablation)}.",
        "",
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
    ]
    lines += ["| " + " | ".join(map(markdown, row_cells(row, full=full))) + " |" for row in ablation.rows]
    noted = [f"- {markdown(row.name)}: {markdown(row.note)}." for row in ablation.rows if row.note]
    notes = [f"- {markdown(note)}" for note in ablation.notes]
    return without_secrets("\n".join([*lines, "", *noted, *notes, ""]))


def chart(ablation: Ablation) -> Figure:
    """Return the chart: each arm's speed-up with its interval, and its memory."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in ablation.rows if row.speed_up is not None]
    figure = Figure(figsize=(11, 1.4 + 0.34 * max(1, len(rows))), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    positions = range(len(rows))
    colours = [COLOURS[row.kind] for row in rows]
    medians = [row.speed_up.median for row in rows if row.speed_up]
    errors = [
        [row.speed_up.median - row.speed_up.low for row in rows if row.speed_up],
        [row.speed_up.high - row.speed_up.median for row in rows if row.speed_up],
    ]
    speed.barh(positions, medians, xerr=errors if rows else None, color=colours, ecolor="#444444", capsize=2)
    for position, row in zip(positions, rows, strict=True):
        if row.speed_up:
            speed.annotate(
                f" {row.speed_up.median:.2f}", (row.speed_up.high, position), va="center", fontsize=8, color="#333333"
            )
    speed.axvline(1.0, color="#444444", linewidth=0.8)
    speed.set_yticks(list(positions), [row.name for row in rows])
    speed.invert_yaxis()
    speed.margins(x=0.08)
    speed.set_xlabel("speed, baseline = 1")
    bytes_of = [(row.device_bytes if row.device_bytes is not None else row.host_bytes) or 0 for row in rows]
    memory.barh(positions, [number / 1e9 for number in bytes_of], color=colours)
    on_gpu = any(row.device_bytes is not None for row in rows)
    memory.set_xlabel("GB on the GPU" if on_gpu else "GB on the host")
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    kinds = [kind for kind in LEGEND if any(row.kind == kind for row in rows)]
    if kinds:
        handles = [Patch(color=COLOURS[kind], label=LEGEND[kind]) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False)
    figure.suptitle(f"{ablation.recipe}: {_machine(ablation)}", fontsize=9)
    return figure


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What makes {{ ablation.recipe }} fast here</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #8884; }
tr.removed:first-of-type, tr.everything { border-top: 2px solid #8888; }
.muted { opacity: .6; } figure { margin: 1rem 0; background: #fff; padding: .5rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } code { overflow-wrap: anywhere; } details { margin: 1rem 0; }
</style></head><body>
<h1>What makes {{ ablation.recipe }} fast here</h1>
<p>{{ machine }}. {{ confidence }}. {{ ablation.date }}.</p>
<p><code>{{ ablation.command }}</code></p>
<figure>{{ svg }}</figure>
<table><thead><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row, texts in rows %}<tr class="{{ row.kind }}{% if row.status != 'measured' %} muted{% endif %}">
{% for text in texts %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<ul>{% for row, _ in rows if row.note %}<li>{{ row.name }}: {{ row.note }}.</li>{% endfor %}
{% for note in ablation.notes %}<li>{{ note }}</li>{% endfor %}</ul>
<details><summary>What each arm sets</summary><table><tbody>
{% for row, _ in rows %}<tr><td>{{ row.name }}</td><td><code>{{ row.overrides | join(' ') }}</code></td></tr>
{% endfor %}</tbody></table></details>
<details><summary>Versions</summary><p>{% for name, version in ablation.versions.items() %}{{ name }} {{ version }};
{% endfor %}</p></details>
</body></html>
"""


def to_html(ablation: Ablation, svg: str) -> str:
    """Return one self-contained HTML page; it loads nothing from the network."""
    from markupsafe import Markup

    full = _has_full(ablation)
    page = Environment(autoescape=True, finalize=printable_tree, undefined=StrictUndefined).from_string(PAGE)
    return without_secrets(
        page.render(
            ablation=ablation,
            machine=_machine(ablation),
            confidence=_confidence(ablation),
            header=_header(ablation),
            rows=[(row, row_cells(row, full=full)) for row in ablation.rows],
            policy=POLICY,
            svg=Markup(svg[svg.index("<svg") :]),  # our own drawing; its texts are escaped by matplotlib
        )
    )


def write_ablation(ablation: Ablation, folder: Path) -> None:
    """Write all files, the figures first; RunError if they can't be written."""
    try:
        write_atomically(folder / "ablation.json", without_secrets(ablation.model_dump_json(indent=2)) + "\n")
        write_atomically(folder / "ablation.md", to_markdown(ablation))
        svg = io.StringIO()
        figure = chart(ablation)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        write_atomically(folder / "ablation.svg", svg.getvalue())
        figure.savefig(folder / "ablation.png", dpi=150)
        write_atomically(folder / "ablation.html", to_html(ablation, svg.getvalue()))
    except OSError as error:
        raise RunError(f"{folder}: not everything could be written: {reason(error)}") from None
