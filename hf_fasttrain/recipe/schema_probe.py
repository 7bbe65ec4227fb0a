"""The schema of the recipe's section `probe`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hf_fasttrain.recipe.fields import Auto, Section, result


class ProbeSection(Section):
    views: int = result(
        0,
        "augmented views of each training image whose features are used too, beside its evaluation crop",
        ge=0,
        le=100,
        examples=[4],
    )
    strength: Auto | Annotated[float, Field(gt=0.0, le=1e9)] = result(
        "auto",
        "of the logistic regression on features of variance 1, scikit-learn's C: less regularises more; auto: chosen "
        "on a fifth of the training images",
        examples=[0.01],
    )
    neighbors: Auto | Annotated[int, Field(ge=1, le=10_000)] = result(
        "auto", "k of the k nearest neighbours, as a comparison; auto: chosen as strength is", examples=[10]
    )
