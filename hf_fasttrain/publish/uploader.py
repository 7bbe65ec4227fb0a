"""A push in a process of its own, beside training: `python -m hf_fasttrain.publish.uploader`.

It reads what to push from its standard input, as JSON (the arguments of `push_run`), and answers on its standard
output, as JSON: {"address"} or {"error", "passes"}. The token comes from huggingface_hub's own places.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hf_fasttrain.errors import UserError, without_secrets
from hf_fasttrain.publish.hub import NotPushed, push_run

LESS_URGENT = 19  # nice(2): training has the cores first


def main() -> None:
    """Push what standard input says."""
    from huggingface_hub.utils import disable_progress_bars, logging

    os.nice(LESS_URGENT)
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    asked = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"address": push_run(Path(asked.pop("run")), asked.pop("repo"), **asked)}
    except UserError as error:
        passes = isinstance(error, NotPushed) and error.failure.passes
        answer = {"error": without_secrets(str(error)), "passes": passes}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
