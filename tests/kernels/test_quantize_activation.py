"""Activation codes against a scalar restatement of the definition."""

import numpy as np
import pytest
import torch

from dgq_kernels import quantize_rows, quantize_samples


def scalar_codes(values, bits):
    """The definition for one row of float32 values, in NumPy float32 arithmetic."""
    top = np.float32(2**bits - 1)
    low, high = min(np.float32(0), values.min()), max(np.float32(0), values.max())
    scale = np.float32((high - low) / top)
    scale = scale if scale > 1e-30 else np.float32(1)
    inverse = np.float32(1) / scale
    zero = np.rint(np.float32(-low * inverse))
    return np.clip(np.rint(values * inverse) + zero, 0, top).astype(np.uint8), scale, int(zero)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("k", [1, 6, 123])
def test_rows_match_the_scalar_definition(bits, k):
    x = torch.randn(7, k) * torch.logspace(-3, 3, 7)[:, None]
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = 0
    x[4] *= 1e-39
    codes, scale, zero = quantize_rows(x, bits, None)
    for row in range(7):
        expected, expected_scale, expected_zero = scalar_codes(x[row].numpy(), bits)
        assert codes[row].tolist() == expected.tolist()
        assert float(scale[row]) == expected_scale
        assert int(zero[row]) == expected_zero


def test_error_is_at_most_half_a_step_and_zero_is_exact():
    x = torch.randn(50, 64)
    x[:, 5] = 0
    codes, scale, zero = quantize_rows(x, 8, None)
    back = (codes.float() - zero[:, None]) * scale[:, None]
    # the zero point's own rounding can push the ends of the range half a step further
    assert ((back - x).abs() <= scale[:, None] * 1.001).all()
    assert (back[:, 5] == 0).all()


def test_divisor_is_applied_before_the_range():
    x, inv = torch.randn(4, 32), torch.rand(32) + 0.5
    for got, expected in zip(quantize_rows(x, 8, inv), quantize_rows(x * inv, 8, None), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_samples_are_rows_in_a_zero_point_border(padding):
    x, inv = torch.randn(3, 5, 4, 6), torch.rand(5) + 0.5
    codes, scale, zero = quantize_samples(x, 8, inv, padding)
    flat, flat_scale, flat_zero = quantize_rows((x * inv[:, None, None]).flatten(1), 8, None)
    assert torch.equal(scale, flat_scale)
    assert torch.equal(zero, flat_zero)
    inner = codes[:, :, padding : padding + 4, padding : padding + 6]
    assert torch.equal(inner.flatten(1), flat)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    border = torch.ones(codes.shape[2:], dtype=torch.bool)
    border[padding : padding + 4, padding : padding + 6] = False
    assert (codes[:, :, border] == zero[:, None, None].to(torch.uint8)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened_first(dtype):
    x = torch.randn(4, 40).to(dtype)
    assert torch.equal(quantize_rows(x, 8, None)[0], quantize_rows(x.float(), 8, None)[0])
