"""Products of float activations with packed weights, both directions, on the Triton kernel against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels import packing
from dgq_kernels.scaled_product import reference
from dgq_kernels.scaled_product import triton as kernels
from dgq_kernels.scaled_product.triton import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Config(32, 64, 64, 4, 2)  # several tiles of a small shape


def weights(n, k, group, generator):
    """(weight, subscales, group), whose integers are all over the range."""
    if not group:
        return torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator), None, 0
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    groups = packing.padded_length(k, group) // group
    subscales = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    return packing.pack_int4(codes, group), packing.pack_subscales(subscales), group


def on_device(arguments):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]


def guarded(size, dtype):
    """A NaN buffer, and the guard behind it that no store may touch."""
    count = torch.Size(size).numel()
    whole = torch.full((count + 64,), float("nan"), dtype=dtype, device=DEVICE)
    return whole[:count].view(size), whole[count:]


def check(size, n, window, group, dtype=torch.float32, config=None):
    """Both directions; activations are such integers that every sum is one, and exact in float32."""
    g = torch.Generator().manual_seed(0)
    weight = weights(n, window[0] ** 2 * size[3], group, g)
    x = torch.randint(-9, 10, size, generator=g).to(dtype)
    exact = reference.unscaled_product(x.double(), *weight, *window)
    of_y = torch.randint(-9, 10, exact.shape, generator=g).to(dtype)
    exact_back = reference.unscaled_product_input(of_y.double(), *weight, size, *window)
    for function, arguments, expected in (
        (kernels.unscaled_product, (x, *weight, *window), exact),
        (kernels.unscaled_product_input, (of_y, *weight, list(size), *window), exact_back),
    ):
        out, guard = guarded(expected.shape, dtype)
        got = function(*on_device(arguments), out=out, config=config)
        if dtype == torch.bfloat16:  # which the interpreter truncates to
            torch.testing.assert_close(got.cpu().double(), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(got.cpu(), expected.to(dtype))
        assert guard.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (70, 131, 45), (33, 192, 130)])
def test_rows(m, k, n, group, dtype):
    check((1, 1, m, k), n, (1, 1, 0), group, dtype, SMALL)


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("channels", [4, 64, 96])  # groups that cross from tap to tap, and not
@pytest.mark.parametrize("window", [(3, 1, 1), (3, 2, 1), (3, 2, 0), (2, 2, 0), (1, 2, 0)])
def test_pixels(window, channels, group):
    check((2, 6, 5, channels), 37, window, group, config=SMALL)


def test_tiles_of_the_backend_itself():
    check((1, 1, 150, 150), 140, (1, 1, 0), 32, torch.bfloat16)
    check((1, 4, 4, 150), 140, (3, 1, 1), 0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(1, 70)),
    st.integers(1, 70),
    st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 3, 2)]),
    st.sampled_from([0, 32, 64]),
)
def test_any_shape(size, n, window, group):
    if min(size[1:3]) + 2 * window[2] >= window[0]:
        check(size, n, window, group, config=SMALL)


def test_sums_of_any_floats():
    g = torch.Generator().manual_seed(0)
    weight = weights(40, 9 * 64, 32, g)
    x, window = torch.randn(2, 5, 6, 64, generator=g), (3, 1, 1)
    for dtype, most in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        values = x.to(dtype)
        exact = reference.unscaled_product(values.double(), *weight, *window)
        y = kernels.unscaled_product(*on_device((values, *weight, *window))).cpu().double()
        assert float((y - exact).norm() / exact.norm()) < most


def test_nothing_to_multiply():
    weight = on_device(weights(8, 16, 0, torch.Generator()))
    empty = torch.empty(1, 1, 0, 16, device=DEVICE)
    assert kernels.unscaled_product(empty, *weight, 1, 1, 0).shape == (1, 1, 0, 8)


def test_operands_that_are_not_contiguous_are_refused():
    weight = weights(8, 16, 0, torch.Generator())
    with pytest.raises(ValueError, match="contiguous"):
        kernels.unscaled_product(torch.zeros(1, 1, 16, 3).transpose(2, 3), *weight, 1, 1, 0)
