"""The commands, in the order of `--help`; `train` is the default."""

from __future__ import annotations

from pathlib import Path

import typer

from hf_fasttrain.cli.ablate import ablate
from hf_fasttrain.cli.cache import clean_caches, list_caches
from hf_fasttrain.cli.check import check
from hf_fasttrain.cli.crossval import crossval
from hf_fasttrain.cli.doctor import doctor
from hf_fasttrain.cli.evaluate import evaluate
from hf_fasttrain.cli.explain import explain
from hf_fasttrain.cli.export import export
from hf_fasttrain.cli.init import init
from hf_fasttrain.cli.mislabeled import mislabeled
from hf_fasttrain.cli.predict import predict
from hf_fasttrain.cli.probe import probe
from hf_fasttrain.cli.push import push
from hf_fasttrain.cli.recipes import copy_recipe, list_recipes
from hf_fasttrain.cli.report import report
from hf_fasttrain.cli.schema import schema
from hf_fasttrain.cli.train import train
from hf_fasttrain.cli.tune import tune
from hf_fasttrain.cli.version import common_options
from hf_fasttrain.recipe.find import shipped_recipes
from hf_fasttrain.utils.errors import UserError, nearest

COMMANDS = (
    *(init, train, crossval, probe, check, mislabeled, evaluate, predict, push, export, report),
    *(ablate, tune, doctor, explain, schema),
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(
    help="List the shipped recipes, or copy one.", invoke_without_command=True, rich_markup_mode=None
)
cache_app = typer.Typer(
    help="List the decoded pixels cached on disk (data.cache), or delete them.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

app.callback(
    help="Train an image classifier from one recipe file: `hf-fasttrain RECIPE [section.key=value ...]`, "
    "or `accelerate launch -m hf_fasttrain RECIPE [section.key=value ...]`."
)(common_options)
recipes_app.callback()(list_recipes)
recipes_app.command("copy")(copy_recipe)
cache_app.callback()(list_caches)
cache_app.command("clean")(clean_caches)
# Words of other programs -> what does the same here.
OTHER_COMMANDS = {
    "resume": "A run is resumed by `hf-fasttrain RUN --resume`.",
    "continue": "A run is resumed by `hf-fasttrain RUN --resume`.",
    "fit": "Did you mean 'train'?",
    "eval": "Did you mean 'evaluate'?",
    "test": "Did you mean 'evaluate'?",
    "val": "Did you mean 'evaluate'?",
    "validate": "Did you mean 'check' (of a recipe) or 'evaluate' (of a run)?",
    "infer": "Did you mean 'predict'?",
    "inference": "Did you mean 'predict'?",
    "cv": "Did you mean 'crossval'?",
    "kfold": "Did you mean 'crossval'?",
    "knn": "Did you mean 'probe'?",
    "linear": "Did you mean 'probe'?",
    "features": "Did you mean 'probe'?",
    "upload": "Did you mean 'push'?",
    "profile": "Did you mean 'doctor'?",
    "clean": "Did you mean 'mislabeled' (labels) or 'cache clean'?",
    "noise": "Did you mean 'mislabeled'?",
    "new": "Did you mean 'init'?",
    "create": "Did you mean 'init'?",
    "start": "Did you mean 'init'?",
    "help": "`hf-fasttrain --help` lists the commands.",
}
GROUPS = {"recipes": recipes_app, "cache": cache_app}

for command in COMMANDS:
    app.command()(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)


def with_command(arguments: list[str]) -> list[str]:
    """Insert the default command `train` if the arguments start with a recipe. Raises UserError for unknown words."""
    commands = {command.__name__ for command in COMMANDS} | set(GROUPS)
    if not arguments or arguments[0] in commands or arguments[0] in ("--help", "-h", "--version"):
        return ["--help"] if arguments[:1] == ["-h"] else arguments
    first = next((argument for argument in arguments if not argument.startswith("-")), "")
    known = first.endswith((".yaml", ".yml")) or first.startswith("hf://") or first in shipped_recipes()
    if first and not known and not Path(first).exists():
        hint = nearest(first, [*commands, *shipped_recipes()])
        hint = f" {OTHER_COMMANDS[first]}" if first in OTHER_COMMANDS else hint
        raise UserError(
            f"'{first}' is neither a recipe nor a command.{hint} Commands: {', '.join(sorted(commands))}; "
            f"recipes: a .yaml file, hf://OWNER/NAME, or one of {', '.join(shipped_recipes())}"
        )
    return ["train", *arguments]
