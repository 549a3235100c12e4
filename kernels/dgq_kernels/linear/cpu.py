"""The quantized linear layer on the CPU: oneDNN's u8 * s8 product with 32-bit sums. Here the GEMM is called."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import shift_classes
from ..backend import cpu_path
from ..codes import unsigned
from ..packing import expand_two_level
from . import reference


def needs_split(bits: int, weight: Tensor) -> bool:
    """Whether codes of `bits` bits times this int8 weight need two products to stay exact on this CPU.

    Without 32-bit accumulation two neighbouring products are added in 16 saturating bits: exact for codes up to 127
    with any weight, and for weights up to 64 in size with any code (2 * 255 * 64 < 2^15).
    """
    return cpu_path() == "split" and bits > 7 and int(weight.to(torch.int16).abs().amax()) > 64


def prepack(weight: Tensor, class_ends: list[int]) -> list[Tensor]:
    """oneDNN's blocked form of an int8 weight (N, K), one per shift class (opaque tensors, still int8)."""
    starts = [0, *class_ends[:-1]]
    return [
        torch.ops.onednn.qlinear_prepack(weight[:, start:end].contiguous(), None)
        for start, end in zip(starts, class_ends, strict=True)
        if end > start
    ]


def _product(codes: Tensor, packed: Tensor, n: int, split: bool) -> Tensor:
    """The int32 sums of codes (M, K) and one packed weight, as float32 (M, N) (exact below 2^24)."""
    if split:
        codes = torch.cat((codes >> 1, codes & 1))
    product = torch.ops.onednn.qlinear_pointwise(
        codes,
        1.0,
        0,
        packed,
        codes.new_ones(n, dtype=torch.float32),
        codes.new_zeros(n, dtype=torch.int32),
        None,
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


def accumulate(codes: Tensor, packed: list[Tensor], class_ends: list[int], n: int, split: bool) -> Tensor:
    """The sums of `reference.accumulate` as float32 (M, N): each product exact, doubled between shift classes."""

    def product(number: int, start: int, end: int) -> Tensor:
        part = codes if end - start == codes.shape[1] else codes[:, start:end].contiguous()
        return _product(part, packed[number], n, split)

    return shift_classes.accumulate(class_ends, product)


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
    """See `dgq_kernels.linear_prepacked`."""
    total = accumulate(unsigned(codes), packed, class_ends, column_sum.shape[0], split)
    total.addr_(zero_point.float(), column_sum.float(), alpha=-1)
    total.mul_(weight_scale).mul_(scale[:, None])
    if bias is not None:
        total.add_(bias)
    return total.to(out_dtype)


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
    """`dgq_kernels.linear_int8` on the CPU: packs the weight for this one call (layers pack once and keep it)."""
    if cpu_path() == "reference":
        return reference.linear_int8(
            codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, class_ends, residual, gated
        )
    y = linear_prepacked(
        codes,
        scale,
        zero_point,
        prepack(weight, class_ends),
        class_ends,
        needs_split(8, weight),
        weight_scale,
        column_sum,
        bias,
        out_dtype if residual is None and not gated else torch.float32,
    )
    if gated:
        return reference.gate(y).to(out_dtype)
    return y if residual is None else y.add_(residual).to(out_dtype)


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
    """`dgq_kernels.linear_int4` on the CPU, as `linear_int8`."""
    k = codes.shape[1]
    weight = expand_two_level(packed, subscales, k, group)
    return linear_int8(
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, [k], residual, gated
    )
