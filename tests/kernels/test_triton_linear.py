"""The linear kernels against the reference: the integer sums are exact, so outputs agree to the epilogue's rounding."""

import pytest
import torch
from comparing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels import linear_float_groups, linear_int8, packing, quantize_rows
from dgq_kernels.linear import reference
from dgq_kernels.linear import triton as kernels
from dgq_kernels.linear.tiles import Config, Tiling

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def inputs(m, k, n, seed=0):
    """codes, scale, zero_point, weight, weight_scale, bias."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=g),
        torch.rand(m, generator=g) + 0.1,
        torch.randint(-20, 300, (m,), dtype=torch.int32, generator=g),
        torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g),
        (torch.rand(n, generator=g) + 0.1) / 100,  # outputs stay within float16
        torch.randn(n, generator=g),
    )


def column_sum(weight, ends):
    ones = torch.ones((1, weight.shape[1]), dtype=torch.uint8)
    return reference.accumulate(ones, weight, ends)[0].to(torch.int32)


def on_device(arguments):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]


def poisoned(m, n, dtype):
    """A NaN buffer (m, n) and the guard behind it, which no store may touch."""
    whole = torch.full((m * n + 64,), float("nan"), dtype=dtype, device=DEVICE)
    return whole[: m * n].view(m, n), whole[m * n :]


def check_int8(
    m, k, n, ends, *, dtype=torch.float32, bias=True, data=None, config=None, splits=1, gated=False, residual=None
):
    codes, scale, zero_point, weight, weight_scale, b = data or inputs(m, k, n)
    arguments = (codes, scale, zero_point, weight, weight_scale, column_sum(weight, ends), b if bias else None, dtype)
    out, guard = poisoned(m, n // (1 + gated), dtype)
    kernels.linear_int8(
        *on_device((*arguments, ends, residual, gated)), out=out, tiling=Tiling(config, splits) if config else None
    )
    expected = reference.linear_int8(*arguments, ends, residual, gated)
    torch.testing.assert_close(out.cpu(), expected, **_tolerance(dtype, gated))
    assert guard.isnan().all()


def check_int4(m, k, n, group, *, dtype=torch.float32, extreme=None, config=None, splits=1, gated=False):
    codes, scale, zero_point, _, weight_scale, bias = inputs(m, k, n)
    g = torch.Generator().manual_seed(1)
    groups = packing.padded_length(k, group) // group
    w4 = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=g)
    m_values = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=g)
    if extreme is not None:
        codes.fill_(255)
        w4.fill_(extreme)
        m_values.fill_(15)
    packed, subscales = packing.pack_int4(w4, group), packing.pack_subscales(m_values)
    sums = packing.expand_two_level(packed, subscales, k, group).sum(1, dtype=torch.int32)
    arguments = (codes, scale, zero_point, packed, subscales, weight_scale, sums, bias, dtype, group, None, gated)
    out, guard = poisoned(m, n // (1 + gated), dtype)
    kernels.linear_int4(*on_device(arguments), out=out, tiling=Tiling(config, splits) if config else None)
    torch.testing.assert_close(out.cpu(), reference.linear_int4(*arguments), **_tolerance(dtype, gated))
    assert guard.isnan().all()


def _tolerance(dtype, gated=False):
    """On the CPU the epilogue's operations are the reference's, one by one; CUDA's may differ in the last place, and
    so may the error function of GELU anywhere."""
    if gated and dtype is torch.float32:
        return {"rtol": 1e-5, "atol": 1e-3}  # 1 + erf cancels, times values of hundreds
    if dtype is torch.bfloat16:
        return {"rtol": 8e-3, "atol": 0}  # the interpreter cuts bfloat16 off
    return {"rtol": 1e-3 if dtype is torch.float16 else 1e-6, "atol": 1e-4} if CUDA else {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(("m", "k", "n"), [(6, 42, 123), (42, 431, 6), (123, 6, 42), (431, 320, 130), (1, 512, 1)])
def test_int8_ragged_shapes(m, k, n):
    check_int8(m, k, n, [k])


@pytest.mark.parametrize(
    "ends",
    [[200, 431], [0, 431], [431, 431, 431], [100, 100, 431], [0, 0, 0, 431], [7, 9, 300, 430, 431]],
)
def test_int8_shift_classes(ends):
    """Boundaries inside a step, several in one step, empty classes first, last and between."""
    check_int8(42, 431, 123, ends)
    check_int8(6, 431, 42, ends, config=Config(32, 32, 32, 4, 1))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_int8_any_shape(data):
    m, k, n = (data.draw(st.integers(1, limit)) for limit in (140, 600, 140))
    ends = sorted(data.draw(st.lists(st.integers(0, k), max_size=4)))
    check_int8(m, k, n, [*ends, k], bias=data.draw(st.booleans()))


@pytest.mark.parametrize("weight", [127, -128])
@pytest.mark.parametrize("zero", [0, 255])
def test_int8_longest_reduction(weight, zero):
    """Codes 255 and extreme weights over the longest reduction that is let through: the sum nears 2^31."""
    k = 2**31 // (255 * 128) // 16 * 16
    data = list(inputs(6, k, 6))
    data[0].fill_(255)
    data[2].fill_(zero)
    data[3].fill_(weight)
    data[3][0] = -weight - 1
    check_int8(6, k, 6, [k], data=data, config=None if CUDA else Config(16, 16, 4096, 4, 1))


def test_int8_shifted_classes_near_the_limit():
    """Horner's doubling with every code 255: 255 * 128 * (K0 + 2 K1 + 4 K2) just below 2^31."""
    k = 3 * 9392
    data = list(inputs(6, k, 6))
    data[0].fill_(255)
    data[3].fill_(-128)
    data[2].zero_()
    check_int8(6, k, 6, [k // 3, 2 * k // 3, k], data=data, config=None if CUDA else Config(16, 16, 4096, 4, 1))


@pytest.mark.parametrize("group", packing.GROUP_SIZES)
@pytest.mark.parametrize(("m", "k", "n"), [(6, 42, 123), (42, 431, 6), (123, 6, 42), (130, 640, 131), (1, 32, 1)])
def test_int4_ragged_shapes(m, k, n, group):
    check_int4(m, k, n, group)


@pytest.mark.parametrize("group", packing.GROUP_SIZES)
@pytest.mark.parametrize("extreme", [7, -8])
def test_int4_extremes(group, extreme):
    check_int4(42, 431, 42, group, extreme=extreme)


@pytest.mark.parametrize("group", packing.GROUP_SIZES)
def test_int4_small_tiles(group):
    """The tile of a GPU configuration: several steps, several tiles each way."""
    check_int4(40, 500, 70, group, config=Config(32, 64, 64, 4, 1))


@settings(max_examples=8, deadline=None)
@given(m=st.integers(1, 140), k=st.integers(1, 700), n=st.integers(1, 140), group=st.sampled_from(packing.GROUP_SIZES))
def test_int4_any_shape(m, k, n, group):
    check_int4(m, k, n, group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_types(dtype):
    check_int8(42, 64, 42, [64], dtype=dtype)
    check_int4(42, 64, 42, 32, dtype=dtype)


def test_many_tiles_cover_the_output_once():
    """More than 8 row blocks and ragged bands: the order of tiles is a permutation."""
    check_int8(10 * 16 + 3, 64, 2 * 16 + 1, [64], config=Config(16, 16, 32, 4, 1))


def test_the_operators_reach_these_kernels(monkeypatch):
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codes, scale, zero_point = quantize_rows(x, 8, None)
    weight, weight_scale, bias = on_device(inputs(6, 64, 42)[3:])
    sums = weight.sum(1, dtype=torch.int32)
    y = linear_int8(codes, scale, zero_point, weight, weight_scale, sums, bias, torch.float32, [64])
    exact = x @ (weight * weight_scale[:, None]).t() + bias
    assert_close("output", y, exact, 0.02)


@pytest.mark.skipif(not CUDA, reason="the interpreter has no inline assembly")
def test_assembly_unpacks_every_byte_as_the_plain_form_does():
    for group in packing.GROUP_SIZES:
        check_int4(16, 512, 256, group)


def test_word_arithmetic_of_the_assembly():
    """The four-bytes-at-once recipe, replayed on integers for every byte and sub-scale (no GPU needed)."""
    for m in range(16):
        offset = (m * 0xF7F7F7F8 + 0x80808080) & 0xFFFFFFFF
        for byte in range(256):
            word = byte | (byte ^ 0x5A) << 8 | (255 - byte) << 16 | (byte ^ 0x33) << 24
            for shift in (0, 4):
                u = ((word >> shift) & 0x0F0F0F0F) ^ 0x08080808
                result = ((u * m + offset) & 0xFFFFFFFF) ^ 0x80808080
                for lane in range(4):
                    nibble = (word >> (8 * lane + shift)) & 0xF
                    w4 = nibble - 16 if nibble >= 8 else nibble
                    assert (result >> 8 * lane) & 0xFF == (w4 * m) & 0xFF


def test_refuses_what_may_overflow_and_strided_operands():
    codes, scale, zero_point, weight, weight_scale, bias = inputs(2, 70000, 2)
    sums = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="overflow"):
        kernels.linear_int8(codes, scale, zero_point, weight, weight_scale, sums, bias, torch.float32, [70000])
    codes, weight = codes[:, :64], weight[:, :64]
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear_int8(codes, scale, zero_point, weight, weight_scale, sums, bias, torch.float32, [64])


SMALL = Config(32, 32, 32, 4, 1)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("ends", [[431], [200, 431], [7, 9, 300, 300, 431], [0, 0, 431]])
def test_split_reductions_are_exact(splits, ends):
    """Shares that end inside a class, that lie outside all but one, and (8 shares of 7 steps) that are empty."""
    residual = torch.randn(6, 42, generator=torch.Generator().manual_seed(2))
    check_int8(6, 431, 42, ends, config=SMALL, splits=splits, residual=residual)


@pytest.mark.parametrize("group", packing.GROUP_SIZES)
def test_split_int4_reductions_are_exact(group):
    check_int4(40, 500, 70, group, config=Config(32, 64, 64, 4, 1), splits=3)
    check_int4(6, 431, 42, group, config=Config(32, 32, 32, 4, 1), splits=8, extreme=-8)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "config", [Config(32, 32, 32, 4, 1, True), Config(64, 32, 128, 4, 1, True), Config(16, 64, 64, 4, 1, True, 3)]
)
def test_one_product_per_step(config, splits):
    """Ends of rows, of channels and of the reduction inside a tile, the epilogue's halves of a tile past the end."""
    for m, k, n in ((6, 42, 123), (70, 431, 6), (33, 320, 130), (1, 512, 1)):
        check_int8(m, k, n, [k], config=config, splits=splits)
    residual = torch.randn(6, 42, generator=torch.Generator().manual_seed(2))
    check_int8(6, 431, 42, [431], config=config, splits=splits, residual=residual)
    for m, k, n in ((6, 42, 2), (42, 131, 122), (40, 320, 66)):
        check_int8(m, k, n, [k], config=config, splits=splits, gated=True)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("group", packing.GROUP_SIZES)
def test_one_int4_product_per_step(group, splits):
    """Weights in the order of K, and sub-scales of the next step past the end."""
    for config in (Config(32, 32, 64, 4, 1, True), Config(16, 64, 128, 4, 1, True)):
        for m, k, n in ((6, 42, 123), (40, 500, 70), (1, 512, 1)):
            check_int4(m, k, n, group, config=config, splits=splits)
        check_int4(6, 431, 42, group, config=config, splits=splits, extreme=-8)
        check_int4(42, 131, 122, group, config=config, splits=splits, gated=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_gated_outputs(splits):
    """Tiles whose end cuts a pair of halves, more tiles than one, odd halves."""
    for m, k, n in ((6, 42, 2), (42, 131, 122), (40, 320, 66)):
        check_int8(m, k, n, [k], config=SMALL, splits=splits, gated=True)
        check_int8(m, k, n, [k // 3, k], bias=False, config=SMALL, splits=splits, gated=True)
        check_int4(m, k, n, 32, config=SMALL, splits=splits, gated=True)
    check_int4(6, 42, 10, 64, gated=True, dtype=torch.float16)


def test_a_gated_operator_is_the_plain_one_and_geglu(monkeypatch):
    codes, scale, zero_point, weight, weight_scale, bias = on_device(inputs(6, 64, 42))
    arguments = (codes, scale, zero_point, weight, weight_scale, weight.sum(1, dtype=torch.int32), bias, torch.float32)
    value, gate = linear_int8(*arguments, [64]).chunk(2, 1)
    for backend in ("triton", "reference") + (() if CUDA else ("cpu",)):
        monkeypatch.setenv("DGQ_BACKEND", backend)
        y = linear_int8(*arguments, [64], None, True)
        torch.testing.assert_close(y, value * torch.nn.functional.gelu(gate), rtol=1e-5, atol=1e-3)
    torch.library.opcheck(linear_int8, (*arguments, [64], None, True))
    with pytest.raises(ValueError, match="42 outputs cannot be gated beside a residual"):
        linear_int8(*arguments, [64], y, True)


def float_groups(m, k, n, ends):
    codes, _, _, weight, weight_scale, bias = inputs(m, k, n)
    g = torch.Generator().manual_seed(3)
    scale = torch.rand(len(ends), generator=g) + 0.1
    zero_point = torch.randint(-300, 600, (len(ends),), dtype=torch.int32, generator=g)
    sums = torch.stack([weight[:, a:b].sum(1, dtype=torch.int32) for a, b in zip([0, *ends], ends, strict=False)])
    return codes, scale, zero_point, weight, weight_scale, sums, bias, torch.float32, ends


@pytest.mark.parametrize("ends", [[431], [40, 64, 64, 127, 300, 431], [0, 1, 431]])
@pytest.mark.parametrize("config", [None, SMALL])
def test_float_groups(ends, config):
    """Group ends inside a step, at a step's end, several in a step, and empty groups."""
    arguments = float_groups(42, 431, 43, ends)
    out, guard = poisoned(42, 43, torch.float32)
    kernels.linear_float_groups(*on_device(arguments), out=out, config=config)
    torch.testing.assert_close(out.cpu(), reference.linear_float_groups(*arguments), **_tolerance(torch.float32))
    assert guard.isnan().all()


def test_float_groups_are_the_product_of_dequantized_operands(monkeypatch):
    arguments = float_groups(6, 96, 42, [30, 64, 96])
    codes, scale, zero_point, weight, weight_scale, _, bias, *_ = arguments
    group = torch.tensor([0] * 30 + [1] * 34 + [2] * 32)
    x = (codes.double() - zero_point[group]) * scale[group]
    expected = (x @ (weight.double() * weight_scale[:, None]).T + bias).float()
    moved = on_device(arguments)
    for backend in ("triton", "reference"):
        monkeypatch.setenv("DGQ_BACKEND", backend)
        torch.testing.assert_close(linear_float_groups(*moved).cpu(), expected, rtol=1e-5, atol=1e-3)
    torch.library.opcheck(linear_float_groups, tuple(moved))
    with pytest.raises(ValueError, match="do not cut 96 channels into 3 groups"):
        linear_float_groups(*moved[:-1], [30, 64, 90])
