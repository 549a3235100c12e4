"""The inner loops of rounding a weight: GPTQ's columns one after the other, and the sub-scales of two-level int4.

Calibration alone calls them, with float32 tensors on the CPU. The engine's form gives the reference's bits.
"""

from __future__ import annotations

from torch import Tensor

from ..backend import implementation
from . import reference


def round_columns(
    values: Tensor, pull: Tensor, ahead: Tensor, diagonal: Tensor, step: Tensor, low: int, high: int
) -> Tensor:
    """Set each column in turn to the multiple of its row's step that is nearest to the row's least error, in place.

    One block of GPTQ's sweep (docs/method.md, "weights"): column i is rounded at values[:, i] - pull[:, i] /
    diagonal[i], and what it changes by pulls at the block's later columns by ahead[i].

    Args:
        values: float32 (N, B), B at most 64; its rows may lie apart.
        pull: float32 (N, B), what columns before the block pull by; left as it is.
        ahead: float32 (B, B or more), the block's rows of the pulling matrix from its own first column on; what lies
            above the diagonal is read.
        diagonal: float32 (B,).
        step: float32 (N,), positive.
        low, high: of the codes, at most 2^21 in size.

    Returns:
        float32 (N, B), by how much the values changed.
    """
    return implementation(reference.round_columns, values)(values, pull, ahead, diagonal, step, low, high)


def search_subscales(groups: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The best sub-scale, 1 to 15, of each group of weights on the grid (-8..7) * sub-scale * scale, by trying all.

    Args:
        groups: float32 (N, G, g), g at most 64.
        importance: float32 (G, g), weights of the squared errors.
        scale: float32 (N,), positive.

    Returns:
        The sub-scales, uint8 (N, G), the smallest of equally good ones; and their errors, float32 (N, G), whose sums
        are formed from the first value of a group to the last.
    """
    return implementation(reference.search_subscales, groups)(groups, importance, scale)
