"""The stress variants: the same function in float, more outliers in front of linear layers or of convolutions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dgq.errors import DgqError
from embedded.stress import add_outliers, make, places


def tiny_unet(**options: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(**{**shape, **options})
    for name, parameter in unet.named_parameters():
        if "norm" in name:  # gains and offsets away from one and zero
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return unet.eval()


def run(unet: UNet2DConditionModel) -> tuple[Tensor, dict[str, float]]:
    """The output, and the largest channel over the median channel (by absmax) of every layer's input."""
    ratios: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        x = x if x.dim() < 4 else x.permute(0, 2, 3, 1)
        channels = x.flatten(0, -2).abs().amax(0)
        ratios[name] = float(channels.max() / channels.median())

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sample = torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype)
        context = torch.randn(2, 5, 32, generator=generator).to(unet.dtype)
        output = unet(sample, torch.tensor(500), context).sample
    for handle in handles:
        handle.remove()
    return output, ratios


@pytest.mark.parametrize("linear", [False, True])
def test_the_function_stays_and_outliers_grow(linear: bool) -> None:
    unet = tiny_unet(use_linear_projection=linear)
    before, plain = run(unet)
    done = add_outliers(unet, strength=24, share=0.05, seed=3)
    after, stressed = run(unet)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert all(count >= 1 for count in done.values())
    for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
        full = f"mid_block.attentions.0.transformer_blocks.0.{name}"
        assert stressed[full] > 2.5 * plain[full], name


def exact_unet(**options: object) -> UNet2DConditionModel:
    """In float64, and with group norms that do not see the scale of a group, as their epsilon else lets them."""
    unet = tiny_unet(**options).double()
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-14
    return unet


@pytest.mark.parametrize("groups", [8, 32])
def test_the_function_stays_and_outliers_of_convolutions_grow(groups: int) -> None:
    """With norms of several channels a group; and of one and two, where some sets are of two streams and stay."""
    unet = exact_unet(norm_num_groups=groups)
    before, plain = run(unet)
    done = add_outliers(unet, strength=24, share=0.05, seed=3, kind="convolutions")
    after, stressed = run(unet)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert "up_blocks.0.upsamplers.0.conv" in done
    for name in done:
        assert stressed[name] > 4 * plain[name], name
    others = [name for name in plain if name.endswith(("conv1", "conv2", "proj_in", "to_q"))]
    assert len(others) > 20
    for name in others:  # behind norms nothing is seen of it
        assert stressed[name] == pytest.approx(plain[name], rel=1e-3), name


def test_sets_are_whole_groups_of_every_norm() -> None:
    """Streams of 32 and of 80 channels under norms of eight groups."""
    unet = tiny_unet(norm_num_groups=8, block_out_channels=(32, 80))
    found = {place.name: place for place in places(unet, "convolutions")}
    upsampler = found["up_blocks.0.upsamplers.0.conv"]
    assert upsampler.sets == [[i] for i in range(80)]  # no norm reads what a block without attention hands on
    for place in found.values():
        channels = [i for one in place.sets or () for i in one]
        assert len(channels) == len(set(channels))
        assert all(3 * len(one) <= place.channels for one in place.sets or ())
    joined = found["up_blocks.0.resnets.0.conv_shortcut"]
    assert len(joined.readers) == 2  # the stream, and the same a skip later
    assert joined.sets == [list(range(20 * i, 20 * i + 20)) for i in range(4)]  # 160 in eight groups


def test_every_transformer_block_has_all_places() -> None:
    names = [place.name for place in places(tiny_unet())]
    blocks = {name.removesuffix(".proj_in") for name in names if name.endswith(".proj_in")}
    assert len(blocks) == 4
    for block in blocks:
        own = [name for name in names if name.startswith(block + ".")]
        assert len(own) == 7, own  # proj_in, attn1, its output, attn2, its output, ff, its second layer


def test_the_seed_decides() -> None:
    first, again, other = tiny_unet(), tiny_unet(), tiny_unet()
    for unet, seed in ((first, 0), (again, 0), (other, 1)):
        add_outliers(unet, 16, 0.03, seed)
    weights = [unet.state_dict()["mid_block.attentions.0.proj_in.weight"] for unet in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("strength", "share"), [(1.0, 0.1), (16, 0), (float("nan"), 0.1), (16, 0.9)])
def test_arguments_out_of_range(strength: float, share: float) -> None:
    with pytest.raises(DgqError, match="strength"):
        add_outliers(tiny_unet(), strength, share, 0)


def test_a_model_without_transformers_is_refused() -> None:
    with pytest.raises(DgqError, match="transformer"):
        add_outliers(torch.nn.Linear(3, 3), 16, 0.1, 0)
    with pytest.raises(DgqError, match="not Stable Diffusion's"):
        add_outliers(torch.nn.Linear(3, 3), 16, 0.1, 0, "convolutions")
    with pytest.raises(DgqError, match="not Stable Diffusion's"):
        add_outliers(tiny_unet(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), 16, 0.1, 0, "convolutions")


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_the_folder_says_what_it_is(tiny_pipeline: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "stressed"
    command = [sys.executable, "-m", "embedded.stress", "--model", str(tiny_pipeline), "--out", str(out)]
    command += [] if kind == "linear" else ["--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "stress variant" in done.stdout
    assert "stress variant" in (out / "README.md").read_text()
    assert f"--kind {kind} --strength 16" in (out / "README.md").read_text()
    facts = json.loads((out / "unet" / "config.json").read_text())["_stress_variant"]
    assert (facts["kind"], facts["strength"]) == (kind, 16)
    original = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet", torch_dtype=torch.float32).eval()
    stressed = UNet2DConditionModel.from_pretrained(out / "unet").eval()
    assert stressed.dtype == torch.float32
    assert "warning" not in done.stderr.lower()
    config = original.config
    sample = torch.randn(1, config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 7, config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            stressed(sample, 7, context).sample, original(sample, 7, context).sample, rtol=1e-3, atol=1e-4
        )
    with pytest.raises(DgqError, match="already exists"):
        make(str(tiny_pipeline), out)


def test_a_quantized_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DgqError, match="quantized already"):
        make(str(tiny_checkpoint), tmp_path / "out")
