"""The implicit-GEMM convolutions against the reference: exact sums, so outputs agree to the epilogue's rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels import conv2d, conv2d_int4, packing, quantize_samples
from dgq_kernels.conv2d import reference
from dgq_kernels.conv2d import triton as kernels
from dgq_kernels.linear.tiles import Config, Tiling

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EXACT = {"rtol": 1e-6, "atol": 1e-4} if CUDA else {"rtol": 0, "atol": 0}


def inputs(batch, channels, height, width, n, kernel, padding, seed=0):
    """codes with zero points at the border, scale, zero_point, weight, weight_scale, bias."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=g) + torch.arange(batch)[:, None, None, None]
    weight = torch.randint(-128, 128, (n, channels, kernel, kernel), dtype=torch.int8, generator=g)
    return (
        *quantize_samples(x, 8, None, padding),
        weight,
        (torch.rand(n, generator=g) + 0.1) / 100,
        torch.randn(n, generator=g),
    )


def poisoned(expected):
    """A channels-last NaN buffer of the shape of `expected` and the guard behind it, which no store may touch."""
    whole = torch.full((expected.numel() + 64,), float("nan"), dtype=expected.dtype, device=DEVICE)
    b, n, h, w = expected.shape
    return whole[: expected.numel()].view(b, h, w, n).permute(0, 3, 1, 2), whole[expected.numel() :]


def compare(run, expected, **tolerance):
    out, guard = poisoned(expected)
    run(out)
    torch.testing.assert_close(out.cpu(), expected, **(tolerance or EXACT))
    assert guard.isnan().all()


def on_device(arguments):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]


def check_int8(
    data, stride, ends, *, dtype=torch.float32, bias=True, residual=False, config=None, splits=1, **tolerance
):
    codes, scale, zero_point, weight, weight_scale, b = data
    sums = reference.accumulate(torch.ones_like(codes[:1, :, : weight.shape[2], : weight.shape[3]]), weight, 1, ends)
    arguments = (
        codes,
        scale,
        zero_point,
        weight,
        weight_scale,
        sums.flatten().int(),
        b if bias else None,
        stride,
        dtype,
        ends,
    )
    plain = reference.conv2d(*arguments)
    extra = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(dtype) if residual else None
    expected = reference.conv2d(*arguments, extra)
    moved = on_device((*arguments, extra))
    compare(
        lambda out: kernels.conv2d(*moved, out=out, tiling=Tiling(config, splits) if config else None),
        expected,
        **tolerance,
    )


def check_int4(
    data, stride, group, *, residual=False, extreme=None, dtype=torch.float32, config=None, splits=1, **tolerance
):
    codes, scale, zero_point, weight, weight_scale, bias = data
    n, channels, kernel, _ = weight.shape
    k = channels * kernel**2
    g = torch.Generator().manual_seed(1)
    w4 = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=g)
    m = torch.randint(0, 16, (n, packing.padded_length(k, group) // group), dtype=torch.uint8, generator=g)
    if extreme is not None:
        w4.fill_(extreme)
        m.fill_(15)
    packed, subscales = packing.pack_int4(w4, group), packing.pack_subscales(m)
    sums = packing.expand_two_level(packed, subscales, k, group).sum(1, dtype=torch.int32)
    arguments = (
        codes,
        scale,
        zero_point,
        packed,
        subscales,
        weight_scale,
        sums,
        bias,
        kernel,
        stride,
        dtype,
        group,
    )
    plain = reference.conv2d_int4(*arguments)
    extra = torch.randn(plain.shape, generator=g).to(dtype) if residual else None
    expected = reference.conv2d_int4(*arguments, extra)
    moved = on_device((*arguments, extra))
    compare(
        lambda out: kernels.conv2d_int4(*moved, out=out, tiling=Tiling(config, splits) if config else None),
        expected,
        **tolerance,
    )


# batch, channels, height, width, outputs, kernel, padding, stride; ragged in every direction
SHAPES = [
    (2, 6, 9, 7, 42, 3, 1, 2),
    (1, 42, 6, 6, 123, 3, 1, 1),
    (3, 33, 5, 7, 6, 1, 0, 1),
    (2, 16, 7, 9, 13, 1, 0, 2),
    (1, 64, 8, 8, 64, 3, 0, 1),
    (2, 3, 5, 5, 1, 5, 2, 1),
    (1, 1, 1, 1, 1, 3, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_ragged_shapes_and_strides(shape, bits):
    *sizes, stride = shape
    data = inputs(*sizes)
    if bits == 8:
        check_int8(data, stride, [sizes[1]], residual=True)
    else:
        check_int4(data, stride, 32, residual=True)


@pytest.mark.parametrize("ends", [[20, 42], [0, 42], [42, 42, 42], [7, 7, 30, 42], [0, 0, 0, 42]])
@pytest.mark.parametrize("stride", [1, 2])
def test_shift_classes(ends, stride):
    """Boundaries inside a chunk, several in one chunk, empty classes first, last and between."""
    data = inputs(2, 42, 5, 6, 10, 3, 1)
    check_int8(data, stride, ends)
    check_int8(data, stride, ends, config=Config(32, 32, 32, 4, 1))


@pytest.mark.parametrize("channels", [64, 32, 48])
def test_gpu_tiles(channels):
    """Chunks that fill a row of taps, that cross its end, and a K tail; several tiles each way."""
    data = inputs(2, channels, 6, 5, 70, 3, 1)
    check_int8(data, 1, [channels], config=Config(32, 64, 64, 4, 1))
    check_int4(data, 1, 64, config=Config(32, 64, 64, 4, 1))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 48, 6, 5, 70, 3, 1, 1), (2, 32, 6, 5, 70, 3, 1, 1)])
def test_one_product_per_step(shape, splits):
    """Steps within a row of taps, across one end and across several, and a K tail."""
    *sizes, stride = shape
    config = Config(32, 64, 32, 4, 1, True)
    check_int8(inputs(*sizes), stride, [sizes[1]], config=config, splits=splits, residual=True)
    config = Config(32, 64, 64, 4, 1, True)
    check_int4(inputs(*sizes), stride, 64 if sizes[1] % 16 else 32, config=config, splits=splits, residual=True)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("weight", [127, -128])
def test_extremes(value, weight):
    data = list(inputs(1, 300, 4, 4, 6, 3, 1))
    data[0].fill_(value)
    data[3].fill_(weight)
    check_int8(data, 1, [300])
    check_int4(data, 1, 64, extreme=-8 if weight < 0 else 7)


def test_a_constant_image_is_exact_at_the_border():
    """Codes equal to the zero point everywhere, border too: every output is the bias, to the last bit."""
    x = torch.zeros(2, 16, 5, 5)
    x[1] = -3.0  # one-sided range: the zero point is 255
    codes, scale, zero_point = quantize_samples(x, 8, None, 1)
    _, _, _, weight, weight_scale, bias = inputs(2, 16, 5, 5, 9, 3, 1)
    arguments = (codes, scale, zero_point, weight, weight_scale, weight.sum((1, 2, 3), dtype=torch.int32), bias)
    out = kernels.conv2d(*on_device(arguments), 1, torch.float32, [16]).cpu()
    assert torch.equal(out[0], bias[:, None, None].expand(9, 5, 5))
    inner = torch.nn.functional.conv2d(x[1:, :, 1:4, 1:4], weight.float() * weight_scale[:, None, None, None], bias)
    torch.testing.assert_close(out[1, :, 2:3, 2:3], inner[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    batch, channels, height, width, n = (data.draw(st.integers(1, limit)) for limit in (3, 100, 8, 8, 70))
    kernel, padding = data.draw(st.sampled_from([(1, 0), (3, 1), (2, 1)]))
    stride = data.draw(st.integers(1, 2))
    sizes = inputs(batch, channels, height, width, n, kernel, padding)
    ends = sorted(data.draw(st.lists(st.integers(0, channels), max_size=3)))
    check_int8(sizes, stride, [*ends, channels], bias=data.draw(st.booleans()), residual=data.draw(st.booleans()))
    check_int4(sizes, stride, data.draw(st.sampled_from(packing.GROUP_SIZES)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_types(dtype):
    # the interpreter cuts bfloat16 off: one unit in the last place
    tolerance = {"rtol": 8e-3 if dtype is torch.bfloat16 else 1e-3, "atol": 1e-3}
    data = inputs(1, 8, 4, 4, 12, 3, 1)
    check_int8(data, 1, [8], dtype=dtype, residual=True, **tolerance)
    check_int4(data, 1, 32, dtype=dtype, residual=True, **tolerance)


@pytest.mark.parametrize("name", ["triton", "cpu", "reference"])
def test_the_operators_agree_on_every_backend(monkeypatch, name):
    if name == "cpu" and CUDA:
        pytest.skip("codes lie on the GPU")
    codes, scale, zero_point, weight, weight_scale, bias = inputs(2, 40, 6, 6, 20, 3, 1)
    monkeypatch.setenv("DGQ_BACKEND", name)
    w4 = weight.permute(0, 2, 3, 1).reshape(20, -1) >> 4
    packed = packing.pack_int4(w4)
    ones = packing.pack_subscales(torch.ones(20, packing.padded_length(360, 32) // 32, dtype=torch.uint8))
    dense = (weight >> 4).contiguous()
    sums = w4.sum(1, dtype=torch.int32)
    residual = torch.randn(2, 20, 6, 6, generator=torch.Generator().manual_seed(2))
    common = on_device((weight_scale, sums, bias))
    head = on_device((codes, scale, zero_point))
    y8 = conv2d(*head, dense.to(DEVICE), *common, 1, torch.float32, [40], residual.to(DEVICE))
    y4 = conv2d_int4(*head, *on_device((packed, ones)), *common, 3, 1, torch.float32, 32, residual.to(DEVICE))
    torch.testing.assert_close(y4, y8, rtol=1e-6, atol=1e-6)
    exact = reference.conv2d(codes, scale, zero_point, dense, weight_scale, sums, bias, 1, torch.float32, [40])
    torch.testing.assert_close(y8.cpu(), exact + residual, rtol=1e-5, atol=1e-5)


def test_opcheck():
    codes, scale, zero_point, weight, weight_scale, bias = inputs(1, 32, 4, 4, 6, 3, 1)
    w4 = weight.permute(0, 2, 3, 1).reshape(6, -1) >> 4
    ones = packing.pack_subscales(torch.ones(6, 9, dtype=torch.uint8))
    arguments = (codes, scale, zero_point, packing.pack_int4(w4), ones, weight_scale, w4.sum(1, dtype=torch.int32))
    torch.library.opcheck(conv2d_int4, (*arguments, bias, 3, 1, torch.float32, 32))
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    residual = torch.randn(1, 6, 4, 4)
    arguments = (codes, scale, zero_point, weight, weight_scale, sums, bias, 1, torch.float16, [32], residual)
    torch.library.opcheck(conv2d, arguments)


def test_refuses_what_may_overflow():
    codes = torch.zeros(1, 8000, 3, 3, dtype=torch.uint8)
    weight = torch.zeros(1, 8000, 3, 3, dtype=torch.int8)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="overflow"):
        kernels.conv2d(codes, one, one.int(), weight, one, one.int(), None, 1, torch.float32, [8000])


@pytest.mark.parametrize("ends", [[70], [20, 70], [0, 40, 40, 70]])
def test_split_reductions_are_exact(ends):
    """By K without shift classes, by input channels with them."""
    data = inputs(2, 70, 5, 6, 10, 3, 1)
    check_int8(data, 1, ends, config=Config(32, 32, 32, 4, 1), splits=3, residual=True)


def test_split_int4_reductions_are_exact():
    check_int4(inputs(2, 48, 5, 6, 10, 3, 1), 1, 32, config=Config(32, 32, 32, 4, 1), splits=4, residual=True)
