"""Small arguments of every operator: what `dgq doctor` compares with the references, and the tests of registration run.

Each operator's folder has its own, in a file `samples.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .packing import expand_two_level, pack_int4, pack_subscales, padded_length


class Sample(NamedTuple):
    """Arguments of an operator, on the CPU, with every optional tensor given and values at the ends of their ranges.

    Attributes:
        operator: its name.
        arguments: in their order.
        exact: whether every backend gives the reference's integers, and its floats but for the last bits. Where codes
            are of what exponentials or sums of floats made, a code may differ by one.
    """

    operator: str
    arguments: tuple[Any, ...]
    exact: bool = True


def samples() -> Iterator[Sample]:
    """Those of every operator that has a reference."""
    for folder in backend.folders():
        yield from importlib.import_module(f"{folder}.samples").samples()


def reference(operator: str) -> Callable[..., Any]:
    """The definition of an operator."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"{backend.FOLDERS[operator]}.reference"), operator)
    return function


def floats(*size: int) -> Tensor:
    """Normal float32 values; the same for the same size."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(len(size)))


def codes(*size: int) -> Tensor:
    """uint8 over the whole range; the first ones are all 255, where saturating sums show."""
    drawn = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    drawn[0] = 255
    return drawn


def weights(*size: int) -> Tensor:
    """int8 over the whole range, the first ones all 127."""
    drawn = torch.randint(-127, 128, size, dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    drawn[0] = 127
    return drawn


def order(channels: int) -> Tensor:
    """A permutation, int32."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(3)).to(torch.int32)


def epilogue(rows: int, matrix: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(scale, zero_point) of rows, and (weight_scale, column_sum, bias) of an int8 matrix (N, K)."""
    n = len(matrix)
    zero_point = torch.arange(rows, dtype=torch.int32) % 256
    channels = torch.linspace(0.001, 0.01, n), matrix.sum(1, dtype=torch.int32), floats(n)
    return (torch.linspace(0.01, 0.1, rows), zero_point), channels


def two_level(n: int, k: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A two-level int4 weight: packed, subscales, and the int8 matrix (N, k) that they stand for."""
    packed = pack_int4(weights(n, k).div(16, rounding_mode="floor"), group)
    groups = padded_length(k, group) // group
    subscales = pack_subscales(torch.arange(n * groups, dtype=torch.uint8).view(n, groups) % 15 + 1)
    return packed, subscales, expand_two_level(packed, subscales, k, group)
