"""What `tune` found, as a complete recipe, and in the store that `auto` looks into."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_fasttrain.from_recipe.tunings import Tuning, store_tuning, tuning_key
from hf_fasttrain.recipe.load import to_yaml
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study import tune_space as space
from hf_fasttrain.study.tune import Candidate, TuneResult
from hf_fasttrain.utils.environment import describe_machine, describe_versions
from hf_fasttrain.utils.errors import RunError, without_secrets
from hf_fasttrain.utils.files import reason, write_atomically
from hf_fasttrain.utils.format import format_duration, format_images_rate, format_percent, format_rate

ROUNDING = (*space.MATH_KEYS, "accelerate.channels_last", "accelerate.compile")


def default_path(recipe: Recipe) -> Path:
    """Return the recipe's name with .tuned.yaml, here."""
    return Path(f"{recipe.source.name}.tuned.yaml")


def require_new_file(path: Path) -> None:
    """Raise RunError, before anything is measured, if the file is there already or its folder is not."""
    if path.exists():
        raise RunError(f"{path}: exists already; give another --output")
    if not path.absolute().parent.is_dir():
        raise RunError(f"{path}: can't be written: {path.absolute().parent} is no folder; give another --output")


def tuned_text(recipe: Recipe, found: TuneResult, *, command: str) -> str:
    """Return the recipe with the settings that were found; only machine keys differ from what was asked."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    accelerate, data = tree.setdefault("accelerate", {}), tree.setdefault("data", {})
    accelerate.pop("gradient_accumulation_steps", None)
    for key, value in found.best.config.items():
        (accelerate if key.startswith("accelerate.") else data)[key.rpartition(".")[2]] = value
    if accelerate["micro_batch_size"] is None:
        accelerate["gradient_accumulation_steps"] = 1
        del accelerate["micro_batch_size"]
    if found.ready.device == "cpu":
        del data["pin_memory"]  # has no effect there
    body = _marked(to_yaml(tree), _marks(found))
    return without_secrets("\n".join([*_header(recipe, found, command), body]))


def _marks(found: TuneResult) -> dict[str, str]:
    """Return what is to be said beside keys that change rounding or statistics."""
    base = (found.baseline or found.tried[0]).config
    marks = {key: "changes rounding" for key in ROUNDING if found.best.config[key] != base[key]}
    verdict = found.guards.get(space.precision_name(found.best.config, found.gpu))
    for key in space.MATH_KEYS:
        if key in marks and verdict is not None:
            marks[key] = f"changes rounding: {verdict}"
    micro = "accelerate.micro_batch_size"
    if found.ready.has_batch_norm and found.best.config[micro] != base[micro]:
        marks[micro] = marks["accelerate.gradient_accumulation_steps"] = "changes batch-norm statistics"
    return marks


def _marked(text: str, marks: dict[str, str]) -> str:
    lines, section = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = line.partition(":")[0]
        mark = marks.get(f"{section}.{line.strip().partition(':')[0]}") if line.startswith("  ") else None
        lines.append(f"{line}  # {mark}" if mark else line)
    return "\n".join([*lines, ""])


def _header(recipe: Recipe, found: TuneResult, command: str) -> list[str]:
    machine = describe_machine(torch.device(found.ready.device), 1)
    gpu = "" if machine["device"] == "cpu" else f", {machine['device']}"
    versions = describe_versions()
    shown = ("torch", "timm", "transformers", "accelerate", "hf_fasttrain")
    lines = [
        f"# {recipe.source.name}, tuned for {machine['processor']}, {machine['cores']} cores{gpu}",
        f"# by `{command}`, {datetime.now(UTC).isoformat(timespec='seconds')}, {format_duration(found.seconds)}",
        f"# with Python {versions['python']}, {', '.join(f'{name} {versions[name]}' for name in shown)}",
        *(f"# {line}" for line in summary(found)),
    ]
    return [" ".join(line.split("\n")) for line in lines]


def summary(found: TuneResult) -> list[str]:
    """Return what was found, in a few sentences."""
    own_rate = found.best.measurement.images_per_second.median
    lines = [
        f"{format_images_rate(own_rate)}; training as long as train.duration says: "
        f"{format_duration(found.best.forecast())}"
    ]
    if found.baseline is None:
        lines.append("The recipe's own settings do not fit in memory.")
    else:
        own = found.baseline.measurement.images_per_second.median
        lines.append(
            f"The recipe's own settings: {format_images_rate(own)}, {format_duration(found.baseline.forecast())}"
        )
    if found.speed_up is not None:
        lines.append(
            f"Side by side, {format_percent(found.speed_up.confidence, 0)} interval: {found.speed_up} times as fast."
        )
    elif found.baseline is found.best:
        lines.append("Nothing that was tried is faster.")
    if not found.whole:
        lines.append("Interrupted by Ctrl-C: this is the best so far.")
    if found.skipped:
        lines.append(f"Not tried: {'; '.join(dict.fromkeys(found.skipped))}")
    return lines


def write_tuned(recipe: Recipe, found: TuneResult, path: Path, *, command: str, store: bool) -> list[str]:
    """Write the recipe and store the tuning; return what could not be stored. RunError if the recipe can't be."""
    try:
        write_atomically(path, tuned_text(recipe, found, command=command))
    except OSError as error:
        raise RunError(f"{path}: can't be written: {reason(error)}; give another --output") from None
    if not store:
        return []
    machine, versions, model, data = tuning_key(recipe)
    best_rate = found.best.measurement.images_per_second.median
    date = datetime.now(UTC).date().isoformat()
    try:
        store_tuning(
            Tuning(machine, versions, model, data, dict(found.best.config), date, best_rate, str(recipe.train.duration))
        )
    except OSError as error:
        return [f"the tuning could not be stored for `auto`: {reason(error)}"]
    return []


def print_found(console: Console, found: TuneResult, path: Path) -> None:
    """Print what was tried, the fastest forecast first, and what came of it."""
    measured = [candidate for candidate in found.tried if candidate.measurement.is_measured]
    shown = Table(title="settings tried", title_justify="left")
    for name in ("settings", "images/s", "whole training", "turns", ""):
        shown.add_column(name, justify="left" if name in ("settings", "") else "right", overflow="fold")
    for candidate in [*sorted(measured, key=Candidate.forecast), *(c for c in found.tried if c not in measured)]:
        m, mark = candidate.measurement, "best" if candidate is found.best else ""
        if m.is_measured:
            figures = (
                format_rate(m.images_per_second.median),
                format_duration(candidate.forecast()),
                str(len(m.rounds)),
            )
        else:
            figures = ("-", m.failed.splitlines()[0] if m.failed else "not measured", "0")
        shown.add_row(*map(Text, (m.arm.name, *figures, mark)))
    console.print(shown)
    for line in [*summary(found), f"{path}: hf-fasttrain {path}"]:
        console.print(line, markup=False)
