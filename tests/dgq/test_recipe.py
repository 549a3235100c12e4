"""Recipes and plans: strict in both directions."""

import pytest

from dgq.errors import DgqError
from dgq.recipe import LayerPlan, Recipe


def test_recipe_round_trip():
    recipe = Recipe(wbits=8, abits=6, overrides=(("mid_block.*", 0), ("*.ff.net.2", 4)))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_stored_options_that_mean_nothing_are_left_out():
    stored = {**Recipe().to_dict(), "groups": 8}
    assert Recipe.from_dict(stored) == Recipe()
    stored = {**Recipe("paper", groups=8).to_dict(), "attention": "float"}
    assert Recipe.from_dict(stored) == Recipe("paper", groups=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"wbits": 5},
        {"abits": 9},
        {"abits": 3},
        {"name": "magic"},
        {"name": "paper", "groups": 2},
        {"groups": 8},
        {"name": "paper", "rounding": "magic"},
        {"name": "paper", "channels": "none"},
        {"overrides": (("x", 3),)},
        {"name": "paper", "overrides": (("x", 8),)},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(DgqError):
        Recipe(**fields)


def test_last_matching_override_wins():
    recipe = Recipe(wbits=4, overrides=(("mid.*", 8), ("mid.to_k", 0)))
    assert [recipe.weight_bits(name) for name in ("up.to_k", "mid.to_q", "mid.to_k")] == [4, 8, 0]
    assert recipe.unmatched_overrides(["mid.to_q"]) == ["mid.to_k"]


def test_plan_round_trip_stores_only_what_differs():
    plan = LayerPlan("conv2d", 32, 64, 4, 8, True, kernel_size=3, padding=1, class_ends=[32])
    data = plan.to_dict()
    assert "stride" not in data
    assert LayerPlan.from_dict(data) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"kind": "conv9d"},
        {"wbits": 3},
        {"in_features": 0},
        {"in_features": 2**40},
        {"padding": -1},
        {"class_ends": [16]},
        {"class_ends": [40, 32]},
        {"class_ends": []},
        {"weight_group": 7},
        {"channels": "?"},
    ],
)
def test_damaged_plans_are_refused(change):
    data = LayerPlan("linear", 32, 64, 4, 8, False, class_ends=[32]).to_dict()
    with pytest.raises(DgqError):
        LayerPlan.from_dict({**data, **change})


def test_missing_field_is_named():
    with pytest.raises(DgqError, match="in_features"):
        LayerPlan.from_dict({"kind": "linear"})
