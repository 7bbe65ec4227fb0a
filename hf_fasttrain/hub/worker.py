"""A push in a process of its own, beside training: `python -m hf_fasttrain.hub.worker`.

It reads what to push from its standard input, as JSON (the arguments of `push_run`), and answers on its standard
output, as JSON: {"address"} or {"error", "passes", "retry_after"}. The token comes from huggingface_hub's own places.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hf_fasttrain.hub.push import STALLED_SECONDS, NotPushed, push_run
from hf_fasttrain.utils.errors import UserError, without_secrets
from hf_fasttrain.utils.private_apis import hub_client_factory


def main() -> None:
    """Push what standard input says."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging

    give_way()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    request = json.load(sys.stdin)
    set_client_factory(partial(_client, float(request.get("stalled", STALLED_SECONDS))))
    answer: dict[str, Any]
    try:
        answer = {"address": push_run(Path(request.pop("run")), request.pop("repo"), **request)}
    except UserError as error:
        passes = isinstance(error, NotPushed) and error.failure.passes
        wait = error.failure.retry_after if isinstance(error, NotPushed) else 0.0
        answer = {"error": without_secrets(str(error)), "passes": passes, "retry_after": wait}
    json.dump(answer, sys.stdout)


def give_way() -> None:
    """Let training have the cores first: run only where one is idle, if the system can, else niced."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_with_parent(parent: int) -> None:
    """End this process when the training is gone: a resumed one pushes what is newer."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _client(stalled: float) -> Any:
    """Return huggingface_hub's own client, but for its patience with a connection on which nothing moves."""
    client = hub_client_factory()()
    client.timeout = stalled
    return client


if __name__ == "__main__":
    main()
