"""The CPU engine: every instruction set gives the bits of the references."""

import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from comparing import assert_close, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import dgq_kernels
from dgq_kernels import native, packing
from dgq_kernels.conv2d import reference as conv2d_reference
from dgq_kernels.linear import reference as linear_reference
from dgq_kernels.log_attention import cpu as attention_cpu
from dgq_kernels.log_attention import reference as attention_reference
from dgq_kernels.native import library
from dgq_kernels.quantize_activation import reference as quantize_reference

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")


@pytest.fixture(params=native.ISAS)
def isa(request):
    if request.param not in native.supported():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.use(request.param)
    yield request.param
    native.use(before)


def weights(n, k, g, extreme=False):
    weight = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    if extreme:
        weight = torch.where(torch.rand(n, k, generator=g) < 0.5, -128, 127).to(torch.int8)
        weight[0] = 127
    return weight, torch.rand(n, generator=g) + 0.1, weight.sum(1, dtype=torch.int32), torch.randn(n, generator=g)


def check_linear(m, k, n, bits, dtype, divide, extreme=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight, scale, sums, bias = weights(n, k, g, extreme)
    x = torch.randn(m, k, generator=g)
    if extreme:
        x[0], x[-1] = 1.0, -1.0  # every code at an end of its range
        x[m // 2] = 0.0
    x = x.to(dtype)
    divisor = torch.rand(k, generator=g) + 0.5 if divide else None
    codes, row_scale, zero = quantize_reference.quantize_rows(x, bits, divisor)
    layer = native.Layer(weight, scale, bias, divisor, bits)
    expected = linear_reference.linear_int8(codes, row_scale, zero, weight, scale, sums, bias, dtype, [k])
    assert torch.equal(layer.linear(x), expected)
    residual = torch.randn(m, n, generator=g).to(dtype)
    exact = linear_reference.linear_int8(codes, row_scale, zero, weight, scale, sums, bias, torch.float32, [k])
    assert torch.equal(layer.linear(x, residual), (exact + residual.float()).to(dtype))


@pytest.mark.parametrize("shape", [(1, 7, 5), (6, 42, 123), (33, 431, 17), (77, 768, 320), (130, 2880, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_the_reference(isa, shape, dtype):
    check_linear(*shape, 8, dtype, divide=shape[0] == 33)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_linear_at_the_ends_of_the_ranges(isa, bits):
    check_linear(35, 200, 50, bits, torch.float32, divide=False, extreme=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 80), st.integers(1, 300), st.integers(1, 70), st.integers(2, 8), st.booleans(), st.integers(0, 2**30)
)
def test_linear_of_any_shape(m, k, n, bits, divide, seed):
    check_linear(m, k, n, bits, torch.float32, divide, seed=seed)


def test_linear_takes_strided_rows_and_half_precision():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(20, 64, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    wide = torch.randn(5, 3, 100, generator=g)
    assert torch.equal(layer.linear(wide[..., 10:74]), layer.linear(wide[..., 10:74].contiguous()))
    turned = torch.randn(64, 9, generator=g)
    assert torch.equal(layer.linear(turned.t()), layer.linear(turned.t().contiguous()))
    half = turned.t().half()
    assert torch.equal(layer.linear(half), layer.linear(half.float()).half())
    assert layer.linear(turned.new_empty(0, 64)).shape == (0, 20)


def test_every_number_of_threads_gives_the_same(monkeypatch):
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(96, 100, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    x = torch.randn(70, 100, generator=g)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        results.append(layer.linear(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_two_callers_at_once():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(64, 300, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    inputs = [torch.randn(40, 300, generator=g) for _ in range(4)]
    expected = [layer.linear(x) for x in inputs]
    wrong = []

    def call(i):
        for _ in range(50):
            if not torch.equal(layer.linear(inputs[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize(
    "sizes, kernel, stride, padding",
    [
        ((2, 32, 8, 8, 48), 3, 1, 1),
        ((1, 5, 7, 9, 3), 3, 2, 1),
        ((3, 160, 4, 5, 33), 3, 1, 1),
        ((2, 20, 9, 6, 40), 5, 1, 2),
        ((1, 64, 6, 6, 16), 3, 2, 0),
        # lines of whole groups of pixels and blocks of channels: multiplied in place
        ((2, 64, 6, 32, 40), 3, 1, 1),
        ((1, 128, 10, 32, 48), 3, 2, 1),
        ((3, 64, 3, 16, 33), 3, 1, 1),
        ((1, 64, 16, 18, 70), 3, 1, 0),
        ((2, 64, 5, 48, 16), 5, 1, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv2d_equals_the_reference(isa, sizes, kernel, stride, padding, dtype):
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    weight, scale, sums, bias = weights(n, kernel**2 * channels, g)
    x = torch.randn(batch, channels, height, width, generator=g).to(dtype)
    divisor = torch.rand(channels, generator=g) + 0.5 if channels % 32 else None
    codes, sample_scale, zero = quantize_reference.quantize_samples(x, 8, divisor, padding)
    four_d = weight.view(n, kernel, kernel, channels).permute(0, 3, 1, 2)
    args = (codes, sample_scale, zero, four_d, scale, sums, bias, stride)
    layer = native.Layer(weight, scale, bias, divisor, 8, kernel, stride, padding)
    got = layer.conv2d(x)
    assert torch.equal(got, conv2d_reference.conv2d(*args, dtype, [channels]))
    assert got.is_contiguous(memory_format=torch.channels_last)
    residual = torch.randn(got.shape, generator=g).to(dtype)
    exact = conv2d_reference.conv2d(*args, torch.float32, [channels])
    assert torch.equal(layer.conv2d(x, residual), (exact + residual.float()).to(dtype))


@pytest.mark.parametrize(
    "sizes, kernel, stride",
    [
        ((2, 48, 7, 9, 33), 3, 1),  # rows, columns and channels that fill no tile
        ((1, 64, 20, 32, 64), 3, 1),
        ((3, 20, 4, 5, 20), 5, 1),
        ((2, 64, 17, 33, 64), 3, 2),
        ((1, 320, 3, 5, 320), 3, 1),  # few rows: threads share the columns
        ((1, 32, 50, 60, 40), 3, 1),  # not in the place of its input
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["eight bits", "four bits", "rotated", "divided"])
def test_a_convolution_in_place_is_the_plain_one(isa, sizes, kernel, stride, dtype, form):
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(n, kernel**2 * channels, g)
    if form == "four bits":
        k = kernel**2 * channels
        codes = torch.randint(-8, 8, (n, k), generator=g).to(torch.int8)
        groups = -(-k // 32)
        subscales = packing.pack_subscales(torch.randint(0, 16, (n, groups), generator=g).to(torch.uint8))
        weight = native.TwoLevel(packing.pack_int4(codes, 32), subscales, k, 32)
    divisor = torch.rand(channels, generator=g) + 0.5 if form == "divided" else None
    rotation = 16 if form == "rotated" and channels % 16 == 0 else 0
    layer = native.Layer(weight, scale, bias, divisor, 8, kernel, stride, kernel // 2, None, rotation)
    norm = norm_of(channels, g, groups=4, silu=True)
    x = torch.randn(batch, channels, height, width, generator=g).to(dtype).contiguous(memory_format=LAST)
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            for before in (None, norm):
                expected = layer.conv2d(x, norm=before)
                own = x.clone()
                got = layer.conv2d(own, norm=before, in_place=True)
                assert torch.equal(got, expected)
                assert got.is_contiguous(memory_format=LAST)
                assert (place(got) == place(own)) == (expected.numel() <= x.numel())
                residual = torch.randn(expected.shape, generator=g).to(dtype).contiguous(memory_format=LAST)
                own, given = x.clone(), residual.clone()
                got = layer.conv2d(own, given, norm=before, in_place=True)
                assert torch.equal(got, layer.conv2d(x, residual, norm=before))
                assert place(got) == place(given)
                assert torch.equal(own, x)
    finally:
        torch.set_num_threads(threads)


def test_a_residual_of_another_form_keeps_its_values():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(16, 9 * 16, g)
    layer = native.Layer(weight, scale, bias, None, 8, 3, 1, 1)
    x = torch.randn(2, 16, 6, 5, generator=g).contiguous(memory_format=LAST)
    for residual in (
        torch.randn(2, 16, 6, 5, generator=g),
        torch.randn(2, 16, 1, 1, generator=g).expand(2, 16, 6, 5),
        torch.randn(2, 16, 6, 5, generator=g).to(torch.bfloat16).contiguous(memory_format=LAST),
    ):
        kept, values = residual.clone(), x.clone()
        assert torch.equal(layer.conv2d(x, residual, in_place=True), layer.conv2d(x, kept))
        assert torch.equal(residual, kept)
        assert torch.equal(x, values)
    x = torch.randn(2, 16, 6, 5, generator=g)  # what is copied first is not written either
    kept = x.clone()
    assert torch.equal(layer.conv2d(x, in_place=True), layer.conv2d(kept))
    assert torch.equal(x, kept)
    part = torch.randn(3, 16, 6, 5, generator=g).contiguous(memory_format=LAST)
    kept = part.clone()
    assert torch.equal(layer.conv2d(part[1:2], in_place=True), layer.conv2d(kept[1:2]))
    assert torch.equal(part[::2], kept[::2])  # nothing around it
    assert layer.conv2d(part[:0], in_place=True).shape == (0, 16, 6, 5)


@pytest.mark.parametrize("sizes", [(2, 64, 6, 32, 48), (1, 20, 7, 5, 16), (3, 32, 3, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upsampling_equals_the_reference(isa, sizes, dtype):
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    weight, scale, sums, bias = weights(4 * n, 4 * channels, g, extreme=channels == 32)
    x = (torch.randn(batch, channels, height, width, generator=g) * 3).to(dtype)
    codes = quantize_reference.quantize_wide_samples(x, 1)
    four_d = weight.view(4 * n, 2, 2, channels).permute(0, 3, 1, 2)
    layer = native.Layer(weight, scale, bias, None, 16, 2, 1, 1)
    got = layer.upsample(x)
    assert torch.equal(got, conv2d_reference.upsample_conv2d(*codes, four_d, scale, sums, bias, dtype, True))
    assert got.is_contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    assert torch.equal(layer.upsample(x)[1:], got[1:])
    assert layer.upsample(x)[0].isnan().all()
    assert layer.upsample(x[:0]).shape == (0, n, 2 * height, 2 * width)
    with pytest.raises(ValueError, match="16 in an upsampling alone"):
        layer.conv2d(x)


@pytest.mark.parametrize(
    "sizes, bits, divide, rotation",
    [
        ((2, 64, 6, 32, 48), 8, True, 64),
        ((1, 20, 7, 5, 16), 4, True, 0),
        ((3, 32, 3, 16, 32), 8, False, 16),
        ((2, 64, 5, 16, 16), 4, False, 0),
        ((1, 96, 5, 7, 80), 8, True, 0),
        ((2, 5, 1, 1, 16), 2, False, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upsampling_of_few_bits_equals_the_reference(isa, sizes, bits, divide, rotation, dtype):
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    weight, scale, sums, bias = weights(4 * n, 4 * channels, g, extreme=channels == 32)
    x = (torch.randn(batch, channels, height, width, generator=g) * 3).to(dtype)
    divisor = torch.rand(channels, generator=g) + 0.5 if divide else None
    codes = quantize_reference.quantize_samples(x, bits, divisor, 1, None, rotation)
    four_d = weight.view(4 * n, 2, 2, channels).permute(0, 3, 1, 2)
    y = conv2d_reference.conv2d(*codes, four_d, scale, sums, bias, 1, dtype, [channels])
    expected = torch.empty(batch, n, 2 * height, 2 * width, dtype=dtype)
    for place in range(4):
        row, column = place // 2, place % 2
        own = y[:, place * n : (place + 1) * n, row : row + height, column : column + width]
        expected[:, :, row::2, column::2] = own
    layer = native.Layer(weight, scale, bias, divisor, bits, 2, 1, 1, rotation=rotation)
    got = layer.upsample(x)
    assert torch.equal(got, expected)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    plain = native.Layer(weight, scale, None, divisor, bits, 2, 1, 1, rotation=rotation)
    none = native.Layer(weight, scale, torch.zeros(4 * n), divisor, bits, 2, 1, 1, rotation=rotation)
    assert torch.equal(plain.upsample(x), none.upsample(x))
    assert torch.equal(layer.upsample(x.half()), layer.upsample(x.half().float()).half())
    x[0, 0, 0, 0] = torch.nan
    assert torch.equal(layer.upsample(x)[1:], got[1:])
    assert layer.upsample(x)[0].isnan().all()
    assert layer.upsample(x[:0]).shape == (0, n, 2 * height, 2 * width)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sizes", [(1, 32, 1, 3, 48), (2, 32, 4, 16, 48), (2, 20, 30, 33, 16), (1, 16, 8, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upsampling_on_every_number_of_threads(monkeypatch, bits, sizes, dtype):
    """Few pixels are shared out by columns, and then a task has parts of some places."""
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(4 * n, 4 * channels, g)
    layer = native.Layer(weight, scale, bias, None, bits, 2, 1, 1)
    x = torch.randn(batch, channels, height, width, generator=g).to(dtype)
    results = []
    for threads in (1, 2, 3, 5, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        results.append(layer.upsample(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


def two_level(n, k, group, g):
    """A weight of four bits as it is stored, with anything behind its last value, and its integers."""
    padded = packing.padded_length(k, group)
    codes = torch.randint(-8, 8, (n, padded), generator=g).to(torch.int8)
    subscales = torch.randint(0, 16, (n, padded // group), generator=g).to(torch.uint8)
    codes[0], subscales[0] = -8, 15  # the largest sizes
    stored = packing.pack_int4(codes, group), packing.pack_subscales(subscales)
    return native.TwoLevel(*stored, k, group), packing.expand_two_level(*stored, k, group)


def check_four_bits(m, k, n, group, dtype, seed=0, largest=False):
    g = torch.Generator().manual_seed(seed)
    stored, integers = two_level(n, k, group, g)
    rest = torch.rand(n, generator=g), torch.randn(n, generator=g), None, 8
    small, large = native.Layer(stored, *rest), native.Layer(integers, *rest)
    assert (small.group, large.group) == (group, 0)
    assert small.packed.nbytes <= 0.57 * large.packed.nbytes
    assert torch.equal(small.weight(), integers)
    assert torch.equal(small.column_sum, large.column_sum)
    x = torch.randn(m, k, generator=g).to(dtype)
    if largest:  # codes of 255 in all places but one
        x = torch.ones_like(x)
        x[:, -1] = 0
    assert torch.equal(small.linear(x), large.linear(x))
    if small.can_gate:
        assert torch.equal(small.linear(x, gated=True), large.linear(x, gated=True))


@pytest.mark.parametrize("shape", [(1, 7, 5), (6, 42, 123), (33, 431, 32), (77, 768, 320), (300, 1300, 64)])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_give_the_results_of_their_integers(isa, shape, group, dtype):
    check_four_bits(*shape, group, dtype)


@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_of_the_largest_codes(isa, group):
    check_four_bits(35, 200, 50, group, torch.float32, largest=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 1200), st.integers(1, 70), st.sampled_from([32, 64]), st.integers(0, 2**30))
def test_four_bits_of_any_shape(m, k, n, group, seed):
    check_four_bits(m, k, n, group, torch.float32, seed)


@pytest.mark.parametrize(
    "sizes, kernel, stride",
    [
        ((2, 32, 8, 8, 48), 3, 1),
        ((1, 5, 7, 9, 3), 3, 2),
        # in place; a line of the kernel is more than is unpacked together, and less
        ((2, 256, 6, 32, 40), 3, 1),
        ((1, 64, 5, 48, 16), 5, 2),
    ],
)
@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_in_convolutions(isa, sizes, kernel, stride, group):
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    stored, integers = two_level(n, kernel**2 * channels, group, g)
    rest = torch.rand(n, generator=g), torch.randn(n, generator=g), None, 8, kernel, stride, kernel // 2
    x = torch.randn(batch, channels, height, width, generator=g)
    assert torch.equal(native.Layer(stored, *rest).conv2d(x), native.Layer(integers, *rest).conv2d(x))


@pytest.mark.parametrize("sizes", [(2, 64, 6, 32, 48), (1, 20, 7, 5, 16), (1, 320, 3, 16, 16)])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_in_an_upsampling(isa, sizes, bits, group, dtype):
    batch, channels, height, width, n = sizes
    g = torch.Generator().manual_seed(0)
    stored, integers = two_level(4 * n, 4 * channels, group, g)
    divisor = torch.rand(channels, generator=g) + 0.5 if bits == 8 else None
    rest = torch.rand(4 * n, generator=g), torch.randn(4 * n, generator=g), divisor, bits, 2, 1, 1
    layer, x = native.Layer(stored, *rest), torch.randn(batch, channels, height, width, generator=g).to(dtype)
    assert layer.group == group
    assert torch.equal(layer.upsample(x), native.Layer(integers, *rest).upsample(x))


@pytest.mark.parametrize("start, stop", [(0, 16), (16, 33), (32, 70), (0, 70)])
def test_rows_of_four_bits(start, stop):
    stored, integers = two_level(70, 100, 32, torch.Generator().manual_seed(0))
    layer = native.Layer(stored, torch.ones(70), None, None, 8)
    assert torch.equal(layer.rows(start, stop), integers[start:stop])


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers keep what is freed")
def test_a_large_rotated_picture_is_not_kept():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(8, 144, g)
    layer = native.Layer(weight, scale, bias, None, 8, 3, 1, 1, None, 16)
    norm = native.Norm(torch.rand(16, generator=g), torch.randn(16, generator=g), 1e-5, 4, True)
    x = torch.randn(2, 16, 700, 800, generator=g).contiguous(memory_format=torch.channels_last)
    one_by_one = torch.cat([layer.conv2d(x[i : i + 1], norm=norm) for i in range(2)])
    before, peak = peak_of(lambda: layer.conv2d(x, norm=norm))
    assert torch.equal(layer.conv2d(x, norm=norm), one_by_one)
    assert peak - before < x.nbytes  # codes and result are three quarters of it


def test_a_large_rotated_picture_is_upsampled():
    """What is rotated twice has the codes of what is rotated once and kept: two pictures at once, and each alone."""
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(64, 64, g)
    layer = native.Layer(weight, scale, bias, torch.rand(16, generator=g) + 0.5, 8, 2, 1, 1, None, 16)
    x = torch.randn(2, 16, 700, 800, generator=g).bfloat16().contiguous(memory_format=torch.channels_last)
    one_by_one = torch.cat([layer.upsample(x[i : i + 1]) for i in range(2)])
    assert torch.equal(layer.upsample(x), one_by_one)


def peak_of(call):
    """Bytes of memory that this process holds before a call, and at most during it."""
    Path("/proc/self/clear_refs").write_text("5")

    def held(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before = held("VmRSS")
    call()
    return before, held("VmHWM")


@pytest.mark.parametrize("shape", [(1, 7, 32), (33, 130, 64), (70, 320, 2560)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_linear_equals_the_reference(isa, shape, dtype):
    m, k, n = shape
    g = torch.Generator().manual_seed(0)
    weight, scale, sums, bias = weights(n, k, g)
    x = (torch.randn(m, k, generator=g) / 1000).to(dtype)
    layer = native.Layer(weight, scale / k, bias, None, 8)
    codes, row_scale, zero = quantize_reference.quantize_rows(x, 8, None)
    y = linear_reference.linear_int8(codes, row_scale, zero, weight, scale / k, sums, bias, torch.float32, [k])
    value, gate = y.double().chunk(2, -1)
    got = layer.linear(x, gated=True)
    exact = value * torch.nn.functional.gelu(gate)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert bool(((got.double() - exact).abs() <= rounding * exact.abs() + 1e-6 * (value * gate).abs()).all())


def test_every_instruction_set_gates_with_the_same_bits():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(96, 100, g)
    layer = native.Layer(weight, scale / 100, bias, None, 8)
    x = torch.randn(40, 100, generator=g) * torch.logspace(-6, 3, 40)[:, None]
    results = []
    before = native.describe()
    for name in native.supported():
        native.use(name)
        results.append(layer.linear(x, gated=True))
    native.use(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert bool(torch.isfinite(results[0]).all())


def test_gating_wants_whole_blocks_and_no_residual():
    weight, scale, _sums, bias = weights(48, 8, torch.Generator().manual_seed(0))
    layer = native.Layer(weight, scale, bias, None, 8)
    assert not layer.can_gate
    with pytest.raises(ValueError, match="48 outputs"):
        layer.linear(torch.randn(2, 8), gated=True)


@pytest.mark.parametrize("shape", [(5, 7), (16, 64), (33, 431), (320, 2880)])
def test_the_weight_comes_back_from_its_blocks(shape):
    weight, scale, _sums, bias = weights(*shape, torch.Generator().manual_seed(0))
    assert torch.equal(native.Layer(weight, scale, bias, None, 8).weight(), weight)


@pytest.mark.parametrize(
    "n, k, group, taps", [(5, 70, 32, 1), (33, 9 * 20, 32, 9), (64, 320, 64, 1), (48, 9 * 33, 64, 9)]
)
@pytest.mark.parametrize("reordered", [False, True])
def test_packing_reads_the_stored_form(n, k, group, taps, reordered):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), generator=g).to(torch.int8)
    groups = packing.padded_length(k, group) // group
    packed = packing.pack_int4(codes, group)
    subscales = packing.pack_subscales(torch.randint(0, 16, (n, groups), generator=g).to(torch.uint8))
    integers = packing.expand_two_level(packed, subscales, k, group)
    channels = k // taps
    order = torch.randperm(channels, generator=g) if reordered else None
    natural = integers
    if order is not None:
        natural = torch.empty_like(integers).view(n, taps, channels)
        natural[:, :, order] = integers.view(n, taps, channels)
        natural = natural.view(n, k)
    side = 3 if taps == 9 else 1
    for weight in (integers, native.TwoLevel(packed, subscales, k, group)):
        layer = native.Layer(weight, torch.ones(n), None, None, 8, side, order=order)
        assert torch.equal(layer.weight(), natural)
        assert torch.equal(layer.column_sum, integers.sum(1, dtype=torch.int32))
        assert layer.group == (group if isinstance(weight, native.TwoLevel) and not reordered else 0)


def test_sums_that_could_overflow_are_refused():
    weight = torch.full((1, 70_000), 127, dtype=torch.int8)
    native.Layer(weight[:, :66_000].contiguous(), torch.ones(1), None, None, 8)
    with pytest.raises(OverflowError, match="70000 products"):
        native.Layer(weight, torch.ones(1), None, None, 8)


def test_paging_out_loses_nothing(tmp_path):
    file = tmp_path / "values"
    values = torch.arange(100_000, dtype=torch.int32)
    values.numpy().tofile(file)
    mapped = torch.from_file(str(file), size=100_000, dtype=torch.int32)
    for tensor in (values.clone(), mapped, values[3:5], values[:0]):
        expected = tensor.clone()
        native.page_out(tensor)
        assert torch.equal(tensor, expected)


def test_a_mapped_file_is_let_go_of_unless_it_was_changed(tmp_path):
    def kib(of):
        """Of the file, mapped and resident."""
        entries = Path("/proc/self/smaps").read_text().split("VmFlags:")
        return sum(int(re.search(r"^Rss: +(\d+) kB", entry, re.MULTILINE)[1]) for entry in entries if str(of) in entry)

    values, files = torch.arange(100_000, dtype=torch.int32), [tmp_path / name for name in ("kept", "changed")]
    for file in files:
        values.numpy().tofile(file)
    kept, changed = (torch.from_file(str(file), size=100_000, dtype=torch.int32) for file in files)
    changed[5] = -1
    expected = [kept.clone(), changed.clone(), values.clone()]
    assert all(kib(file) >= 388 for file in files)
    native.let_go([kept[7:], changed, values])
    assert kib(files[0]) == 0
    assert kib(files[1]) >= 388
    for tensor, same in zip((kept, changed, values), expected, strict=True):
        assert torch.equal(tensor, same)


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def picture(side, channels=64):
    return torch.zeros(1, channels, side, side).contiguous(memory_format=torch.channels_last)


def test_large_results_take_the_place_of_those_that_nobody_holds():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(64, 64, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    x = torch.randn(1, 64, 200, 200, generator=g).contiguous(memory_format=torch.channels_last)
    expected = layer.conv2d(x)
    with native.recycled():
        first = layer.conv2d(x)
        known = place(first)
        view = first[:, 3:5, 7]
        del first
        second = layer.conv2d(x)  # not in the place of what a view holds
        assert place(second) != known
        assert torch.equal(view, expected[:, 3:5, 7])
        del view
        third = layer.conv2d(x)
        assert place(third) == known
        assert torch.equal(second, expected)
        assert torch.equal(third, expected)
        del third
        larger = layer.conv2d(picture(250))  # there is no room for it
        assert place(larger) not in (known, place(second))
        kept = layer.conv2d(x)
        assert place(kept) == known
    outside = layer.conv2d(x)
    assert len({place(tensor) for tensor in (second, larger, kept, outside)}) == 4
    assert torch.equal(kept, expected)  # it outlives the block
    assert torch.equal(larger, layer.conv2d(picture(250)))


def test_what_is_far_smaller_is_given_back_and_small_results_are_left_alone():
    norm = native.Norm(torch.ones(64), torch.zeros(64), 1e-5, 4)
    with native.recycled():
        blocks = native.memory._active.blocks
        held = [norm.over_groups(picture(side)) for side in (32, 200, 210)]
        assert len(blocks) == 2
        del held
        large = norm.over_groups(picture(280))
        assert len(blocks) == 2 + 1  # more than half as large
        del large
        norm.over_groups(picture(500))
        assert sorted(len(block) for block in blocks) == [64 * 4 * 500**2]
        with native.recycled():  # one in another is the same
            norm.over_groups(picture(490))
        assert len(blocks) == 1
        norm.over_groups(torch.cat([picture(500)] * 2))
        assert sorted(len(block) for block in blocks) == [2 * 64 * 4 * 500**2]


def test_threads_do_not_share_the_places_of_results():
    norm = native.Norm(torch.ones(64), torch.zeros(64), 1e-5, 4)
    with native.recycled():
        known = place(norm.over_groups(picture(200)))
        places = []
        thread = threading.Thread(target=lambda: places.append(norm.over_groups(picture(200))))
        thread.start()
        thread.join()
        assert place(places[0]) != known
        assert place(norm.over_groups(picture(200))) == known


def test_a_convolution_takes_a_bias_for_every_sample():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(33, 9 * 20, g)
    x = torch.randn(3, 20, 5, 6, generator=g)
    each = torch.randn(3, 33, generator=g)
    layer = native.Layer(weight, scale, bias, None, 8, 3, 1, 1)
    for i in range(3):
        alone = native.Layer(weight, scale, each[i], None, 8, 3, 1, 1).conv2d(x[i : i + 1])
        assert torch.equal(layer.conv2d(x, sample_bias=each)[i : i + 1], alone)
    with pytest.raises(ValueError, match=r"sample_bias \(3, 33\)"):
        layer.conv2d(x, sample_bias=each[:2])


def norm_of(channels, g, **options):
    return native.Norm(torch.rand(channels, generator=g) + 0.5, torch.randn(channels, generator=g), 1e-5, **options)


@pytest.mark.parametrize("k", [7, 64, 330])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_normalizes_its_input(isa, k, dtype):
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(40, k, g)
    x = (torch.randn(70, k, generator=g) * 3 + 5).to(dtype)
    norm = norm_of(k, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    normal = torch.nn.functional.layer_norm(x.float(), (k,), norm.gain, norm.shift, norm.eps)
    got = layer.linear(x, norm=norm)
    assert got.dtype == dtype
    # a value on the edge of two codes may fall to either side
    assert_close("output", got, layer.linear(normal), 0.002 if dtype == torch.float32 else 0.005)


@pytest.mark.parametrize("sizes", [(2, 64, 6, 32, 40, 32), (1, 20, 7, 5, 33, 4), (3, 160, 4, 4, 16, 1)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv2d_normalizes_its_input(isa, sizes, silu, dtype):
    batch, channels, height, width, n, groups = sizes
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(n, 9 * channels, g)
    x = (torch.randn(batch, channels, height, width, generator=g) * 3 + 2).to(dtype)
    norm = norm_of(channels, g, groups=groups, silu=silu)
    layer = native.Layer(weight, scale, bias, None, 8, 3, 1, 1)
    normal = torch.nn.functional.group_norm(x.float(), groups, norm.gain, norm.shift, norm.eps)
    normal = torch.nn.functional.silu(normal) if silu else normal
    got = layer.conv2d(x, norm=norm)
    assert_close("output", got, layer.conv2d(normal.to(dtype)), 0.002 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("sizes", [(2, 64, 6, 33, 4), (1, 16, 7, 700, 16), (2, 4112, 2, 3, 1)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_alone(isa, sizes, silu, dtype):
    batch, channels, height, width, groups = sizes
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(batch, channels, height, width, generator=g) * 3 + 2).to(dtype)
    norm = norm_of(channels, g, groups=groups, silu=silu)
    expected = torch.nn.functional.group_norm(x.double(), groups, norm.gain.double(), norm.shift.double(), norm.eps)
    expected = torch.nn.functional.silu(expected) if silu else expected
    got = norm.over_groups(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.dtype == dtype
    assert_close("output", got.double(), expected, 1e-5 if dtype == torch.float32 else 0.003)
    assert torch.equal(norm.over_groups(x.contiguous(memory_format=torch.channels_last)), got)
    own = x.contiguous(memory_format=torch.channels_last).clone()
    over = norm.over_groups(own, in_place=True)
    assert torch.equal(over, got)
    assert place(over) == place(own)
    half = norm.over_groups(x.half())
    assert half.dtype == torch.float16
    assert torch.equal(half, norm.over_groups(x.half().float()).half())


def test_silu_of_extremes(isa):
    """A convolution that passes its one channel on shows the codes of what went in."""
    norm = native.Norm(torch.ones(1), torch.zeros(1), 1e-5, 1, silu=True)
    layer = native.Layer(torch.tensor([[1]], dtype=torch.int8), torch.ones(1), None, None, 8)
    assert layer.k == 1
    for scale in (1e-3, 1.0, 1e3, 1e18):
        x = torch.linspace(-3, 5, 400).view(1, 1, 20, 20) * scale
        x[0, 0, 0, 0] = 90 * scale  # far from the others
        expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 1, eps=1e-5))
        got = layer.conv2d(x, norm=norm)
        step = (expected.max() - min(float(expected.min()), 0)) / 255
        assert float((got - expected).abs().max()) <= 0.51 * step + 1e-5


def test_every_instruction_set_normalizes_with_the_same_bits():
    g = torch.Generator().manual_seed(0)
    weight, scale, _sums, bias = weights(32, 9 * 40, g)
    conv = native.Layer(weight, scale, bias, None, 8, 3, 1, 1)
    line = native.Layer(weight[:, :40].contiguous(), scale, bias, None, 8)
    x = torch.randn(2, 40, 9, 5, generator=g) * torch.logspace(-4, 4, 9)[:, None]
    groups, rows = norm_of(40, g, groups=8, silu=True), norm_of(40, g)
    results = []
    before = native.describe()
    for name in native.supported():
        native.use(name)
        results.append((conv.conv2d(x, norm=groups), line.linear(x.permute(0, 2, 3, 1), norm=rows)))
    native.use(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_layers_share_an_input():
    g = torch.Generator().manual_seed(0)
    made = [weights(48, 70, g) for _ in range(3)]
    layers = [native.Layer(weight, scale, bias, None, 8) for weight, scale, _, bias in made]
    x, norm = torch.randn(2, 33, 70, generator=g), norm_of(70, g)
    for before in (None, norm):
        together = native.linear(layers, x, norm=before)
        assert all(torch.equal(y, layer.linear(x, norm=before)) for y, layer in zip(together, layers, strict=True))
    divided = native.Layer(made[0][0], made[0][1], made[0][3], torch.ones(70), 8)
    assert not native.can_share([layers[0], divided])
    with pytest.raises(ValueError, match="share"):
        native.linear([layers[0], divided], x)
    with pytest.raises(ValueError, match="norm of 70 channels"):
        native.linear(layers, x, norm=norm_of(69, g))


def test_a_call_runs_no_operator_but_for_its_output():
    """A step of a small model is a hundred calls: what torch does around each is as long as its arithmetic."""
    layer = native.Layer(torch.ones(32, 64, dtype=torch.int8), torch.ones(32), torch.ones(32), None, 8)
    conv = native.Layer(torch.ones(32, 36, dtype=torch.int8), torch.ones(32), torch.ones(32), None, 8, 3, 1, 1)
    norm = native.Norm(torch.ones(64), torch.ones(64), 1e-5)
    x, residual, q = torch.ones(2, 3, 64), torch.ones(2, 3, 32), torch.ones(1, 2, 4, 8)
    picture, added = torch.ones(2, 4, 5, 5), torch.ones(2, 32, 5, 5)
    picture, added = (one.contiguous(memory_format=torch.channels_last) for one in (picture, added))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for run, expected in (
        (lambda: layer.linear(x, residual, norm=norm), ["new_empty"]),
        (lambda: native.linear([layer, layer], x), ["new_empty"] * 2),
        (lambda: conv.conv2d(picture, added), ["empty"]),
        (lambda: dgq_kernels.log_attention_eager(q, q, q, 0.3, 8, 4, False), ["new_empty", "transpose"]),
    ):
        seen = []
        with Seen():
            run()
        assert seen == expected


def test_inputs_of_another_shape_are_refused():
    g = torch.Generator().manual_seed(0)
    weight, scale, _, bias = weights(20, 32, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    with pytest.raises(ValueError, match="32 input channels expected"):
        layer.linear(torch.zeros(2, 64))  # would be four rows of 32
    weight, scale, _, bias = weights(8, 36, g)
    conv = native.Layer(weight, scale, bias, None, 8, 3, 1, 0)
    for shape in ((1, 5, 8, 8), (4, 8, 8)):
        with pytest.raises(ValueError, match="4 input channels expected"):
            conv.conv2d(torch.zeros(shape))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        conv.conv2d(torch.zeros(1, 4, 2, 8))
    with pytest.raises(ValueError, match="on meta"):
        layer.linear(torch.zeros(2, 32, device="meta"))
    assert conv.conv2d(torch.zeros(0, 4, 8, 8)).shape == (0, 8, 6, 6)


def heads(g, batch, heads, tokens, width, dtype=torch.float32):
    return torch.randn(batch, tokens, heads, width, generator=g).to(dtype).transpose(1, 2)


@pytest.mark.parametrize(
    "shape", [(2, 4, 64, 64, 32, False), (2, 3, 33, 77, 40, True), (1, 2, 50, 131, 160, False), (1, 1, 5, 2, 16, True)]
)
@pytest.mark.parametrize("bits, fraction_bits", [(8, 4), (6, 3), (8, 5), (4, 0), (8, 0)])
def test_attention_equals_the_reference(isa, shape, bits, fraction_bits):
    """The mean of the keys is summed in another order, which may move single codes: hence not bit for bit."""
    batch, count, rows, keys, width, start = shape
    g = torch.Generator().manual_seed(0)
    q, k, v = (heads(g, batch, count, tokens, width) * factor for tokens, factor in ((rows, 2), (keys, 2), (keys, 1)))
    args = (bits, fraction_bits, start, 8, 8)
    got = native.attention(q, k, v, width**-0.5 * attention_cpu.LOG2_E, *args)
    expected = attention_reference.log_attention(q, k, v, width**-0.5, *args)
    assert got.shape == expected.shape
    assert sqnr(expected, got) > 60


def test_attention_is_exact_where_the_operands_are(isa):
    """Keys and values that are their own codes, with mean zero: the integers must be the reference's."""
    g = torch.Generator().manual_seed(0)
    half = torch.randint(-127, 128, (1, 2, 20, 24), generator=g).float()
    k = torch.cat((half, -half), dim=2)
    k[0, :, 0, 0], k[0, :, 20, 0] = 127, -127
    v = torch.randint(-127, 128, (1, 2, 40, 24), generator=g).float()
    v[:, :, 3] = 127
    q = torch.randint(-127, 128, (1, 2, 37, 24), generator=g).float()
    q[..., 5] = 127
    got = native.attention(q, k, v, 2.0**-14, 8, 4, False, 8, 8)
    expected = attention_reference.log_attention(q, k, v, 2.0**-14 / attention_cpu.LOG2_E, 8, 4, False, 8, 8)
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)


def check_codes(q, half, octaves, odd=False, start=None, bits=8, fraction_bits=4):
    """The engine against the reference for operands that are their own codes; a logit's unit is 2^-octaves octaves.

    The keys are those of half, a zero where their number is to be odd, and those of half negated: their mean is zero.
    """
    g = torch.Generator().manual_seed(0)
    k = torch.cat((half, torch.zeros(int(odd), half.shape[1]), -half.flip(0)))
    v = torch.randint(-127, 128, k.shape, generator=g).float()
    q, k, v = (torch.nn.functional.pad(x, (0, 2)) for x in (q, k, v))
    q[:, -1] = k[0, -2] = 127  # so that all scales are 1; in no product
    k[-1, -2] = -127
    v[len(v) // 3] = 127
    q, k, v = q[None, None], k[None, None], v[None, None]
    if start is not None:
        k, v = (torch.cat((torch.full_like(x[:, :, :1], start), x), dim=2) for x in (k, v))
    args = (bits, fraction_bits, start is not None, 8, 8)
    got = native.attention(q, k, v, 2.0**-octaves, *args)
    expected = attention_reference.log_attention(q, k, v, 2.0**-octaves / attention_cpu.LOG2_E, *args)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0 if start is None else 1e-4)


def test_rows_that_are_not_there_do_not_matter(isa):
    """A block of queries has room for 32, whose logits begin as what the memory held before: here one without a
    difference in int32, which the sanitizers would report."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (heads(g, 1, 1, tokens, 40) for tokens in (1, 257, 257))
    args = (40**-0.5, 8, 4, False, 8, 8)
    expected = native.attention(q, k, v, *args)
    weight, scale, _sums, _bias = weights(16, 4096, g)
    layer = native.Layer(weight, scale, None, None, 8)
    for x in torch.randn(4, 32, 4096, generator=g):
        layer.linear(x)  # its codes are bytes of any kind
        assert torch.equal(native.attention(q, k, v, *args), expected)


@pytest.mark.parametrize("keys", [127, 128, 129, 300, 1024])
@pytest.mark.parametrize("weight", ["first", "last", "middle", "scattered", "everywhere", "nowhere"])
def test_blocks_of_keys_that_are_passed_over(isa, keys, weight):
    """Some keys have all the weight of rows beside others that need every key: no block too many is passed over."""
    width, rows, count = 24, 45, keys // 2
    g = torch.Generator().manual_seed(keys)
    q = torch.randint(-127, 128, (rows, width), generator=g).float()
    half = torch.randint(-3, 4, (count, width), generator=g).float()
    if weight == "nowhere":
        half = torch.zeros(count, width)
    at = {
        "first": [0],
        "last": [0],
        "middle": [count - 1],
        "scattered": range(0, count, 29),
        "everywhere": range(count),
    }
    for row, key in enumerate(at.get(weight, [])):
        half[key] = 90 * q[row % rows].sign()
    q[::13] = 0
    if weight == "last":
        half = -half
    for octaves in (6, 10, 14):
        check_codes(q, half, octaves, odd=keys % 2 == 1)
    check_codes(q, half, 10, odd=keys % 2 == 1, start=5.0)


@pytest.mark.parametrize(("bits", "fraction_bits"), [(3, 0), (3, 3), (5, 2), (8, 0), (8, 3), (8, 4), (8, 5)])
def test_the_last_code_that_counts(isa, bits, fraction_bits):
    """Whole blocks of keys that lie below another by the last code that counts, and around the border to the next."""
    zero = attention_reference.probability_bytes(bits, fraction_bits).index(0)
    q = torch.full((40, 17), 8.0)
    for eighths in (8 * zero - 9, *range(8 * zero - 5, 8 * zero - 2), 8 * zero):
        half = torch.zeros(256, 17)
        each = half[:128]
        each[:, : eighths // 127] = 127
        if eighths % 127:
            each[:, eighths // 127] = eighths % 127
        check_codes(q, half, 6 + fraction_bits, bits=bits, fraction_bits=fraction_bits)


def test_the_engine_equals_attention_carried_by_floats():
    g = torch.Generator().manual_seed(1)
    q, k, v = (heads(g, 2, 2, tokens, 40, torch.bfloat16) for tokens in (30, 50, 50))
    args = (8, 4, True, 8, 8)
    got = native.attention(q, k, v, 40**-0.5 * attention_cpu.LOG2_E, *args)
    assert got.dtype == torch.bfloat16
    assert sqnr(attention_cpu.carried_by_floats(q, k, v, 40**-0.5, *args), got) > 45  # bfloat16 outputs


@pytest.mark.parametrize("wish", ["off", "portable", "no-such-cpu"])
def test_the_environment_chooses(wish):
    code = "from dgq_kernels import native; print(native.available(), native.describe())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "DGQ_CPU_ENGINE": wish}, capture_output=True, text=True
    )
    expected = {"off": "False switched off by DGQ_CPU_ENGINE", "portable": "True portable"}
    if wish in expected:
        assert done.stdout.strip() == expected[wish]
    else:
        assert "DGQ_CPU_ENGINE=no-such-cpu is not one of off, portable" in done.stderr


def test_a_named_library_that_is_none_is_told(tmp_path):
    code = "from dgq_kernels import native; native.available()"
    for file in (Path(__file__), tmp_path / "missing.so"):
        environment = {**os.environ, "DGQ_CPU_LIBRARY": str(file)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        (message,) = [line for line in done.stderr.splitlines() if line.startswith("ValueError")]
        assert message.startswith(f"ValueError: DGQ_CPU_LIBRARY={file} is no CPU engine: ")
        assert ("cannot be loaded (" if file.exists() else "not built") in message


@pytest.mark.parametrize("folder", ["site-packages/torch/lib", "site-packages/torch.libs"])
def test_the_threads_are_those_of_torch_wherever_it_lies(tmp_path, monkeypatch, folder):
    """In a folder with spaces, and beside another package's runtime in an environment called after torch."""
    mine = tmp_path / "my torch" / folder / "libgomp.so.1"
    other = tmp_path / "my torch" / "site-packages" / "other.libs" / "libgomp-0.so.1"
    maps = tmp_path / "maps"
    line = "7f00-7f10 r-xp 00000000 08:01 1234      {}\n"
    maps.write_text(line.format(other) + line.format(mine) + "7f20-7f30 rw-p 00000000 00:00 0\n")
    opened = []

    class Library:
        def __init__(self, name):
            opened.append(name)
            self.GOMP_parallel = torch.abs  # never called

    monkeypatch.setattr(library, "Path", lambda path: maps if path == "/proc/self/maps" else Path(path))
    monkeypatch.setattr(library.ctypes, "CDLL", Library)
    monkeypatch.setattr(library.ctypes, "cast", lambda function, kind: kind(7))
    assert library._parallel_region() == 7
    assert opened == [str(mine)]


def test_other_scales_are_those_of_a_layer_made_with_them():
    g = torch.Generator().manual_seed(0)
    weight, scale, _, bias = weights(48, 70, g)
    layer = native.Layer(weight, scale, bias, None, 8)
    x, divisor = torch.randn(33, 70, generator=g), torch.rand(70, generator=g) + 0.5
    plain = layer.linear(x)
    layer.set_scales(scale * 2, divisor)
    assert torch.equal(layer.linear(x), native.Layer(weight, scale * 2, bias, divisor, 8).linear(x))
    layer.set_scales(scale, None)
    assert torch.equal(layer.linear(x), plain)
    for wrong in ((scale[:-1], None), (scale, divisor[:-1]), (scale.half(), None)):
        with pytest.raises(ValueError, match="expected"):
            layer.set_scales(*wrong)
    assert torch.equal(layer.linear(x), plain)


def test_a_call_keeps_what_it_reads(monkeypatch):
    """Another thread may give a layer other scales while the library multiplies."""
    g = torch.Generator().manual_seed(0)
    rest = torch.rand(64, generator=g), None, None, 8

    def layers(count, k, **geometry):
        return [native.Layer(weights(64, k, g)[0], *rest, **geometry) for _ in range(count)]

    x, picture = torch.randn(3, 16, generator=g), torch.randn(1, 16, 5, 5, generator=g)
    calls = {
        "dgq_linear": (layers(1, 16), lambda one: one.linear(x)),
        "dgq_linear of several": (layers(2, 16), lambda *some: native.linear(some, x)[1]),
        "dgq_conv2d": (layers(1, 9 * 16, kernel=3, padding=1), lambda one: one.conv2d(picture)),
        "dgq_upsample": (layers(1, 4 * 16, kernel=2, padding=1), lambda one: one.upsample(picture)),
    }
    known = library.loaded().library
    for name, (some, run) in calls.items():
        expected = run(*some)
        function, kept = getattr(known, name.split()[0]), []

        def meanwhile(*arguments, some=some, function=function, kept=kept):
            before = [weakref.ref(one._struct) for one in some] + [weakref.ref(one.weight_scale) for one in some]
            for one in some:
                one.set_scales(torch.full((64,), torch.nan), None)
            kept += [one() is not None for one in before]
            return function(*arguments)

        monkeypatch.setattr(known, name.split()[0], meanwhile)
        result = run(*some)
        monkeypatch.undo()
        assert kept == [True] * 2 * len(some), name
        assert torch.equal(result, expected), name
        assert run(*some).isnan().all()


def test_layers_of_one_divisor_share_an_input():
    g = torch.Generator().manual_seed(0)
    made = [weights(48, 70, g) for _ in range(3)]
    divisor = torch.rand(70, generator=g) + 0.5
    layers = [native.Layer(weight, scale, bias, divisor, 8) for weight, scale, _, bias in made]
    x, norm = torch.randn(2, 33, 70, generator=g), norm_of(70, g)
    assert native.can_share(layers)
    for before in (None, norm):
        together = native.linear(layers, x, norm=before)
        assert all(torch.equal(y, layer.linear(x, norm=before)) for y, layer in zip(together, layers, strict=True))
    equal, other = (native.Layer(*made[0][:2], made[0][3], one, 8) for one in (divisor.clone(), divisor + 1))
    assert native.can_share([layers[1], equal])
    assert torch.equal(native.linear([layers[1], equal], x)[1], layers[0].linear(x))
    assert not native.can_share([layers[0], other])
    assert not native.can_share([layers[0], native.Layer(*made[0][:2], made[0][3], None, 8)])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [1, 24, 40])
def test_a_norm_before_a_divisor(silu, channels, isa):
    """As many taps as channels carry the codes out: they are those of the normalized input times the divisor."""
    g = torch.Generator().manual_seed(0)
    weight = torch.eye(channels, dtype=torch.int8)
    divisor = torch.rand(channels, generator=g) * 4 - 1  # tuned ones may be negative
    layer = native.Layer(weight, torch.ones(channels), None, divisor, 8, 1, 1, 0)
    norm = norm_of(channels, g, groups=1, silu=silu)
    x = torch.randn(2, channels, 9, 5, generator=g) * 3
    expected = torch.nn.functional.group_norm(x, 1, norm.gain, norm.shift, norm.eps)
    expected = (torch.nn.functional.silu(expected) if silu else expected) * divisor[:, None, None]
    got = layer.conv2d(x, norm=norm)
    # the range of SiLU is a bound where no value is at its minimum
    least = torch.minimum(expected.amin(dim=(1, 2, 3)), torch.tensor(0.0)) - 0.28 * 4 * silu
    step = (expected.amax(dim=(1, 2, 3)).clamp(min=0) - least) / 255
    assert bool(((got - expected).abs().amax(dim=(1, 2, 3)) <= 0.51 * step + 1e-5).all())
    plain = native.Layer(weight, torch.ones(channels), None, None, 8, 1, 1, 0)
    ones = native.Layer(weight, torch.ones(channels), None, torch.ones(channels), 8, 1, 1, 0)
    assert torch.equal(plain.conv2d(x, norm=norm), ones.conv2d(x, norm=norm))
