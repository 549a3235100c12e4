"""Definition of the quantized linear layer (docs/method.md, "integer recipe")."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import shift_classes
from ..codes import unsigned
from ..packing import expand_two_level


def accumulate(codes: Tensor, weight: Tensor, class_ends: list[int]) -> Tensor:
    """Exact integer sums: int64 (M, N) of codes (M, K), in either form (`codes`), and weight int8 (N, K).

    Channels of shift class i count 2^i.
    """
    codes = unsigned(codes)

    def product(_: int, start: int, end: int) -> Tensor:
        # float64 holds every integer below 2^53, far above 255 * 128 * K; integer matmuls have no BLAS
        return (codes[:, start:end].double() @ weight[:, start:end].double().t()).to(torch.int64)

    return shift_classes.accumulate(class_ends, product)


def gate(y: Tensor) -> Tensor:
    """GEGLU: value * gelu(gate) of the halves (M, N / 2) of y (M, N)."""
    value, gates = y.chunk(2, dim=1)
    return value * torch.nn.functional.gelu(gates)


def dequantize(
    total: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The epilogue: y = s_r * s_w[n] * (total - z_r * C[n]) + bias[n] + residual[r, n], from exact integers, or `gate`
    of it."""
    centred = total - zero_point[:, None].long() * column_sum.long()
    y = centred.float() * (scale[:, None] * weight_scale)
    y = y if bias is None else y + bias
    y = gate(y) if gated else y
    return (y if residual is None else y + residual).to(out_dtype)


def linear_int8(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    class_ends: list[int],
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """See `dgq_kernels.linear_int8`."""
    total = accumulate(codes, weight, class_ends)
    return dequantize(total, scale, zero_point, weight_scale, column_sum, bias, out_dtype, residual, gated)


def linear_int4(
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
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """See `dgq_kernels.linear_int4`."""
    k = codes.shape[1]
    weight = expand_two_level(packed, subscales, k, group)
    return linear_int8(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, [k], residual, gated
    )


def linear_float_groups(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    group_ends: list[int],
) -> Tensor:
    """See `dgq_kernels.linear_float_groups`; float32, added in the order of the groups."""
    total = torch.zeros((codes.shape[0], weight.shape[0]), device=codes.device)
    begin = 0
    for group, end in enumerate(group_ends):
        if end > begin:
            centred = accumulate(codes[:, begin:end], weight[:, begin:end], [end - begin])
            centred -= zero_point[group].long() * column_sum[group].long()
            total += centred.float() * scale[group]
        begin = end
    y = total * weight_scale
    return (y if bias is None else y + bias).to(out_dtype)
