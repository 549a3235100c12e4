"""The quantized convolution on the CPU: oneDNN's u8 * s8 implicit GEMM (no im2col buffer)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import shift_classes
from ..backend import cpu_path
from ..codes import unsigned
from ..linear.cpu import needs_split
from . import reference


def prepack(weight: Tensor, stride: int, class_ends: list[int]) -> list[Tensor]:
    """oneDNN's blocked form of an int8 weight (N, C, kh, kw), one per shift class (opaque tensors, still int8)."""
    starts = [0, *class_ends[:-1]]
    ones = torch.ones(weight.shape[0])
    return [
        torch.ops.onednn.qconv_prepack(
            weight[:, start:end].contiguous(), ones, 1.0, 0, [stride, stride], [0, 0], [1, 1], 1, None
        )
        for start, end in zip(starts, class_ends, strict=True)
        if end > start
    ]


def _product(codes: Tensor, packed: Tensor, n: int, stride: int, split: bool) -> Tensor:
    """The int32 sums of padded codes (B, C, Hp, Wp) and one packed weight, as float32 (exact below 2^24)."""
    if split:
        codes = torch.cat((codes >> 1, codes & 1))
    product = torch.ops.onednn.qconv_pointwise(
        codes.contiguous(memory_format=torch.channels_last),
        1.0,
        0,
        packed,
        codes.new_ones(n, dtype=torch.float32),
        codes.new_zeros(n, dtype=torch.int32),
        None,
        [stride, stride],
        [0, 0],
        [1, 1],
        1,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    if split:
        high, low = product.chunk(2)
        return high.mul_(2).add_(low)
    return product


def accumulate(codes: Tensor, packed: list[Tensor], class_ends: list[int], n: int, stride: int, split: bool) -> Tensor:
    """The sums of `reference.accumulate` as float32: each product exact, doubled between shift classes."""

    def product(number: int, start: int, end: int) -> Tensor:
        return _product(codes[:, start:end], packed[number], n, stride, split)

    return shift_classes.accumulate(class_ends, product)


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
    stride: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `dgq_kernels.conv2d_prepacked`."""
    total = accumulate(unsigned(codes), packed, class_ends, column_sum.shape[0], stride, split)
    factor = weight_scale.view(1, -1, 1, 1) * scale.view(-1, 1, 1, 1)
    shift = -zero_point.view(-1, 1, 1, 1).float() * column_sum.view(1, -1, 1, 1).float()
    total.add_(shift).mul_(factor)
    if bias is not None:
        total.add_(bias.view(1, -1, 1, 1))
    return total.to(out_dtype)


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
    """`dgq_kernels.conv2d` on the CPU: packs the weight for this one call (layers pack once and keep it)."""
    if cpu_path() == "reference":
        return reference.conv2d(
            codes, scale, zero_point, weight, weight_scale, column_sum, bias, stride, out_dtype, class_ends, residual
        )
    y = conv2d_prepacked(
        codes,
        scale,
        zero_point,
        prepack(weight, stride, class_ends),
        class_ends,
        needs_split(8, weight),
        weight_scale,
        column_sum,
        bias,
        stride,
        out_dtype if residual is None else torch.float32,
    )
    return y if residual is None else y.add_(residual).to(out_dtype)


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
    """See `dgq_kernels.upsample_conv2d`."""
    parts = (codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, wide)
    return reference.upsample_conv2d(*parts, conv2d)


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
    """`dgq_kernels.conv2d_int4` on the CPU, as `conv2d`."""
    channels = codes.shape[1]
    weight = reference.dense_weight(packed, subscales, channels, kernel_size, group)
    return conv2d(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, stride, out_dtype, [channels], residual
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
) -> Tensor:
    """See `dgq_kernels.upsample_conv2d_int4`."""
    parts = (codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, out_dtype, group)
    return reference.upsample_conv2d_int4(*parts, conv2d_int4)
