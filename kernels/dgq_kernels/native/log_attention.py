"""Log attention in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import DTYPES, AttentionStruct, loaded


def attention(
    q: Tensor, k: Tensor, v: Tensor, logit_scale: float, bits: int, fraction_bits: int, start_token: bool,
    qk_bits: int, v_bits: int,
) -> Tensor:  # fmt: skip
    """`dgq_kernels.log_attention` with integer operands (qk_bits and v_bits not 0).

    Args:
        logit_scale: scale * log2(e). The others as in `log_attention`; q, k, v may be strided, but for their last axis.

    Returns:
        (B, H, T, d), a view of (B, T, H, d).

    Raises:
        ValueError: shapes or numbers outside the above; the tensors differ in dtype, or are not on the CPU.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise _other_shapes(q, k, v)
    batch, heads, rows, width = q.shape
    if k.shape[:2] != (batch, heads) or k.shape[3] != width:
        raise _other_shapes(q, k, v)
    kind = q.dtype
    if k.dtype != kind or v.dtype != kind or not (q.is_cpu and k.is_cpu and v.is_cpu and kind.is_floating_point):
        kinds = [f"{x.dtype} on {x.device}" for x in (q, k, v)]
        raise ValueError(f"q, k and v of floats of one dtype on the CPU expected, got {kinds}")
    dtype = DTYPES.get(kind)
    if dtype is None:
        args = (logit_scale, bits, fraction_bits, start_token, qk_bits, v_bits)
        return attention(q.float(), k.float(), v.float(), *args).to(kind)
    strides: list[int] = []
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    for x in (q, k, v):
        strides += x.stride()[:3]
    out = q.new_empty((batch, rows, heads, width))
    job = AttentionStruct(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *strides, batch, heads, rows, k.shape[2], width,
        logit_scale, bits, fraction_bits, start_token, qk_bits, v_bits, dtype,
    )  # fmt: skip
    if out.numel():
        engine = loaded()
        engine.check(engine.library.dgq_attention(ctypes.addressof(job), torch.get_num_threads()))
    return out.transpose(1, 2)


def _other_shapes(q: Tensor, k: Tensor, v: Tensor) -> ValueError:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    return ValueError(f"q (B, H, T, d) and k, v (B, H, S, d) expected, got {shapes}")
