"""Batches whose second half is the first one again: what guidance begins with, until the text is read.

A pipeline gives a network the same latents twice, with and without the prompt. All that comes before the first
cross-attention is computed once here, and the result copied: the same bits, since every row of the integer recipe has
scales of its own.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def repeated(*batches: Tensor | None) -> bool:
    """Whether the second half of each batch (B, ...) is the first half, bit for bit: of dense tensors on the CPU, whose
    comparison costs a millisecond at most and nothing where they differ early. None stands for what is not given."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    for x in batches:
        if x is None:
            continue
        if type(x) is not Tensor or x.device.type != "cpu" or len(x) < 2 or len(x) % 2:
            return False
        size, start = x.element_size(), x.data_ptr()
        middle = start + len(x) // 2 * x.stride(0) * size
        # of most calls the first values differ, and a step asks fifty times
        if x.numel() and ctypes.string_at(start, size) != ctypes.string_at(middle, size):
            return False
        first, second = x.view(_BITS[size]).chunk(2)
        if not torch.equal(first, second):
            return False
    return True


def half(x: Tensor) -> Tensor:
    """The first half of a batch (B, ...): (B / 2, ...), a view."""
    return x[: len(x) // 2]


def twice(x: Tensor) -> Tensor:
    """A batch (B, ...) two times, one after the other: (2 B, ...)."""
    return torch.cat((x, x))
