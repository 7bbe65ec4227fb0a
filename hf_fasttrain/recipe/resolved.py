"""All settings of a run after `auto` is resolved: value, origin and reason; for `check` and resolved.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_fasttrain.recipe.load import flatten, origin_of, recipe_text, tag_of
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import all_keys
from hf_fasttrain.run_folder.file_names import RECIPE_FILE, RESOLVED_FILE
from hf_fasttrain.run_folder.schemas import read_settings_file
from hf_fasttrain.utils.files import write_atomically
from hf_fasttrain.utils.yaml import write_yaml

KEPT = "as this run began"  # suffix of the reason if a resumed run keeps a value; in the files of older runs too
TUNED = "tuned on"  # prefix of the reason of a value from a stored tuning; in the files of older runs too
EXPLICIT = ("default", "recipe", "override")  # kinds of settings that no rule decided


@dataclass(frozen=True)
class Decision:
    """The resolved value of a key, and what decided it: a rule of `auto`, the launcher, a tuning, or the recipe."""

    value: Any
    reason: str = ""
    kind: str = "auto"  # auto, launcher, tuned; given: by the recipe or its default
    kept: bool = False  # taken over from the run's first start

    def keep(self) -> Decision:
        """Return the decision as a resumed run records it."""
        if self.kept:
            return self
        return replace(self, reason=f"{self.reason}, {KEPT}" if self.reason else KEPT, kept=True)


@dataclass(frozen=True)
class Setting:
    """One resolved value with its origin (as text and by kind) and the tag of its key."""

    value: Any
    origin: str
    tag: str  # result, speed, output; fact: not a key of the recipe
    kind: str  # default, recipe, override, auto, launcher, tuned, fact
    kept: bool = False

    @property
    def decision(self) -> Decision:
        """The setting as a decision that a later start of the run can keep."""
        _, _, reason = self.origin.partition(": ")
        return Decision(self.value, reason, "given" if self.kind in EXPLICIT else self.kind, self.kept)


@dataclass
class ResolvedSettings:
    """All resolved values of a run, and notes about them for the user."""

    recipe: Recipe
    decisions: dict[str, Decision] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weight_notes: list[str] = field(default_factory=list)  # on the pretrained weights; not shown on resume
    launched: bool = False  # started by accelerate launch or torchrun

    def is_open(self, key: str) -> bool:
        """Return whether the recipe leaves a key to `auto`."""
        return is_open(key, flatten(self.recipe))

    def is_decided(self, key: str) -> bool:
        """Return whether a key has a value already, so that no rule is needed."""
        return key in self.decisions or not self.is_open(key)

    def record(self, key: str, value: Any, reason: str = "") -> Any:
        """Record and return the value of a key with its reason; its kind is auto if the recipe leaves the key open."""
        self.decisions[key] = Decision(value, reason, "auto" if self.is_open(key) else "given")
        return value

    def refine(self, key: str, value: Any, reason: str) -> Any:
        """Replace a recorded value by a more exact one; its kind and reason stay."""
        recorded = self.decisions.get(key)
        if recorded is None:
            return self.record(key, value, reason)
        self.decisions[key] = replace(recorded, value=value)
        return value

    def note(self, text: str) -> None:
        """Record a note that is shown to the user once."""
        self.notes.append(text)

    def all(self) -> dict[str, Setting]:
        """Return every key of the recipe with its resolved value, and further recorded facts."""
        settings = {}
        for key, value in flatten(self.recipe).items():
            origin = origin_of(self.recipe, key)
            decision = self.decisions.get(key, Decision(value, kind="given"))
            kind = origin if decision.kind == "given" else decision.kind
            text = f"{origin}: {decision.reason}" if decision.reason else origin
            settings[key] = Setting(decision.value, text, tag_of(key), kind, decision.kept)
        for key, decision in self.decisions.items():
            if key not in settings:
                settings[key] = Setting(decision.value, decision.reason, "fact", "fact")
        return settings

    def result_settings(self) -> dict[str, Any]:
        """Return the values that change what is learned, which must be the same when a run is resumed.

        Without the duration, which may become longer, and without the location of the dataset: its fingerprint is
        compared. The warmup is compared as the recipe has it: its steps change with the duration.
        """
        may_change = (
            "train.duration",
            "evaluate.every",
            "evaluate.start",
            "data.dataset",
            "data.config",
            "data.revision",
            "data.inventory",
        )
        values = {key: setting.value for key, setting in self.all().items() if setting.tag == "result"}
        values = {key: value for key, value in values.items() if key not in may_change}
        return {**values, "schedule.warmup": flatten(self.recipe)["schedule.warmup"]}


def is_open(key: str, values: Mapping[str, Any]) -> bool:
    """Return whether a recipe, flattened to `values`, leaves a key to `auto`."""
    if key == "accelerate.micro_batch_size":
        return values[key] is None and values["accelerate.gradient_accumulation_steps"] == "auto"
    return bool(values.get(key) == "auto")


def write_settings(folder: Path, settings: ResolvedSettings) -> None:
    """Write recipe.yaml (see `recipe_text`) and resolved.yaml: every setting with origin and tag. Raises OSError."""
    write_atomically(folder / RECIPE_FILE, recipe_text(settings.recipe))
    described = {key: _as_yaml(setting) for key, setting in settings.all().items()}
    write_atomically(folder / RESOLVED_FILE, write_yaml(described))


def _as_yaml(setting: Setting) -> dict[str, Any]:
    values = asdict(setting)
    if not setting.kept:
        del values["kept"]
    return values


def read_settings(folder: Path) -> dict[str, Setting]:
    """Return the settings in resolved.yaml, also of older versions; an empty dict if it can't be read."""
    try:
        entries = read_settings_file(folder / RESOLVED_FILE)
    except (OSError, ValueError):
        return {}
    return {key: _read_setting(key, values) for key, values in entries.items()}


def _read_setting(key: str, values: dict[str, Any]) -> Setting:
    origin, tag = str(values.get("origin", "")), str(values.get("tag", "fact"))
    if "kind" not in values:
        return _read_old_setting(key, values.get("value"), origin, tag)
    return Setting(values.get("value"), origin, tag, str(values["kind"]), values.get("kept") is True)


def _read_old_setting(key: str, value: Any, origin: str, tag: str) -> Setting:
    """Return a setting of an older file, which has no kinds (its texts tell them) and the tags learnt and machine."""
    source, _, reason = origin.partition(": ")
    tag = _tag_by_old_name(key, tag)
    if source not in EXPLICIT:
        return Setting(value, origin, tag, "fact")
    kept = reason.endswith(KEPT)
    if reason.startswith(TUNED):
        kind = "tuned"
    else:
        kind = "auto" if reason and source == "default" and reason != KEPT else source
    return Setting(value, origin, tag, kind, kept)


def _tag_by_old_name(key: str, tag: str) -> str:
    if tag == "machine":
        return "output" if key in set(all_keys()) and tag_of(key) == "output" else "speed"
    return "result" if tag == "learnt" else tag
