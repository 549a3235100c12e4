"""Small arguments of the convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..samples import Sample, codes, epilogue, floats, two_level, weights


def samples() -> Iterator[Sample]:
    """Of each operator here that has a reference."""
    x, weight = codes(2, 6, 6, 24).permute(0, 3, 1, 2), weights(8, 3, 3, 24)
    residual = floats(2, 8, 4, 4)
    rows, (scale, sums, bias) = epilogue(2, weight.flatten(1))
    sums = sums + weight[..., 10:].sum((1, 2, 3), dtype=torch.int32)  # the second class counts twice
    kernel = weight.permute(0, 3, 1, 2)
    yield Sample("conv2d", (x, *rows, kernel, scale, sums, bias, 1, torch.float32, [10, 24], residual))
    halves, four = codes(4, 6, 6, 24).permute(0, 3, 1, 2), weights(32, 2, 2, 24)
    rows, channels = epilogue(4, four.flatten(1))
    image = four.permute(0, 3, 1, 2)
    yield Sample("upsample_conv2d", (halves, *rows, image, *channels, torch.float32, True))
    yield Sample("upsample_conv2d", (halves, *rows, image, *channels, torch.float32, False))
    packed, subscales, matrix = two_level(32, 4 * 24, 32)
    rows, channels = epilogue(2, matrix)
    yield Sample("upsample_conv2d_int4", (x, *rows, packed, subscales, *channels, torch.float32, 32))
    packed, subscales, matrix = two_level(8, 9 * 24, 32)
    rows, channels = epilogue(2, matrix)
    yield Sample("conv2d_int4", (x, *rows, packed, subscales, *channels, 3, 1, torch.float32, 32, residual))
