"""The quantized linear layer: one int8 product and one float epilogue.

y[r, n] = s_r * s_w[n] * (sum_k xq[r, k] * W'[n, k] - z_r * C[n]) + bias[n], with C[n] = sum_k W'[n, k].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import implementation, operator
from ..fakes import register_fake
from . import cpu, reference


@operator("dgq::linear_int8")
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
    """Linear layer on int8 weights, with shift classes.

    Args:
        codes: (M, K) from `quantize_rows`, in either form (`codes`).
        scale, zero_point: float32 and int32 (M,) from `quantize_rows`.
        weight: int8 (N, K).
        weight_scale: float32 (N,).
        column_sum: int32 (N,), sum_k 2^class(k) weight[n, k].
        bias: float (N,) or None.
        out_dtype: float16, bfloat16 or float32.
        class_ends: ascending ends of the shift classes; channels [class_ends[i-1], class_ends[i]) count 2^i.
            [K] where there is no shift.
        residual: float (M, N), added in float32 before the output is rounded, or None.
        gated: GEGLU in the epilogue, in float32: value * gelu(gate), where the value is the first half of the outputs.

    Returns:
        (M, N) of out_dtype, (M, N / 2) if gated.

    Raises:
        ValueError: gated, with a residual or an odd N.
    """
    _check_gated(gated, weight.shape[0], residual)
    return implementation(reference.linear_int8, codes)(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, class_ends, residual, gated
    )


def _check_gated(gated: bool, channels: int, residual: Tensor | None) -> None:
    if gated and (channels % 2 or residual is not None):
        raise ValueError(f"{channels} outputs cannot be gated" + ("" if channels % 2 else " beside a residual"))


@operator("dgq::linear_int4")
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
    """Linear layer on two-level int4 weights W' = w4 * m, unpacked in registers on CUDA.

    Args:
        packed: uint8 (N, Kp / 2) from `packing.pack_int4`; subscales: uint8 (N, ceil(Kp / group / 2)) from
            `packing.pack_subscales`; group: input channels per sub-scale. The others as in `linear_int8`.

    Returns:
        (M, N) of out_dtype, (M, N / 2) if gated.

    Raises:
        ValueError: gated, with a residual or an odd N.
    """
    _check_gated(gated, packed.shape[0], residual)
    return implementation(reference.linear_int4, codes)(
        codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, out_dtype, group, residual, gated
    )


@operator("dgq::linear_float_groups")
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
    """Linear layer whose input channels come in groups with a float scale each, as in DGQ's paper (arXiv 2501.04304).

    For comparison with `linear_int8` only: no recipe asks for it, and on the CPU the reference runs it.
    y[r, n] = s_w[n] * sum_g s_g * (sum_{k in g} xq[r, k] * W[n, k] - z_g * C[g, n]) + bias[n].

    Args:
        codes: (M, K), channels sorted by group; weight: int8 (N, K) in the same order.
        scale, zero_point: float32 and int32 (G,); a zero point may lie outside the codes' range.
        weight_scale: float32 (N,).
        column_sum: int32 (G, N), C[g, n] = sum_{k in g} weight[n, k].
        bias: float (N,) or None.
        out_dtype: float16, bfloat16 or float32.
        group_ends: ascending ends of the groups, the last one K; a group may be empty.

    Returns:
        (M, N) of out_dtype.

    Raises:
        ValueError: the groups do not end at K, or are not as many as the scales.
    """
    if group_ends != sorted(group_ends) or group_ends[-1:] != [codes.shape[1]] or len(group_ends) != len(scale):
        raise ValueError(f"group ends {group_ends} do not cut {codes.shape[1]} channels into {len(scale)} groups")
    return implementation(reference.linear_float_groups, codes)(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, group_ends
    )


@operator("dgq::linear_prepacked")
def linear_prepacked(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    packed: list[Tensor],
    class_ends: list[int],
    split: bool,
    weight_scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`linear_int8` on the CPU with a weight packed once by `cpu.prepack`.

    Args:
        packed: one oneDNN weight per non-empty shift class.
        split: run 8-bit codes as two 7-bit products (`cpu.needs_split`). The others as in `linear_int8`.
    """
    return cpu.linear_prepacked(
        codes, scale, zero_point, packed, class_ends, split, weight_scale, column_sum, bias, out_dtype
    )


@register_fake(linear_int8)
def _(
    codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, class_ends, residual=None, gated=False
):
    return codes.new_empty((codes.shape[0], column_sum.shape[0] // (1 + gated)), dtype=out_dtype)


@register_fake(linear_int4)
def _(
    codes,
    scale,
    zero_point,
    packed,
    subscales,
    weight_scale,
    column_sum,
    bias,
    out_dtype,
    group,
    residual=None,
    gated=False,
):
    return codes.new_empty((codes.shape[0], column_sum.shape[0] // (1 + gated)), dtype=out_dtype)


@register_fake(linear_float_groups)
def _(codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, group_ends):
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


@register_fake(linear_prepacked)
def _(codes, scale, zero_point, packed, class_ends, split, weight_scale, column_sum, bias, out_dtype):
    return codes.new_empty((codes.shape[0], column_sum.shape[0]), dtype=out_dtype)
