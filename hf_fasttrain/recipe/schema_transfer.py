"""The schema of the recipe's sections that transfer what models have learned: `distill` and `lora`."""

from __future__ import annotations

from typing import Annotated

from hf_fasttrain.recipe.fields import Auto, OneOrMore, Section, result


class DistillSection(Section):
    teacher: str = result(
        ...,
        "a run folder or its model folder, hf://OWNER/NAME of a pushed run, or a timm name with published weights; it "
        "has to know all classes of the data, by name",
        examples=["runs/large", "hf://OWNER/NAME", "resnet50.a1_in1k"],
    )
    weight: float = result(
        0.5, "share of the distillation in the loss; the rest is the recipe's loss", gt=0.0, le=1.0, examples=[0.9]
    )
    temperature: float = result(
        2.0, "both models' logits are divided by it; higher: more weight on unlikely classes", gt=0.0, examples=[4.0]
    )


class LoraSection(Section):
    rank: int = result(8, "rows of the matrices: capacity and number of trained weights", ge=1, examples=[16])
    alpha: float = result(16.0, "the product of the matrices is multiplied by alpha / rank", gt=0.0, examples=[32.0])
    dropout: float = result(0.0, "dropout of the matrices' inputs", ge=0.0, lt=1.0, examples=[0.1])
    targets: Annotated[Auto | list[str], OneOrMore] = result(
        "auto",
        "layers, by name or the end of it; auto: query, key, value and output projections of attentions; in a model "
        "without attention 1x1 convolutions and linear layers, except the head",
        examples=[["qkv", "fc1"]],
    )
