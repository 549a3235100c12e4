"""Rotation of channels: blocks of them times an orthogonal matrix that spreads what is large in one over all.

The matrix is the regular Hadamard matrix of ConvRot (arXiv 2512.03673): a Kronecker power of H / 2, symmetric and its
own inverse, H = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]. Its rows have equal sums: a mean that all
channels share stays with all, where the usual (Sylvester's) matrix gathers it in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import implementation, operator
from ..fakes import register_fake
from . import reference

BLOCKS = (16, 64, 256)


@operator("dgq::rotate")
def rotate(x: Tensor, block: int, inv_divisor: Tensor | None = None) -> Tensor:
    """Blocks of channels, divided first, times the regular Hadamard matrix; bit for bit alike on every backend.

    Stage by stage, four values [a, b, c, d] `stride` places apart (1, 4, ..., block / 4) become
    [(a+b) + (c-d), (a+b) - (c-d), (a-b) + (c+d), (c+d) - (a-b)], in float32; then all are multiplied by block^-1/2.

    Args:
        x: float (M, C).
        block: channels of a block, one of `BLOCKS`, which divides C.
        inv_divisor: float32 (C,), or None; x is multiplied by it first.

    Returns:
        float32 (M, C).

    Raises:
        ValueError: no such block.
    """
    if block not in BLOCKS or x.dim() != 2 or x.shape[1] % block:
        raise ValueError(f"blocks of {block} channels cannot be rotated in an input of {tuple(x.shape)}")
    return implementation(reference.rotate, x)(x, block, inv_divisor)


@register_fake(rotate)
def _(x, block, inv_divisor=None):
    return x.new_empty(x.shape, dtype=torch.float32)
