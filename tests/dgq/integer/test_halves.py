"""Batches of two equal halves are known."""

import pytest
import torch
from torch import nn

from dgq.integer.halves import half, repeated, twice


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_only_batches_of_two_equal_halves_are_repeated(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 4, 6).to(dtype)
    both = twice(x)
    assert repeated(both)
    assert torch.equal(half(both), x)
    assert repeated(both.to(memory_format=torch.channels_last), None, both.flatten(1))
    assert repeated(both.transpose(1, 3))
    assert not any(repeated(one) for one in (x, x[:1], x[:0]))
    for at in ((3, 0, 0, 0), (5, 4, 3, 5)):
        other = both.clone()
        other[at] = torch.nextafter(other[at].float(), torch.tensor(9e9)) if dtype == torch.float32 else other[at] + 1
        assert not repeated(other)
        assert not repeated(both, other)
    missing = both.clone()
    missing[1] = missing[4] = torch.nan
    assert repeated(missing)


def test_what_cannot_be_compared_is_not_repeated() -> None:
    both = torch.zeros(2, 3)
    assert not repeated(both.to("meta"))
    assert not repeated(nn.Parameter(both))
    with torch.enable_grad():
        assert not repeated(both)


def test_it_compiles_without_looking() -> None:
    calls = torch.compile(lambda x: x + 1 if repeated(x) else x - 1, fullgraph=True, backend="eager")
    assert torch.equal(calls(torch.zeros(2, 3)), -torch.ones(2, 3))
