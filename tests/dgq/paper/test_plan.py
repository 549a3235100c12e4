"""The table of the paper recipe is read as strictly as the plans of integer layers."""

import json

import pytest

from dgq.errors import DgqError
from dgq.paper.plan import Conv2dPlan, LinearPlan, PaperAttentionPlan, PaperTable

GROUPS = {"axis": "channel", "groups": 4, "size": 8}
TABLE = {
    "timesteps": [801.0, 1.0],
    "layers": {
        "a": {
            "kind": "linear",
            "in_features": 8,
            "out_features": 4,
            "bias": True,
            "wbits": 4,
            "abits": 8,
            "input": GROUPS,
        },
        "b": {
            "kind": "conv2d",
            "in_channels": 8,
            "out_channels": 4,
            "kernel_size": [3, 3],
            "stride": [1, 1],
            "padding": [1, 1],
            "dilation": [1, 1],
            "conv_groups": 2,
            "bias": False,
            "wbits": 4,
            "abits": 8,
            "input": GROUPS,
        },
        "c": {"kind": "attention", "cross": True, "abits": 8, "query": GROUPS, "key": GROUPS, "value": GROUPS},
        "d": {
            "kind": "attention",
            "cross": False,
            "abits": 8,
            "query": GROUPS,
            "key": GROUPS,
            "value": GROUPS,
            "probabilities": GROUPS,
        },
    },
}


def test_a_table_comes_back_as_it_was():
    table = PaperTable.from_dict(json.loads(json.dumps(TABLE)))
    assert [type(plan) for plan in table.layers.values()] == [
        LinearPlan,
        Conv2dPlan,
        PaperAttentionPlan,
        PaperAttentionPlan,
    ]
    assert table.to_dict() == TABLE
    assert (table.layers["a"].shape, table.layers["b"].shape) == ((4, 8), (4, 4, 3, 3))
    assert [len(table.layers[name].parts) for name in "cd"] == [3, 4]


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("timesteps",), [float("nan")], "timesteps"),
        (("timesteps",), [True], "timesteps"),
        (("layers",), [], "damaged"),
        (("surprise",), 1, "damaged"),
        (("layers", "a"), None, "layer 'a': kind None"),
        (("layers", "a", "kind"), ["linear"], "layer 'a': kind"),
        (("layers", "a", "wbits"), True, "layer 'a': wbits True is not a whole number"),
        (("layers", "a", "surprise"), 1, "layer 'a': unknown field 'surprise'"),
        (("layers", "b", "stride"), [1.5, 1], "layer 'b': stride"),
        (("layers", "b", "input"), None, "layer 'b': GroupsPlan is None"),
        (("layers", "c", "query", "axis"), "row", "layer 'c': axis 'row' is not one of tensor, channel, pixel"),
        (("layers", "d", "probabilities", "groups"), None, "layer 'd': groups None"),
    ],
)
def test_what_is_damaged_is_named(path, value, said):
    data = json.loads(json.dumps(TABLE))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(DgqError) as caught:
        PaperTable.from_dict(data)
    assert said in caught.value.message


@pytest.mark.parametrize("field", ["in_features", "bias", "input", "kind"])
def test_what_is_missing_is_named(field):
    data = json.loads(json.dumps(TABLE))
    del data["layers"]["a"][field]
    with pytest.raises(DgqError, match=f"layer 'a': .*{field}"):
        PaperTable.from_dict(data)
