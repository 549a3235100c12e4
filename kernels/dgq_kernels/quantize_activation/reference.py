"""Definition of run-time activation quantization (docs/method.md, "integer recipe", item 1)."""

from __future__ import annotations

import torch
from torch import Tensor

# Smaller ranges count as zero, so that the reciprocal of a scale is always finite.
SMALLEST_SCALE = 1e-30


def _codes(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of x with a range that holds 0; `low` and `high` keep x's rank so that they broadcast."""
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    inverse = 1 / scale
    zero_point = (-low * inverse).round_()
    codes = (x * inverse).round_().add_(zero_point).clamp_(0, top).to(torch.uint8)
    return codes, scale, zero_point


def quantize_rows(x: Tensor, bits: int, inv_divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_rows`."""
    x = x.float()
    if inv_divisor is not None:
        x = x * inv_divisor
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    codes, scale, zero_point = _codes(x, low, high, bits)
    return codes, scale.flatten(), zero_point.flatten().to(torch.int32)


def quantize_samples(x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_samples`."""
    x = x.float()
    if inv_divisor is not None:
        x = x * inv_divisor[:, None, None]
    low, high = (bound.view(-1, 1, 1, 1) for bound in torch.aminmax(x.flatten(1), dim=1))
    codes, scale, zero_point = _codes(x, low, high, bits)
    batch, channels, height, width = x.shape
    padded = torch.empty(
        (batch, channels, height + 2 * padding, width + 2 * padding),
        dtype=torch.uint8, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    if padding:
        padded.copy_(zero_point.to(torch.uint8).expand_as(padded))
    padded[:, :, padding : padding + height, padding : padding + width] = codes
    return padded, scale.flatten(), zero_point.flatten().to(torch.int32)
