"""The quantized convolution: integer sums bit for bit, borders exact, per-sample scales."""

import pytest
import torch
from comparing import assert_close

from dgq_kernels import (
    backend,
    conv2d,
    conv2d_prepacked,
    packing,
    quantize_samples,
    quantize_wide_samples,
    upsample_conv2d,
    upsample_conv2d_int4,
)
from dgq_kernels.conv2d import cpu, reference


def case(batch, channels, size, n, kernel, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 30.0, 0.1])[:batch, None, None, None]
    x = torch.randn(batch, channels, size, size + 1, generator=g) * sizes
    weight = torch.randint(-128, 128, (n, channels, kernel, kernel), dtype=torch.int8, generator=g)
    return x, weight, torch.rand(n, generator=g) + 0.1, torch.randn(n, generator=g)


CASES = [(1, 8, 6, 16, 3, 1), (2, 6, 9, 42, 3, 2), (3, 33, 5, 7, 1, 1), (2, 64, 8, 64, 3, 1)]


@pytest.mark.skipif(backend.cpu_path() == "reference", reason="no exact oneDNN product on this CPU")
@pytest.mark.parametrize("batch, channels, size, n, kernel, stride", CASES)
def test_cpu_sums_are_bit_exact(batch, channels, size, n, kernel, stride):
    x, weight, _, _ = case(batch, channels, size, n, kernel)
    codes, _, _ = quantize_samples(x, 8, None, kernel // 2)
    split = cpu.needs_split(8, weight)
    for ends in ([channels], [channels // 3, channels // 3, channels]):
        got = cpu.accumulate(codes, cpu.prepack(weight, stride, ends), ends, n, stride, split)
        assert torch.equal(got.long(), reference.accumulate(codes, weight, stride, ends))


@pytest.mark.parametrize("batch, channels, size, n, kernel, stride", CASES)
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_the_float_convolution_of_the_codes(batch, channels, size, n, kernel, stride, shifted):
    x, weight, weight_scale, bias = case(batch, channels, size, n, kernel)
    ends = [channels // 2, channels] if shifted else [channels]
    exponents = torch.zeros(channels, dtype=torch.int64)
    exponents[channels // 2 :] = int(shifted)
    effective = weight.double() * (2.0**exponents)[None, :, None, None]
    column_sum = effective.sum((1, 2, 3)).to(torch.int32)
    codes, scale, zero = quantize_samples(x, 8, None, kernel // 2)
    got = conv2d(codes, scale, zero, weight, weight_scale, column_sum, bias, stride, torch.float32, ends)
    inner = codes[:, :, kernel // 2 : codes.shape[2] - kernel // 2, kernel // 2 : codes.shape[3] - kernel // 2]
    back = (inner.double() - zero.view(-1, 1, 1, 1)) * scale.double().view(-1, 1, 1, 1)
    expected = torch.nn.functional.conv2d(
        back, effective * weight_scale.double().view(-1, 1, 1, 1), bias.double(), stride, kernel // 2
    )
    assert got.shape == expected.shape
    for b in range(batch):
        assert_close("output", got[b], expected[b], 1e-5)


def test_an_upsampling_equals_the_float_one():
    x, weight, weight_scale, bias = case(2, 24, 6, 4 * 5, 2)
    column_sum = weight.sum((1, 2, 3), dtype=torch.int32)
    got = upsample_conv2d(*quantize_wide_samples(x, 1), weight, weight_scale, column_sum, bias, torch.float32, True)
    scaled = weight.double() * weight_scale.double().view(-1, 1, 1, 1)
    whole = torch.nn.functional.conv2d(x.double(), scaled, bias.double(), padding=1)
    for place, part in enumerate(whole.chunk(4, 1)):  # each outputs a pixel more than it has
        row, column = place // 2, place % 2
        expected = part[:, :, row : row + 6, column : column + 7]
        for b in range(2):
            assert_close("output", got[b, :, row::2, column::2], expected[b], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upsampling_of_bytes_is_four_convolutions(dtype):
    x, weight, weight_scale, bias = case(2, 32, 6, 4 * 5, 2)
    codes = quantize_samples(x, 8, None, 1)
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    got = upsample_conv2d(*codes, weight, weight_scale, sums, bias, dtype, False)
    assert got.shape == (2, 5, 12, 14)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for place in range(4):
        row, column, own = place // 2, place % 2, slice(5 * place, 5 * place + 5)
        near = codes[0][:, :, row : row + 7, column : column + 8]
        channels = (weight[own], weight_scale[own], sums[own], bias[own])
        expected = conv2d(near, *codes[1:], *channels, 1, dtype, [32])
        assert torch.equal(got[:, :, row::2, column::2], expected)


def test_an_upsampling_of_four_bits_is_that_of_its_bytes():
    x, _, weight_scale, bias = case(2, 24, 6, 4 * 5, 2)
    g = torch.Generator().manual_seed(1)
    nibbles = torch.randint(-8, 8, (20, 4 * 24), dtype=torch.int8, generator=g)
    packed = packing.pack_int4(nibbles, 32)
    subscales = packing.pack_subscales(torch.randint(0, 16, (20, 3), dtype=torch.uint8, generator=g))
    weight = reference.dense_weight(packed, subscales, 24, 2, 32)
    codes, sums = quantize_samples(x, 8, None, 1), weight.sum((1, 2, 3), dtype=torch.int32)
    after = (weight_scale, sums, bias, torch.float32)
    got = upsample_conv2d_int4(*codes, packed, subscales, *after, 32)
    assert torch.equal(got, upsample_conv2d(*codes, weight, *after, False))


def test_a_sample_does_not_depend_on_its_batch_mates():
    x, weight, weight_scale, bias = case(3, 16, 6, 24, 3)
    column_sum = weight.sum((1, 2, 3), dtype=torch.int32)

    def run(batch):
        codes, scale, zero = quantize_samples(batch, 8, None, 1)
        return conv2d(codes, scale, zero, weight, weight_scale, column_sum, bias, 1, torch.float32, [16])

    assert torch.equal(run(x)[1:2], run(x[1:2]))


def test_opcheck():
    x, weight, weight_scale, bias = case(2, 8, 4, 6, 3)
    codes, scale, zero = quantize_samples(x, 8, None, 1)
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    torch.library.opcheck(conv2d, (codes, scale, zero, weight, weight_scale, sums, bias, 1, torch.float32, [8]))
    if backend.cpu_path() != "reference":
        packed = cpu.prepack(weight, 1, [8])
        split = cpu.needs_split(8, weight)
        args = (codes, scale, zero, packed, [8], split, weight_scale, sums, bias)
        got = conv2d_prepacked(*args, 3, 1, torch.float32)
        assert torch.equal(got, conv2d(codes, scale, zero, weight, weight_scale, sums, bias, 1, torch.float32, [8]))
