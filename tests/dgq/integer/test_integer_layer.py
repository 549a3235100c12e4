"""Integer layers: bit-exact sums, real packing, and what `.to` must not do."""

import copy
import dataclasses
import gc

import pytest
import torch
from comparing import assert_close
from torch import nn

from dgq.integer.channels import rotation_block
from dgq.integer.layer import IntegerLayer
from dgq.integer.plan import Layer, plan_layer
from dgq.integer.prepared import Dense, Engine
from dgq.integer.rounding import quantize_layers
from dgq.integer.statistics import Statistics
from dgq.integer.stored import StoredWeight, stored_shapes
from dgq.recipe import LayerPlan, Recipe
from dgq_kernels import backend, native, quantize_rows, quantize_samples
from dgq_kernels.conv2d import cpu as conv_cpu
from dgq_kernels.conv2d import reference as conv_reference
from dgq_kernels.linear import cpu as linear_cpu
from dgq_kernels.linear import reference as linear_reference


def outliers(x, channel_axis):
    index = [slice(None)] * x.dim()
    index[channel_axis] = slice(0, 3)
    x[tuple(index)] *= 15
    return x


def quantized(module, x, **recipe):
    """Quantize one float module on the inputs x."""
    wanted = Recipe(**recipe)
    layer = Layer("layer", module, plan_layer(module, wanted.wbits, wanted))
    statistics = Statistics(layer.plan, 1)
    statistics.add(x)
    return quantize_layers([layer], statistics, wanted)[0]


CASES = [
    (lambda: nn.Linear(96, 80), lambda: outliers(torch.randn(2, 150, 96), -1)),
    (lambda: nn.Linear(42, 6, bias=False), lambda: outliers(torch.randn(300, 42), -1)),
    (lambda: nn.Conv2d(24, 40, 3, padding=1), lambda: outliers(torch.randn(4, 24, 8, 8), 1)),
    (lambda: nn.Conv2d(32, 20, 3, stride=2, padding=1), lambda: outliers(torch.randn(4, 32, 8, 8), 1)),
    (lambda: nn.Conv2d(33, 24, 1), lambda: outliers(torch.randn(4, 33, 8, 8), 1)),
]


@pytest.mark.parametrize("build, data", CASES)
@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("channels", ["none", "smooth", "shift", "rotate"])
@torch.no_grad()
def test_layer_reproduces_the_float_module(build, data, wbits, channels):
    torch.manual_seed(0)
    module, x = build(), data()
    result = quantized(module, x, wbits=wbits, channels=channels)
    y, expected = result.layer(x), module(x)
    assert y.shape == expected.shape
    sqnr = float(20 * torch.log10(expected.norm() / (y - expected).norm()))
    assert sqnr > (17 if wbits == 4 else 33)
    if module.bias is None:  # the reported figure leaves the bias out
        assert abs(sqnr - result.sqnr_db) < 3


@pytest.mark.skipif(backend.cpu_path() == "reference", reason="no exact oneDNN product on this CPU")
@pytest.mark.parametrize("build, data", CASES)
@pytest.mark.parametrize("wbits", [4, 8])
@torch.no_grad()
def test_the_sums_of_a_layer_are_integers_bit_for_bit(build, data, wbits, monkeypatch):
    """Without the engine oneDNN multiplies the stored codes: its sums equal the integer reference exactly."""
    monkeypatch.setattr(native, "available", lambda: False)
    torch.manual_seed(1)
    module, x = build(), data()
    layer = quantized(module, x, wbits=wbits, channels="shift").layer
    plan, ready = layer.plan, layer.prepare(x.device)
    inv = layer.inv_divisor if plan.channels != "none" else None
    matrix = layer.integer_weight() if ready.position is not None else layer.natural_weight
    if plan.kind == "conv2d":
        codes, _, _ = quantize_samples(x, plan.abits, inv, plan.padding, ready.position)
        weight = matrix.view(plan.out_features, 3, 3, -1).permute(0, 3, 1, 2)
        expected = conv_reference.accumulate(codes, weight, plan.stride, plan.class_ends)
        got = conv_cpu.accumulate(codes, ready.tensors, plan.class_ends, plan.out_features, plan.stride, ready.split)
    else:
        rows = x.permute(0, 2, 3, 1) if plan.kind == "pointwise" else x
        codes, _, _ = quantize_rows(rows.reshape(-1, plan.in_features), plan.abits, inv, ready.position)
        expected = linear_reference.accumulate(codes, matrix, plan.class_ends)
        got = linear_cpu.accumulate(codes, ready.tensors, plan.class_ends, plan.out_features, ready.split)
    assert torch.equal(got.long(), expected)


@pytest.mark.skipif(not native.available(), reason="no CPU engine")
@pytest.mark.parametrize("build, data", CASES)
@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("channels", ["smooth", "rotate"])
@torch.no_grad()
def test_the_engine_gives_the_bits_of_the_reference(build, data, wbits, channels, monkeypatch):
    torch.manual_seed(1)
    module, x = build(), data()
    layer = quantized(module, x, wbits=wbits, channels=channels).layer
    y = layer(x)
    assert isinstance(layer.prepare(x.device), Engine)
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    layer.restore()
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("build, data", CASES)
@pytest.mark.parametrize("wbits", [4, 8])
@torch.no_grad()
def test_a_rotated_layer_on_triton_equals_the_reference(build, data, wbits, monkeypatch):
    """Alone, and behind a norm within the quantizing kernel, whose last digits move some codes by one."""
    torch.manual_seed(1)
    module, x = build(), data()
    plain = quantized(module, x, wbits=wbits, channels="smooth").layer
    block = rotation_block(plain.plan.in_features)
    layer = IntegerLayer(dataclasses.replace(plain.plan, rotation=block))
    for name, value in plain.state_dict().items():
        layer.set_stored(name, value)
    channels = x.shape[-1 if isinstance(module, nn.Linear) else 1]
    norm = nn.LayerNorm(channels) if isinstance(module, nn.Linear) else nn.GroupNorm(1, channels)
    results = []
    for name in ("reference", "triton"):
        monkeypatch.setenv("DGQ_BACKEND", name)
        layer.restore()
        results.append((layer(x), layer(x, norm=norm)))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] - results[1][1]).norm() < 1e-3 * results[0][1].norm()


@pytest.mark.filterwarnings("ignore")  # walking every object touches deprecated ones
@torch.no_grad()
def test_no_float_copy_of_the_weight_exists():
    """Neither the layer nor anything a forward pass leaves behind holds as many floats as the weight."""
    torch.manual_seed(0)
    module, x = nn.Linear(384, 512), torch.randn(64, 384)
    layer = quantized(module, x, wbits=4).layer
    size = module.weight.numel()
    del module
    layer(x)
    gc.collect()
    floats = [
        item
        for item in gc.get_objects()
        if isinstance(item, torch.Tensor) and item.is_floating_point() and item.numel() >= size
    ]
    assert not floats
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert stored < 0.29 * 2 * size
    assert all(not t.is_floating_point() for t in layer.prepare(x.device).tensors)


@torch.no_grad()
def test_casting_moves_no_scale():
    torch.manual_seed(0)
    module, x = nn.Linear(64, 32), torch.randn(10, 64)
    layer = quantized(module, x, wbits=8, channels="smooth").layer
    expected = layer(x)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        cast(layer)
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer(x), expected)
    assert layer(x.half()).dtype == torch.float16


@torch.no_grad()
def test_copies_work_after_the_first_call():
    module, x = nn.Linear(64, 32), torch.randn(10, 64)
    layer = quantized(module, x).layer
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def _assigned(layer, x, tensors):
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer(x)


def _moved(layer, x, tensors):
    for name, tensor in tensors.items():
        layer.get_parameter(name).data = tensor
    return layer(x)


def _written(layer, x, tensors):
    for name, tensor in tensors.items():
        layer.get_parameter(name).copy_(tensor)
    return layer(x)


def _lent(layer, x, tensors):
    before = layer(x)
    result = torch.func.functional_call(layer, tensors, (x,))
    assert torch.equal(layer(x), before)
    return result


@pytest.mark.parametrize("change", [_assigned, _moved, _written, _lent])
@torch.no_grad()
def test_scales_and_biases_in_the_place_of_others_are_read(change):
    torch.manual_seed(0)
    x = outliers(torch.randn(10, 64), -1)
    layer = quantized(nn.Linear(64, 32), x, wbits=8, channels="smooth").layer
    names = ("bias", "weight_scale", "inv_divisor")
    others = {name: layer.get_parameter(name) * (1 + torch.rand(len(layer.get_parameter(name)))) for name in names}
    changed, expected = copy.deepcopy(layer), copy.deepcopy(layer)
    changed(x)
    expected.load_state_dict(others, strict=False)
    result = change(changed, x, others)
    assert torch.equal(result, expected(x))
    assert not torch.equal(result, layer(x))


@pytest.mark.parametrize("build, data", CASES)
@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("channels", ["none", "smooth", "shift"])
@torch.no_grad()
def test_the_stored_form_comes_back_from_the_packed_one(build, data, wbits, channels):
    torch.manual_seed(0)
    module, x = build(), data()
    layer = quantized(module, x, wbits=wbits, channels=channels).layer
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    y = layer(x)
    if isinstance(layer.prepare(x.device), Engine):
        assert isinstance(layer.stored, StoredWeight)  # the engine's blocks are the only copy
    again = layer.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    name = "weight" if wbits == 8 else "packed"
    layer.load_state_dict({**stored, name: torch.zeros_like(stored[name])})
    assert not torch.equal(layer(x), y)
    layer.load_state_dict(stored)
    assert torch.equal(layer(x), y)


@torch.no_grad()
def test_layers_add_what_they_are_given():
    torch.manual_seed(0)
    for build, data in CASES:
        module, x = build(), data()
        layer = quantized(module, x).layer
        y = layer(x)
        residual = torch.randn_like(y)
        assert torch.allclose(layer(x, residual), y + residual, rtol=0, atol=1e-5)
        if layer.plan.kind == "conv2d":
            each = torch.randn(y.shape[:2])
            expected = y + each[:, :, None, None] + residual
            assert torch.allclose(layer(x, residual, each), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 60])  # 60: halves that are no whole blocks
@torch.no_grad()
def test_layers_gate_their_output(width):
    torch.manual_seed(0)
    module, x = nn.Linear(48, width), torch.randn(10, 48)
    layer = quantized(module, x).layer
    value, gate = layer(x).chunk(2, -1)
    assert torch.allclose(layer.gated(x), value * nn.functional.gelu(gate), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_reference_backend_agrees(monkeypatch):
    torch.manual_seed(0)
    for build, data in CASES:
        module, x = build(), data()
        layer = quantized(module, x, wbits=4, channels="shift").layer
        fast = layer(x)
        layer.restore()
        with monkeypatch.context() as patch:
            patch.setenv("DGQ_BACKEND", "reference")
            slow = layer(x)
        layer.restore()
        assert_close("fast", fast, slow, 1e-5)


def test_buffer_sizes_are_what_the_format_says():
    plan = LayerPlan("conv2d", 320, 640, 4, 8, True, kernel_size=3, padding=1, class_ends=[320])
    specs = stored_shapes(plan)
    assert specs["packed"] == ((640, 1440), torch.uint8)
    assert specs["subscales"] == ((640, 45), torch.uint8)
    with torch.device("meta"):
        assert IntegerLayer(plan).packed.device.type == "meta"


@torch.no_grad()
def test_picture_alone_equals_picture_in_a_batch():
    torch.manual_seed(0)
    module = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(4, 16, 8, 8) * torch.tensor([1.0, 5, 0.2, 9]).view(4, 1, 1, 1)
    layer = quantized(module, x).layer
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


@pytest.mark.parametrize("build, data", CASES)
@pytest.mark.parametrize("wbits", [4, 8])
@torch.no_grad()
def test_kernels_read_what_is_stored(build, data, wbits, monkeypatch):
    """The weight is in memory once: no second form of it, but of a reordered int8 one, and that is counted once."""
    torch.manual_seed(0)
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    module, x = build(), data()
    for channels in ("none", "shift"):
        layer = quantized(module, x, wbits=wbits, channels=channels).layer
        layer.restore()
        assert layer.prepared_bytes == 0
        ready = layer.prepare(x.device)
        copied = wbits == 8 and layer.plan.reordered and ready.position is None
        assert layer.prepared_bytes == (layer.weight.nbytes if copied else 0)
        if isinstance(ready, Dense) and not copied:
            assert ready.operand(layer).untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
