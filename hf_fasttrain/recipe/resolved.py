"""Every setting of a run after `auto` is decided: its value, who decided it and why; for `check` and resolved.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hf_fasttrain.recipe.load import flatten, origin_of, recipe_text, tag_of, to_yaml
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import all_keys
from hf_fasttrain.utils.files import write_atomically

RESOLVED_FILE = "resolved.yaml"
KEPT = "as this run began"  # ends the reason of a setting that a resumed run keeps
TUNED = "tuned on"  # begins the reason of a setting that a stored tuning decides
GIVEN = ("default", "recipe", "override")  # kinds of settings that nobody had to decide


@dataclass(frozen=True)
class Decision:
    """What became of a key, and who decided it: a rule of `auto`, the launcher, a stored tuning, or nobody (given)."""

    value: Any
    reason: str = ""
    kind: str = "auto"  # auto, launcher, tuned, given
    kept: bool = False  # from the run's first start

    def keep(self) -> Decision:
        """Return the decision as a resumed run has it."""
        if self.kept:
            return self
        return replace(self, reason=f"{self.reason}, {KEPT}" if self.reason else KEPT, kept=True)


@dataclass(frozen=True)
class Setting:
    """One resolved value, where it came from in words and by kind, and what the key decides."""

    value: Any
    origin: str
    tag: str  # result, speed, output; fact for what is no key of a recipe
    kind: str  # default, recipe, override, auto, launcher, tuned, fact
    kept: bool = False

    @property
    def decision(self) -> Decision:
        """The setting as a decision that another start of the run can keep."""
        _, _, reason = self.origin.partition(": ")
        return Decision(self.value, reason, "given" if self.kind in GIVEN else self.kind, self.kept)


@dataclass
class ResolvedSettings:
    """All resolved values of a run, and what has to be said about them."""

    recipe: Recipe
    decisions: dict[str, Decision] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weight_notes: list[str] = field(default_factory=list)  # on those that training starts from; a checkpoint's go first
    launched: bool = False  # by accelerate launch or torchrun

    def is_open(self, key: str) -> bool:
        """Return whether the recipe leaves a key to `auto`."""
        return is_open(key, flatten(self.recipe))

    def is_decided(self, key: str) -> bool:
        """Return whether no rule has to decide a key any more."""
        return key in self.decisions or not self.is_open(key)

    def record(self, key: str, value: Any, reason: str = "") -> Any:
        """Record and return what became of a key, by a rule if the recipe leaves it to `auto`, and why."""
        self.decisions[key] = Decision(value, reason, "auto" if self.is_open(key) else "given")
        return value

    def refine(self, key: str, value: Any, reason: str) -> Any:
        """Record a value that is known better now; who decided the key before, and why, stays."""
        earlier = self.decisions.get(key)
        if earlier is None:
            return self.record(key, value, reason)
        self.decisions[key] = replace(earlier, value=value)
        return value

    def note(self, text: str) -> None:
        """Record something that the user should be told once."""
        self.notes.append(text)

    def all(self) -> dict[str, Setting]:
        """Return every key of the recipe with its resolved value, and what else was found out."""
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

    def deciding_results(self) -> dict[str, Any]:
        """Return the values that decide what is learned, which must be the same when a run is resumed.

        Without the duration, which may become longer, and without where the data set lies: its fingerprint counts.
        Of the warmup the recipe's words count: its steps change with the duration.
        """
        may_change = ("train.duration", "evaluate.every", "data.dataset", "data.config", "data.revision")
        values = {key: found.value for key, found in self.all().items() if found.tag == "result"}
        values = {key: value for key, value in values.items() if key not in may_change}
        return {**values, "schedule.warmup": flatten(self.recipe)["schedule.warmup"]}


def is_open(key: str, values: Mapping[str, Any]) -> bool:
    """Return whether a recipe, flattened to `values`, leaves a key to `auto`."""
    if key == "accelerate.micro_batch_size":
        return values[key] is None and values["accelerate.gradient_accumulation_steps"] == "auto"
    return bool(values.get(key) == "auto")


# --- resolved.yaml -------------------------------------------------------------------------------------------


def write_settings(folder: Path, settings: ResolvedSettings) -> None:
    """Write recipe.yaml, as the user wrote it, and resolved.yaml: every setting, where it came from, and its tag.

    Raises OSError.
    """
    write_atomically(folder / "recipe.yaml", recipe_text(settings.recipe))
    described = {key: _as_yaml(setting) for key, setting in settings.all().items()}
    write_atomically(folder / RESOLVED_FILE, to_yaml(described))


def _as_yaml(setting: Setting) -> dict[str, Any]:
    values = asdict(setting)
    if not setting.kept:
        del values["kept"]
    return values


def read_settings(folder: Path) -> dict[str, Setting]:
    """Return what resolved.yaml says, also one of an older version; nothing if it can't be read."""
    try:
        found = YAML(typ="safe", pure=True).load((folder / RESOLVED_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): _read_setting(str(key), values) for key, values in found.items() if isinstance(values, dict)}


def _read_setting(key: str, values: dict[str, Any]) -> Setting:
    origin, tag = str(values.get("origin", "")), str(values.get("tag", "fact"))
    if "kind" not in values:
        return _read_old_setting(key, values.get("value"), origin, tag)
    return Setting(values.get("value"), origin, tag, str(values["kind"]), values.get("kept") is True)


def _read_old_setting(key: str, value: Any, origin: str, tag: str) -> Setting:
    """Return a setting of a file without kinds, which only its words tell, and with the tags learnt and machine."""
    given, _, reason = origin.partition(": ")
    tag = _tag_by_old_name(key, tag)
    if given not in GIVEN:
        return Setting(value, origin, tag, "fact")
    kept = reason.endswith(KEPT)
    if reason.startswith(TUNED):
        kind = "tuned"
    else:
        kind = "auto" if reason and given == "default" and reason != KEPT else given
    return Setting(value, origin, tag, kind, kept)


def _tag_by_old_name(key: str, tag: str) -> str:
    if tag == "machine":
        return "output" if key in set(all_keys()) and tag_of(key) == "output" else "speed"
    return "result" if tag == "learnt" else tag
