"""Rotation of channels: blocks of them times an orthogonal matrix that spreads what is large in one over all.

The matrix is the regular Hadamard matrix of ConvRot (arXiv 2512.03673; docs/method.md, "integer recipe", item 2): a
Kronecker power of H / 2, symmetric and its own inverse, H = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1],
[-1, 1, 1, 1]]. Its rows have equal sums: a mean that all channels share stays with all, where the usual (Sylvester's)
matrix gathers it in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = (16, 64, 256)


def rotate(x: Tensor, block: int) -> Tensor:
    """Blocks of channels times the matrix; the quantizing operators do the same, bit for bit, on every backend.

    Stage by stage, four values [a, b, c, d] `stride` places apart (1, 4, ..., block / 4) become
    [(a+b) + (c-d), (a+b) - (c-d), (a-b) + (c+d), (c+d) - (a-b)], in float32; then all are multiplied by block^-1/2.

    Args:
        x: float (..., C).
        block: channels of a block, one of `BLOCKS`, which divides C.

    Returns:
        float32 (..., C). Differentiable.

    Raises:
        ValueError: no such block.
    """
    check_rotation(x.shape[-1], block)
    y, stride = x.float(), 1
    while stride < block:
        a, b, c, d = y.unflatten(-1, (-1, 4, stride)).unbind(-2)
        low, high, sum_, difference = a + b, a - b, c + d, c - d
        y = torch.stack((low + difference, low - difference, high + sum_, sum_ - high), -2).flatten(-3)
        stride *= 4
    return y / block**0.5


def check_rotation(channels: int, block: int) -> None:
    """Refuse a block that is none of `BLOCKS`, or does not divide the channels.

    Raises:
        ValueError: so it is.
    """
    if block not in BLOCKS or channels % block:
        raise ValueError(f"{channels} channels cannot be rotated in blocks of {block}")
