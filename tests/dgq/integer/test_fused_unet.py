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

from dgq.integer.attention import AttentionPlan, use_log_attention
from dgq.integer.channels import no_groups, to_matrix
from dgq.integer.fused_unet import (
    FusedGEGLU,
    FusedResnetBlock,
    FusedTimestepEmbedding,
    FusedTransformer,
    FusedTransformerBlock,
)
from dgq.integer.layer import IntegerLayer
from dgq.integer.on_the_fly import round_to_nearest
from dgq.integer.plan import plan_layers
from dgq.integer.skeleton import fuse, place
from dgq.recipe import Recipe

FUSED = {
    FusedGEGLU: GEGLU,
    FusedResnetBlock: ResnetBlock2D,
    FusedTransformer: Transformer2DModel,
    FusedTransformerBlock: BasicTransformerBlock,
    FusedTimestepEmbedding: TimestepEmbedding,
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


def test_a_float_model_stays_as_it_is() -> None:
    model = unet()
    fuse(model)
    assert not any(type(module) in FUSED for module in model.modules())


def test_checkpoints_load_fused(tiny_checkpoint: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")
    assert any(isinstance(module, FusedResnetBlock) for module in model.modules())
