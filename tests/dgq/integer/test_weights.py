"""Integer weights: grids, GPTQ against a direct loop, and the overflow proof."""

import pytest
import torch
from comparing import sqnr
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq.errors import DgqError
from dgq.integer.weights import (
    FACTOR_BLOCK,
    GPTQ,
    Int8Grid,
    TwoLevelGrid,
    _upper_factor,
    column_sum,
    nearest,
    quantize_weight,
)
from dgq_kernels import packing


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 150), st.sampled_from([4, 8]), st.sampled_from([32, 64]), st.integers(0, 999))
def test_codes_stay_in_their_range_and_pack(n, k, bits, group, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(k)
    result = quantize_weight(weight, bits, group, ones, nearest(ones))
    assert result.codes.shape == (n, k)
    if bits == 8:
        assert result.codes.abs().max() <= 127
    else:
        assert result.codes.min() >= -8
        assert result.codes.max() <= 7
        assert 1 <= result.subscales.min() <= result.subscales.max() <= 15
        packed = packing.pack_int4(result.codes, group)
        subscales = packing.pack_subscales(result.subscales)
        assert torch.equal(packing.expand_two_level(packed, subscales, k, group), result.integer())
    assert torch.isfinite(result.dequantize()).all()


def test_error_falls_in_the_order_of_the_grids():
    """Per-channel int4 < two-level int4 < int8, by the margins one expects of a Gaussian."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(256)
    int8 = sqnr(weight, quantize_weight(weight, 8, 32, ones, nearest(ones)).dequantize())
    int4 = sqnr(weight, quantize_weight(weight, 4, 32, ones, nearest(ones)).dequantize())
    absmax = weight.abs().amax(1, keepdim=True) / 7
    plain = sqnr(weight, (weight / absmax).round().clamp(-8, 7) * absmax)
    assert plain + 2 < int4
    assert int4 + 15 < int8


def correlated_inputs(rows, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, generator=g) @ torch.randn(k, k, generator=g) / k**0.5


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_lowers_the_output_error(bits):
    x = correlated_inputs(2000, 96)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    moment = x.t() @ x / len(x)
    importance = moment.diagonal()
    plain = quantize_weight(weight, bits, 32, importance, nearest(importance)).dequantize()
    better = quantize_weight(weight, bits, 32, importance, GPTQ(moment)).dequantize()
    target = x @ weight.t()
    assert sqnr(target, x @ better.t()) > sqnr(target, x @ plain.t()) + 1.0


def test_gptq_is_the_column_by_column_update():
    """Against the textbook loop on a fixed grid, without blocks."""
    x = correlated_inputs(500, 40)
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    moment = x.t() @ x / len(x)
    result = quantize_weight(weight, 8, 32, moment.diagonal(), GPTQ(moment, sweeps=0))
    damped = moment.double() + 0.1 * moment.diagonal().double().mean() * torch.eye(40, dtype=torch.float64)
    left = weight.double().clone()
    step = result.scale.double()
    for column in range(40):
        # Error spreads by the inverse of the second moment of the columns still free.
        inverse = torch.linalg.inv(damped[column:, column:])
        code = (left[:, column] / step).round().clamp(-127, 127)
        agree = code == result.codes[:, column].double()
        near_tie = ((left[:, column] / step) % 1 - 0.5).abs() < 1e-3
        assert (agree | near_tie).all()
        code = result.codes[:, column].double()
        error = (left[:, column] - code * step) / inverse[0, 0]
        left[:, column:] -= torch.outer(error, inverse[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_coordinate_descent_ends_where_no_single_code_could_do_better(bits):
    x = correlated_inputs(500, 70)  # more than a block of 64 columns
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(7))
    moment = x.t() @ x / len(x)
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(70)

    def errors(rounded, codes):
        sub = 1 if bits == 8 else rounded.subscales.repeat_interleave(32, 1)[:, :70]
        off = (codes * sub * rounded.scale[:, None] - weight).double()
        return ((off @ damped.double()) * off).sum(1)

    first, done = (quantize_weight(weight, bits, 32, moment.diagonal(), GPTQ(moment, sweeps=n)) for n in (0, 40))
    least = errors(done, done.codes)
    assert (least <= errors(first, first.codes) * (1 + 1e-6)).all()
    assert least.sum() < 0.98 * errors(first, first.codes).sum()
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    for column in range(70):
        for change in (-1, 1):
            codes = done.codes.clone()
            codes[:, column] = (codes[:, column] + change).clamp(low, high)
            assert (errors(done, codes) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_descent_alone_comes_between_nearest_and_gptq(bits):
    """It is what candidates are judged by: most of GPTQ's gain, without its factor."""
    x = correlated_inputs(2000, 128)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    moment = x.t() @ x / len(x)
    importance = moment.diagonal()

    def error(rounding):
        off = quantize_weight(weight, bits, 32, importance, rounding).dequantize() - weight
        return float(((off @ moment) * off).sum())

    one = GPTQ(moment)
    alone = error(one.descent)
    assert "factor" not in vars(one)
    plain, both = error(nearest(importance)), error(one)
    assert both <= 1.02 * alone
    assert alone < plain - 0.7 * (plain - both)


def test_gptq_refuses_inputs_that_are_not_finite():
    with pytest.raises(DgqError, match="not finite"):
        GPTQ(torch.full((4, 4), float("nan")))


def test_zero_and_constant_weights_survive():
    for weight in (torch.zeros(3, 40), torch.full((3, 40), 0.25)):
        for bits in (4, 8):
            ones = torch.ones(40)
            back = quantize_weight(weight, bits, 32, ones, nearest(ones)).dequantize()
            assert torch.allclose(back, weight, atol=0.02)


def test_range_search_beats_plain_absmax_with_an_outlier():
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(5))
    weight[:, 0] = 30
    importance = torch.ones(512)
    importance[0] = 1e-6  # the outlier's input is nearly silent: clipping it is right
    grid = Int8Grid(weight, importance)
    assert (grid.scale < 0.5 * weight.abs().amax(1) / 127).all()


def test_column_sum_and_overflow_proof():
    integer = torch.randint(-128, 128, (6, 30), dtype=torch.int8)
    classes = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    expected = (integer.long() * (2**classes)).sum(1)
    assert torch.equal(column_sum(integer, classes).long(), expected)
    with pytest.raises(DgqError, match="overflow"):
        column_sum(torch.full((1, 70_000), 127, dtype=torch.int8))
    assert int(column_sum(torch.full((1, 66_000), 127, dtype=torch.int8))[0]) == 66_000 * 127


def test_two_level_grid_pads_a_ragged_tail():
    weight = torch.randn(3, 33)
    grid = TwoLevelGrid(weight, 32, torch.ones(33))
    result = nearest(torch.ones(33))(weight, grid)
    assert result.subscales.shape == (3, 2)


def test_factor_of_several_blocks():
    k = 2 * FACTOR_BLOCK + 50
    x = torch.randn(2 * k, k, dtype=torch.float64)
    moment = x.t() @ x
    rows, diagonal = _upper_factor(lambda start, end: moment[start:end, start:].float(), k, 3.0)
    factor = torch.zeros(k, k, dtype=torch.float64)
    for start in range(0, k, 100):
        factor[start : start + 100, start:] = rows(start, start + 100)
    factor = factor.triu()
    assert torch.equal(factor.diagonal().float(), diagonal)
    assert float((factor @ factor.t() - moment - 3 * torch.eye(k)).norm() / moment.norm()) < 1e-5
