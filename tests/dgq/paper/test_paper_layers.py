"""The simulated layers and the calibration of the paper recipe, on a tiny UNet of diffusers' real class."""

import copy
import json
import math
from typing import Any

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from comparing import sqnr
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from dgq.errors import DgqError
from dgq.paper.calibration import build_paper_skeleton, calibrate_paper
from dgq.paper.layers import (
    PaperActivation,
    PaperAttnProcessor,
    PaperConv2d,
    PaperLinear,
    StepState,
    activation_plan,
    layer_geometry,
)
from dgq.paper.quantizers import (
    AxisRanges,
    Grouping,
    dequantize_weight,
    fake_quantize,
    group_activation,
    quantize_weight,
)

pytestmark = pytest.mark.usefixtures("quick")

TIMESTEPS = (801, 401, 1)
TOKENS = 6
Quantized = tuple[nn.Module, dict[str, Any]]  # a calibrated UNet and its table


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    model: UNet2DConditionModel = tiny_pipelines.unet(seed, cross_attention_dim=24)
    return model.eval()


def unet_inputs(timestep: int, batch: int = 2, size: int = 8, seed: int = 0) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, size, size, seed=seed + timestep),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": randn(batch, TOKENS, 24, seed=seed + timestep + 1),
    }


def recorded() -> list[list[dict[str, Any]]]:
    """Two "prompts" of 16 samples: fewer leave ranges that new noise often exceeds."""
    return [[unet_inputs(t, batch=16, seed=1000 * prompt) for t in TIMESTEPS] for prompt in range(2)]


@torch.no_grad()
def run(unet: nn.Module, **inputs: Any) -> torch.Tensor:
    return unet(**inputs).sample


def calibrated(unet: nn.Module, wbits: int = 8, abits: int = 8, groups: int = 16) -> Quantized:
    unet = copy.deepcopy(unet)
    return unet, calibrate_paper(unet, recorded(), wbits=wbits, abits=abits, groups=groups)


@pytest.fixture(scope="module")
def float_unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture(scope="module")
def w4a8(float_unet: UNet2DConditionModel) -> Quantized:
    return calibrated(float_unet, wbits=4)


def at_step(index: int, steps: int = 2) -> StepState:
    state = StepState(range(steps))
    state.index = index
    return state


def observe(*steps: torch.Tensor, groups: int, bits: int = 8) -> Grouping:
    ranges = AxisRanges("layer", len(steps))
    for step, x in enumerate(steps):
        ranges.update(step, x)
    return group_activation(ranges, bits, groups)


# The step.


def test_step_is_the_nearest_calibrated_timestep() -> None:
    state = StepState([801, 401, 1])
    for timestep, index in ((801, 0), (999, 0), (602, 0), (500.5, 1), (0, 2), (torch.tensor([401, 401]), 1)):
        state.set_timestep(timestep)
        assert state.index == index
    with pytest.raises(DgqError, match="several timesteps"):
        state.set_timestep(torch.tensor([401, 1]))


def test_a_layer_without_a_step_says_so() -> None:
    activation = PaperActivation({"axis": "tensor", "groups": 1, "size": 1}, 8, "down.proj", StepState([1]))
    with pytest.raises(DgqError, match=r"down\.proj.*step"):
        activation(torch.ones(1, 1))


# Linear and Conv2d.


@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 7)])
def test_linear_is_rounded_input_times_rounded_weight(wbits: int, shape: tuple[int, ...]) -> None:
    module = nn.Linear(7, 6, bias=wbits == 8)  # 7: an odd row of nibbles
    steps = randn(*shape, seed=1), 3 * randn(*shape, seed=2)
    grouping = observe(*steps, groups=4)
    plan = {**layer_geometry(module, "l"), "wbits": wbits, "abits": 8, "input": activation_plan(grouping)}
    weight = dequantize_weight(*quantize_weight(module.weight.detach(), wbits))
    dim = -2 if grouping.axis == "pixel" else -1
    for step, x in enumerate(steps):
        layer = PaperLinear.from_float(module, plan, grouping, "l", at_step(step))
        assert layer.weight.numel() == 6 * (4 if wbits == 4 else 7)
        torch.testing.assert_close(layer.float_weight(), weight, rtol=0, atol=0)
        scale, zero_point = (t[step][grouping.index] for t in (grouping.scale, grouping.zero_point))
        expected = F.linear(fake_quantize(x, scale, zero_point, 8, dim), weight, module.bias)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize(("stride", "padding", "conv_groups"), [(1, 1, 1), (2, 0, 1), ((1, 2), (0, 1), 2)])
@pytest.mark.parametrize("outliers", ["channel", "pixel"])
def test_conv_rounds_each_channel_or_pixel_with_its_group(
    wbits: int, stride: Any, padding: Any, conv_groups: int, outliers: str
) -> None:
    module = nn.Conv2d(6, 4, 3, stride, padding, groups=conv_groups)
    x = randn(2, 6, 5, 7)
    level = torch.tensor([9.0, -9.0])
    if outliers == "channel":
        x[:, 2] += level[:, None, None]
    else:
        x[:, :, 3, 1] += level[:, None]
    grouping = observe(x.flatten(2).transpose(1, 2), groups=3)
    assert grouping.axis == outliers
    plan = {**layer_geometry(module, "c"), "wbits": wbits, "abits": 8, "input": activation_plan(grouping)}
    layer = PaperConv2d.from_float(module, plan, grouping, "c", at_step(0, steps=1))
    rounded = torch.empty_like(x)
    for c in range(6):
        for h in range(5):
            for w in range(7):
                group = grouping.index[c if outliers == "channel" else h * 7 + w]
                scale, zero_point = grouping.scale[0, group], grouping.zero_point[0, group]
                codes = (torch.round(x[:, c, h, w] / scale) + zero_point).clamp(0, 255)
                rounded[:, c, h, w] = (codes - zero_point) * scale
    weight = dequantize_weight(*quantize_weight(module.weight.detach(), wbits))
    expected = F.conv2d(rounded, weight, module.bias, stride, padding, groups=conv_groups)
    torch.testing.assert_close(layer(x), expected)


def test_unsupported_padding_and_broken_weights_are_named() -> None:
    with pytest.raises(DgqError, match=r"conv_x.*padding"):
        layer_geometry(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "conv_x")
    module = nn.Linear(3, 3)
    module.weight.data[0, 0] = torch.nan
    grouping = observe(randn(1, 2, 3), groups=1)
    plan = {**layer_geometry(module, "l"), "wbits": 4, "abits": 8, "input": activation_plan(grouping)}
    with pytest.raises(DgqError, match=r"proj_7.*NaN"):
        PaperLinear.from_float(module, plan, grouping, "proj_7", at_step(0, steps=1))


def test_another_size_is_an_error_only_where_pixels_are_grouped() -> None:
    plan = {"axis": "pixel", "groups": 2, "size": 64}
    activation = PaperActivation(plan, 8, "mid_block.conv", at_step(0), None)
    with pytest.raises(DgqError, match=r"mid_block\.conv.*64.*100") as error:
        activation(randn(1, 100, 3))
    assert "--recipe integer" in str(error.value.hint)
    by_channel = PaperActivation({"axis": "channel", "groups": 2, "size": 3}, 8, "c", at_step(0), None)
    assert by_channel(randn(1, 100, 3)).shape == (1, 100, 3)


# Attention.


def attention(cross: bool, **kwargs: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(16, 24 if cross else None, heads=2, dim_head=8, **kwargs).eval()


def processor_for(attn: Attention, bits: int, scale: float) -> PaperAttnProcessor:
    plan = {"kind": "attention", "cross": attn.is_cross_attention, "abits": bits}
    plan |= {part: {"axis": "tensor", "groups": 1, "size": 1} for part in ("query", "key", "value")}
    processor = PaperAttnProcessor(plan, "attn", at_step(0))
    for part in (processor.query, processor.key, processor.value):
        part.scale.fill_(scale)
        part.zero_point.fill_(2 ** (bits - 1))
    return processor


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_published_formula(cross: bool, masked: bool) -> None:
    attn = attention(cross)
    processor = processor_for(attn, 6, 0.07)
    x, text = randn(2, 5, 16), randn(2, TOKENS, 24) if cross else None
    context = x if text is None else text
    mask = torch.zeros(2, 1, context.shape[1])
    if masked:
        mask[0, 0, 2] = -1e4
    attn.set_processor(processor)
    output = attn(x, text, attention_mask=mask if masked else None)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return ((t / 0.07).round() + 32).clamp(0, 63).sub(32) * 0.07

    first = int(cross)
    heads = torch.zeros(2, 5, 16)
    for b in range(2):
        q, k, v = rounded(attn.to_q(x[b])), attn.to_k(context[b]), rounded(attn.to_v(context[b]))
        k = torch.cat([k[:first], rounded(k[first:])])
        columns = [slice(0, 8), slice(8, 16)]
        weights = [torch.softmax(q[:, c] @ k[:, c].T * 8**-0.5 + mask[b], dim=-1) for c in columns]
        d = max(float(w[:, first:].max()) for w in weights)
        for c, w in zip(columns, weights, strict=True):
            for row in range(5):
                for column in range(first, len(k)):
                    a = float(w[row, column])
                    code = min(max(round(-math.log2(a / d)), 0), 63) if a > 0 else 63
                    w[row, column] = d * 2.0**-code
            heads[b, :, c] = w @ v[:, c]
    torch.testing.assert_close(output, attn.to_out[0](heads))


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
def test_attention_of_one_group_rounds_probabilities_in_equal_steps(cross: bool) -> None:
    attn = attention(cross)
    one = {"axis": "tensor", "groups": 1, "size": 1}
    plan = {"kind": "attention", "cross": cross, "abits": 6}
    plan |= dict.fromkeys(("query", "key", "value", "probabilities"), one)
    processor = PaperAttnProcessor(plan, "attn", at_step(1))
    x, text = randn(2, 5, 16), randn(2, TOKENS, 24) if cross else None
    context = x if text is None else text
    steps = {"query": (0.07, 30.0), "key": (0.08, 32.0), "value": (0.06, 34.0), "probabilities": (0.005, -3.0)}
    for part, (scale, zero_point) in steps.items():
        getattr(processor, part).scale[1] = scale
        getattr(processor, part).zero_point[1] = zero_point
    attn.set_processor(processor)

    def rounded(t: torch.Tensor, part: str) -> torch.Tensor:
        scale, zero_point = steps[part]
        return ((t / scale).round() + zero_point).clamp(0, 63).sub(zero_point) * scale

    heads = torch.zeros(2, 5, 16)
    for b in range(2):
        q, k, v = (
            rounded(project(t[b]), part)  # the start token's key too
            for project, t, part in (
                (attn.to_q, x, "query"),
                (attn.to_k, context, "key"),
                (attn.to_v, context, "value"),
            )
        )
        for c in (slice(0, 8), slice(8, 16)):
            weights = torch.softmax(q[:, c] @ k[:, c].T * 8**-0.5, dim=-1)
            heads[b, :, c] = rounded(weights, "probabilities") @ v[:, c]
    torch.testing.assert_close(attn(x, text), attn.to_out[0](heads))


@torch.no_grad()
def test_attention_follows_diffusers_around_the_product() -> None:
    """Residual, group norm, 4-D input, rescaling. Zero queries make A uniform: only v is rounded."""
    attn = attention(False, norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0)
    attn.to_q.weight.zero_()
    x = randn(2, 16, 2, 3)
    expected = attn(x)
    attn.set_processor(processor_for(attn, 8, 0.02))
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=0.02)


@torch.no_grad()
def test_attention_normalises_the_text_states() -> None:
    attn = attention(True, cross_attention_norm="layer_norm")
    attn.to_q.weight.zero_()
    x, text = randn(1, 3, 16), randn(1, TOKENS, 24) * 40 + 7
    expected = attn(x, text)
    attn.set_processor(processor_for(attn, 8, 0.02))
    torch.testing.assert_close(attn(x, text), expected, rtol=0, atol=0.02)


def test_unsupported_attention_is_named() -> None:
    with pytest.raises(DgqError, match=r"up\.attn.*norm_q"):
        layer_geometry(attention(False, qk_norm="layer_norm"), "up.attn")
    with pytest.raises(DgqError, match=r"up\.attn.*grouped"):
        layer_geometry(attention(False, kv_heads=1), "up.attn")
    cross = attention(True)
    cross.set_processor(processor_for(cross, 8, 0.1))
    with pytest.raises(DgqError, match="needs encoder_hidden_states"):
        cross(randn(1, 3, 16))


def test_attention_made_anew_by_its_class_is_refused() -> None:
    """As diffusers does for an IP-Adapter."""
    attn = attention(False)
    attn.set_processor(processor_for(attn, 8, 0.1))
    with pytest.raises(DgqError, match="calibrated ranges") as refused:
        type(attn.processor)()
    assert refused.value.hint is not None
    assert "IP-Adapters" in refused.value.hint


# A whole UNet.


def test_every_layer_but_the_first_and_last_convolution_is_quantized(w4a8: Quantized) -> None:
    unet, table = w4a8
    left = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert left == ["conv_in", "conv_out"]
    assert all(isinstance(p, PaperAttnProcessor) for p in unet.attn_processors.values())
    assert table["layers"]["time_embedding.linear_1"]["input"]["axis"] == "tensor"
    assert table["layers"]["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]["cross"] is True
    assert table["timesteps"] == [801.0, 401.0, 1.0]
    inputs = {plan["input"]["axis"] for plan in table["layers"].values() if "input" in plan}
    assert inputs == {"channel", "pixel", "tensor"}


def test_output_improves_with_bits(float_unet: UNet2DConditionModel) -> None:
    inputs = unet_inputs(401, seed=77)
    reference = run(float_unet, **inputs)
    four, six, eight = (sqnr(reference, run(calibrated(float_unet, abits=b)[0], **inputs)) for b in (4, 6, 8))
    assert eight > six > four
    assert eight > 20


def test_groups_save_what_channel_outliers_cost() -> None:
    unet = tiny_unet(3)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data[::11] *= 20
    inputs = unet_inputs(401, seed=77)
    reference = run(unet, **inputs)
    one, sixteen = (sqnr(reference, run(calibrated(unet, abits=6, groups=g)[0], **inputs)) for g in (1, 16))
    assert sixteen > one + 3


def test_an_image_alone_equals_itself_in_a_batch(w4a8: Quantized) -> None:
    # In float64, because float32 products round by batch size, and their last bit may move a code.
    unet = copy.deepcopy(w4a8[0]).double()
    batch = {k: v.double() if v.ndim else v for k, v in unet_inputs(401, batch=3, seed=5).items()}
    together = run(unet, **batch)
    for i in range(3):
        alone = {k: v[i : i + 1] if v.ndim else v for k, v in batch.items()}
        torch.testing.assert_close(together[i : i + 1], run(unet, **alone), rtol=1e-9, atol=1e-9)


def test_steps_use_their_own_scales(w4a8: Quantized) -> None:
    unet, _ = w4a8
    state = unet.time_embedding.linear_1.input.state
    for index, timestep in enumerate(TIMESTEPS):
        run(unet, **unet_inputs(timestep))
        assert state.index == index
    layer = unet.mid_block.resnets[0].conv1
    assert not torch.equal(layer.input.scale[0], layer.input.scale[2])
    unet(unet_inputs(1)["sample"], 795, unet_inputs(1)["encoder_hidden_states"])  # positional, between steps
    assert state.index == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_dict_round_trip(w4a8: Quantized, device: str) -> None:
    unet, table = w4a8
    table = json.loads(json.dumps(table))
    with torch.device(device):
        empty = tiny_unet(1)
    build_paper_skeleton(empty, table)
    assert all(t.device.type == device for t in empty.state_dict().values())
    empty.load_state_dict(unet.state_dict(), strict=True, assign=device == "meta")
    inputs = unet_inputs(401, seed=3)
    assert torch.equal(run(empty.eval(), **inputs), run(unet, **inputs))


def test_a_table_of_another_model_is_refused(w4a8: Quantized) -> None:
    _, table = w4a8
    name = "mid_block.resnets.0.conv1"
    missing = copy.deepcopy(table)
    del missing["layers"][name]
    with pytest.raises(DgqError, match=f"{name}: only the model"):
        build_paper_skeleton(tiny_unet(), missing)
    strided = copy.deepcopy(table)
    strided["layers"][name]["stride"] = [2, 2]
    with pytest.raises(DgqError, match=f"{name}: stride"):
        build_paper_skeleton(tiny_unet(), strided)
    spelled = copy.deepcopy(table)
    spelled["layers"][name]["input"]["axis"] = "row"
    with pytest.raises(DgqError, match=f"{name}.*'row'"):
        build_paper_skeleton(tiny_unet(), spelled)
    for field in ("wbits", "input", "abits"):
        damaged = copy.deepcopy(table)
        del damaged["layers"][name][field]
        with pytest.raises(DgqError, match=f"damaged.*{field}"):
            build_paper_skeleton(tiny_unet(), damaged)


def test_four_bit_weights_take_half_the_bytes(w4a8: Quantized) -> None:
    unet, _ = w4a8
    layer = unet.mid_block.resnets[0].conv1
    assert layer.weight.numel() == layer.weight_shape[0] * layer.weight_shape[1] * 9 // 2


def test_casting_keeps_scales_and_works_in_half_precision(w4a8: Quantized) -> None:
    unet, _ = w4a8
    inputs = unet_inputs(401)
    reference = run(unet, **inputs)
    cast = copy.deepcopy(unet).to(torch.bfloat16)
    before, after = unet.state_dict(), cast.state_dict()
    integer = {k for k in before if before[k].dtype == torch.uint8}
    kept = integer | {k for k in before if k.endswith(("scale", "zero_point"))}
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in kept)
    half = run(cast, **{k: v.bfloat16() if v.ndim else v for k, v in inputs.items()})
    assert sqnr(reference, half.float()) > 10


def test_a_copy_has_its_own_step(w4a8: Quantized) -> None:
    unet, _ = w4a8
    run(unet, **unet_inputs(801))
    other = copy.deepcopy(unet)
    run(other, **unet_inputs(1))
    assert unet.time_embedding.linear_1.input.state.index == 0
    assert other.time_embedding.linear_1.input.state.index == 2


def test_another_image_size_is_refused_by_name(w4a8: Quantized) -> None:
    with pytest.raises(DgqError, match="calibrated for 64 pixels or tokens, but got 144"):
        run(w4a8[0], **unet_inputs(401, size=12))


@pytest.mark.parametrize("bad", [{"wbits": 3}, {"abits": 2}, {"groups": 0}])
def test_arguments_are_checked(float_unet: UNet2DConditionModel, bad: dict[str, int]) -> None:
    arguments = {"wbits": 4, "abits": 8, "groups": 8} | bad
    with pytest.raises(DgqError, match="has no W"):
        calibrate_paper(float_unet, recorded(), **arguments)
    with pytest.raises(DgqError, match="no recorded"):
        calibrate_paper(float_unet, [], wbits=4, abits=8, groups=8)


@pytest.mark.parametrize("groups", [1, 8])
def test_a_failed_calibration_leaves_the_unet_float(float_unet: UNet2DConditionModel, groups: int) -> None:
    unet = copy.deepcopy(float_unet)
    processors = unet.attn_processors
    inputs = unet_inputs(401)
    reference = run(unet, **inputs)
    with pytest.raises(DgqError, match=r"64 and 144|144 and 64"):
        calibrate_paper(unet, [[inputs, unet_inputs(1)], [unet_inputs(401, size=12)]], wbits=4, abits=8, groups=groups)
    assert unet.attn_processors == processors
    assert torch.equal(run(unet, **inputs), reference)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize("groups", [1, 2])
def test_the_start_token_has_a_part_in_key_ranges_only_with_one_group(
    float_unet: UNet2DConditionModel, groups: int
) -> None:
    plain, loud = unet_inputs(401), unet_inputs(401)
    loud["encoder_hidden_states"][:, 0] *= 100
    keys, values = [], []
    for inputs in (plain, loud):
        unet = copy.deepcopy(float_unet)
        calibrate_paper(unet, [[inputs]], wbits=8, abits=8, groups=groups)
        processor = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.processor
        keys.append(processor.key.scale)
        values.append(processor.value.scale)
    assert torch.equal(keys[0], keys[1]) == (groups > 1)
    assert values[1].max() > values[0].max()


def test_one_group_takes_the_range_of_the_float_probabilities(float_unet: UNet2DConditionModel) -> None:
    unet, table = calibrated(float_unet, abits=6, groups=1)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert table["layers"][name]["probabilities"] == {"axis": "tensor", "groups": 1, "size": 1}
    attn, seen = float_unet.get_submodule(name), []

    def keep(_: nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        query, key = attn.to_q(args[0]), attn.to_k(kwargs["encoder_hidden_states"])
        query, key = (attn.head_to_batch_dim(part) for part in (query, key))
        seen.append(attn.get_attention_scores(query, key))

    handle = attn.register_forward_pre_hook(keep, with_kwargs=True)
    for prompt in recorded():
        for inputs in prompt:
            run(float_unet, **inputs)
    handle.remove()
    found = unet.get_submodule(name).processor.probabilities
    for step in range(len(TIMESTEPS)):
        both = torch.cat([seen[step], seen[step + len(TIMESTEPS)]])
        scale = float(both.max() - both.min()) / 63
        assert float(found.scale[step]) == pytest.approx(scale, rel=1e-4)
        assert float(found.zero_point[step]) == round(-float(both.min()) / scale)


def test_a_table_without_probabilities_keeps_log_attention(float_unet: UNet2DConditionModel) -> None:
    unet, table = calibrated(float_unet, groups=1)
    inputs = unet_inputs(401, seed=3)
    linear = run(unet, **inputs)
    rebuilt = tiny_unet(1)
    build_paper_skeleton(rebuilt, json.loads(json.dumps(table)))
    rebuilt.load_state_dict(unet.state_dict(), strict=True)
    assert torch.equal(run(rebuilt, **inputs), linear)

    for plan in table["layers"].values():
        plan.pop("probabilities", None)
    older = tiny_unet(1)
    build_paper_skeleton(older, table)
    state = {name: tensor for name, tensor in unet.state_dict().items() if ".probabilities." not in name}
    older.load_state_dict(state, strict=True)
    for processor in unet.attn_processors.values():
        processor.probabilities = None
    logarithmic = run(unet, **inputs)
    assert torch.equal(run(older, **inputs), logarithmic)
    assert not torch.allclose(logarithmic, linear)


def test_calls_at_one_timestep_share_scales_and_progress_counts_them(
    float_unet: UNet2DConditionModel,
) -> None:
    seen: list[tuple[str, int, int]] = []
    table = calibrate_paper(
        copy.deepcopy(float_unet),
        [[unet_inputs(401), unet_inputs(401, seed=9)]],
        wbits=8,
        abits=8,
        groups=1,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert table["timesteps"] == [401.0]
    layers = len(table["layers"])
    quantized = [("quantize", i + 1, layers) for i in range(layers)]
    assert seen == [("calibrate", 1, 2), ("calibrate", 2, 2), *quantized]
