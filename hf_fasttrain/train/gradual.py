"""Trains a part of the model for some steps, then another one, as with a head that is trained before the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_fasttrain.train.callbacks import Callback

if TYPE_CHECKING:
    from hf_fasttrain.train.step_loss import At
    from hf_fasttrain.train.trainer import Trainer


@dataclass(frozen=True)
class PhaseOfSteps:
    """The parameters of the model that are trained from a step on, the first one being 1."""

    part: str  # for the log
    first_step: int
    names: frozenset[str]


class GradualTraining(Callback):
    """Freezes and unfreezes the model's parameters as the phases say; the optimizer has all of them from the start.

    A part that is unfrozen begins without momenta: optimizers create them at the first gradient, and those of a part
    that is frozen are dropped. The first phase begins at step 1.
    """

    def __init__(self, phases: Sequence[PhaseOfSteps]) -> None:
        self.phases = list(phases)
        self.number: int | None = None  # of the current phase
        self.has_first_state = False  # whether the optimizer has a state before its first step, which it relies on

    def before_step(self, trainer: Trainer, at: At) -> None:
        """Begin the phase that a step belongs to, unless it has begun."""
        number = max(number for number, phase in enumerate(self.phases) if phase.first_step <= at.step)
        if number == self.number:
            return
        parameters = dict(trainer.raw_model.named_parameters())
        if self.number is None:
            self.has_first_state = bool(trainer.optimizer.state)  # Adagrad's and Adahessian's
        self._begin(self.phases[number], parameters, trainer.optimizer)
        if self.number is not None:
            names, counts = self.phases[number].names, {name: p.numel() for name, p in parameters.items()}
            trainer.log.print(
                f"step {at.step:,}: from here on model.train={self.phases[number].part}: "
                f"{sum(counts[name] for name in names):,} of {sum(counts.values()):,} parameters are trained"
            )
        self.number = number

    def _begin(self, phase: PhaseOfSteps, parameters: dict[str, nn.Parameter], optimizer: Any) -> None:
        before = self.phases[self.number].names if self.number is not None else frozenset[str]()
        trained_before = {id(parameters[name]) for name in before}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in phase.names)
            if name not in phase.names and not self.has_first_state:
                optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            is_new = not any(id(parameter) in trained_before for parameter in group["params"])
            if is_new and any(parameter.requires_grad for parameter in group["params"]):
                group.pop("step", None)  # of LAMB and Adan, which count a group's updates while it is frozen too

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the current phase; which parameters are frozen is in every checkpoint."""
        return {"number": self.number, "has_first_state": self.has_first_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.number, self.has_first_state = state["number"], state["has_first_state"]
