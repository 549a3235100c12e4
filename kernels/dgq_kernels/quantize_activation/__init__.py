"""Run-time activation quantization: floats to asymmetric codes in bytes, per row or per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import select
from . import reference


@torch.library.custom_op("dgq::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, bits: int, inv_divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise asymmetric codes of a linear layer's input.

    With x' = x * inv_divisor: lo = min(0, min x'), hi = max(0, max x'), scale = (hi - lo) / (2^bits - 1) (1 where
    that is below 1e-30), zero_point = rint(-lo / scale), codes = clamp(rint(x' / scale) + zero_point, 0, 2^bits - 1).

    Args:
        x: float (M, K).
        bits: 2 to 8.
        inv_divisor: float32 (K,), reciprocal of the channel divisors, or None.

    Returns:
        codes uint8 (M, K); scale float32 (M,); zero_point int32 (M,).
    """
    if select(x.device) == "triton":
        from . import triton as kernels

        return kernels.quantize_rows(x, bits, inv_divisor)
    return reference.quantize_rows(x, bits, inv_divisor)


@quantize_rows.register_fake
def _(x: Tensor, bits: int, inv_divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        torch.empty_like(x, dtype=torch.uint8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


@torch.library.custom_op("dgq::quantize_samples", mutates_args=())
def quantize_samples(x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of a convolution's input, one scale per sample, already padded.

    A per-pixel scale cannot leave the sum over taps, hence per sample. The border of `padding` pixels holds the
    sample's zero point, so the products over it cancel exactly against zero_point * column_sum.

    Args:
        x: float (B, C, H, W).
        bits: 2 to 8.
        inv_divisor: float32 (C,) or None.
        padding: zero padding on each side, in pixels.

    Returns:
        codes uint8 (B, C, H + 2 padding, W + 2 padding), channels-last; scale float32 (B,); zero_point int32 (B,).
    """
    return reference.quantize_samples(x, bits, inv_divisor, padding)


@quantize_samples.register_fake
def _(x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    codes = torch.empty(
        (batch, channels, height + 2 * padding, width + 2 * padding),
        dtype=torch.uint8, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    return codes, x.new_empty(batch, dtype=torch.float32), x.new_empty(batch, dtype=torch.int32)
