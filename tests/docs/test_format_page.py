"""docs/format.md tells the format as it is: its reader reads a checkpoint, and it misses no field and no tensor."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dgq.checkpoint.header import FORMAT_VERSION, Header
from dgq.integer.attention import AttentionPlan
from dgq.integer.folding import fold
from dgq.integer.stored import stored_shapes
from dgq.method import METHODS
from dgq.paper.plan import Conv2dPlan, GroupsPlan, LinearPlan, PaperAttentionPlan
from dgq.recipe import LayerPlan, Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["tiny_checkpoint", "shifted_checkpoint", "rotated_checkpoint"])
def checkpoint(request):
    """(tensors of the UNet's file, header) of a checkpoint."""
    folder = request.getfixturevalue(request.param)
    header = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), header


@pytest.fixture(scope="module")
def shifted_checkpoint(tiny_pipeline, tmp_path_factory):
    """int8 weights, whose shift classes stay apart in the accumulator."""
    from dgq.calibration.run import Options, calibrate

    out = tmp_path_factory.mktemp("checkpoints") / "shifted"
    recipe = Recipe(wbits=8, channels="shift", rounding="nearest", weight_group=64, overrides=(("mid_block.*", 4),))
    calibrate(tiny_pipeline, out, recipe, Options(prompts=["a cat"], steps=2, evaluate=0))
    return out


@pytest.fixture(scope="module")
def rotated_checkpoint(tiny_pipeline, tmp_path_factory):
    """Activations of 4 bits, for which rotations are worth it."""
    from dgq.calibration.run import Options, calibrate

    out = tmp_path_factory.mktemp("checkpoints") / "rotated"
    recipe = Recipe(wbits=8, abits=4, channels="rotate", rounding="nearest")
    calibrate(tiny_pipeline, out, recipe, Options(prompts=["a cat"], steps=2, evaluate=0))
    return out


def test_the_page_reads_every_layer(checkpoint, tiny_pipeline):
    code: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], code)
    tensors, header = checkpoint
    floats = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    for name, plan in header["layers"].items():
        own = plan.get("columns")
        target = floats[f"{name.rpartition('.')[0] if own else name}.weight"]
        target = target[:, slice(*own)] if own else target
        target = fold(torch.from_numpy(target)).numpy() if plan.get("upsampled") else target
        weight = code["float_weight"](tensors, name, plan)
        error = np.linalg.norm(weight - target.reshape(weight.shape)) / np.linalg.norm(target)
        assert error < (0.03 if plan["wbits"] == 8 else 0.3), f"{name}: {error}"


def test_the_layers_cover_what_the_format_has(tiny_checkpoint, shifted_checkpoint, rotated_checkpoint):
    plans = [
        plan
        for folder in (tiny_checkpoint, shifted_checkpoint, rotated_checkpoint)
        for plan in json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]["layers"].values()
    ]
    seen = {(plan["wbits"], plan.get("channels", "none"), len(plan["class_ends"]) > 1) for plan in plans}
    assert {(8, "shift", True), (4, "shift", False), (4, "none", False)} <= seen
    assert any("columns" in plan for plan in plans)
    assert {plan["kind"] for plan in plans if plan.get("rotation")} == {"linear", "pointwise", "conv2d"}


def test_every_field_and_tensor_is_on_the_page():
    named = set(re.findall(r"`(\w+)`", PAGE))
    tables = {method.name for method in METHODS.values() if method.read_table}  # which is where a header's table goes
    for kind in (Header, Recipe, LayerPlan):
        assert not ({item.name for item in dataclasses.fields(kind)} | tables) - {"table"} - named, kind.__name__
    for kind in (GroupsPlan, LinearPlan, Conv2dPlan, PaperAttentionPlan):
        assert not {item.name for item in dataclasses.fields(kind)} - named - {"axis", "groups", "size"}, kind.__name__
    assert all(f'"{item.name}"' in PAGE for item in dataclasses.fields(AttentionPlan))
    for plan in (
        LayerPlan("conv2d", 8, 8, 8, 8, True, kernel_size=3, channels="shift", class_ends=[4, 8], reordered=True),
        LayerPlan("linear", 8, 8, 4, 8, True, class_ends=[8]),
    ):
        assert not stored_shapes(plan).keys() - named
    assert PAGE.startswith(f"# The checkpoint format\n\nVersion {FORMAT_VERSION}.")
