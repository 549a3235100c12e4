"""ConvRot: every layer rotated, rows rounded by their largest weight, no call of the network."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

import dgq
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.reading import read_header
from dgq.errors import DgqError
from dgq.family import network_of
from dgq.inspection.inspect import inspect
from dgq.integer.channels import to_matrix
from dgq.integer.convrot import absmax
from dgq.integer.folding import fold
from dgq.integer.layer import IntegerLayer
from dgq.pictures.generation import Settings, generate
from dgq.recipe import Recipe
from dgq_kernels.rotation import rotate

OPTIONS = Options(prompts=["a cat"], steps=2, evaluate=1)


@pytest.fixture(scope="module", params=[8, 4])
def made(request, tiny_pipeline, tmp_path_factory):
    """(folder of a checkpoint, its header, stages that its calibration told of)"""
    out, stages = tmp_path_factory.mktemp("convrot") / "out", set()
    recipe = Recipe("convrot", wbits=request.param)
    header = calibrate(tiny_pipeline, out, recipe, OPTIONS, lambda stage, *rest: stages.add(stage))
    return out, header, stages


def test_nothing_is_recorded(made, tiny_pipeline):
    out, header, stages = made
    assert stages == {"compare", "quantize", "save"}
    assert header.calibration.keys() == {"fidelity"}
    assert header.calibration["fidelity"]["psnr_db"] > (28 if header.recipe.wbits == 8 else 12)
    assert header.attention is None
    predicted = estimate(tiny_pipeline, header.recipe, OPTIONS)
    assert (predicted.calls, predicted.passes) == (0, 0)
    assert predicted.layers == len(header.layers)
    assert predicted.seconds > 0
    assert "| calibration | none |" in (out / "README.md").read_text()
    assert f"| VAE | convrot W8A8, {predicted.decoder_layers} layers; " in (out / "README.md").read_text()


def test_built_in_prompts_may_be_too_long_for_the_model(tiny_pipeline, tmp_path):
    """None is drawn, and there is no option that names others."""
    float_model = shutil.copytree(tiny_pipeline, tmp_path / "float")
    (float_model / "concepts.json").unlink()
    with pytest.raises(DgqError, match=r"tokens, the model reads 24"):
        calibrate(float_model, tmp_path / "out", Recipe(rounding="nearest"), Options(steps=1, evaluate=0))
    header = calibrate(float_model, tmp_path / "out", Recipe("convrot", wbits=8), Options(evaluate=0))
    assert header.layers


def test_every_row_is_rounded_by_its_largest_rotated_weight(made, tiny_pipeline):
    out, header, _ = made
    network = network_of(dgq.load(out, device="cpu"))
    floats = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    limit, rotations = (127 if header.recipe.wbits == 8 else 7), set()
    for name, plan in header.layers.items():
        weight = floats[f"{plan.owner(name)}.weight"].float()
        weight = fold(weight) if plan.upsampled else weight
        weight = to_matrix(weight[:, slice(*plan.columns)] if plan.columns else weight)
        weight = weight if plan.kind == "conv2d" else weight.flatten(1)
        rotated = rotate(weight, plan.rotation) if plan.rotation else weight  # K is made of runs of channels
        scale = rotated.abs().amax(1, keepdim=True) / limit
        layer = network.get_submodule(name)
        assert isinstance(layer, IntegerLayer)
        torch.testing.assert_close(layer.weight_scale[:, None], scale, rtol=1e-6, atol=0)
        codes = layer.natural_weight.reshape(rotated.shape)
        assert int(codes.abs().max()) == limit
        assert float((codes - rotated / scale).abs().max()) < 0.501
        rotations.add(plan.rotation)
    assert len(rotations - {0}) > 1


def test_it_rotates_what_the_integer_recipe_rotates(made, tiny_pipeline, tmp_path):
    _, header, _ = made
    rotated = Recipe(wbits=header.recipe.wbits, channels="rotate", rounding="nearest", attention="float")
    options = Options(prompts=["a cat"], steps=1, calls=1, evaluate=0, vae="float")
    assert calibrate(tiny_pipeline, tmp_path / "out", rotated, options).layers == header.layers
    assert dataclasses.replace(rotated, name="convrot") == header.recipe


def test_it_draws_and_is_told(made):
    out, header, _ = made
    (picture,) = generate(dgq.load(out, device="cpu"), ["a cat"], Settings(steps=1, guidance=3.0))
    assert torch.isfinite(picture.latents).all()
    found = inspect(out)
    assert found.label == f"convrot W{header.recipe.wbits}A8"
    assert found.words == {"rounding": "nearest", "attention": "float"}
    assert read_header(out).to_dict() == header.to_dict()


def test_options_that_it_settles():
    assert Recipe("convrot") == Recipe("convrot", rounding="nearest", channels="rotate", attention="float")
    for option, value in (("channels", "smooth"), ("channels", "none")):
        with pytest.raises(DgqError, match="the convrot recipe has channels 'rotate', not"):
            Recipe("convrot", **{option: value})
    with pytest.raises(DgqError, match="is not one of log, float"):
        Recipe("convrot", attention="linear")


def test_rows_of_zeros_stay_zeros():
    weight = torch.randn(3, 40)
    weight[1] = 0
    for bits in (4, 8):
        rounded = absmax(weight, bits, 32)
        assert not rounded.dequantize()[1].any()
        assert bool((rounded.scale >= torch.finfo(torch.float32).tiny).all())
        limit = 2 ** (bits - 1) - 1
        assert rounded.codes.abs().amax(1).tolist() == [limit, 0, limit]
