"""Trackers (TensorBoard, Weights & Biases, ...) through Accelerate; a resumed run goes on in its old tracker runs."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from hf_fasttrain.errors import RunError
from hf_fasttrain.files import reason
from hf_fasttrain.processes import on_main


class Tracking:
    """Feeds the trackers of an Accelerator with (values, step)."""

    def __init__(
        self, accelerator: Accelerator, project: str, config: dict[str, Any], *, ids: dict[str, str], step: int
    ) -> None:
        """Start the trackers; `ids` are those of the tracker runs to go on with, from `step` on.

        Raises RunError if one of them can't be started.
        """
        self.accelerator = accelerator
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}} if step else {}
        keys = {"wandb": "id", "mlflow": "run_id", "trackio": "name"}
        for name, run in ids.items():
            options[name] = {keys[name]: run, **({} if name == "mlflow" else {"resume": "allow"})}

        def start() -> None:
            try:
                accelerator.init_trackers(project, config=config, init_kwargs=options)
            except Exception as error:  # noqa: BLE001 - others' code: login, network, versions
                raise RunError(
                    f"log.trackers can't be started: {reason(error)}; log in, mend the connection or leave it out"
                ) from None

        on_main(start)

    def __call__(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def ids(self) -> dict[str, str]:
        """Return tracker name -> id of its run, of those that go on by an id."""
        found = {}
        for tracker in self.accelerator.trackers:
            run = getattr(tracker, "tracker", None)
            run_id = {
                "wandb": lambda run: run.id,
                "mlflow": lambda run: run.info.run_id,
                "trackio": lambda run: run.name,
            }.get(tracker.name)
            if run is not None and run_id is not None:
                found[tracker.name] = str(run_id(run))
        return found
