"""The quantized convolution on CUDA: byte im2col and the Triton linear kernel.

The column matrix holds bytes, kh * kw times the input; an implicit GEMM that never writes it is the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear import triton as linear_kernels


def im2col(codes: Tensor, kernel: tuple[int, int], stride: int) -> tuple[Tensor, int, int]:
    """Padded codes (B, C, Hp, Wp) -> uint8 (B * Ho * Wo, C * kh * kw) with c outermost, and (Ho, Wo)."""
    windows = codes.unfold(2, kernel[0], stride).unfold(3, kernel[1], stride)
    batch, _, height, width = windows.shape[:4]
    columns = windows.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, -1)
    return columns, height, width


def conv2d(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, stride: int, out_dtype: torch.dtype, class_ends: list[int],
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.conv2d`."""
    n, _, *kernel = weight.shape
    columns, height, width = im2col(codes, (kernel[0], kernel[1]), stride)
    pixels = height * width
    taps = kernel[0] * kernel[1]
    y = linear_kernels.linear_int8(
        columns, scale.repeat_interleave(pixels), zero_point.repeat_interleave(pixels), weight.flatten(1),
        weight_scale, column_sum, bias, out_dtype, [end * taps for end in class_ends],
    )  # fmt: skip
    return y.view(-1, height, width, n).permute(0, 3, 1, 2)
