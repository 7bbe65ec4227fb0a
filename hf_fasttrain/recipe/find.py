"""The shipped recipes, and how a recipe is found by path or name."""

from __future__ import annotations

from pathlib import Path

from hf_fasttrain.run_folder.file_names import RECIPE_FILE
from hf_fasttrain.utils.errors import RecipeError, closest, nearest
from hf_fasttrain.utils.files import expand_user


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the wheel next to this file, in a checkout next to the package."""
    packaged = Path(__file__).parent / "shipped"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return {name: file} of the shipped recipes, such as ``quickstart`` and ``study/resnet50_cifar10``."""
    folder = recipes_folder()
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def recipe_header(path: Path) -> str:
    """Return the comment lines that a recipe starts with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server"):
            lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def find_recipe(recipe: str) -> Path:
    """Return a recipe's file by its path, by its run folder or by a shipped recipe's name. Raises RecipeError."""
    path = expand_user(recipe)
    if len(recipe) > 1000:
        raise RecipeError(f"{recipe[:60]}...: is not the name of a recipe file; it has {len(recipe)} characters")
    if (path / RECIPE_FILE).is_file():
        return path / RECIPE_FILE
    if path.exists() and not path.is_dir():
        return path
    shipped = shipped_recipes()
    name = recipe.removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped and not path.is_absolute():
        return shipped[name]
    if path.is_dir():
        raise RecipeError(
            f"{recipe}: is a folder without {RECIPE_FILE}; give a recipe file or a run folder, and images as "
            f"data.dataset={recipe}"
        )
    raise RecipeError(
        f"{recipe}: no such recipe file.{_files_like(path) or nearest(name, shipped)} Shipped recipes are "
        f"{', '.join(shipped)}"
    )


def _files_like(path: Path) -> str:
    """Return a hint that names the recipe file in the same folder with the nearest name; "" if there is none."""
    try:
        files = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    close = closest(path.name, files)
    return f" Did you mean '{path.parent / close[0]}'?" if close else ""
