"""Products trained by their scales: values and gradients against the plain formula, and what is kept of the weight."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dgq_kernels.scaled_product as scaled
from dgq_kernels import scaled_conv2d, scaled_linear
from dgq_kernels.scaled_product import Weight, reference


def weight_of(matrix):
    return Weight(*matrix.shape, lambda start, stop: matrix[start:stop])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(scaled, "_TILE", {"cpu": 600})
    monkeypatch.setattr(scaled, "_STRIP", {"cpu": 70})


def scales(n, c, samples, dtype=torch.float32):
    shape = () if samples is None else (samples,)
    return (
        (1 + torch.randn(*shape, c, dtype=dtype) / 4).requires_grad_(),
        (torch.rand(*shape, n, dtype=dtype) / 100).requires_grad_(),
    )


def compare(run, x, matrix, d_in, d_out, bias):
    """Result and all gradients of both, to 1e-5 of their size."""
    results = []
    for function, weight in ((run[0], weight_of(matrix)), (run[1], matrix)):
        leaves = [x.detach().clone().requires_grad_(), *(s.detach().clone().requires_grad_() for s in (d_in, d_out))]
        y = function(leaves[0], weight, leaves[1], leaves[2], bias)
        torch.manual_seed(1)
        (y * torch.randn_like(y)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert ours.shape == plain.shape
        assert float((ours - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("shape, n", [((3, 7, 33), 50), ((3, 19), 16), ((3, 2, 5, 64), 36)])
def test_linear_equals_the_plain_formula(shape, n, samples, biased, gated, small_tiles):
    torch.manual_seed(0)
    matrix = torch.randint(-120, 121, (n, shape[-1]), dtype=torch.int8)
    d_in, d_out = scales(n, shape[-1], samples)
    both = (partial(one, gated=gated) for one in (scaled_linear, reference.scaled_linear))
    compare(tuple(both), torch.randn(shape), matrix, d_in, d_out, torch.randn(n) if biased else None)


@pytest.mark.parametrize("gated", [False, True])
def test_rows_that_lie_in_another_order(gated, small_tiles):
    """No view of x or of the gradient has all its rows in one dimension."""
    torch.manual_seed(0)
    matrix = torch.randint(-120, 121, (20, 33), dtype=torch.int8)
    d_in, d_out = scales(20, 33, None)

    def turned(function):
        return lambda x, *more: function(x.transpose(1, 2), *more, gated).transpose(1, 2).contiguous()

    both = turned(scaled_linear), turned(reference.scaled_linear)
    compare(both, torch.randn(2, 3, 5, 33), matrix, d_in, d_out, torch.randn(20))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("kernel, stride, padding, size", [(3, 1, 1, (5, 7)), (3, 2, 1, (6, 5)), (1, 1, 0, (4, 3))])
def test_convolution_equals_the_plain_formula(kernel, stride, padding, size, samples, biased, small_tiles):
    torch.manual_seed(0)
    n, c = 37, 11
    matrix = torch.randint(-120, 121, (n, kernel**2 * c), dtype=torch.int8)
    d_in, d_out = scales(n, c, samples)

    def with_taps(function):
        return lambda *arguments: function(*arguments, kernel, stride, padding)

    both = (with_taps(scaled_conv2d), with_taps(reference.scaled_conv2d))
    compare(both, torch.randn(2, c, *size), matrix, d_in, d_out, torch.randn(n) if biased else None)


@pytest.mark.parametrize("samples", [None, 2])
def test_gradients_are_those_of_finite_differences(samples, small_tiles):
    torch.manual_seed(0)
    matrix = torch.randint(-8, 8, (20, 27), dtype=torch.int8)
    linear = torch.randn(2, 3, 27, dtype=torch.float64, requires_grad=True)
    d_in, d_out = scales(20, 27, samples, torch.float64)
    bias = torch.randn(20, dtype=torch.float64)
    for more in ((), (bias,), (bias, True), (None, True)):
        assert torch.autograd.gradcheck(
            lambda *a, m=more: scaled_linear(a[0], weight_of(matrix), *a[1:], *m), (linear, d_in, d_out)
        )
    picture = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    d_in, d_out = scales(20, 3, samples, torch.float64)
    for stride in (1, 2):
        assert torch.autograd.gradcheck(
            lambda *a, s=stride: scaled_conv2d(a[0], weight_of(matrix), *a[1:], None, 3, s, 1), (picture, d_in, d_out)
        )


def test_without_an_input_scale(small_tiles):
    matrix = torch.randint(-8, 8, (20, 27), dtype=torch.int8)
    x, d_out = torch.randn(4, 27, requires_grad=True), torch.rand(20, requires_grad=True)
    y = scaled_linear(x, weight_of(matrix), None, d_out)
    plain = reference.scaled_linear(x, matrix, None, d_out)
    assert torch.allclose(y, plain, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (x, d_out)), torch.autograd.grad(plain.sum(), (x, d_out)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_scale_of_zero_spoils_no_other_gradient(small_tiles):
    matrix, x, d_out = torch.randint(-8, 8, (20, 27), dtype=torch.int8), torch.randn(4, 27), torch.rand(20)
    d_out[3] = 0
    compare((scaled_linear, reference.scaled_linear), x, matrix, torch.ones(27), d_out, torch.randn(20))
    d_out.requires_grad_()
    scaled_linear(x, weight_of(matrix), None, d_out).sum().backward()
    assert d_out.grad[3] == 0
    assert bool(d_out.grad.isfinite().all())


@pytest.mark.parametrize("gated, biased", [(False, False), (False, True), (True, True)])
def test_what_is_kept_for_the_backward_pass(gated, biased, small_tiles):
    """x and one tensor of the output's size: the output itself, or what it is made of."""
    n, x = 64, torch.randn(50, 30, requires_grad=True)
    d_in, d_out = scales(n, 30, None)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        matrix = torch.randint(-8, 8, (n, 30), dtype=torch.int8)
        y = scaled_linear(x, weight_of(matrix), d_in, d_out, torch.randn(n) if biased else None, gated)
    large = [tensor for tensor in kept.values() if tensor.dim() == 2]
    assert sorted(tensor.numel() for tensor in large) == [x.numel(), 50 * n]
    assert (y.data_ptr() in kept) == (not biased)


@torch.no_grad()
def test_scales_are_applied_in_their_own_dtype(small_tiles):
    """In bfloat16 a scale that is 1/1000 larger would be the same one."""
    torch.manual_seed(0)
    matrix, x = torch.randint(-8, 8, (40, 30), dtype=torch.int8), torch.randn(60, 4, 30).bfloat16()
    d_in, d_out = scales(40, 30, None)
    d_in, d_out = d_in.bfloat16().float(), d_out.bfloat16().float()
    sizes = [
        float(scaled_linear(x, weight_of(matrix), d_in, d_out * factor).float().abs().sum()) for factor in (1, 1.001)
    ]
    assert 1.0005 < sizes[1] / sizes[0] < 1.0015


class Largest(TorchDispatchMode):
    """The most values of a float tensor that the weight's length K is a side of."""

    def __init__(self, k):
        super().__init__()
        self.k, self.values = k, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and self.k in leaf.shape:
                self.values = max(self.values, leaf.numel())
        return result


def test_no_float_copy_of_the_weight_exists(small_tiles):
    n, k = 640, 30
    matrix = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    x, (d_in, d_out) = torch.randn(2, k, requires_grad=True), scales(n, k, None)
    with Largest(k) as seen:
        scaled_linear(x, weight_of(matrix), d_in, d_out).sum().backward()
    assert 0 < seen.values <= 600
    with Largest(k) as seen:
        reference.scaled_linear(x, matrix, d_in, d_out).sum().backward()
    assert seen.values >= n * k
