"""The row quantizer's kernel gives the reference's codes, scales and zero points bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels.codes import unsigned
from dgq_kernels.quantize_activation import reference
from dgq_kernels.quantize_activation import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(x, bits, inv_divisor):
    """Run the kernel on buffers full of rubbish with guard bytes behind them and compare everything."""
    rows, channels = x.shape
    guarded = torch.full((rows * channels + 64,), -91, dtype=torch.int8, device=DEVICE)
    out = (
        guarded[: rows * channels].view(rows, channels),
        torch.full((rows,), float("nan"), device=DEVICE),
        torch.full((rows,), -12345, dtype=torch.int32, device=DEVICE),
    )
    divisor = None if inv_divisor is None else inv_divisor.to(DEVICE)
    kernels.quantize_rows(x.to(DEVICE), bits, divisor, out=out)
    for got, expected in zip(out, reference.quantize_rows(x, bits, inv_divisor), strict=True):
        assert torch.equal(unsigned(got.cpu()), expected)
    assert (guarded[rows * channels :] == -91).all()


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize(("rows", "channels"), [(6, 42), (123, 431), (65, 1024), (1, 1), (3, 2600)])
@pytest.mark.parametrize("divide", [False, True])
def test_bit_exact(rows, channels, bits, divide):
    g = torch.Generator().manual_seed(rows * bits)
    x = torch.randn(rows, channels, generator=g) * torch.rand(rows, 1, generator=g) * 30
    x[:, channels // 2] *= 20
    check(x, bits, torch.rand(channels, generator=g) + 0.5 if divide else None)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 70),
    channels=st.integers(1, 1100),
    bits=st.integers(2, 8),
    offset=st.floats(-5, 5),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
def test_any_shape_and_range(rows, channels, bits, offset, exponent, seed):
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    check((x + offset) * 10.0**exponent, bits, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(torch.randn(42, 431, generator=torch.Generator().manual_seed(0)).to(dtype), 8, None)


def test_ties_go_to_even():
    """Multiples of half a step: where rounding half up and half to even part."""
    steps = torch.arange(0, 511) / 2
    check(torch.stack((steps, -steps, steps - 63.5)), 8, None)


def test_constant_zero_and_one_sided_rows():
    x = torch.stack((torch.zeros(42), torch.full((42,), 3.0), torch.full((42,), -3.0), torch.linspace(1, 2, 42)))
    check(x, 8, None)


def test_strided_rows_and_no_rows():
    x = torch.randn(12, 90, generator=torch.Generator().manual_seed(0))
    check(x[::2, :42], 8, None)
    check(x.t(), 8, None)
    check(x[:0], 8, None)
