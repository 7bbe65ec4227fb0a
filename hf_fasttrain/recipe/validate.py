"""Validation: a recipe's tree of values to a checked `Recipe`, and every mistake in it as a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from hf_fasttrain.recipe.conflicts import conflicts
from hf_fasttrain.recipe.fields import POLICY_PATTERN
from hf_fasttrain.recipe.messages import Item, describe, how_to_write, joined, proposals, takes, value_text
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.clean import holds_control_character
from hf_fasttrain.utils.errors import closest, shortened, shown

MAX_EXPLAINED = 100  # unknown keys; looking for names like theirs takes a millisecond each
MAX_NUMBER = 1e15  # of all keys but the seed
MAX_PROPOSED = 100  # characters of a value to write
Tree = dict[str, Any]
KeyPath = tuple[str, ...]

# Other tools' names of settings, where the spelling alone does not lead to ours.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "epochs": "train.duration",
    "num_epochs": "train.duration",
    "num_train_epochs": "train.duration",
    "max_steps": "train.duration",
    "per_device_train_batch_size": "accelerate.micro_batch_size",
    "num_workers": "data.workers",
    "amp": "accelerate.mixed_precision",
    "fp16": "accelerate.mixed_precision",
    "bf16": "accelerate.mixed_precision",
    "scheduler": "schedule.name",
    "lr_scheduler": "schedule.name",
    "max_grad_norm": "optimizer.clip_norm",
    "clip_grad": "optimizer.clip_norm",
    "report_to": "log.trackers",
    "img_size": "data.image_size",
    "num_classes": "data.label_column",
    "train_img_size": "data.train_size",
    "train_crop_size": "data.train_size",
    "bce_loss": "train.bce",
    "max_train_samples": "train.max_images",
    "max_eval_samples": "evaluate.max_images",
    "limit_train_batches": "train.max_images",
    "limit_val_batches": "evaluate.max_images",
    "eval_delay": "evaluate.start",
    "gradient_clip_val": "optimizer.clip_norm",
    "aa": "augment.auto",
    "auto_augment": "augment.auto",
    "hflip": "augment.flip",
    "reprob": "augment.erase",
    "remode": "augment.erase_fill",
    "smoothing": "augment.label_smoothing",
    "mixup_off_epoch": "augment.mixup_until",
    "sched": "schedule.name",
    "warmup_lr": "schedule.start_ratio",
    "decay_milestones": "schedule.milestones",
    "patience_epochs": "schedule.patience",
    "resume": "--resume",
}
NULLABLE = {"ema", "early_stopping", "hub", "output_dir"}
# Replace required values that are missing or wrong, so that conflicts elsewhere are still found.
PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "model": {"name": "?"},
    "data": {"dataset": "?"},
    "train": {"duration": "1000000 epochs", "batch_size": 10**9},
}


def check_tree(
    tree: Tree,
    metrics: Collection[str] | None = (),
    is_override: Callable[[KeyPath], bool] = lambda key: False,
) -> tuple[Recipe | None, list[tuple[KeyPath, str]]]:
    """Return the recipe of a tree, None if there are mistakes, and all mistakes as (key, what is wrong).

    `metrics` may be watched beside those of evaluate.metrics; None: any. `is_override` tells whether a key's value is
    an override, for messages that say what to write.
    """
    mistakes: list[tuple[KeyPath, str]] = []
    recipe: Recipe | None = None
    # A section with every key commented out is null in YAML; unless null has a meaning there, it counts as empty.
    tree = {key: value for key, value in tree.items() if value is not None or key in NULLABLE}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        mistakes = _explain(error, tree, is_override)
        recipe = _without_mistakes(tree, [key for key, _ in mistakes])
    mistakes += [(key, f"holds a control character: {shown(text)}") for key, text in _control_characters(tree)]
    named = {key for key, _ in mistakes}
    mistakes += [(key, what) for key, what in _extreme_numbers(tree) if key not in named]
    if recipe is not None:
        mistakes += [(tuple(key.split(".")), what) for key, what in conflicts(recipe, metrics)]
    return (None if mistakes else recipe), mistakes


def _leaves(tree: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the values in mappings and lists with their keys; those of a list have its key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, (*key, str(name)))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, key)
    else:
        yield key, tree


def _control_characters(tree: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield texts that no path and no name can hold, with their keys."""
    for key, value in _leaves(tree):
        if isinstance(value, str) and holds_control_character(value):
            yield key, value


def _extreme_numbers(tree: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield what is wrong with numbers with which any calculation would overflow, with their keys."""
    for key, value in _leaves(tree):
        if isinstance(value, int | float) and MAX_NUMBER < abs(value) < math.inf and key != ("seed",):
            yield key, f"holds {value_text(value)}; numbers are at most {MAX_NUMBER:g}"


def _without_mistakes(tree: Tree, keys: list[KeyPath]) -> Recipe | None:
    pruned = _without(tree, keys)
    for section, values in PLACEHOLDERS.items():
        written = pruned.get(section)
        pruned[section] = {**values, **(written if isinstance(written, dict) else {})}
    try:
        return Recipe.model_validate(pruned)
    except ValidationError:
        return None


def _explain(error: ValidationError, tree: Tree, is_override: Callable[[KeyPath], bool]) -> list[tuple[KeyPath, str]]:
    texts: dict[KeyPath, list[str]] = {}
    wrong: dict[KeyPath, list[Item]] = {}
    items = error.errors(include_url=False)
    unknown = [_field_path(item["loc"]) for item in items if item["type"] == "extra_forbidden"][:MAX_EXPLAINED]
    meant = {key for name in unknown for key in keys_meant(".".join(name))}
    for item in items:
        key = _field_path(item["loc"])
        found = texts.setdefault(key, [])
        if item["type"] == "extra_forbidden":
            found.append(_unknown_key(key) if key in unknown else "is not a key of a recipe")
        elif item["type"] != "missing":
            wrong.setdefault(key, []).append(item)
        elif not any(f"{name}.".startswith(f"{'.'.join(key)}.") for name in meant):  # else it is there, misspelt
            found.append(f"is missing; it is {_description(key)}")
    for key, of_key in wrong.items():
        texts[key] = [_wrong_value(key, of_key, tree, as_override=is_override(key))]
    return [(key, "; ".join(parts)) for key, parts in texts.items() if parts]


def _wrong_value(key: KeyPath, items: list[Item], tree: Tree, *, as_override: bool) -> str:
    parent, section, name = model_at(key[:-1]), model_at(key), ".".join(key)
    value, is_written = _value_at(tree, key)
    if parent is None or not is_written or key[-1] not in parent.model_fields:
        return str(items[0]["msg"])
    field = parent.model_fields[key[-1]]
    it_is = "; it is a section" if section is not None else ""
    if isinstance(value, str) and section is not None and key[0] == "augment" and re.match(POLICY_PATTERN, value):
        return f"is '{value}'{it_is}; timm's policies are set by augment.auto={value}"
    for right in proposals(name, value, section) if len(str(value)) <= MAX_PROPOSED else ():
        if takes(parent, {key[-1]: right}) or isinstance(right, dict):
            write = how_to_write(name, right, as_override=as_override, each_key=field.default is not None)
            return f"is {value_text(value)}{it_is}: write {write}"
    return describe(value, items, field, section)


def _value_at(tree: Tree, key: KeyPath) -> tuple[Any, bool]:
    """Return the value of a key in a tree, and whether it has one there."""
    node: Any = tree
    for part in key:
        if not isinstance(node, dict) or part not in node:
            return None, False
        node = node[part]
    return node, bool(key)


def _field_path(loc: tuple[int | str, ...]) -> KeyPath:
    """Return the recipe's keys at the start of a pydantic location, which continues with union members."""
    path: list[str] = []
    model: type[BaseModel] | None = Recipe
    for number, part in enumerate(loc):
        if model is None or not isinstance(part, str):
            break
        if part in model.model_fields:
            path.append(part)
            model = _section_of(model.model_fields[part].annotation)
        elif number == len(loc) - 1 or not _is_union_member(part, model):
            path.append(part)
            break
    return tuple(path)


def _is_union_member(part: str, section: type[BaseModel]) -> bool:
    return part == section.__name__ or part.startswith(("function-", "literal["))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def model_at(key: KeyPath) -> type[BaseModel] | None:
    """Return the section of the recipe that a key path leads to, None if there is none."""
    model: type[BaseModel] | None = Recipe
    for part in key:
        field = model.model_fields.get(part) if model else None
        model = _section_of(field.annotation) if field else None
    return model


def is_allowed(key: str, value: Any) -> bool:
    """Return whether a recipe may have a value for a dotted key; False for an unknown key."""
    *above, name = key.split(".")
    section = model_at(tuple(above))
    field = section.model_fields.get(name) if section else None
    if field is None:
        return False
    form: Any = Annotated[field.annotation, field]  # the field's bounds are not part of its annotation
    try:
        TypeAdapter(form).validate_python(value)
    except ValidationError:
        return False
    return True


def _description(key: KeyPath) -> str:
    above = model_at(key[:-1])
    field = above.model_fields.get(key[-1]) if above and key else None
    if field is None:
        return ""
    section = _section_of(field.annotation)
    return field.description or (f"a section with {shortened(section.model_fields)}" if section else "")


def _unknown_key(key: KeyPath) -> str:
    name, section, above = ".".join(key), model_at(key[:-1]), ".".join(key[:-1])
    siblings = list(section.model_fields) if section else []
    if (before := re.split(r"[:\s]", key[-1])[0]) != key[-1] and before in siblings:
        return f"is not a key of a recipe: after '{before}' a colon and a space are missing, as in {before}: VALUE"
    if hint := hint_for(name):
        return f"is not a key of a recipe.{hint} `hf-fasttrain explain{above and f' {above}'}` lists the keys"
    return f"is not a key of a recipe. Known here: {shortened(siblings, 30)}"


def hint_for(name: str) -> str:
    """Return " Did you mean ...?" for a dotted name that is not a key; "" if nothing is like it."""
    meant = [f"'{key}'" for key in keys_meant(name)]
    if meant and "." in name and "." not in meant[0]:
        return f" Did you mean {meant[0]}, outside of '{name.rpartition('.')[0]}'?"
    return f" Did you mean {joined(meant)}?" if meant else ""


def keys_meant(name: str) -> list[str]:
    """Return the dotted keys that a dotted name which is none most likely stands for, at most three."""
    above, _, last = name.rpartition(".")
    section = model_at(tuple(above.split("."))) if above else Recipe
    if last in OTHER_NAMES:
        return [OTHER_NAMES[last]]
    everywhere = {key: key.rpartition(".")[2] for key in (*Recipe.model_fields, *all_keys())}
    if same := [key for key, end in everywhere.items() if end == last]:
        return same[:3]
    siblings = list(section.model_fields) if section else []
    if near := closest(last, siblings):
        return [f"{above}.{near[0]}" if above else near[0]]
    near = closest(last, everywhere.values(), cutoff=0.75)
    return [key for key, end in everywhere.items() if end in near[:1]][:3]


def all_keys(model: type[BaseModel] = Recipe, above: str = "") -> Iterator[str]:
    """Yield every dotted key that a recipe may hold."""
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is None:
            yield above + name
        else:
            yield from all_keys(section, f"{above}{name}.")


def _without(tree: Tree, keys: list[KeyPath]) -> Tree:
    def copy(node: Any, above: KeyPath) -> Any:
        if not isinstance(node, dict):
            return node
        kept = {k: v for k, v in node.items() if (*above, str(k)) not in keys}
        return {k: copy(v, (*above, str(k))) for k, v in kept.items()}

    return copy(tree, ())
