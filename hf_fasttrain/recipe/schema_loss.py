"""The schema of losses and sampling in the recipe's section `train`."""

from __future__ import annotations

from hf_fasttrain.recipe.fields import Probability, Section, result


class BinaryCrossEntropy(Section):
    target_threshold: Probability | None = result(
        None,
        "targets above it count as 1, others as 0, after mixup, cutmix and label smoothing; null: as they are",
        examples=[0.2],
    )
    sum: bool = result(False, "sum over the classes instead of their mean")


class FocalSection(Section):
    gamma: float = result(
        2.0, "0 is cross-entropy; more counts well classified images less", ge=0.0, le=20.0, examples=[3.0]
    )


class AsymmetricSection(Section):
    gamma_negative: float = result(
        4.0, "focusing of classes that an image does not have, above gamma_positive", ge=0.0, le=20.0, examples=[2.0]
    )
    gamma_positive: float = result(1.0, "focusing of classes that it has", ge=0.0, le=20.0, examples=[3.0])
    clip: float = result(
        0.05,
        "several labels per image: probabilities below it count as 0 for classes that an image does not have",
        ge=0.0,
        lt=1.0,
        examples=[0.1],
    )
    sum: bool = result(False, "sum over the classes instead of their mean (several labels per image)")
