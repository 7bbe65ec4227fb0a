"""The command `schema`."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from hf_fasttrain.recipe.load import json_schema

    print(json.dumps(json_schema(), indent=2))
