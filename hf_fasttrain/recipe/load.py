"""Loading of recipes: YAML and overrides to a checked `Recipe`, with all mistakes in one message; and back to YAML."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hf_fasttrain.recipe.find import find_recipe
from hf_fasttrain.recipe.messages import flow_text, how_to_write
from hf_fasttrain.recipe.overrides import apply_overrides, leaves
from hf_fasttrain.recipe.schema import Recipe, RecipeSource
from hf_fasttrain.recipe.validate import KeyPath, Tree, check_tree, model_at
from hf_fasttrain.run_folder.file_names import RECIPE_FILE
from hf_fasttrain.run_folder.result import is_built_in
from hf_fasttrain.utils.clean import cut, holds_secret, one_line
from hf_fasttrain.utils.errors import RecipeError, shown
from hf_fasttrain.utils.files import expand_user
from hf_fasttrain.utils.format import format_count
from hf_fasttrain.utils.remote import download_file, is_hub_url, parse_hub_url
from hf_fasttrain.utils.yaml import MAX_CHARACTERS, InvalidYaml, read_yaml, write_yaml

MAX_LISTED = 30  # mistakes in one message
# Keys of a pushed recipe that are not used here: where it was written, cached, logged and pushed to.
NOT_INHERITED = ("output_dir", "hub", "data.cache_dir", "log.trackers", "log.project")


def load_recipe(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    metrics: Collection[str] | None = (),
    without: Sequence[str] = (),
) -> Recipe:
    """Return the checked recipe of a file, a shipped recipe's name, hf://OWNER/NAME or a `Recipe`, with overrides.

    A run folder stands for its recipe.yaml with itself as output_dir. An override is `section.key=value`. `metrics` are
    names of the user's own that may be watched beside those of evaluate.metrics; None: any. Keys of the recipe that are
    in `without` are ignored. Raises RecipeError with all mistakes in one message.
    """
    if isinstance(recipe, Recipe):
        return _with_overrides(recipe, overrides, metrics) if overrides else recipe
    if is_hub_url(str(recipe)):
        loaded = _load_pushed(str(recipe), overrides, metrics, without)
    else:
        path, folder = find_recipe(str(recipe)), expand_user(recipe)
        name = path.resolve().parent.name if folder.is_dir() else path.stem
        options: dict[str, Any] = {"metrics": metrics, "without": without}
        loaded = parse_recipe(_read_file(path), overrides, where=str(path), name=name, **options)
        if path.parent == folder:
            loaded = _in_folder(loaded, folder)
    loaded._source = replace(loaded.source, argument=str(recipe))
    return loaded


def _in_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a run folder with that folder as output_dir, unless an override gives another one."""
    is_same = os.path.realpath(output_dir(recipe)) == os.path.realpath(folder)
    if is_same or origin_of(recipe, "output_dir") == "override":
        return recipe
    moved = with_values(recipe, {"output_dir": str(folder)})
    moved._source = replace(recipe.source, origins={**recipe.source.origins, "output_dir": "override"})
    return moved


def _read_file(path: Path) -> str:
    """Return a recipe file's text; of a device or an endless pipe no more than a recipe may have."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as text: {error}") from None


def _with_overrides(recipe: Recipe, overrides: Sequence[str], metrics: Collection[str] | None) -> Recipe:
    """Return a copy of a recipe with further overrides, checked as on the command line."""
    source, tree = recipe.source, recipe.model_dump(mode="json", exclude_unset=True)
    written = _Written(tree, dict(source.origins), f"recipe '{source.name}'")
    checked, origins = _checked(written, overrides, metrics)
    checked._source = replace(source, origins=origins, overrides=(*source.overrides, *overrides))
    return checked


def _load_pushed(
    url: str, overrides: Sequence[str], metrics: Collection[str] | None, without: Sequence[str] = ()
) -> Recipe:
    """Return the recipe of a pushed run, without the keys of NOT_INHERITED.

    Somebody else may have written it: settings that run code from the Hub are accepted only as overrides.
    """
    where, name = f"{url}, recipe.yaml", parse_hub_url(url)[0].split("/")[-1]
    text = _read_file(download_file(url, RECIPE_FILE))
    recipe = parse_recipe(text, overrides, where=where, name=name, without=(*NOT_INHERITED, *without), metrics=metrics)
    measured = recipe.evaluate.metrics
    runs_code = {
        "model.trust_remote_code": recipe.model.trust_remote_code,
        "evaluate.metrics": measured != "auto" and not all(map(is_built_in, measured)),
    }
    for key, runs in runs_code.items():
        if runs and origin_of(recipe, key) == "recipe":
            value = flatten(recipe)[key]
            override = how_to_write(key, value, as_override=True)
            raise RecipeError(
                f"{where}: {key}={flow_text(value)} runs code from the Hub; read that code first, then allow it by the "
                f"override {override}, or override it with another value"
            )
    return recipe


def parse_recipe(
    text: str,
    overrides: Sequence[str] = (),
    *,
    where: str,
    name: str,
    without: Sequence[str] = (),
    metrics: Collection[str] | None = (),
) -> Recipe:
    """Return the checked recipe of a YAML text; `where` names the text in messages, keys in `without` are ignored."""
    _require_no_token(text, where)
    tree, lines = _read_tree(text, where)
    removed = [_remove(tree, key) for key in without]
    if any(removed):
        text = ""  # the run's recipe.yaml is written from the values
    written = _Written(tree, dict.fromkeys(leaves(tree), "recipe"), where, lines)
    recipe, origins = _checked(written, overrides, metrics)
    recipe._source = RecipeSource(name, text, origins, tuple(overrides))
    return recipe


@dataclass(frozen=True)
class _Written:
    """A recipe as it was written, before overrides."""

    tree: Tree
    origins: dict[str, str]
    where: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def position(self, key: KeyPath) -> str:
        line = next((self.lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self.lines), None)
        return self.where if line is None else f"{self.where}, line {line}"


def _merged(written: _Written, overrides: Sequence[str]) -> tuple[Tree, dict[str, str]]:
    """Return a recipe's tree with overrides, and the origins of its values. Raises RecipeError for malformed ones."""
    tree, origins = copy.deepcopy(written.tree), dict(written.origins)
    apply_overrides(tree, overrides, origins)
    return tree, origins


def _checked(
    written: _Written, overrides: Sequence[str], metrics: Collection[str] | None
) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe with its origins. Raises RecipeError with all mistakes, each with the position of its key."""
    tree, origins = _merged(written, overrides)
    recipe, mistakes = check_tree(tree, metrics, lambda key: _is_override(origins, key))
    if recipe is not None:
        return recipe, origins
    positions = {key: "override" if _is_override(origins, key) else written.position(key) for key, _ in mistakes}
    blamed = _blamed(written, overrides, metrics, [key for key, where in positions.items() if where != "override"])
    positions |= {key: f"override {shlex.quote(one_line(cut(override, 200)))}" for key, override in blamed.items()}
    of_overrides = [where.startswith("override") for where in positions.values()]
    have = f"{written.where} has" if not any(of_overrides) else f"{written.where} with the overrides has"
    have = "the overrides have" if all(of_overrides) else have
    listed = [
        f"  {positions[key]}: {_name(key)} {what}{_replaced(tree, key, blamed)}" for key, what in mistakes[:MAX_LISTED]
    ]
    more = len(mistakes) - len(listed)
    listed += [f"  ... and {more:,} more"] if more else []
    raise RecipeError(f"{have} {format_count(len(mistakes), 'mistake')}:\n" + "\n".join(listed))


def _blamed(
    written: _Written, overrides: Sequence[str], metrics: Collection[str] | None, keys: Collection[KeyPath]
) -> dict[KeyPath, str]:
    """Return key -> override for mistakes at keys of the file that are none without that override."""
    blamed: dict[KeyPath, str] = {}
    for number, override in enumerate(overrides):
        if left := set(keys) - set(blamed):
            others = [*overrides[:number], *overrides[number + 1 :]]
            remaining = {key for key, _ in check_tree(_merged(written, others)[0], metrics)[1]}
            blamed |= dict.fromkeys(left - remaining, override)
    return blamed


def _replaced(tree: Tree, key: KeyPath, blamed: Mapping[KeyPath, str]) -> str:
    """Return what to do if a key is missing because an override has replaced its whole section."""
    section = blamed.get(key, "").partition("=")[0].strip()
    if section == ".".join(key) or not ".".join(key).startswith(f"{section}.") or not section:
        return ""
    values: Any = tree
    for part in section.split("."):
        values = values[part]
    known = model_at(tuple(section.split(".")))
    if known is None or not values.keys() <= known.model_fields.keys():
        return f"; {section}=... replaces the whole section"
    single = how_to_write(section, values, as_override=True, each_key=True)
    return f"; {section}=... replaces the whole section, {single} does not"


def _name(key: KeyPath) -> str:
    """Return a key for a message, whatever a stranger has written as one."""
    return one_line(cut(".".join(key), 100))


def _require_no_token(text: str, where: str) -> None:
    """Raise RecipeError for an access token: a recipe is stored in the run folder and pushed, with its comments."""
    for number, line in enumerate(text.splitlines(), 1):
        if holds_secret(line):
            raise RecipeError(
                f"{where}, line {number}: contains an access token; remove it, and log in with `hf auth login` or "
                "the variable HF_TOKEN"
            )


def _remove(tree: Tree, key: str) -> bool:
    """Remove a dotted key from a tree, and return whether it had a value."""
    *sections, last = key.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    return isinstance(node, dict) and node.pop(last, None) is not None


def _read_tree(text: str, where: str) -> tuple[Tree, dict[KeyPath, int]]:
    """Return a recipe's mapping and the lines of its keys."""
    try:
        tree, lines = read_yaml(text)
    except InvalidYaml as error:
        raise RecipeError(f"{where}{error.at}: not valid YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        got = "this one is empty" if tree is None else f"got {shown(tree)}"
        raise RecipeError(f"{where}: a recipe is a mapping with model:, data: and train:; {got}")
    return tree, lines


def _is_override(origins: Mapping[str, str], key: KeyPath) -> bool:
    """Return whether an override has set a key's value, or the section that it is in as a whole."""
    above = (origins.get(".".join(key[:end])) for end in range(len(key) - 1, 0, -1))
    return (_origin(origins, key) or next(filter(None, above), None)) == "override"


def _origin(origins: Mapping[str, str], key: KeyPath) -> str | None:
    return origins.get(".".join(key)) or _origin_within(origins, key)


def _origin_within(origins: Mapping[str, str], key: KeyPath) -> str | None:
    inside = {origin for leaf, origin in origins.items() if leaf.startswith(".".join(key) + ".")}
    return inside.pop() if len(inside) == 1 else None


def flatten(section: BaseModel, above: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of all fields, with plain YAML values."""
    values: dict[str, Any] = {}
    dumped = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values |= flatten(value, f"{above}{name}.")
        else:
            values[above + name] = dumped[name]
    return values


def default_values() -> dict[str, Any]:
    """Return {dotted key: value} of the `result` keys that have a default; a section that is off is null."""
    required = {"model": {"name": "?"}, "data": {"dataset": "?"}, "train": {"duration": "1 step", "batch_size": 2}}
    values, given = flatten(Recipe.model_validate(required)), set(leaves(required))
    return {key: value for key, value in values.items() if key not in given and tag_of(key) == "result"}


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a copy of the recipe with new values for some dotted keys; their recorded origins stay."""
    updates: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        updates.setdefault(section, {})[name] = value
    top_level = updates.pop("", {})
    sections = {name: getattr(recipe, name).model_copy(update=changed) for name, changed in updates.items()}
    return recipe.model_copy(update={**top_level, **sections})


def tag_of(key: str) -> str:
    """Return the tag of a dotted key: ``result``, ``speed`` or ``output``."""
    *above, name = key.split(".")
    model = model_at(tuple(above))
    extra = model.model_fields[name].json_schema_extra if model else None
    return str(extra["tag"]) if isinstance(extra, dict) else "result"


def origin_of(recipe: Recipe, key: str) -> str:
    """Return where a dotted key's value comes from: ``default``, ``recipe`` or ``override``."""
    return _origin(recipe.source.origins, tuple(key.split("."))) or "default"


def output_dir(recipe: Recipe) -> str:
    """Return the recipe's run folder: its output_dir, else runs/<recipe name>."""
    return str(expand_user(recipe.output_dir or os.path.join("runs", recipe.source.name)))


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML: its file's text, or with overrides their list in a comment and the merged values."""
    source = recipe.source
    if source.text and not source.overrides:
        return source.text
    header = [f"# overrides: {' '.join(source.overrides)}"] if source.overrides else []
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    return "\n".join([*header, write_yaml(tree)])


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hf_fasttrain recipe"
    return schema
