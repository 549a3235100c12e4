"""The quantized linear layer: integer sums bit for bit, outputs to float32 rounding."""

import pytest
import torch
from comparing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels import backend, linear_int4, linear_int8, linear_prepacked, packing, quantize_rows
from dgq_kernels.linear import cpu, reference


def layer(m, k, n, seed=0, extreme=False):
    """Codes with their scales, an int8 weight with its scale, a bias."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=g)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    if extreme:
        codes.fill_(255)
        weight.fill_(127)
        weight[0] = -128
    scale, zero = torch.rand(m, generator=g) + 0.1, torch.randint(0, 256, (m,), dtype=torch.int32, generator=g)
    return codes, scale, zero, weight, torch.rand(n, generator=g) + 0.1, torch.randn(n, generator=g)


def column_sums(weight, ends):
    starts = [0, *ends[:-1]]
    parts = [weight[:, a:b].sum(1, dtype=torch.int64) << i for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
    return sum(parts).to(torch.int32)


def test_reference_sums_are_the_plain_integer_loop():
    codes, _, _, weight, *_ = layer(3, 7, 5)
    ends = [2, 2, 7]
    for r in range(3):
        for n in range(5):
            expected = sum(int(codes[r, k]) * int(weight[n, k]) * (1 if k < 2 else 4) for k in range(7))
            assert int(reference.accumulate(codes, weight, ends)[r, n]) == expected


@pytest.mark.skipif(backend.cpu_path() == "reference", reason="no exact oneDNN product on this CPU")
@pytest.mark.parametrize("shape", [(1, 64, 48), (6, 42, 123), (123, 431, 6), (77, 768, 320), (300, 192, 576)])
@pytest.mark.parametrize("extreme", [False, True])
def test_cpu_sums_are_bit_exact(shape, extreme):
    m, k, n = shape
    codes, _, _, weight, *_ = layer(m, k, n, extreme=extreme)
    for ends in ([k], [k // 2, k // 2, k]):
        packed = cpu.prepack(weight, ends)
        got = cpu.accumulate(codes, packed, ends, n, cpu.needs_split(8, weight))
        expected = reference.accumulate(codes, weight, ends)
        inside = expected.abs() < 2**24  # where float32 can hold the integer
        assert torch.equal(got[inside].long(), expected[inside])
        assert torch.allclose(got.double(), expected.double(), rtol=1e-6)


@pytest.mark.skipif(backend.cpu_path() == "reference", reason="no exact oneDNN product on this CPU")
@pytest.mark.parametrize("bits, top_weight", [(7, 127), (8, 64), (6, 127)])
def test_one_product_suffices_where_the_split_is_skipped(bits, top_weight):
    weight = torch.full((8, 256), top_weight, dtype=torch.int8)
    weight[::2] *= -1
    assert not cpu.needs_split(bits, weight)
    codes = torch.full((9, 256), 2**bits - 1, dtype=torch.uint8)
    got = cpu.accumulate(codes, cpu.prepack(weight, [256]), [256], 8, False)
    assert torch.equal(got.long(), reference.accumulate(codes, weight, [256]))


@pytest.mark.skipif(backend.cpu_path() == "reference", reason="no exact oneDNN product on this CPU")
def test_sums_above_two_to_the_24_are_rounded_once():
    """oneDNN gives its int32 sums as float32, which docs/cpu.md says."""
    weight = torch.randint(100, 128, (8, 1025), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    codes = torch.full((4, 1025), 255, dtype=torch.uint8)
    exact = reference.accumulate(codes, weight, [1025])
    assert int(exact.min()) > 2**24
    got = cpu.accumulate(codes, cpu.prepack(weight, [1025]), [1025], 8, cpu.needs_split(8, weight))
    away = (got.double() - exact).abs()
    assert (away <= exact * 2.0**-24 * (2 if backend.cpu_path() == "split" else 1)).all()
    assert away.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_cpu_equals_reference(m, k, n, seed, with_bias):
    codes, scale, zero, weight, weight_scale, bias = layer(m, k, n, seed)
    ends = sorted([int(torch.randint(0, k + 1, (1,))), k])
    args = (codes, scale, zero, weight, weight_scale, column_sums(weight, ends), bias if with_bias else None)
    expected = reference.linear_int8(*args, torch.float32, ends)
    got = linear_int8(*args, torch.float32, ends)
    # cancellation of the zero-point term can magnify float32 rounding: measure against the uncancelled size
    size = ((codes + zero.abs()[:, None]).double() @ weight.double().abs().t() * scale[:, None] * weight_scale).norm()
    assert float((got - expected).double().norm() / size.clamp(min=1e-30)) < 1e-6


@pytest.mark.parametrize("k", [32, 42, 431])
def test_int4_is_int8_on_the_expanded_weight(k):
    codes, scale, zero, _, weight_scale, bias = layer(17, k, 24)
    w4 = torch.randint(-8, 8, (24, k), dtype=torch.int8)
    m = torch.randint(1, 16, (24, packing.padded_length(k, 32) // 32), dtype=torch.uint8)
    packed, subscales = packing.pack_int4(w4), packing.pack_subscales(m)
    weight = packing.expand_two_level(packed, subscales, k, 32)
    sums = column_sums(weight, [k])
    got = linear_int4(codes, scale, zero, packed, subscales, weight_scale, sums, bias, torch.float32, 32)
    expected = linear_int8(codes, scale, zero, weight, weight_scale, sums, bias, torch.float32, [k])
    assert torch.equal(got, expected)


def test_layer_approximates_the_float_product():
    x, w = torch.randn(64, 256), torch.randn(96, 256)
    scale = w.abs().amax(1) / 127
    weight = (w / scale[:, None]).round().to(torch.int8)
    codes, s, z = quantize_rows(x, 8, None)
    y = linear_int8(codes, s, z, weight, scale, column_sums(weight, [256]), None, torch.float32, [256])
    assert_close("output", y, x @ w.t(), 0.012)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtype(dtype):
    codes, scale, zero, weight, weight_scale, bias = layer(4, 32, 8)
    args = (codes, scale * 1e-3, zero, weight, weight_scale * 1e-2, column_sums(weight, [32]), bias)
    y = linear_int8(*args, dtype, [32])
    assert y.dtype == dtype
    assert_close("output", y.float(), linear_int8(*args, torch.float32, [32]), 5e-3)


def test_opcheck():
    codes, scale, zero, weight, weight_scale, bias = layer(4, 64, 8)
    sums = column_sums(weight, [64])
    torch.library.opcheck(linear_int8, (codes, scale, zero, weight, weight_scale, sums, bias, torch.float32, [64]))
    if backend.cpu_path() != "reference":
        packed = cpu.prepack(weight, [64])

        def run(c):
            return linear_prepacked(c, scale, zero, packed, [64], False, weight_scale, sums, bias, torch.float32)

        half = codes // 2
        assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(half), run(half))
