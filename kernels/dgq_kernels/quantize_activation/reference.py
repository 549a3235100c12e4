"""Definition of run-time activation quantization (docs/method.md, "integer recipe", item 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..rotation import rotate

# Smaller ranges count as zero, so that the reciprocal of a scale is always finite.
SMALLEST_SCALE = 1e-30
# x * sigmoid(x) falls down to this place, where it is so much, and rises from there.
SILU_TURNS, SILU_LEAST = -1.2784645427610738, -0.2784645427610738


def _codes(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of x with a range that holds 0; `low` and `high` keep x's rank so that they broadcast, and are
    NaN where x somewhere is. The scale is NaN where the range is not finite."""
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / torch.full_like(high, top)  # by a tensor: on CUDA torch multiplies by 1 / a number instead
    finite = scale < torch.inf
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    inverse = 1 / scale
    zero_point = (-low * inverse).round_().masked_fill_(~finite, 0)
    codes = (x * inverse).round_().add_(zero_point).clamp_(0, top).nan_to_num_(0)
    codes = codes.to(torch.uint8 if bits <= 8 else torch.int32)
    return codes, scale.masked_fill_(~finite, torch.nan), zero_point


def _placed(codes: Tensor, position: Tensor | None, dim: int) -> Tensor:
    """Codes with channel i of axis `dim` moved to place position[i]."""
    if position is None:
        return codes
    return torch.empty_like(codes).index_copy_(dim, position.long(), codes)


def quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_rows`."""
    x = x.float()
    if inv_divisor is not None:
        x = x * inv_divisor
    if rotation:
        x = rotate(x, rotation)
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    codes, scale, zero_point = _codes(x, low, high, bits)
    return _placed(codes, position, 1).contiguous(), scale.flatten(), zero_point.flatten().to(torch.int32)


def layer_norm_quantize_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bits: int,
    inv_divisor: Tensor | None,
    position: Tensor | None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.layer_norm_quantize_rows`."""
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    normed = functional.layer_norm(x.float(), x.shape[1:], weight, bias, eps)
    return quantize_rows(normed, bits, inv_divisor, position, rotation)


def geglu_quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.geglu_quantize_rows`."""
    value, gate = x.float().chunk(2, dim=1)
    return quantize_rows(value * functional.gelu(gate), bits, inv_divisor, position, rotation)


def silu_quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.silu_quantize_rows`."""
    return quantize_rows(functional.silu(x.float()), bits, inv_divisor, position, rotation)


def _group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    # torch's norm of a channels-last tensor loses the digits of a large mean; of a contiguous one it does not
    return functional.group_norm(x.float().contiguous(), groups, weight, bias, eps)


def group_norm_quantize_rows(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bits: int,
    inv_divisor: Tensor | None,
    position: Tensor | None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.group_norm_quantize_rows`."""
    rows = _group_norm(x, groups, weight, bias, eps).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return quantize_rows(rows, bits, inv_divisor, position, rotation)


def quantize_samples(
    x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int, position: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_samples`."""
    x = x.float()
    if inv_divisor is not None:
        x = x * inv_divisor[:, None, None]
    if rotation:
        x = rotate(x.permute(0, 2, 3, 1), rotation).permute(0, 3, 1, 2)
    codes, scale, zero_point = sample_codes(x, bits)
    return _padded(_placed(codes, position, 1), zero_point, padding), scale.flatten(), zero_point.flatten()


def sample_codes(x: Tensor, bits: int, ends: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of float32 (B, C, H, W), uint8 or of more than 8 bits int32, scale float32 and zero point int32
    (B, 1, 1, 1). `ends` are those of the range, (B,)."""
    low, high = (end.view(-1, 1, 1, 1) for end in ends or torch.aminmax(x.flatten(1), dim=1))
    codes, scale, zero_point = _codes(x, low, high, bits)
    return codes, scale, zero_point.to(torch.int32)


def _padded(codes: Tensor, zero_point: Tensor, padding: int) -> Tensor:
    """Codes (B, C, H, W) of 8 bits in a border of their zero points, channels-last."""
    batch, channels, height, width = codes.shape
    padded = torch.empty(
        (batch, channels, height + 2 * padding, width + 2 * padding),
        dtype=torch.uint8,
        device=codes.device,
        memory_format=torch.channels_last,
    )
    if padding:
        padded.copy_(zero_point.to(torch.uint8).expand_as(padded))
    padded[:, :, padding : padding + height, padding : padding + width] = codes
    return padded


def quantize_wide_samples(x: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_wide_samples`."""
    codes, scale, zero_point = sample_codes(x.float(), 16)
    halves, zeros = (torch.cat((each >> 8, each & 255)) for each in (codes, zero_point))
    return _padded(halves, zeros, padding), torch.cat((scale * 256, scale)).flatten(), zeros.flatten()


def group_norm_quantize_samples(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    bits: int,
    inv_divisor: Tensor | None,
    padding: int,
    position: Tensor | None,
    offset: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.group_norm_quantize_samples`."""
    if offset is not None:
        x = x.float() + offset.float()[:, :, None, None]
    y = _group_norm(x, groups, weight, bias, eps)
    if rotation or not silu:
        return quantize_samples(functional.silu(y) if silu else y, bits, inv_divisor, padding, position, rotation)
    ends = _silu_ends(y, inv_divisor)
    y = functional.silu(y)
    if inv_divisor is not None:
        y = y * inv_divisor[:, None, None]
    codes, scale, zero_point = sample_codes(y, bits, ends)
    return _padded(_placed(codes, position, 1), zero_point, padding), scale.flatten(), zero_point.flatten()


def _silu_ends(y: Tensor, inv_divisor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ends (B,) of a range that holds SiLU(y) * inv_divisor for y (B, C, H, W), from those of each channel of y:
    one pass over y is enough to know them. SiLU's least value is taken for one of a channel that lies to both sides."""
    low, high = y.amin((2, 3)), y.amax((2, 3))
    least = torch.where((low < SILU_TURNS) & (high > SILU_TURNS), SILU_LEAST, functional.silu(low))
    ends = torch.stack((least, functional.silu(low), functional.silu(high)))
    if inv_divisor is not None:
        ends = ends * inv_divisor
    return ends.amin((0, 2)), ends.amax((0, 2))
