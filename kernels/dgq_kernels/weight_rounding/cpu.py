"""Rounding weights by the CPU engine, or by the reference where there is none."""

from __future__ import annotations

from torch import Tensor

from .. import native
from . import reference


def round_columns(
    values: Tensor, pull: Tensor, ahead: Tensor, diagonal: Tensor, step: Tensor, low: int, high: int
) -> Tensor:
    """See `dgq_kernels.weight_rounding.round_columns`."""
    run = native.round_columns if native.available() else reference.round_columns
    return run(values, pull, ahead, diagonal, step, low, high)


def search_subscales(groups: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `dgq_kernels.weight_rounding.search_subscales`."""
    run = native.search_subscales if native.available() else reference.search_subscales
    return run(groups, importance, scale)
