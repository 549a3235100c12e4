"""The quantized convolution: the linear layer's product and epilogue, with one scale and zero point per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import implementation, operator
from ..fakes import register_fake
from . import cpu, reference


@operator("dgq::conv2d")
def conv2d(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    stride: int,
    out_dtype: torch.dtype,
    class_ends: list[int],
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution of padded codes with int8 weights.

    Args:
        codes: (B, C, Hp, Wp), channels-last, from `quantize_samples` (padding already there), in either form (`codes`).
        scale, zero_point: float32 and int32 (B,).
        weight: int8 (N, C, kh, kw).
        weight_scale: float32 (N,); column_sum: int32 (N,), sum over c, kh, kw of 2^class(c) weight.
        bias: float (N,) or None.
        stride: 1 or more, both directions.
        out_dtype: float16, bfloat16 or float32.
        class_ends: shift classes over C, as in `linear_int8`.
        residual: float (B, N, Ho, Wo), added in float32 before the output is rounded, or None.

    Returns:
        (B, N, Ho, Wo) of out_dtype, channels-last.
    """
    return implementation(reference.conv2d, codes)(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, stride, out_dtype, class_ends, residual
    )


@operator("dgq::upsample_conv2d")
def upsample_conv2d(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    wide: bool,
) -> Tensor:
    """A nearest upsampling by two and a 3x3 convolution with a padding of 1.

    An output pixel at row 2 i + r and column 2 j + c, with r and c 0 or 1, sees 2x2 pixels of the small picture: those
    from row i + r - 1 and column j + c - 1 on. For each of the four (r, c) there are 2x2 weights of their own, at place
    2 r + c. Its value is that of `conv2d`; with `wide` of 16-bit codes' upper halves, float32, without bias, added as
    the residual to `conv2d` of the lower halves.

    Args:
        codes, scale, zero_point: of `quantize_samples` with a padding of 1, (B, C, H + 2, W + 2) and (B,); with `wide`
            of `quantize_wide_samples`, (2 B, C, H + 2, W + 2) and (2 B,).
        weight: int8 (4 N, C, 2, 2), N outputs for each place.
        weight_scale, column_sum, bias: as of `conv2d`, (4 N,).
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (B, N, 2 H, 2 W) of out_dtype, channels-last.
    """
    return implementation(reference.upsample_conv2d, codes)(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, wide
    )


@operator("dgq::upsample_conv2d_int4")
def upsample_conv2d_int4(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    packed: Tensor,
    subscales: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    group: int,
) -> Tensor:
    """`upsample_conv2d`, not `wide`, with two-level int4 weights (4 N, 4 C) as `conv2d_int4` takes them."""
    return implementation(reference.upsample_conv2d_int4, codes)(
        codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, out_dtype, group
    )


@operator("dgq::conv2d_int4")
def conv2d_int4(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    packed: Tensor,
    subscales: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    out_dtype: torch.dtype,
    group: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution of padded codes with two-level int4 weights, unpacked in registers on CUDA.

    Args:
        packed: uint8 (N, Kp / 2) from `packing.pack_int4` of the matrix (N, kernel_size^2 * C), c innermost;
            subscales: uint8 from `packing.pack_subscales`; group: weights per sub-scale, 32 or 64.
        kernel_size: of the square kernel. The others as in `conv2d`; column_sum sums the matrix's rows.

    Returns:
        (B, N, Ho, Wo) of out_dtype, channels-last.
    """
    return implementation(reference.conv2d_int4, codes)(
        codes,
        scale,
        zero_point,
        packed,
        subscales,
        weight_scale,
        column_sum,
        bias,
        kernel_size,
        stride,
        out_dtype,
        group,
        residual,
    )


@operator("dgq::conv2d_prepacked")
def conv2d_prepacked(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    packed: list[Tensor],
    class_ends: list[int],
    split: bool,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`conv2d` on the CPU with a weight packed once by `cpu.prepack`; kernel_size only gives the output's shape."""
    return cpu.conv2d_prepacked(
        codes, scale, zero_point, packed, class_ends, split, weight_scale, column_sum, bias, stride, out_dtype
    )


def _empty_output(codes: Tensor, n: int, kernel: tuple[int, int], stride: int, out_dtype: torch.dtype) -> Tensor:
    batch, _, height, width = codes.shape
    size = (batch, n, (height - kernel[0]) // stride + 1, (width - kernel[1]) // stride + 1)
    return torch.empty(size, dtype=out_dtype, device=codes.device, memory_format=torch.channels_last)


def _empty_upsampled(codes: Tensor, n: int, out_dtype: torch.dtype, halves: int) -> Tensor:
    batch, _, height, width = codes.shape
    size = (batch // halves, n // 4, 2 * (height - 2), 2 * (width - 2))
    return torch.empty(size, dtype=out_dtype, device=codes.device, memory_format=torch.channels_last)


@register_fake(conv2d)
def _(codes, scale, zero_point, weight, weight_scale, column_sum, bias, stride, out_dtype, class_ends, residual=None):
    return _empty_output(codes, weight.shape[0], weight.shape[2:], stride, out_dtype)


@register_fake(upsample_conv2d)
def _(codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, wide):
    return _empty_upsampled(codes, column_sum.shape[0], out_dtype, 2 if wide else 1)


@register_fake(upsample_conv2d_int4)
def _(codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, out_dtype, group):
    return _empty_upsampled(codes, column_sum.shape[0], out_dtype, 1)


@register_fake(conv2d_int4)
def _(
    codes,
    scale,
    zero_point,
    packed,
    subscales,
    weight_scale,
    column_sum,
    bias,
    kernel_size,
    stride,
    out_dtype,
    group,
    residual=None,
):
    return _empty_output(codes, column_sum.shape[0], (kernel_size, kernel_size), stride, out_dtype)


@register_fake(conv2d_prepacked)
def _(
    codes,
    scale,
    zero_point,
    packed,
    class_ends,
    split,
    weight_scale,
    column_sum,
    bias,
    kernel_size,
    stride,
    out_dtype,
):
    return _empty_output(codes, column_sum.shape[0], (kernel_size, kernel_size), stride, out_dtype)
