"""Small arguments of the linear layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..samples import Sample, codes, epilogue, floats, two_level, weights


def samples() -> Iterator[Sample]:
    """Of each operator here that has a reference."""
    x, weight, residual = codes(9, 96), weights(40, 96), floats(9, 40)
    rows, channels = epilogue(9, weight)
    scale, sums, bias = channels
    ends = [30, 96]  # the second class counts twice
    shifted = sums + weight[:, 30:].sum(1, dtype=torch.int32)
    yield Sample("linear_int8", (x, *rows, weight, scale, shifted, bias, torch.float32, ends, residual))
    packed, subscales, matrix = two_level(40, 96, 32)
    rows, channels = epilogue(9, matrix)
    yield Sample("linear_int4", (x, *rows, packed, subscales, *channels, torch.float32, 32, residual))
    parts = torch.stack([weight[:, :30].sum(1, dtype=torch.int32), weight[:, 30:].sum(1, dtype=torch.int32)])
    grouped = (x, *(one[:2].contiguous() for one in rows), weight, scale, parts, bias, torch.float32, ends)
    yield Sample("linear_float_groups", grouped)
