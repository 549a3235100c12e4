"""Definition of the quantized convolution (docs/method.md, "integer recipe", item 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import shift_classes
from ..packing import expand_two_level


def accumulate(codes: Tensor, weight: Tensor, stride: int, class_ends: list[int]) -> Tensor:
    """Exact integer sums: int64 (B, N, Ho, Wo) of codes uint8 (B, C, Hp, Wp), already padded, and int8 weights."""

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
    convolution: Callable[..., Tensor] = conv2d,
) -> Tensor:
    """See `dgq_kernels.upsample_conv2d`; by this implementation of `conv2d`."""
    batch, (height, width), n = codes.shape[0] // 2, (side - 2 for side in codes.shape[2:]), len(weight) // 4
    out = torch.empty(
        (batch, n, 2 * height, 2 * width), dtype=out_dtype, device=codes.device, memory_format=torch.channels_last
    )
    upper, lower = slice(batch), slice(batch, None)
    for place in range(4):
        own, row, column = slice(place * n, (place + 1) * n), place // 2, place % 2
        near = codes[:, :, row : row + height + 1, column : column + width + 1]
        near = near.contiguous(memory_format=torch.channels_last)
        channels = (weight[own], weight_scale[own], column_sum[own])
        ends = [codes.shape[1]]
        y = convolution(near[upper], scale[upper], zero_point[upper], *channels, None, 1, torch.float32, ends)
        own_bias = None if bias is None else bias[own]
        y = convolution(near[lower], scale[lower], zero_point[lower], *channels, own_bias, 1, out_dtype, ends, y)
        out[:, :, row::2, column::2] = y
    return out


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
