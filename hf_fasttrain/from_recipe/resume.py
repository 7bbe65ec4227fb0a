"""What `auto` decided when a run began, read back where the run is resumed: the same rounding, the same split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fasttrain.from_recipe.accelerator import user_threads
from hf_fasttrain.from_recipe.auto import MACHINE
from hf_fasttrain.from_recipe.tunings import COMPUTE_KEYS, Presets, machine_here
from hf_fasttrain.recipe.load import flatten, plain
from hf_fasttrain.recipe.resolved import RESOLVED_FILE, Decision, ResolvedSettings, is_open, read_settings
from hf_fasttrain.recipe.schema import Recipe

MICRO, THREADS, EVAL_BATCH = "accelerate.micro_batch_size", "accelerate.cpu_threads", "evaluate.batch_size"
SHARED_KEYS = (MICRO, EVAL_BATCH, THREADS)  # what depends on the number of processes
KEPT_KEYS = (*COMPUTE_KEYS, *SHARED_KEYS)


@dataclass(frozen=True)
class FirstStart:
    """What the machine settings of a run were when it began, why, and on which machine."""

    decisions: dict[str, Decision]
    machine: dict[str, Any] | None  # None: of a version that did not write it down
    given: frozenset[str] = frozenset()  # keys that the recipe gave

    def kept(self, recipe: Recipe) -> Presets | None:
        """Return the values that hold on, without those that the user gives now; None on another machine.

        Where the run did not write its machine down, they are those of a stored tuning.
        """
        if self._is_elsewhere():
            return None
        shared = set(SHARED_KEYS) if self._differs("processes") else set()
        keys = self._tuned() if self.machine is None else set(self.decisions) - shared
        if not is_open(MICRO, flatten(recipe)) or MICRO not in keys:
            keys.discard(EVAL_BATCH)  # it follows from the micro-batch
        if THREADS in keys - self._tuned() and user_threads():
            keys.discard(THREADS)  # a stored tuning goes before OMP_NUM_THREADS, a rule does not
        return Presets({key: self.decisions[key].keep() for key in sorted(keys)})

    def note_changes(self, settings: ResolvedSettings) -> None:
        """Say what is no longer as it was when the run began, though the recipe does not give it."""
        if self.machine is None:
            return
        values, now = flatten(settings.recipe), settings.all()
        left = {key: d.value for key, d in self.decisions.items() if is_open(key, values)}
        still = [
            f"{key}={plain(value)}" for key, value in left.items() if key in self.given and now[key].value == value
        ]
        if still:
            settings.note(f"kept as this run began, though the recipe no longer gives it: {', '.join(still)}")
        changed = [
            f"{key}={plain(now[key].value)} ({plain(value)} before)"
            for key, value in left.items()
            if now[key].value != value
        ]
        here = machine_here()
        differs = [f"{name} {self.machine.get(name)}, now {here[name]}" for name in here if self._differs(name)]
        if differs:
            anew = "what `auto` decides is" if self._is_elsewhere() else "micro-batch and threads are"
            outcome = ", ".join(changed) or "all as it was"
            settings.note(f"this run began elsewhere ({'; '.join(differs)}): {anew} decided anew: {outcome}")
        elif changed:
            settings.note(f"not as this run began, since the launcher or OMP_NUM_THREADS says so: {', '.join(changed)}")

    def _tuned(self) -> set[str]:
        return {key for key, decision in self.decisions.items() if decision.kind == "tuned"}

    def _differs(self, name: str) -> bool:
        return self.machine is not None and self.machine.get(name) != machine_here()[name]

    def _is_elsewhere(self) -> bool:
        return any(self._differs(name) for name in machine_here() if name != "processes")


def read_first_start(folder: Path) -> FirstStart | None:
    """Return what a run's resolved.yaml says of how it began, None if there is none."""
    if not (folder / RESOLVED_FILE).exists():
        return None
    found = read_settings(folder)
    decided = {key: s for key, s in found.items() if key in KEPT_KEYS or s.kind == "tuned"}
    decided = {key: setting for key, setting in sorted(decided.items()) if setting.value not in (None, "auto")}
    machine = found[MACHINE].value if MACHINE in found else None
    given = frozenset(key for key, setting in decided.items() if setting.kind in ("recipe", "override"))
    decisions = {key: setting.decision for key, setting in decided.items()}
    return FirstStart(decisions, machine if isinstance(machine, dict) else None, given)
