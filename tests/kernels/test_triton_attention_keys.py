"""Quantization of attention's keys and values: v's codes and scales bit for bit; k's as far as a mean summed in another
order allows (a code on a rounding boundary may fall to its other side)."""

import math

import pytest
import torch
from comparing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels.log_attention import reference
from dgq_kernels.log_attention import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE, FRACTION = 0.3, 4


def keys_and_values(heads, keys, width, seed=0, offset=3.0):
    """Keys with an offset of their own in each head and channel, values of very different channels."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(*heads, keys, width, generator=g) + offset * torch.randn(*heads, 1, width, generator=g)
    return k, torch.randn(*heads, keys, width, generator=g) * torch.rand(*heads, 1, width, generator=g)


def check(k, v, start, qk_bits=8, v_bits=8, block=64):
    own = kernels.quantize_keys(k.to(DEVICE), v.to(DEVICE), SCALE, FRACTION, start, qk_bits, v_bits, block)
    own = kernels.Keys(*(None if x is None else x.cpu() for x in own))
    heads, width, keys = k.shape[0] * k.shape[1], k.shape[3], k.shape[2] - int(start)
    expected = reference.quantize_operands(k[:, :, :1] * 0, k, v, SCALE, FRACTION, start, qk_bits, v_bits)
    assert own.k.shape == (heads, -(-keys // block) * block, kernels.padded_width(width))

    values = own.v.mT
    assert torch.equal(values[:, :keys, :width].float(), expected.v.flatten(0, 1))
    assert torch.equal(own.v_scale[:, :width], expected.v_scale.flatten(0, 2))
    assert torch.equal(own.v_sum.sum(1), own.v.sum(2, dtype=torch.int32))
    torch.testing.assert_close(own.key_step, expected.key_step.flatten(), rtol=1e-5, atol=0)
    apart = (own.k[:, :keys, :width].float() - expected.k.flatten(0, 1)).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 1e-3 or (apart != 0).sum() <= 2
    for codes in (own.k, values):  # padding is zero: it joins no sum
        assert not codes[:, keys:].any()
        assert not codes[:, :, width:].any()
    if not start:
        assert own.start_k is own.start_v is None
        return
    size = float(k.float().abs().max())
    torch.testing.assert_close(own.start_k[:, :width], expected.start_k.flatten(0, 2), rtol=1e-6, atol=1e-6 * size)
    assert torch.equal(own.start_v[:, :width], expected.start_v.flatten(0, 2))
    assert not own.start_k[:, width:].any()
    assert not own.start_v[:, width:].any()


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    # one key, less than a block, whole blocks, more blocks than chunks; widths that are no power of two
    ("keys", "width", "block"),
    [(2, 16, 32), (77, 40, 64), (129, 160, 32), (1025, 42, 32), (2100, 64, 64)],
)
def test_equals_the_reference(keys, width, block, start):
    # the interpreter takes a second for each head of the long ones
    check(*keys_and_values((2, 3) if keys < 1000 else (1, 2), keys, width), start, block=block)


@settings(max_examples=8, deadline=None)
@given(
    keys=st.integers(2, 300),
    width=st.integers(1, 160),
    start=st.booleans(),
    qk_bits=st.integers(2, 8),
    v_bits=st.integers(2, 8),
    block=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_any_shape(keys, width, start, qk_bits, v_bits, block, seed):
    check(*keys_and_values((1, 2), keys, width, seed), start, qk_bits, v_bits, block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_slices_of_one_product(dtype):
    """k and v as they lie in the joined product of queries, keys and values."""
    joined = torch.randn(2, 50, 3 * 4 * 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, k, v = (x.unflatten(-1, (4, 20)).transpose(1, 2) for x in joined.chunk(3, dim=-1))
    assert not k.is_contiguous()
    check(k, v, True)


def test_extremes():
    """Equal keys (codes 0, scale 1), zero values, huge and tiny ones, an outlier, a start token far from the rest."""
    k, v = keys_and_values((1, 2), 40, 24)
    k[:, 0], v[:, 1] = 1.5, 0
    for factor in (1.0, 2.0**-66, 2.0**-116, 2.0**50):  # powers of two: the mean of equal keys stays exact
        check(k * factor, v * factor, False)
    k[0, 1, 7, 3], v[0, 0, 9, 5] = 1e4, -1e4
    k[:, :, 0] = 1e6
    check(k, v, True)


def test_an_error_of_the_mean_is_invisible():
    """Keys a thousand deviations from zero: attention stays that of the centred keys."""
    k, v = keys_and_values((1, 2), 300, 32, offset=0.0)
    q = torch.randn(1, 2, 20, 32, generator=torch.Generator().manual_seed(1))
    arguments = (32**-0.5, 8, 4, False, 8, 8)
    moved = (k + 1000).double()
    exact = reference.log_attention(q, (moved - moved.mean(2, keepdim=True)).float(), v, *arguments)
    got = kernels.log_attention(q.to(DEVICE), (k + 1000).to(DEVICE), v.to(DEVICE), *arguments).cpu()
    assert_close("output", got, exact, 0.01)
    assert math.isfinite(float(got.sum()))
