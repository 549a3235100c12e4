"""What rounds weights: the engine's bits are the reference's, under every instruction set of this CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels import native, weight_rounding
from dgq_kernels.weight_rounding import reference

SETS = native.supported()
if not SETS:
    pytest.skip("there is no CPU engine", allow_module_level=True)


@pytest.fixture(params=SETS)
def isa(request):
    before = native.use(request.param)
    yield request.param
    native.use(before)


def block(rows, columns, apart=0, seed=0):
    """A block of columns as it lies in larger matrices."""
    generator = torch.Generator().manual_seed(seed)
    wide = columns + apart
    values, pull = (torch.randn(rows, wide, generator=generator)[:, :columns] for _ in range(2))
    ahead = torch.randn(columns, wide, generator=generator)
    diagonal = torch.rand(columns, generator=generator) + 0.5
    step = torch.rand(rows, generator=generator) * 0.3 + 1e-3
    return values, pull * 0.1, ahead, diagonal, step


def equal(a, b):
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def same_rounding(low, high, *tensors):
    values, *others = tensors
    expected = values.clone()
    found = torch.cat([values, values[:, :1]], 1)[:, : values.shape[1]]  # its rows lie apart
    expected_change = reference.round_columns(expected, *others, low, high)
    change = native.round_columns(found, *others, low, high)
    assert equal(found, expected)
    assert equal(change, expected_change)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 129])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 64])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-127, 127)])
def test_columns_are_rounded_as_by_the_reference(isa, rows, columns, low, high):
    same_rounding(low, high, *block(rows, columns, apart=5, seed=rows * columns))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 64), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e20]), st.integers(0, 2**31))
def test_columns_of_any_size_of_values(rows, columns, size, seed):
    values, pull, ahead, diagonal, step = block(rows, columns, seed=seed)
    same_rounding(-8, 7, values * size, pull, ahead * size, diagonal, step)


def test_ties_go_to_even_and_what_is_not_finite_stays_so(isa):
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, 7.5, 100.0, -100.0, float("nan")]]).repeat(3, 1)
    values[1, 7] = float("inf")
    nothing, step = torch.zeros(8, 8), torch.ones(3)
    change = native.round_columns(values, torch.zeros(3, 8), nothing, torch.ones(8), step, -8, 7)
    assert values[0, :7].tolist() == [0, 2, 2, 0, 7, 7, -8]
    assert values[0, 7].isnan()
    assert change[0, 7].isnan()
    assert values[1, 7] == 7
    assert change[1, 7].isinf()


@pytest.mark.parametrize("size", [1, 17, 32, 64])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 7), (130, 2), (5, 300)])
def test_subscales_are_found_as_by_the_reference(isa, rows, groups, size):
    generator = torch.Generator().manual_seed(rows * size)
    values = torch.randn(rows, groups, size, generator=generator)
    importance = torch.rand(groups, size, generator=generator)
    scale = torch.rand(rows, generator=generator) * 0.05 + 1e-3
    expected, found = (m.search_subscales(values, importance, scale) for m in (reference, native))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[0].min() >= 1
    assert found[0].max() <= 15
    # columns of a wider matrix, of one group
    wide = torch.cat([values[:, 0], values[:, 0]], 1)
    again = native.search_subscales(wide[:, None, :size], importance[:1], scale)
    assert torch.equal(again[0], expected[0][:, :1])


def test_the_best_subscale_is_the_best():
    """A weight that lies on a sub-scale's grid is given that sub-scale, or one that divides it."""
    scale = torch.tensor([0.01])
    codes = torch.tensor([-8.0, 7, 3, 5, -1, 2, 0, 1])
    for m in range(1, 16):
        found, error = weight_rounding.search_subscales((codes * m * scale)[None, None], torch.ones(1, 8), scale)
        assert found.item() == m
        assert error.item() < 1e-12


def test_what_does_not_fit_is_refused():
    values, pull, ahead, diagonal, step = block(4, 8)
    with pytest.raises(ValueError, match="pull"):
        native.round_columns(values, pull[:, :7], ahead, diagonal, step, -8, 7)
    with pytest.raises(ValueError, match="diagonal"):
        native.round_columns(values, pull, ahead, diagonal[:7], step, -8, 7)
    with pytest.raises(ValueError, match="step"):
        native.round_columns(values, pull, ahead, diagonal, step.double(), -8, 7)
    with pytest.raises(ValueError, match="in place"):
        native.round_columns(values.t().contiguous().t(), pull, ahead, diagonal, step, -8, 7)
    with pytest.raises(ValueError, match="1 to 64 columns"):
        native.round_columns(*block(4, 65), -8, 7)
    with pytest.raises(ValueError, match="importance"):
        native.search_subscales(values[:, None], torch.ones(2, 8), step)
    with pytest.raises(ValueError, match="1 to 64 columns"):
        native.search_subscales(torch.ones(2, 1, 65), torch.ones(1, 65), torch.ones(2))


def test_without_an_engine_the_reference_runs(monkeypatch):
    tensors = block(5, 6)
    expected = tensors[0].clone()
    reference.round_columns(expected, *tensors[1:], -8, 7)
    monkeypatch.setattr(native, "available", lambda: False)
    weight_rounding.round_columns(*tensors, -8, 7)
    assert torch.equal(tensors[0], expected)
