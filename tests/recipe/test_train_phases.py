"""Parts of a model and phases of training them, as recipes have them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.utils.errors import RecipeError
from hf_fasttrain.utils.train_phases import TrainPhases

OPTIONS = ["data.dataset=digits", "model.pretrained=w"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("all", "all"),
        ("last  1 blocks", "last 1 block"),
        ({"then": "all", "head": "2 epochs"}, "head for 2 epochs, then all"),
        ([{"norm": "1 epoch"}, "last 2 blocks"], "norm for 1 epoch, then last 2 blocks"),
        (
            [{"head": "2 epochs"}, {"last 2 blocks": "5 steps"}, "all"],
            "head for 2 epochs, then last 2 blocks for 5 steps, then all",
        ),
        (["head"], "head"),
    ],
)
def test_phases_are_read_and_written(value: Any, text: str) -> None:
    phases = TrainPhases.parse(value)
    assert str(phases) == text
    assert TrainPhases.parse(phases.to_yaml()) == phases


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("last 0 blocks", "must be all, head, norm or 'last 3 blocks', or phases such as {head: 2 epochs, then: all}"),
        (3, "must be all, head, norm or 'last 3 blocks', or phases"),
        ([], "must be all, head, norm or 'last 3 blocks', or phases"),
        ({"head": 2, "then": "all"}, "a number needs a unit; write '2 epochs' or '2 steps'"),
        ({"head": "0 epochs", "then": "all"}, "must be phases of at least 1 step; 'head' has 0 epochs"),
        ({"head": "2 epochs"}, "must be one part with its duration, and what is trained then"),
        ({"head": "2 epochs", "then": "body"}, "must be all, head, norm or 'last 3 blocks'"),
        ({"head": "1 epoch", "norm": "1 epoch", "then": "all"}, "must be a list for more than two phases"),
        (["head", "all"], "must be a list of parts with their durations, and last the part that is trained to the end"),
        ([{"head": "1 epoch"}, "head"], "must be phases that train different parts; 'head' is followed by itself"),
    ],
)
def test_what_is_neither_a_part_nor_phases_is_one_message(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainPhases.parse(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.train=heads"], "model.train is 'heads'; must be all, head, norm or 'last 3 blocks'"),
        (
            ["model.freeze_backbone=true", "model.train=norm"],
            "model.freeze_backbone is an older name of model.train: head, and model.train is 'norm'",
        ),
        (["model.train={head: 1 epoch, then: all}", "model.pretrained=false"], "model.train would freeze random"),
        (["model.train=head", "optimizer.layer_decay=0.5"], "layer_decay has no effect with model.train=head"),
    ],
)
def test_what_contradicts_the_trained_part_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("quickstart", [*OPTIONS, *overrides])


def test_both_names_may_be_given_if_they_agree() -> None:
    recipe = load_recipe("quickstart", [*OPTIONS, "model.freeze_backbone=true", "model.train=head"])
    assert str(recipe.model.trained) == "head"
