"""Writes the result of `tune` as a complete recipe, and into the store that `auto` reads."""

from __future__ import annotations

import itertools
import os
from datetime import UTC, datetime
from pathlib import Path

import torch

from hf_fasttrain.from_recipe.tunings import Tuning, store_tuning, tuning_key
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study import tune_space as space
from hf_fasttrain.study.tune import Candidate, TuneResult
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.environment import describe_machine, describe_versions
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason, write_atomically
from hf_fasttrain.utils.format import format_command, format_duration, format_images_rate, format_percent, format_rate
from hf_fasttrain.utils.terminal import Terminal, build_table
from hf_fasttrain.utils.yaml import write_yaml

ROUNDING = (*space.MATH_KEYS, "accelerate.channels_last", "accelerate.compile")


def default_path(recipe: Recipe) -> Path:
    """Return NAME.tuned.yaml in the current directory; numbered, NAME.tuned.2.yaml, if earlier tunings are there."""
    name = recipe.source.name
    paths = (Path(f"{name}.tuned{f'.{number}' if number > 1 else ''}.yaml") for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def require_new_file(path: Path) -> None:
    """Raise RunError, before anything is measured, if the file exists or its folder does not."""
    if path.exists():
        raise RunError(f"{path}: exists already; give another --output")
    if not path.absolute().parent.is_dir():
        raise RunError(f"{path}: can't be written: {path.absolute().parent} is not a folder; give another --output")


def tuned_text(recipe: Recipe, result: TuneResult, *, command: str) -> str:
    """Return the recipe with the best settings as YAML; only machine keys are changed."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    accelerate, data = tree.setdefault("accelerate", {}), tree.setdefault("data", {})
    accelerate.pop("gradient_accumulation_steps", None)
    for key, value in result.best.config.items():
        (accelerate if key.startswith("accelerate.") else data)[key.rpartition(".")[2]] = value
    if accelerate["micro_batch_size"] is None:
        accelerate["gradient_accumulation_steps"] = 1
        del accelerate["micro_batch_size"]
    if result.ready.device == "cpu":
        del data["pin_memory"]  # has no effect there
    body = _marked(write_yaml(tree), _marks(result))
    return without_secrets("\n".join([*_header(recipe, result, command), body]))


def _marks(result: TuneResult) -> dict[str, str]:
    """Return comments on keys that change rounding or batch-norm statistics."""
    base = (result.baseline or result.tried[0]).config
    marks = {key: "changes rounding" for key in ROUNDING if result.best.config[key] != base[key]}
    verdict = result.guards.get(space.precision_name(result.best.config, result.gpu))
    for key in space.MATH_KEYS:
        if key in marks and verdict is not None:
            marks[key] = f"changes rounding: {verdict}"
    micro = "accelerate.micro_batch_size"
    if result.ready.has_batch_norm and result.best.config[micro] != base[micro]:
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


def _header(recipe: Recipe, result: TuneResult, command: str) -> list[str]:
    machine = describe_machine(torch.device(result.ready.device), 1)
    gpu = "" if machine["device"] == "cpu" else f", {machine['device']}"
    versions = describe_versions()
    shown = ("torch", "timm", "transformers", "accelerate", "hf_fasttrain")
    lines = [
        f"# {recipe.source.name}, tuned for {machine['processor']}, {machine['cores']} cores{gpu}",
        f"# by `{command}`, {datetime.now(UTC).isoformat(timespec='seconds')}, {format_duration(result.seconds)}",
        f"# with Python {versions['python']}, {', '.join(f'{name} {versions[name]}' for name in shown)}",
        *(f"# {line}" for line in summary(result)),
    ]
    return [" ".join(line.split("\n")) for line in lines]


def summary(result: TuneResult) -> list[str]:
    """Return the result in a few sentences."""
    lines = [
        f"{format_images_rate(result.best.images_per_second)}; training as long as train.duration says: "
        f"{format_duration(result.best.forecast())}"
    ]
    if result.baseline is None:
        lines.append("The recipe's own settings do not fit in memory.")
    else:
        rate = format_images_rate(result.baseline.images_per_second)
        lines.append(f"The recipe's own settings: {rate}, {format_duration(result.baseline.forecast())}")
    if result.speed_up is not None:
        lines.append(
            f"Side by side, {format_percent(result.speed_up.confidence, 0)} interval: {result.speed_up} times as fast."
        )
    elif result.baseline is result.best:
        others = len(result.tried) > 1
        lines.append("Nothing that was tried is faster." if others else "There was no time to try anything else.")
    if not result.complete:
        lines.append("Interrupted by Ctrl-C: this is the best so far.")
    if result.rough:
        lines.append(result.rough)
    if result.skipped:
        lines.append(f"Not tried: {'; '.join(dict.fromkeys(result.skipped))}")
    return lines


def write_tuned(recipe: Recipe, result: TuneResult, path: Path, *, command: str, store: bool) -> list[str]:
    """Write the recipe and store the tuning; return notes on a store that can't be written. Raises RunError."""
    try:
        write_atomically(path, tuned_text(recipe, result, command=command))
    except OSError as error:
        raise RunError(f"{path}: can't be written: {reason(error)}; give another --output") from None
    if not store:
        return []
    machine, versions, model, data = tuning_key(recipe)
    best_rate = result.best.images_per_second
    date = datetime.now(UTC).date().isoformat()
    try:
        store_tuning(
            Tuning(
                machine, versions, model, data, dict(result.best.config), date, best_rate, str(recipe.train.duration)
            )
        )
    except OSError as error:
        return [f"the tuning could not be stored for `auto`: {reason(error)}"]
    return []


def print_tuning(terminal: Terminal, result: TuneResult, path: Path) -> None:
    """Print all candidates, the fastest forecast first, and the summary."""
    measured = [candidate for candidate in result.tried if candidate.measurement.is_measured]
    rows = []
    for candidate in [*sorted(measured, key=Candidate.forecast), *(c for c in result.tried if c not in measured)]:
        m, mark = candidate.measurement, "best" if candidate is result.best else ""
        if m.is_measured:
            figures = (
                format_rate(candidate.images_per_second),
                f"{candidate.speed_up().median:.2f}",
                format_duration(candidate.forecast()),
                str(len(m.rounds)),
            )
        else:
            figures = ("-", "-", m.failed.splitlines()[0] if m.failed else "not measured", "0")
        rows.append((m.arm.name, *figures, mark))
    header = ("settings", "images/s", "x as it is", "whole training", "turns", "")
    terminal.print(build_table(header, rows, title="settings tried", right=(1, 2, 3, 4)))
    for line in [*summary(result), f"{path}: {format_command('train', path)}"]:
        terminal.print(line)
