"""Definition of the quantized convolution (docs/method.md, "integer recipe", item 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import shift_classes
from ..codes import unsigned
from ..packing import expand_two_level


def accumulate(codes: Tensor, weight: Tensor, stride: int, class_ends: list[int]) -> Tensor:
    """Exact integer sums: int64 (B, N, Ho, Wo) of codes (B, C, Hp, Wp), already padded, in either form (`codes`), and
    int8 weights."""
    codes = unsigned(codes)

    def product(_: int, start: int, end: int) -> Tensor:
        part = torch.nn.functional.conv2d(codes[:, start:end].double(), weight[:, start:end].double(), stride=stride)
        return part.to(torch.int64)

    return shift_classes.accumulate(class_ends, product)


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
    """See `dgq_kernels.conv2d`."""
    total = accumulate(codes, weight, stride, class_ends)
    centred = total - zero_point.long().view(-1, 1, 1, 1) * column_sum.long().view(1, -1, 1, 1)
    y = centred.float() * (scale.view(-1, 1, 1, 1) * weight_scale.view(1, -1, 1, 1))
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual
    return y.to(out_dtype).contiguous(memory_format=torch.channels_last)


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
    convolution: Callable[..., Tensor] = conv2d,
) -> Tensor:
    """See `dgq_kernels.upsample_conv2d`; by this implementation of `conv2d`."""
    channels, ends = (weight, weight_scale, column_sum), [codes.shape[1]]
    if not wide:
        return interleaved(convolution(codes, scale, zero_point, *channels, bias, 1, out_dtype, ends))
    upper, lower = (list(half) for half in zip(*(one.chunk(2) for one in (codes, scale, zero_point)), strict=True))
    y = convolution(*upper, *channels, None, 1, torch.float32, ends)
    return interleaved(convolution(*lower, *channels, bias, 1, out_dtype, ends, y))


def interleaved(y: Tensor) -> Tensor:
    """The upsampled picture (B, N, 2 H, 2 W), channels-last, of the results (B, 4 N, H + 1, W + 1) of a convolution for
    each place in a square of four pixels: at row 2 i + r and column 2 j + c that of place 2 r + c at (i + r, j + c)."""
    batch, n, height, width = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    y = y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, H + 1, W + 1, 4 N)
    pictures, rows, columns, _ = y.stride()
    places = y.as_strided((batch, height, 2, width, 2, n), (pictures, rows, rows + 2 * n, columns, columns + n, 1))
    return places.reshape(batch, 2 * height, 2 * width, n).permute(0, 3, 1, 2)


def dense_weight(packed: Tensor, subscales: Tensor, channels: int, kernel_size: int, group: int) -> Tensor:
    """The int8 weight (N, C, k, k), channels-last, of a packed matrix (N, k * k * C)."""
    matrix = expand_two_level(packed, subscales, kernel_size**2 * channels, group)
    return matrix.view(-1, kernel_size, kernel_size, channels).permute(0, 3, 1, 2)


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
    """See `dgq_kernels.conv2d_int4`."""
    weight = dense_weight(packed, subscales, codes.shape[1], kernel_size, group)
    return conv2d(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, stride, out_dtype, [codes.shape[1]], residual
    )


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
    convolution: Callable[..., Tensor] = conv2d_int4,
) -> Tensor:
    """See `dgq_kernels.upsample_conv2d_int4`; by this implementation of `conv2d_int4`."""
    parts = (codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias)
    return interleaved(convolution(*parts, 2, 1, out_dtype, group))
