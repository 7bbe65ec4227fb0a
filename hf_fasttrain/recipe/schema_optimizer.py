"""The schema of the recipe's sections `optimizer`, `schedule` and `ema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from hf_fasttrain.recipe.fields import DurationField, OneOrMore, Section, WarmupField, result
from hf_fasttrain.utils.duration import Duration


class OptimizerSection(Section):
    name: str = result(
        "adamw", "any optimizer of timm: adamw, sgd (Nesterov), momentum, lamb, lion, ...", examples=["sgd", "lamb"]
    )
    lr: float = result(1e-3, "the schedule's highest learning rate", gt=0.0, examples=[5e-4])
    weight_decay: float = result(0.05, "not applied to norms, biases and position embeddings", ge=0.0, examples=[1e-4])
    momentum: float = result(0.9, "momentum of SGD-like optimizers", ge=0.0, lt=1.0, examples=[0.95])
    clip_norm: float | None = result(None, "maximum norm of all gradients together", gt=0.0, examples=[1.0])
    clip_value: float | None = result(
        None, "maximum absolute value of the elements of gradients", gt=0.0, examples=[0.5]
    )
    clip_agc: float | None = result(
        None,
        "adaptive clipping (timm's agc): maximum norm of a unit's gradient / norm of its weights, without the head",
        gt=0.0,
        examples=[0.01],
    )
    backbone_lr_scale: float = result(
        1.0, "learning rate of everything but the head, relative to lr", gt=0.0, examples=[0.1]
    )
    layer_decay: float | None = result(
        None, "learning rate of each layer relative to that of the next", gt=0.0, le=1.0, examples=[0.75]
    )
    args: dict[str, Any] = result(
        {}, "passed on to the optimizer's constructor, like betas or eps", examples=[{"eps": 1e-6}]
    )


class ScheduleSection(Section):
    name: Literal[
        "cosine", "linear", "polynomial", "onecycle", "exponential", "step", "multistep", "plateau", "constant"
    ] = result("cosine", "learning rate schedule")
    warmup: WarmupField = result(
        "auto",
        "length of the rise to lr: 5% of the training, 500 steps, 1 epoch, 0 for none; auto: onecycle 30%, else none",
    )
    start_ratio: float | None = result(
        None,
        "first lr of the warmup / lr; null: 1 / warmup steps, linear and polynomial: 0, as in transformers",
        ge=0.0,
        le=1.0,
        examples=[0.01],
    )
    min_lr_ratio: float = result(
        0.0, "cosine, linear, polynomial: last lr / lr; plateau: least lr / lr", ge=0.0, lt=1.0, examples=[0.01]
    )
    gamma: float = result(
        0.1,
        "step, exponential: factor per `every`; multistep: at each milestone; plateau: after `patience`",
        gt=0.0,
        le=1.0,
        examples=[0.97],
    )
    every: DurationField = result(Duration(30, "epochs"), "step, exponential: how often lr is multiplied by gamma")
    milestones: Annotated[list[DurationField], OneOrMore] = result(
        [], "multistep: when lr is multiplied by gamma: [30 epochs, 60 epochs]", examples=[["30 epochs", "60 epochs"]]
    )
    metric: str = result("loss", "plateau: watched metric of the evaluation", examples=["accuracy"])
    mode: Literal["auto", "max", "min"] = result(
        "auto", "plateau: whether higher or lower is better; auto: by the metric's name"
    )
    patience: DurationField = result(
        Duration(10, "epochs"), "plateau: training without a better value before lr is multiplied by gamma"
    )
    min_delta: float = result(
        0.0, "plateau: by how much a value must exceed the best one to count as better", ge=0.0, examples=[0.001]
    )
    power: float = result(1.0, "polynomial: exponent of the remaining share of the training", gt=0.0, examples=[2.0])
    cycles: int = result(1, "cosine: number of cycles, each starting again at lr (warm restarts)", ge=1, examples=[3])
    div: float = result(25.0, "onecycle: lr / first lr", ge=1.0, examples=[10.0])
    final_div: float = result(1e4, "onecycle: first lr / last lr", ge=1.0, examples=[1000.0])


class EmaSection(Section):
    decay: float = result(0.9999, "share of the old average kept in each step", ge=0.0, lt=1.0, examples=[0.999])
    warmup: bool = result(True, "limit the decay at step t to (1 + t) / (10 + t)")
