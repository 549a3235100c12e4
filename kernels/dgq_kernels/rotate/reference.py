"""Definition of the rotation of channels (docs/method.md, "integer recipe", item 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, block: int, inv_divisor: Tensor | None = None) -> Tensor:
    """See `dgq_kernels.rotate`; here x may have any number of axes, channels last."""
    y, stride = x.float() if inv_divisor is None else x.float() * inv_divisor, 1
    while stride < block:
        a, b, c, d = y.unflatten(-1, (-1, 4, stride)).unbind(-2)
        low, high, sum_, difference = a + b, a - b, c + d, c - d
        y = torch.stack((low + difference, low - difference, high + sum_, sum_ - high), -2).flatten(-3)
        stride *= 4
    return y / block**0.5
