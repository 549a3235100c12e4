"""The weight range search of the DGQ paper (section 1 of docs/method.md): shrink a channel's range step by
step and keep the one whose rounding error is smallest in the 2.4-norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHRINK_FACTORS = tuple(i / 100 for i in range(100, 20, -1))  # 1.00, 0.99, ..., 0.21: 80 candidates


LOSS_POWER = 2.4


# Every scale is at least this: below it float32 loses digits, and the reciprocal overflows.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


# Rows are searched in blocks of about this many weights: 80 passes over a block that stays in the cache.
_BLOCK_ELEMENTS = 1 << 18


def affine_parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of asymmetric codes 0 .. 2^bits - 1 over the range [low, high].

    ``s = (high - low) / (2^bits - 1)``, ``z = round(-low / s)``. The zero point is not clamped to the code
    range: a range that excludes 0 needs it outside (DGQ paper). A range of one point v gets s = |v|
    (1 where v = 0), which represents v exactly. Numbers below SMALLEST_SCALE count as 0.

    Args:
        low, high: float32, any one shape, low <= high.
        bits: code width.

    Returns:
        (scale, zero_point), float32, of that shape; the zero point holds whole numbers.
    """
    scale = (high - low) / (2**bits - 1)
    lone_value = torch.where(low.abs() < SMALLEST_SCALE, torch.ones_like(low), low.abs())
    scale = torch.where(scale < SMALLEST_SCALE, lone_value, scale)
    return scale, torch.round(-low / scale)


def search_asymmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Range (low, high) per output channel minimising mean |W - W^|^2.4 over the channel (DGQ paper).

    The candidates are (min, max) of the row times 1.00, 0.99, ..., 0.21; the widest wins a tie.

    Args:
        weight: (N, K), any float dtype.
        bits: width of the codes that ``affine_parameters(low, high, bits)`` will give.

    Returns:
        (low, high), float32 (N,).
    """
    weight = weight.float()
    low, high = torch.aminmax(weight, dim=1)

    def dequantized(rows: Tensor, index: slice, factor: float) -> Tensor:
        scale, zero_point = affine_parameters(low[index] * factor, high[index] * factor, bits)
        scale, zero_point = scale[:, None], zero_point[:, None]
        codes = rows.div(scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
        return codes.sub_(zero_point).mul_(scale)

    factor = _best_factor(weight, dequantized)
    return low * factor, high * factor


def search_symmetric(weight: Tensor, qmax: int, qmin: int, importance: Tensor | None = None) -> Tensor:
    """Scale per output channel of signed codes qmin .. qmax minimising mean |W - W^|^2.4 over the channel.

    The candidates are absmax / qmax times 1.00, 0.99, ..., 0.21 (the symmetric form of
    ``search_asymmetric``).

    Args:
        weight: (N, K), any float dtype.
        qmax, qmin: largest and smallest code, e.g. 7 and -8.
        importance: (K,), weights of the mean (the inputs' mean squares), or None for a plain one.

    Returns:
        scale, float32 (N,); 1 for a row of zeros, and of numbers that would need less than SMALLEST_SCALE.
    """
    weight = weight.float()
    widest = weight.abs().amax(dim=1) / qmax
    widest = torch.where(widest * SHRINK_FACTORS[-1] < SMALLEST_SCALE, torch.ones_like(widest), widest)

    def dequantized(rows: Tensor, index: slice, factor: float) -> Tensor:
        scale = (widest[index] * factor)[:, None]
        return rows.div(scale).round_().clamp_(qmin, qmax).mul_(scale)

    return widest * _best_factor(weight, dequantized, importance)


def _best_factor(
    weight: Tensor, dequantized: Callable[[Tensor, slice, float], Tensor], importance: Tensor | None = None
) -> Tensor:
    """The shrink factor of least loss per row of weight (N, K): float32 (N,)."""
    if importance is None:
        importance = weight.new_ones(weight.shape[1])
    best = torch.empty(len(weight), device=weight.device)
    block = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), block):
        index = slice(start, start + block)
        rows = weight[index]
        losses = torch.stack(
            [
                dequantized(rows, index, factor).sub_(rows).abs_().pow_(LOSS_POWER) @ importance
                for factor in SHRINK_FACTORS
            ]
        )
        best[index] = losses.new_tensor(SHRINK_FACTORS)[losses.argmin(dim=0)]
    return best
