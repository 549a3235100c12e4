"""Small arguments of activation quantization."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..samples import Sample, floats, order


def samples() -> Iterator[Sample]:
    """Of each operator here."""
    rows, image = floats(9, 96) * 5, floats(2, 32, 4, 4) * 5
    place, divisor = order(96), torch.linspace(0.5, 1, 96)
    gain, shift = floats(96), floats(96).flip(0)
    yield Sample("quantize_rows", (rows, 8, divisor, None, 16))
    yield Sample("quantize_rows", (rows, 8, divisor, place))
    yield Sample("layer_norm_quantize_rows", (rows, gain, shift, 1e-5, 8, divisor, place), exact=False)
    yield Sample("geglu_quantize_rows", (floats(9, 192), 8, divisor, place), exact=False)
    yield Sample("silu_quantize_rows", (rows, 8, divisor, place), exact=False)
    place, divisor, gain, shift = order(32), divisor[:32].contiguous(), gain[:32].contiguous(), shift[:32].contiguous()
    yield Sample("group_norm_quantize_rows", (image, 4, gain, shift, 1e-5, 8, divisor, place), exact=False)
    yield Sample("quantize_samples", (image, 8, divisor, 1, None, 16))
    yield Sample("quantize_samples", (image, 8, divisor, 1, place))
    yield Sample("quantize_wide_samples", (image, 1))
    norm = (gain, shift, 1e-5, True, 8, divisor, 1, place, floats(2, 32))
    yield Sample("group_norm_quantize_samples", (image, 4, *norm), exact=False)
