"""Fused modules give what diffusers' own modules give."""

import copy
from pathlib import Path

import pytest
import torch
from comparing import assert_close
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dgq.integer import fused_unet
from dgq.integer.attention import AttentionPlan, LogAttnProcessor, use_log_attention
from dgq.integer.channels import no_groups, to_matrix
from dgq.integer.fused_unet import (
    FoldedUpsample,
    FusedGEGLU,
    FusedResnetBlock,
    FusedTimestepEmbedding,
    FusedTransformer,
    FusedTransformerBlock,
)
from dgq.integer.halves import half, twice
from dgq.integer.layer import IntegerLayer
from dgq.integer.on_the_fly import round_to_nearest
from dgq.integer.plan import Layer, plan_layer, plan_layers
from dgq.integer.rounding import quantize_layers
from dgq.integer.skeleton import fuse, place
from dgq.integer.statistics import Statistics
from dgq.recipe import Recipe

FUSED = {
    FusedGEGLU: GEGLU,
    FusedResnetBlock: ResnetBlock2D,
    FusedTransformer: Transformer2DModel,
    FusedTransformerBlock: BasicTransformerBlock,
    FusedTimestepEmbedding: TimestepEmbedding,
    FoldedUpsample: Upsample2D,
}


def unet(**options: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(**{**config, **options}).eval()
    with torch.no_grad():  # biases start at zero, which would hide a bias that is lost
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def quantize(model: UNet2DConditionModel) -> None:
    """W8A8 in place, without calibration."""
    made = {}
    for layer in plan_layers(model, Recipe(wbits=8, abits=8, rounding="nearest", channels="none"))[0]:
        plan = layer.plan
        weight = round_to_nearest(to_matrix(layer.weight), plan.wbits, plan.weight_group)
        made[layer.name] = IntegerLayer.from_quantized(plan, weight, no_groups(plan.in_features), layer.bias)
    place(model, made)
    use_log_attention(model, AttentionPlan(8, 4))
    fuse(model)


def plain_copy(model: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same quantized model with diffusers' classes."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    return copied


def call(model: UNet2DConditionModel, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    with torch.no_grad():
        return model(sample.to(dtype), 500, text.to(dtype), return_dict=False, **options)[0]


@pytest.mark.parametrize("linear_projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_modules_give_the_same(linear_projection: bool, dtype: torch.dtype) -> None:
    model = unet(use_linear_projection=linear_projection)
    quantize(model)
    model = model.to(dtype)
    kinds = {type(module) for module in model.modules()}
    assert kinds.issuperset(FUSED)
    other = plain_copy(model)
    assert other.state_dict().keys() == model.state_dict().keys()
    got, expected = call(model, dtype).float(), call(other, dtype).float()
    # a code may fall on its other side where a sum was rounded in another order
    assert_close("output", got, expected, 0.01 if dtype == torch.float32 else 0.03)


def test_masks_and_float_attention_take_the_ordinary_way() -> None:
    model = unet()
    quantize(model)
    model.set_attn_processor(AttnProcessor2_0())
    other = plain_copy(model)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False
    for options in ({}, {"encoder_attention_mask": mask}):
        got, expected = call(model, **options), call(other, **options)
        assert_close("output", got, expected, 0.01)
    assert not torch.allclose(call(model), call(model, encoder_attention_mask=mask), atol=1e-3)


def test_modules_with_another_forward_stay() -> None:
    model = unet(resnet_time_scale_shift="scale_shift")
    quantize(model)
    assert not any(isinstance(module, FusedResnetBlock) for module in model.modules())
    call(model)


@pytest.mark.parametrize("channels", ["none", "smooth", "rotate", "shift"])
@pytest.mark.parametrize("wbits", [8, 4])
@torch.no_grad()
def test_an_upsampler_reads_the_small_picture(wbits: int, channels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every backend with the same bits, at sizes that are one less than twice as large, and as a float layer where
    others are around it."""
    torch.manual_seed(0)
    plain, x = Upsample2D(64, use_conv=True), torch.randn(2, 64, 5, 16)
    x[:, 3] *= 8
    recipe = Recipe(wbits=wbits, channels=channels)  # type: ignore[arg-type]
    one = Layer("conv", plain.conv, plan_layer(plain.conv, wbits, recipe, upsampled=True))
    statistics = Statistics(one.plan, 1)
    statistics.add(x)
    layer = quantize_layers([one], statistics, recipe)[0].layer
    assert (layer.plan.out_features, layer.plan.rotation > 0) == (256, channels == "rotate")
    module = copy.copy(plain)
    module._modules = {"conv": layer}
    module.__class__ = FoldedUpsample
    for size in (None, (10, 32), (9, 32), (10, 31), (9, 31)):
        expected, got = plain(x, size), module(x, size)
        assert got.shape == expected.shape
        assert_close("output", got, expected, 0.05 if wbits == 8 else 0.2)
        large = nn.functional.interpolate(x, size=size or (10, 32))
        torch.testing.assert_close(layer(large), got, rtol=1e-5, atol=1e-5)
        seen: list[torch.Size] = []
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        torch.testing.assert_close(module(x, size), got, rtol=1e-5, atol=1e-5)
        hook.remove()
        assert seen == [large.shape]
    result, half = module(x), module(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for backend in ("reference", "triton"):
        monkeypatch.setenv("DGQ_BACKEND", backend)
        layer.restore()
        assert torch.equal(module(x), result), backend
        if backend == "reference":  # Triton's interpreter cuts bfloat16 off
            assert torch.equal(module(x.bfloat16()), half)


@pytest.mark.parametrize("size", [(7, 9), (8, 6), (10, 7)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    model = unet()
    float_model = copy.deepcopy(model)
    quantize(model)
    assert any(type(module) is FoldedUpsample for module in model.modules())
    sample, text = torch.randn(2, 4, *size), torch.randn(2, 7, 24)
    with torch.no_grad():
        got, expected = (one(sample, 500, text).sample for one in (model, float_model))
    assert_close("output", got, expected, 0.1)


def test_a_unet_that_halves_otherwise_is_not_folded() -> None:
    model = unet(downsample_padding=0)
    quantize(model)
    assert not any(type(module) is FoldedUpsample for module in model.modules())
    call(model)


def test_a_float_model_stays_as_it_is() -> None:
    model = unet()
    fuse(model)
    assert not any(type(module) in FUSED for module in model.modules())


def test_checkpoints_load_fused(tiny_checkpoint: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")
    assert any(isinstance(module, FusedResnetBlock) for module in model.modules())


def guided(pictures: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(pictures, 4, 8, 8, generator=generator)
    text = torch.randn(2 * pictures, 7, 24, generator=generator)
    return {"sample": sample.repeat(2, 1, 1, 1), "encoder_hidden_states": text}


@torch.no_grad()
def attended(
    model: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch, **call: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """The output, and the batches of all self-attentions in their order."""
    batches: list[int] = []
    plain = LogAttnProcessor.__call__

    def spy(
        self: LogAttnProcessor, attn: nn.Module, x: torch.Tensor, context: torch.Tensor | None = None, **kwargs: object
    ) -> torch.Tensor:
        if context is None:
            batches.append(len(x))
        return plain(self, attn, x, context, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LogAttnProcessor, "__call__", spy)
        return model(**{"timestep": 500, **call}).sample, batches


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guided_call(pictures: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block, up to where the text is read, sees each picture once; the result is that of the whole batch."""
    model = unet()
    quantize(model)
    model = model.to(dtype)
    call = {name: x.to(dtype) for name, x in guided(pictures).items()}
    got, batches = attended(model, monkeypatch, **call)
    assert batches[0] == pictures
    assert set(batches[1:]) == {2 * pictures}
    monkeypatch.setattr(fused_unet, "repeated", lambda *_: False)
    expected, batches = attended(model, monkeypatch, **call)
    assert set(batches) == {2 * pictures}
    assert_close("output", got.float(), expected.float(), 0.01 if dtype == torch.float32 else 0.03)
    assert not torch.equal(half(got), got[pictures:])


def test_pictures_that_differ_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    quantize(model)
    call = guided(1)
    call["sample"][1, -1, -1, -1] += 1
    assert set(attended(model, monkeypatch, **call)[1]) == {2}
    # one picture at two times: its first convolution gives the same twice, the residual block does not
    call = guided(1)
    assert set(attended(model, monkeypatch, **call, timestep=torch.tensor([500, 400]))[1]) == {2}


@torch.no_grad()
def test_attention_of_others_gets_the_whole_batch() -> None:
    """Processors may mix the halves: perturbed-attention guidance does."""
    model = unet()
    quantize(model)
    batches: list[int] = []

    class Spy(AttnProcessor2_0):
        def __call__(self, attn: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            batches.append(len(x))
            return super().__call__(attn, x, *args, **kwargs)

    model.set_attn_processor(Spy())
    model(timestep=500, **guided(1))
    assert set(batches) == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_residual_block_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    quantize(model)
    block = next(module for module in model.to(dtype).modules() if isinstance(module, ResnetBlock2D))
    x = twice(torch.randn(2, block.in_channels, 9, 7)).to(dtype, memory_format=torch.channels_last)
    embedding = torch.randn(1, block.time_emb_proj.in_features).repeat(4, 1).to(dtype)
    got = block(x, embedding)
    seen: list[int] = []
    plain = IntegerLayer.forward

    def spy(self: IntegerLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(len(x))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(IntegerLayer, "forward", spy)
    assert torch.equal(block(x, embedding), got)
    assert seen[-2:] == [2, 2]
    monkeypatch.setattr(fused_unet, "repeated", lambda *_: False)
    assert torch.equal(block(x, embedding), got)
    assert seen[-2:] == [4, 4]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_norm_that_was_changed_is_read_anew(dtype: torch.dtype, part: str) -> None:
    """Also through `.data`, of which the parameter's version does not tell."""
    model = unet()
    quantize(model)
    block = next(module for module in model.modules() if isinstance(module, FusedResnetBlock)).to(dtype)
    x, time = torch.randn(1, block.in_channels, 8, 8).to(dtype), torch.randn(1, 128).to(dtype)
    before = block(x, time)
    getattr(block.norm1, part).data.mul_(-1.5)
    after = block(x, time)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(block)(x, time))
