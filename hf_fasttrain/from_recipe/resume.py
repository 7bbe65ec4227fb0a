"""The decisions of `auto` at a run's first start, kept when the run is resumed: same rounding, same micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fasttrain.from_recipe.accelerator import user_threads
from hf_fasttrain.from_recipe.auto import MACHINE
from hf_fasttrain.from_recipe.tunings import COMPUTE_KEYS, Presets, current_machine
from hf_fasttrain.recipe.load import flatten, with_values
from hf_fasttrain.recipe.messages import flow_text
from hf_fasttrain.recipe.resolved import Decision, ResolvedSettings, is_open, read_settings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import is_allowed
from hf_fasttrain.run_folder.file_names import RESOLVED_FILE
from hf_fasttrain.run_folder.folder import saved_state

MICRO, THREADS, EVAL_BATCH = "accelerate.micro_batch_size", "accelerate.cpu_threads", "evaluate.batch_size"
SHARED_KEYS = (MICRO, EVAL_BATCH, THREADS)  # these depend on the number of processes
KEPT_KEYS = (*COMPUTE_KEYS, *SHARED_KEYS)


@dataclass(frozen=True)
class FirstStart:
    """The machine settings at a run's first start with their reasons, and the machine."""

    decisions: dict[str, Decision]
    machine: dict[str, Any] | None  # None: written by a version that did not record it
    explicit: frozenset[str] = frozenset()  # keys that the recipe set

    def presets(self, recipe: Recipe) -> Presets | None:
        """Return the decisions that a resumed run keeps, without keys that the user sets now; None on another machine.

        If the run did not record its machine, only those of a stored tuning are kept.
        """
        if self._is_other_machine():
            return None
        shared = set(SHARED_KEYS) if self._has_changed("processes") else set()
        keys = self._tuned_keys() if self.machine is None else set(self.decisions) - shared
        if not is_open(MICRO, flatten(recipe)) or MICRO not in keys:
            keys.discard(EVAL_BATCH)  # it follows from the micro-batch
        if THREADS in keys - self._tuned_keys() and user_threads():
            keys.discard(THREADS)  # OMP_NUM_THREADS takes precedence over a rule, but not over a stored tuning
        return Presets({key: self.decisions[key].keep() for key in sorted(keys)})

    def note_changes(self, settings: ResolvedSettings) -> None:
        """Note which settings differ from the first start although the recipe does not set them."""
        if self.machine is None:
            return
        values, current = flatten(settings.recipe), settings.all()
        open_keys = {key: d.value for key, d in self.decisions.items() if is_open(key, values)}
        kept = [
            f"{key}={flow_text(value)}"
            for key, value in open_keys.items()
            if key in self.explicit and current[key].value == value
        ]
        if kept:
            settings.note(f"kept from this run's first start, though the recipe no longer sets it: {', '.join(kept)}")
        changed = [
            f"{key}={flow_text(current[key].value)} ({flow_text(value)} before)"
            for key, value in open_keys.items()
            if current[key].value != value
        ]
        machine = current_machine()
        differences = [
            f"{name} {self.machine.get(name)}, now {machine[name]}" for name in machine if self._has_changed(name)
        ]
        if differences:
            affected = "`auto` is" if self._is_other_machine() else "micro-batch and threads are"
            outcome = ", ".join(changed) or "nothing changes"
            settings.note(f"this run started elsewhere ({'; '.join(differences)}): {affected} decided again: {outcome}")
        elif changed:
            settings.note(f"changed since this run started, by the launcher or OMP_NUM_THREADS: {', '.join(changed)}")

    def _tuned_keys(self) -> set[str]:
        return {key for key, decision in self.decisions.items() if decision.kind == "tuned"}

    def _has_changed(self, name: str) -> bool:
        return self.machine is not None and self.machine.get(name) != current_machine()[name]

    def _is_other_machine(self) -> bool:
        return any(self._has_changed(name) for name in current_machine() if name != "processes")


def read_first_start(folder: Path) -> FirstStart | None:
    """Return a run's first start from its resolved.yaml, None if there is no such file."""
    if not (folder / RESOLVED_FILE).exists():
        return None
    settings = read_settings(folder)
    kept = {key: s for key, s in settings.items() if key in KEPT_KEYS or s.kind == "tuned"}
    kept = {
        key: setting
        for key, setting in sorted(kept.items())
        if setting.value not in (None, "auto") and is_allowed(key, setting.value)
    }
    machine = settings[MACHINE].value if MACHINE in settings else None
    explicit = frozenset(key for key, setting in kept.items() if setting.kind in ("recipe", "override"))
    decisions = {key: setting.decision for key, setting in kept.items()}
    return FirstStart(decisions, machine if isinstance(machine, dict) else None, explicit)


def settings_of_run(folder: Path) -> dict[str, Any] | None:
    """Return the settings that change what a run learns; None if it was killed before it wrote any.

    They are in its newest checkpoint; before the first one, in its resolved.yaml with all others.
    """
    saved = saved_state(folder).get("learnt")
    return saved or {key: setting.value for key, setting in read_settings(folder).items()} or None


def decoding_as_begun(recipe: Recipe, begun_with: Mapping[str, Any]) -> Recipe:
    """Return the recipe with full decoding if the run began with it, as runs from before `auto` did."""
    key = "data.reduced_decode"
    if is_open(key, flatten(recipe)) and begun_with.get(key, False) is False:
        return with_values(recipe, {key: False})
    return recipe
