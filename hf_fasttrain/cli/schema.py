"""The command `schema`."""

from __future__ import annotations

from hf_fasttrain.utils.printing import echo_json


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from hf_fasttrain.recipe.load import json_schema

    echo_json(json_schema(), indent=2)
