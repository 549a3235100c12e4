"""Run-time activation quantization: floats to asymmetric codes in bytes, per row or per sample: uint8, or on CUDA int8
less 128 (`codes`).

Each op also comes fused with what precedes it in a transformer or residual block, so that the normalised or activated
floats never reach memory. What is not finite stays visible: where a row (or sample), as it is quantized, holds NaN or
infinity or has a range beyond float32, its scale is NaN, and so is what a layer makes of it; its codes and zero point
mean nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import chosen, implementation, operator
from ..fakes import register_fake
from ..rotation import check_rotation
from . import reference


@operator("dgq::quantize_rows")
def quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise asymmetric codes of a linear layer's input.

    With x' = x * inv_divisor, rotated where that is asked for: lo = min(0, min x'), hi = max(0, max x'),
    scale = (hi - lo) / (2^bits - 1) (1 where that is below 1e-30), zero_point = rint(-lo / scale),
    codes = clamp(rint(x' / scale) + zero_point, 0, 2^bits - 1).

    Args:
        x: float (M, K).
        bits: 2 to 8.
        inv_divisor: float32 (K,), reciprocal of the channel divisors, or None.
        position: int32 (K,), a permutation: channel i's code is stored at place position[i]; None stores in order.
        rotation: channels of a block that is rotated (`dgq_kernels.rotation`), or 0; without a position.

    Returns:
        codes (M, K); scale float32 (M,); zero_point int32 (M,).

    Raises:
        ValueError: such blocks cannot be rotated.
    """
    _check(x.shape[1], position, rotation)
    return implementation(reference.quantize_rows, x)(x, bits, inv_divisor, position, rotation)


@operator("dgq::layer_norm_quantize_rows")
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
    """`quantize_rows` of LayerNorm(x) over the channels, the norm in float32.

    Args:
        x: float (M, K).
        weight, bias: float (K,), the norm's gain and offset, or None.
        eps: added to the variance. The others as in `quantize_rows`.

    Returns:
        codes (M, K); scale float32 (M,); zero_point int32 (M,).
    """
    _check(x.shape[1], position, rotation)
    return implementation(reference.layer_norm_quantize_rows, x)(
        x, weight, bias, eps, bits, inv_divisor, position, rotation
    )


@operator("dgq::geglu_quantize_rows")
def geglu_quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows` of x[:, :F] * gelu(x[:, F:]), the exact GELU in float32.

    Args:
        x: float (M, 2 F), values and gates as diffusers' GEGLU has them. The others as in `quantize_rows`, K = F.

    Returns:
        codes (M, F); scale float32 (M,); zero_point int32 (M,).
    """
    _check(x.shape[1] // 2, position, rotation)
    return implementation(reference.geglu_quantize_rows, x)(x, bits, inv_divisor, position, rotation)


@operator("dgq::silu_quantize_rows")
def silu_quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows` of SiLU(x) = x * sigmoid(x), in float32; of a time embedding.

    Args:
        x: float (M, K). The others as in `quantize_rows`.

    Returns:
        codes (M, K); scale float32 (M,); zero_point int32 (M,).
    """
    _check(x.shape[1], position, rotation)
    return implementation(reference.silu_quantize_rows, x)(x, bits, inv_divisor, position, rotation)


@operator("dgq::group_norm_quantize_rows")
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
    """`quantize_rows` of GroupNorm(x), a row for each pixel: what a transformer over pixels begins with.

    Args:
        x: float (B, C, H, W).
        groups, weight, bias, eps: of the norm, as in `group_norm_quantize_samples`. The others as in `quantize_rows`,
            K = C.

    Returns:
        codes (B * H * W, C); scale float32 (B * H * W,); zero_point int32 (B * H * W,).

    Raises:
        ValueError: groups does not divide C, or such blocks cannot be rotated.
    """
    _check(x.shape[1], position, rotation, groups)
    return implementation(reference.group_norm_quantize_rows, x)(
        x, groups, weight, bias, eps, bits, inv_divisor, position, rotation
    )


def _check(channels: int, position: Tensor | None, rotation: int, groups: int = 1) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    if rotation:
        check_rotation(channels, rotation)
        if position is not None:
            raise ValueError("rotated channels have no other order")


def _empty_rows(x: Tensor, rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((rows, channels), dtype=chosen(x.device).codes),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


@register_fake(quantize_rows)
def _(x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None = None, rotation: int = 0):
    return _empty_rows(x, *x.shape)


@register_fake(layer_norm_quantize_rows)
def _(x, weight, bias, eps, bits, inv_divisor, position, rotation=0):
    return _empty_rows(x, *x.shape)


@register_fake(geglu_quantize_rows)
def _(x, bits, inv_divisor, position, rotation=0):
    return _empty_rows(x, x.shape[0], x.shape[1] // 2)


@register_fake(silu_quantize_rows)
def _(x, bits, inv_divisor, position, rotation=0):
    return _empty_rows(x, *x.shape)


@register_fake(group_norm_quantize_rows)
def _(x, groups, weight, bias, eps, bits, inv_divisor, position, rotation=0):
    return _empty_rows(x, x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])


@operator("dgq::quantize_samples")
def quantize_samples(
    x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int, position: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of a convolution's input, one scale per sample, already padded.

    A per-pixel scale cannot leave the sum over taps, hence per sample. The border of `padding` pixels holds the
    sample's zero point, so the products over it cancel exactly against zero_point * column_sum.

    Args:
        x: float (B, C, H, W).
        bits: 2 to 8.
        inv_divisor: float32 (C,) or None.
        padding: zero padding on each side, in pixels.
        position: int32 (C,), a permutation: channel i's codes are stored at place position[i]; or None.
        rotation: channels of a block that is rotated in each pixel after the division, or 0; without a position.

    Returns:
        codes (B, C, H + 2 padding, W + 2 padding), channels-last; scale float32 (B,); zero_point int32 (B,).

    Raises:
        ValueError: such blocks cannot be rotated.
    """
    _check(x.shape[1], position, rotation)
    return implementation(reference.quantize_samples, x)(x, bits, inv_divisor, padding, position, rotation)


@operator("dgq::quantize_wide_samples")
def quantize_wide_samples(x: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 16-bit codes of an upsampling's input, one scale per sample, as two samples of 8-bit codes.

    A code q is 256 times its upper half plus its lower one, and so is the zero point: x ~ s (q - z) is the sum of two
    samples, x ~ 256 s (q_high - z_high) + s (q_low - z_low), each of which a product of 8-bit codes takes.

    Args:
        x: float (B, C, H, W).
        padding: zero padding on each side, in pixels.

    Returns:
        codes (2 B, C, H + 2 padding, W + 2 padding), channels-last; scale float32 (2 B,); zero_point int32
        (2 B,): the upper halves of all samples, then the lower ones.
    """
    return implementation(reference.quantize_wide_samples, x)(x, padding)


@operator("dgq::group_norm_quantize_samples")
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
    """`quantize_samples` of GroupNorm(x), or SiLU(GroupNorm(x)), in float32.

    Args:
        x: float (B, C, H, W).
        groups: of the norm; divides C.
        weight, bias: float (C,), the norm's gain and offset, or None.
        eps: added to the variance.
        silu: apply y * sigmoid(y).
        offset: float (B, C), added to x first (a residual block's time embedding), or None. The others as in
            `quantize_samples`.

    Returns:
        As `quantize_samples`.

    Raises:
        ValueError: groups does not divide C, or such blocks cannot be rotated.
    """
    _check(x.shape[1], position, rotation, groups)
    return implementation(reference.group_norm_quantize_samples, x)(
        x, groups, weight, bias, eps, silu, bits, inv_divisor, padding, position, offset, rotation
    )


def _empty_samples(x: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    codes = torch.empty(
        (batch, channels, height + 2 * padding, width + 2 * padding),
        dtype=chosen(x.device).codes,
        device=x.device,
        memory_format=torch.channels_last,
    )
    return codes, x.new_empty(batch, dtype=torch.float32), x.new_empty(batch, dtype=torch.int32)


@register_fake(quantize_samples)
def _(x, bits, inv_divisor, padding, position=None, rotation=0):
    return _empty_samples(x, padding)


@register_fake(quantize_wide_samples)
def _(x, padding):
    return _empty_samples(torch.cat((x, x)), padding)


@register_fake(group_norm_quantize_samples)
def _(x, groups, weight, bias, eps, silu, bits, inv_divisor, padding, position, offset=None, rotation=0):
    return _empty_samples(x, padding)
