"""The schema of the recipe's sections that transfer what other models have learned: `distill`."""

from __future__ import annotations

from hf_fasttrain.recipe.fields import Section, result


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
