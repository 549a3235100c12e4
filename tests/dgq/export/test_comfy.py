"""ComfyUI's int8 files: what is in them, against a reader of our own words; and those of other tools, read."""

import json
import shutil
from pathlib import Path

import numpy as np
import original_names
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dgq.calibration.sources import float_folder
from dgq.errors import DgqError
from dgq.export import comfy
from dgq.export.source import loaded, open_checkpoint
from dgq.integer.plan import Layer, plan_layer
from dgq.integer.rounding import quantize_layers
from dgq.integer.statistics import Statistics
from dgq.recipe import Recipe

PREFIX = "model.diffusion_model."


def hadamard(size):
    """The regular Hadamard matrix that ConvRot rotates by."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    return four if size == 4 else np.kron(hadamard(size // 4), four)


def stands_for(tensors, layer):
    """The float weight of a layer of a file, float64 (N, K)."""
    about = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
    assert about["format"] == "int8_tensorwise"
    codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    assert (codes.dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, torch.float32, (len(codes), 1))
    weight = codes.double().numpy() * scale.double().numpy()
    if about.get("convrot"):
        group = about["convrot_groupsize"]
        weight = (weight.reshape(len(weight), -1, group) @ hadamard(group).T).reshape(weight.shape)
    return weight


def int8_file(folder: Path, file: Path, group: int = 16, **changes):
    """The tiny pipeline's UNet as another tool writes it: float rows over 127, rotated where the group divides."""
    tensors = {
        name: value
        for name, value in original_names.single_file(folder, [("clip", "cond_stage_model.transformer.")]).items()
        if name.startswith(PREFIX)
    }
    for name in [name for name, value in tensors.items() if value.dim() == 2 and ".transformer_blocks." in name]:
        weight = tensors[name].double().numpy()
        rotated = weight.shape[1] % group == 0
        if rotated:
            weight = (weight.reshape(len(weight), -1, group) @ hadamard(group).T).reshape(weight.shape)
        scale = np.abs(weight).max(1, keepdims=True) / 127
        about = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": group} if rotated else {})}
        layer = name.removesuffix(".weight")
        tensors[name] = torch.from_numpy(np.rint(weight / scale).astype(np.int8))
        tensors[f"{layer}.weight_scale"] = torch.from_numpy(scale.astype(np.float32))
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(about | changes).encode()), dtype=torch.uint8)
    save_file(tensors, file)
    return tensors


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """What was told of the tiny checkpoint's file, its tensors, and its UNet."""
    source, file = open_checkpoint(tiny_checkpoint), tmp_path_factory.mktemp("comfy") / "tiny.safetensors"
    return comfy.export(source, file), load_file(file), loaded(source, "unet")


def test_a_file_stands_for_the_checkpoints_weights(exported):
    told, tensors, unet = exported
    assert all((told.exact, told.rounded, told.as_float))
    names = {name: PREFIX + original_names.unet_module(name) for name in (*told.exact, *told.rounded, *told.as_float)}
    for name in told.exact:
        weight = unet.get_submodule(name).dequantize().double().numpy()
        np.testing.assert_allclose(stands_for(tensors, names[name]), weight, rtol=0, atol=1e-6 * np.abs(weight).max())
    for name, sqnr_db in told.rounded.items():
        weight = unet.get_submodule(name).dequantize().double().numpy()
        noise = ((stands_for(tensors, names[name]) - weight) ** 2).sum()
        assert 10 * np.log10((weight**2).sum() / noise) == pytest.approx(sqnr_db, abs=0.01)
        assert sqnr_db > 38
    for name in told.as_float:
        weight = unet.get_submodule(name).dequantize().half()
        assert torch.equal(tensors[f"{names[name]}.weight"], weight)
    marks = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    assert marks == {names[name] for name in (*told.exact, *told.rounded)}


def test_a_file_is_read_as_the_checkpoint_dequantized(exported, tiny_checkpoint):
    """Every tensor by its name; float16 but for what was rounded again."""
    told, _, _ = exported
    read = comfy.float_tensors(Path(told.path))
    plain = loaded(open_checkpoint(tiny_checkpoint), "unet").dequantize().state_dict()
    names = {
        name: f"{PREFIX}{original_names.unet_module(name.rpartition('.')[0])}.{name.rpartition('.')[2]}"
        for name in plain
    }
    assert set(read) == set(names.values())
    for name, value in plain.items():
        layer = name.removesuffix(".weight")
        tolerance = value.abs().max() / 127 if layer in told.rounded else 1e-3 * value.abs().max()
        assert (read[names[name]] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize("channels", ["none", "smooth", "shift", "rotate", "auto"])
@pytest.mark.parametrize("wbits", [4, 8])
@torch.no_grad()
def test_every_handling_of_channels(wbits, channels):
    """Exact but where divisors are left: in smoothed layers, and int4 ones with shift classes."""
    torch.manual_seed(0)
    module, x = nn.Linear(64, 24), torch.randn(200, 64)
    x[:, :3] *= 15
    wanted = Recipe(wbits=wbits, channels=channels, rounding="nearest")
    layer = Layer("layer", module, plan_layer(module, wbits, wanted))
    statistics = Statistics(layer.plan, 1)
    statistics.add(x)
    made = quantize_layers([layer], statistics, wanted)[0].layer
    codes, scale, sqnr_db = comfy.int8_rows(made)
    slot = comfy.slot(codes, scale, made.plan.rotation)
    weight = made.dequantize().double().numpy()
    found = stands_for({f"layer.{name}": tensor for name, tensor in slot.items()}, "layer")
    divided = made.plan.channels == "smooth" or (made.plan.channels == "shift" and wbits == 4)
    assert (sqnr_db is None) == (not divided)
    if divided:
        assert 10 * np.log10((weight**2).sum() / ((found - weight) ** 2).sum()) == pytest.approx(sqnr_db, abs=0.01)
    else:
        assert int(codes.abs().max()) <= 127
        np.testing.assert_allclose(found, weight, rtol=0, atol=1e-6)


def test_a_convrot_file_of_another_tool_becomes_a_float_folder(tiny_pipeline, tmp_path):
    int8_file(tiny_pipeline, tmp_path / "convrot.safetensors", group=16)
    made = float_folder(str(tmp_path / "convrot.safetensors"), tmp_path / "made", tiny_pipeline)
    before, after = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (tiny_pipeline, made))
    assert before.keys() == after.keys()
    for name, value in before.items():
        near = 0.01 if ".transformer_blocks." in name and value.dim() == 2 else 1e-3
        assert (after[name] - value).norm() <= near * value.norm(), name
    assert any(not torch.equal(after[name], value.half()) for name, value in before.items())
    for part in ("vae", "text_encoder"):
        before, after = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (tiny_pipeline, made))
        assert all(torch.equal(before[name].half(), after[name]) for name in before), part


def test_one_scale_for_all_outputs_and_an_inner_object_are_read(tiny_pipeline, tmp_path):
    about = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}
    mark = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    codes = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((8,), 0.5)):
        file = tmp_path / "file.safetensors"
        save_file({"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": mark}, file)
        expected = (codes.double().numpy() / 2).reshape(8, 2, 16) @ hadamard(16).T
        assert np.allclose(comfy.float_tensors(file, torch.float32)["a.weight"], expected.reshape(8, 32), atol=1e-5)


def test_what_is_not_read_is_told(tiny_pipeline, tiny_checkpoint, tmp_path):
    file = tmp_path / "file.safetensors"
    whole = int8_file(tiny_pipeline, file)
    layer = next(name for name in whole if name.endswith(".comfy_quant")).removesuffix(".comfy_quant")

    def mark(**about):
        return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    cases = {
        "in the format 'nvfp4', which dgq does not read": {"comfy_quant": mark(format="nvfp4")},
        "in the format None": {"comfy_quant": torch.tensor([123], dtype=torch.uint8)},
        "rotated in groups of 4, its inputs are": {
            "comfy_quant": mark(format=comfy.FORMAT, convrot=True, convrot_groupsize=4)
        },
        "convrot_groupsize 'x' is not a whole number": {
            "comfy_quant": mark(format=comfy.FORMAT, convrot=True, convrot_groupsize="x")
        },
        "weight_scale' is missing": {"weight_scale": None},
        "weight_scale' holds no scale": {"weight_scale": torch.tensor([torch.nan])},
        "not an int8 matrix": {"weight": torch.zeros(4, 4, 1, dtype=torch.int8)},
        "is I8, and nothing says what it stands for": {"comfy_quant": None},
    }
    for message, changes in cases.items():
        changed = {**whole, **{f"{layer}.{leaf}": value for leaf, value in changes.items()}}
        save_file({name: value for name, value in changed.items() if value is not None}, file)
        with pytest.raises(DgqError, match=message) as told:
            comfy.float_tensors(file)
        assert told.value.message.startswith(f"{file}: ")
    save_file({**whole, "first_stage_model.x": torch.zeros(1)}, file)
    with pytest.raises(DgqError, match="holds a VAE too"):
        float_folder(str(file), tmp_path / "made", tiny_pipeline)
    del whole[f"{PREFIX}middle_block.0.in_layers.2.weight"]
    save_file(whole, file)
    for config, message in (
        (tiny_pipeline, "file.safetensors: cannot be read as the UNet"),
        (tiny_checkpoint, "is a dgq"),
    ):
        with pytest.raises(DgqError, match=message):
            float_folder(str(file), tmp_path / "made", config)
    assert not (tmp_path / "made").exists()


def test_what_has_no_place_is_refused(tiny_checkpoint, tiny_pipeline, tmp_path):
    with pytest.raises(DgqError, match="is a float model: there is nothing to export"):
        open_checkpoint(tiny_pipeline)
    config = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy")) / "unet" / "config.json"
    header = json.loads(config.read_text())
    header["quantization_config"]["calibration"]["prompts"] = 3
    config.write_text(json.dumps(header))
    with pytest.raises(DgqError, match="is not as it was written"):
        open_checkpoint(tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy", verify=False).header.base_model
