"""Small arguments of the rotation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..samples import Sample, floats


def samples() -> Iterator[Sample]:
    """Without and with divisors."""
    rows, divisor = floats(9, 192), torch.linspace(0.5, 1, 192)
    yield Sample("rotate", (rows, 16, None))
    yield Sample("rotate", (rows, 64, divisor))
