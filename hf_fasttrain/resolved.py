"""What a recipe's wishes became: resolved values with their origins, for `check`, resolved.yaml and result.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hf_fasttrain.files import write_whole
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.recipe_file import flatten, origin_of, recipe_as_asked, tag_of, to_yaml

RESOLVED_FILE = "resolved.yaml"


@dataclass(frozen=True)
class Setting:
    """One resolved value, where it came from, and whether it is learnt or machine."""

    value: Any
    origin: str
    tag: str


@dataclass
class ResolvedSettings:
    """All resolved values of a run, and what has to be said about them."""

    recipe: Recipe
    resolved: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weight_notes: list[str] = field(default_factory=list)  # on those that training starts from; a checkpoint's go first
    launched: bool = False  # by accelerate launch or torchrun

    def resolve(self, key: str, value: Any, why: str) -> Any:
        """Record and return what a wish became; `why` is the rule that decided it."""
        self.resolved[key] = (value, why)
        return value

    def why(self, key: str, rule: str) -> str:
        """Return the reason recorded for a key, or a new one."""
        return self.resolved[key][1] if key in self.resolved else rule

    def note(self, text: str) -> None:
        """Record something that the user should be told once."""
        self.notes.append(text)

    def all(self) -> dict[str, Setting]:
        """Return every key of the recipe with its resolved value, and settings beyond the recipe."""
        settings = {}
        for key, asked in flatten(self.recipe).items():
            origin = origin_of(self.recipe, key)
            value, why = self.resolved.get(key, (asked, ""))
            settings[key] = Setting(value, f"{origin}: {why}" if why else origin, tag_of(key))
        for key, (value, why) in self.resolved.items():
            if key not in settings:
                settings[key] = Setting(value, why, "fact")
        return settings

    def learnt(self) -> dict[str, Any]:
        """Return the learnt values, which must be the same when a run is resumed.

        Without the duration, which may become longer, and without where the data set lies: its fingerprint counts.
        Of the warmup what was asked counts: its steps change with the duration.
        """
        may_change = ("train.duration", "evaluate.every", "data.dataset", "data.config", "data.revision")
        learnt = {key: fact.value for key, fact in self.all().items() if fact.tag == "learnt" and key not in may_change}
        return {**learnt, "schedule.warmup": flatten(self.recipe)["schedule.warmup"]}


# --- resolved.yaml -------------------------------------------------------------------------------------------


def write_settings(folder: Path, settings: ResolvedSettings) -> None:
    """Write recipe.yaml, as the user wrote it, and resolved.yaml: every value, where it came from, and its tag.

    Raises OSError.
    """
    write_whole(folder / "recipe.yaml", recipe_as_asked(settings.recipe))
    described = {key: asdict(setting) for key, setting in settings.all().items()}
    write_whole(folder / RESOLVED_FILE, to_yaml(described))


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what resolved.yaml says: key -> value, origin and tag; nothing if it can't be read."""
    try:
        return YAML(typ="safe", pure=True).load((folder / RESOLVED_FILE).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, YAMLError):
        return {}
