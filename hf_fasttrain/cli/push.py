"""The command `push`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import ModelOption, RunArgument, WeightsOption
from hf_fasttrain.cli.terminal import print_note
from hf_fasttrain.utils.errors import UserError
from hf_fasttrain.utils.format import format_command
from hf_fasttrain.utils.printing import echo


def push(
    run: RunArgument,
    repo: Annotated[str | None, typer.Argument(help="OWNER/NAME on the Hub; by default the recipe's hub.repo.")] = None,
    private: Annotated[bool | None, typer.Option("--private", help="Make a new repository private.")] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the model, for the model card: apache-2.0, mit, ...")
    ] = None,
    weights: WeightsOption = None,
    model: ModelOption = None,
) -> None:
    """Upload a finished run to a Hub repository: model, card, recipe and figures in one commit."""
    from hf_fasttrain.hub.push import hub_section, push_run

    hub = hub_section(run, model)
    name = repo or hub.get("repo")
    if not name:
        command = format_command("push", run, "OWNER/NAME")
        raise UserError(f"{run}: its recipe has no hub.repo; give the repository: {command}")
    if name == hub.get("repo"):
        private = hub.get("private") if private is None else private
        license = license or hub.get("license")
        weights = weights or ("best" if hub.get("every") == "best" else None)
    echo(push_run(run, name, private=private, license=license, weights=weights, model=model, log=print_note))
