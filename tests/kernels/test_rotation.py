"""The rotation of channels is the regular Hadamard matrix, and all backends give its bits."""

import pytest
import torch

import dgq_kernels
from dgq_kernels import native
from dgq_kernels.linear import reference as linear_reference
from dgq_kernels.quantize_activation import reference as quantize_reference
from dgq_kernels.rotation import BLOCKS, rotate


def matrix(block):
    """The Kronecker power of the matrix of order 4, orthogonal, in float64."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    power = four
    while len(power) < block:
        power = torch.kron(power, four)
    return power


@pytest.mark.parametrize("block", BLOCKS)
def test_reference_is_the_matrix(block):
    x = torch.randn(7, 3 * block, generator=torch.Generator().manual_seed(block), dtype=torch.float64).float()
    expected = (x.double().view(7, 3, block) @ matrix(block)).flatten(1)
    torch.testing.assert_close(rotate(x, block).double(), expected, rtol=0, atol=2e-6)
    # entries are powers of two: of whole numbers everything is exact, and the matrix is its own inverse
    whole = torch.randint(-1000, 1000, (5, block), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(rotate(whole, block).double(), whole.double() @ matrix(block))
    assert torch.equal(rotate(rotate(whole, block), block), whole)


def test_a_common_mean_stays_with_all():
    assert torch.equal(rotate(torch.full((1, 256), 3.0), 256), torch.full((1, 256), 3.0))


def test_what_is_not_finite_fills_its_block():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x[1, 70], x[2, 3], x[3, 5], x[3, 9] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = rotate(x, 64)
    assert y[0].isfinite().all()
    assert (~y.isfinite()).view(4, 2, 64).all(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 0]]
    assert (~y.isfinite()).view(4, 2, 64).any(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize(("channels", "block"), [(64, 32), (64, 256), (48, 64), (64, -16)])
def test_other_blocks_are_refused(channels, block):
    for run, x in ((dgq_kernels.quantize_rows, (2, channels)), (dgq_kernels.quantize_samples, (2, channels, 3, 3))):
        last = (None, block) if run is dgq_kernels.quantize_rows else (1, None, block)
        with pytest.raises(ValueError, match="cannot be rotated"):
            run(torch.zeros(x), 8, None, *last)
    with pytest.raises(ValueError, match="no other order"):
        dgq_kernels.quantize_rows(torch.zeros(2, 64), 8, None, torch.arange(64, dtype=torch.int32), 64)


@pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")
class TestEngine:
    @pytest.fixture(params=native.ISAS)
    def isa(self, request):
        if request.param not in native.supported():
            pytest.skip(f"this CPU has no {request.param}")
        before = native.use(request.param)
        yield request.param
        native.use(before)

    @pytest.mark.parametrize(("rows", "channels", "block"), [(1, 16, 16), (35, 192, 64), (9, 512, 256)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("divide", [False, True])
    def test_linear(self, isa, rows, channels, block, dtype, divide):
        g = torch.Generator().manual_seed(rows)
        weight = torch.randint(-127, 128, (37, channels), generator=g).to(torch.int8)
        scale, bias = torch.rand(37, generator=g) + 0.1, torch.randn(37, generator=g)
        divisor = torch.rand(channels, generator=g) + 0.5 if divide else None
        x = torch.randn(rows, channels, generator=g).to(dtype)
        codes = quantize_reference.quantize_rows(x, 8, divisor, None, block)
        sums = weight.sum(1, dtype=torch.int32)
        expected = linear_reference.linear_int8(*codes, weight, scale, sums, bias, dtype, [channels])
        assert torch.equal(native.Layer(weight, scale, bias, divisor, 8, rotation=block).linear(x), expected)

    @pytest.mark.parametrize("divide", [False, True])
    @pytest.mark.parametrize("normed", [False, True])
    def test_convolution(self, isa, divide, normed):
        """Rotation after norm, SiLU and division; exact where there is no norm."""
        g = torch.Generator().manual_seed(0)
        matrix = torch.randint(-127, 128, (24, 9 * 64), generator=g).to(torch.int8)
        scale, bias = torch.rand(24, generator=g) / 100 + 0.001, torch.randn(24, generator=g)
        divisor = torch.rand(64, generator=g) + 0.5 if divide else None
        x = torch.randn(2, 64, 9, 7, generator=g)
        gain, shift = torch.rand(64, generator=g) + 0.5, torch.randn(64, generator=g)
        norm = native.Norm(gain, shift, 1e-5, 4, True) if normed else None
        layer = native.Layer(matrix, scale, bias, divisor, 8, 3, 1, 1, rotation=16)
        before = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, gain, shift, 1e-5)) if normed else x
        codes = quantize_reference.quantize_samples(before, 8, divisor, 1, None, 16)
        weight = matrix.view(24, 3, 3, 64).permute(0, 3, 1, 2)
        expected = dgq_kernels.conv2d(
            *codes, weight, scale, matrix.sum(1, dtype=torch.int32), bias, 1, torch.float32, [64]
        )
        got = layer.conv2d(x, norm=norm)
        if normed:  # the norm's last digits move some codes by one
            assert (got - expected).norm() / expected.norm() < 1e-3
        else:
            assert torch.equal(got, expected)

    def test_layers_of_one_rotation_share_an_input(self, isa):
        g = torch.Generator().manual_seed(0)
        weight, scale = torch.randint(-127, 128, (32, 64), generator=g).to(torch.int8), torch.ones(32)
        same = [native.Layer(weight, scale, None, None, 8, rotation=16) for _ in range(2)]
        x = torch.randn(5, 64, generator=g)
        assert native.can_share(same)
        assert torch.equal(native.linear(same, x)[1], same[1].linear(x))
        other = [same[0], native.Layer(weight, scale, None, None, 8)]
        assert not native.can_share(other)
        divided = [native.Layer(weight, scale, None, torch.full((64,), 0.5), 8, rotation=16) for _ in range(2)]
        assert native.can_share(divided)
        assert torch.equal(native.linear(divided, 2 * x)[1], same[1].linear(x))
        divided[0].set_scales(scale, torch.ones(64))
        assert not native.can_share(divided)
        with pytest.raises(ValueError, match="rotations"):
            native.linear(other, x)

    def test_a_block_that_does_not_fit_is_refused(self):
        weight = torch.zeros(8, 48, dtype=torch.int8)
        for block in (64, 32, -16):
            with pytest.raises(ValueError, match="rotation of 16, 64 or 256"):
                native.Layer(weight, torch.ones(8), None, None, 8, rotation=block)
