"""The recipe that `init` writes: values of a shipped recipe, changed by the rules, with comments."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_fasttrain.from_recipe.auto import Choice
from hf_fasttrain.models.cached_weights import cached_timm_models, has_published_weights, is_on_this_machine
from hf_fasttrain.models.model import timm_name
from hf_fasttrain.models.weights import architecture_of, weights_file
from hf_fasttrain.recipe.load import load_recipe, parse_recipe
from hf_fasttrain.recipe.messages import flow_text
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.run_folder.folder import run_files_in
from hf_fasttrain.study import init_rules as rules
from hf_fasttrain.study.init_survey import Machine, Survey
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import ModelError, shortened
from hf_fasttrain.utils.format import format_command


@dataclass(frozen=True)
class Weights:
    """The model of the recipe, and where its weights are."""

    name: Choice
    pretrained: Choice
    line: str  # for people
    is_here: bool  # whether the recipe can be trained without a network


@dataclass
class Draft:
    """A recipe in the making: its values, and the comments beside them."""

    base: Choice
    tree: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)  # by dotted key
    suggestions: Sequence[rules.Suggestion] = ()

    def reason(self, key: str) -> str:
        """Return the reason for a key's value, or for a value in it; "" if it is the shipped recipe's."""
        return next((why for known, why in self.reasons.items() if f"{known}.".startswith(f"{key}.")), "")

    def set(self, key: str, choice: Choice | None) -> None:
        """Set a key to what a rule has chosen, if it has."""
        if choice is None:
            return
        *above, name = key.split(".")
        section = self.tree
        for part in above:
            section = section.setdefault(part, {})
        section[name] = choice.value
        self.reasons[key] = choice.reason


def find_weights(machine: Machine, model: str | None, file: str | None) -> Weights:
    """Return the model and its weights: as given, or by the rules. Raises ModelError for one that does not exist."""
    if file is not None:
        return _weights_of_file(file, model)
    cached = cached_timm_models()
    name = rules.model_name(cores=machine.cores, gpu=bool(machine.gpu), there=cached)
    if model is not None:
        name = Choice(model, "given by --model")
    if not model or not model.startswith("transformers:"):
        timm_name(name.value)  # raises an error with the nearest name
    if not has_published_weights(name.value):
        line = f"{name.value}: none are published; it starts at random"
        return Weights(name, Choice(False, "no weights are published for this model"), line, is_here=True)
    if is_on_this_machine(name.value):
        where = "on this machine" if Path(name.value).exists() else "in the local cache of the Hub"
        return Weights(name, Choice(True, where), f"{name.value}: {where}", is_here=True)
    others = [other for other in cached if other != name.value]
    also = f" In the cache are those of {shortened(others, 6)}." if others else ""
    reason = "not on this machine: the first run downloads them; or write the path of a .safetensors file"
    line = f"{name.value}: not on this machine, the first run downloads them; --weights FILE takes a file.{also}"
    return Weights(name, Choice(True, reason), line, is_here=False)


def _weights_of_file(file: str, model: str | None) -> Weights:
    import timm

    path = weights_file(file)
    name = model or architecture_of(file, path)
    if name is None:
        likely = path.stem if timm.is_model(path.stem) else "efficientnet_b0"
        raise ModelError(
            f"--weights {one_line(file)}: nothing beside it says which model these weights are of; add --model NAME, "
            f"such as --model {likely}"
        )
    reason = "given by --model" if model else "of these weights"
    return Weights(Choice(name, reason), Choice(file, "given by --weights"), f"{name}: {one_line(file)}", is_here=True)


def draft(data: Survey, machine: Machine, weights: Weights, *, run: str) -> Draft:
    """Return the recipe by the rules; `run` is the run folder."""
    name = weights.name.value
    base = rules.base_recipe(images=data.images, model=name)
    tree = load_recipe(base.value).model_dump(mode="json", exclude_unset=True)
    recipe = Draft(base, tree)
    _remove_unsuitable(tree, weights)
    recipe.set("output_dir", Choice(run, ""))
    recipe.set("model.name", weights.name)
    recipe.set("model.pretrained", weights.pretrained)
    recipe.set("data.dataset", Choice(data.dataset, ""))
    facts = rules.Facts(
        images=data.images,
        held_out=len(data.splits) == 1,
        test_split=data.test_split,
        short_side=data.short_side,
        imbalance=data.imbalance,
        multi_label=data.multi_label,
        is_weak_machine=rules.is_weak_machine(cores=machine.cores, gpu=bool(machine.gpu)),
        usual_image_size=tree["data"]["image_size"],
        usual_batch_size=tree["train"]["batch_size"],
        fixed_image_size=_fixed_size(name),
    )
    for key, rule in rules.RULES.items():
        recipe.set(key, rule(facts))
    recipe.suggestions = rules.suggestions(facts)
    return recipe


def _remove_unsuitable(tree: dict[str, Any], weights: Weights) -> None:
    """Remove settings of a shipped recipe that are not for this model, or not without pretrained weights."""
    name: str = weights.name.value
    takes_drop_path = "efficientnet" in name or rules.is_transformer(name)
    if not takes_drop_path or name.startswith("transformers:"):
        tree["model"].pop("drop_path", None)
    if weights.pretrained.value is False:
        for section, key in (
            ("optimizer", "backbone_lr_scale"),
            ("optimizer", "layer_decay"),
            ("train", "probe_first"),
        ):
            tree[section].pop(key, None)


def _fixed_size(name: str) -> int | None:
    """Return the image size that a timm model is built for, None if it takes others."""
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix("timm/")) if not name.startswith("transformers:") else None
    return config.input_size[-1] if config is not None and config.fixed_input_size else None


def text_of(recipe: Draft, header: Sequence[str]) -> str:
    """Return the recipe as YAML with its comments; each line of the header becomes one."""
    lines = [f"# {one_line(line)}" for line in header]
    for section, values in recipe.tree.items():
        if not isinstance(values, Mapping):
            lines.append(_line("", section, values, recipe.reasons.get(section, "")))
            continue
        lines.append(f"{section}:")
        for name, value in values.items():
            lines.append(_line("  ", name, value, recipe.reason(f"{section}.{name}")))
        lines += [f"  # {each.text}  # {each.reason}" for each in recipe.suggestions if _section(each) == section]
    return "\n".join(lines) + "\n"


def _line(indent: str, name: str, value: Any, reason: str) -> str:
    return f"{indent}{name}: {flow_text(value)}" + (f"  # {one_line(reason)}" if reason else "")


def _section(suggestion: rules.Suggestion) -> str:
    return suggestion.key.partition(".")[0]


def header_of(data: Survey, *, command: str, facts: Mapping[str, Sequence[str]], base: str) -> list[str]:
    """Return the lines at the top of the recipe; `facts` are lines by topic."""
    written = datetime.now(UTC).date().isoformat()
    lines = [f"Trains a classifier on {data.dataset}; written by `{command}` on {written}."]
    for topic, texts in facts.items():
        lines += [f"{topic if number == 0 else '':<9} {text}" for number, text in enumerate(texts)]
    lines.append(
        f"Keys without a reason have the values of the recipe {base}. `hf-fasttrain explain KEY` explains each key."
    )
    return lines


def free_run_folder(name: str) -> str:
    """Return runs/NAME, numbered if it holds a run."""
    folders = (f"runs/{name}{'' if number == 1 else f'_{number}'}" for number in itertools.count(1))
    return next(folder for folder in folders if not run_files_in(Path(folder)))


def next_commands(path: Path, run: str) -> list[tuple[str, str]]:
    """Return (command, what it does) of what to do next."""
    probe = free_run_folder(f"{Path(run).name}_probe")
    return [
        (format_command("check", path), "validates it and shows every value"),
        (format_command("probe", path, f"output_dir={probe}"), "fits only the head: a first result in one pass"),
        (format_command(path), "trains"),
    ]


def checked(text: str, path: Path) -> Recipe:
    """Return the recipe of a text, as it will be read from `path`."""
    return parse_recipe(text, where=str(path), name=path.stem)
