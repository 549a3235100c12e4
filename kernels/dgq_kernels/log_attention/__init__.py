"""Attention with base-2 logarithmic probabilities: integer products, a table and a shift instead of exponentials."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import native
from ..backend import chosen, implementation, operator
from ..fakes import register_fake
from . import cpu, reference


def _in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in the widest dtype of the three, so that none is rounded; in float32 where no kernel has that one.

    Raises:
        ValueError: one of them is not of floats, or they are on different devices.
    """
    if not q.device == k.device == v.device or not (
        q.dtype.is_floating_point and k.dtype.is_floating_point and v.dtype.is_floating_point
    ):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v of floats on one device expected, got {kinds}")
    if q.dtype == k.dtype == v.dtype != torch.float64:
        return q, k, v
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if dtype == torch.float64:
        dtype = torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype)


@operator("dgq::log_attention")
def log_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bits: int,
    fraction_bits: int,
    start_token: bool,
    qk_bits: int = 8,
    v_bits: int = 8,
) -> Tensor:
    """softmax(scale * q k^T) v with the probabilities as `bits`-bit codes (DGQ paper; docs/method.md).

    With t = scale * log2(e) * q . k and m a row's largest t: code = clamp(rint((m - t) * 2^f), 0, 2^bits - 1), the
    top code meaning zero, and p = rint(255 * 2^(-code / 2^f)), a byte (a small table and a shift give it).
    q is quantized per row, k per head after subtracting the mean over its keys (softmax does not see it), v per head
    and channel, all symmetric. With a start token (cross-attention's column 0) the start key, value, logit and
    probability stay float, and mean, ranges and m are taken over the other keys. NaN or infinity in a row of q makes
    that row NaN, in k or v all rows of that head.

    Args:
        q: float16, bfloat16 or float32 (B, H, T, d).
        k, v: (B, H, S, d). Where dtypes differ, all are taken in the widest.
        scale: positive factor of the logits, usually d^-0.5.
        bits: 2 to 8 bits of a code.
        fraction_bits: f, 0 to 5; steps per octave are 2^f.
        start_token: key 0 is the start token; S >= 2 then.
        qk_bits, v_bits: bits of the codes of q and k, and of v; 0 keeps them float.

    Returns:
        (B, H, T, d) in q's dtype, laid out as (B, T, H, d): what follows joins the heads of a row.

    Raises:
        ValueError: shapes or numbers outside the above; tensors on different devices, or not of floats.
    """
    reference.validate(q, k, v, scale, bits, fraction_bits, start_token, qk_bits, v_bits)
    run = implementation(reference.log_attention, q)
    y = run(*_in_one_dtype(q, k, v), scale, bits, fraction_bits, start_token, qk_bits, v_bits)
    return _rows_first(y.to(q.dtype))


def _rows_first(y: Tensor) -> Tensor:
    """y (B, H, T, d) laid out as (B, T, H, d)."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_rows_first(q: Tensor) -> Tensor:
    batch, heads, rows, width = q.shape
    return q.new_empty((batch, rows, heads, width)).transpose(1, 2)


def log_attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bits: int,
    fraction_bits: int,
    start_token: bool,
    qk_bits: int = 8,
    v_bits: int = 8,
) -> Tensor:
    """`log_attention`; on the CPU without torch's dispatcher."""
    if not q.is_cpu or torch.compiler.is_compiling() or not cpu.engine_takes(q.device, qk_bits, v_bits):
        return log_attention(q, k, v, scale, bits, fraction_bits, start_token, qk_bits, v_bits)
    dtype = q.dtype
    q, k, v = _in_one_dtype(q, k, v)
    y = native.attention(q, k, v, scale * cpu.LOG2_E, bits, fraction_bits, start_token, qk_bits, v_bits)
    return y if y.dtype == dtype else y.to(dtype)


# DGQ_LOG_ATTENTION=1 or 0 in the environment decides for every device; read once, as compiled code cannot ask.
FORCED = {"1": True, "0": False}.get(os.environ.get("DGQ_LOG_ATTENTION", ""))


def log_attention_pays(device: torch.device) -> bool:
    """Whether log attention is faster than float attention on a device, as far as it was measured (docs/triton.md,
    docs/performance.md); code compiled for the CPU always has it."""
    if FORCED is not None:
        return FORCED
    if device.type == "cuda":
        return False
    return torch.compiler.is_compiling() or native.attention_pays() or chosen(device).name != "cpu"


@register_fake(log_attention)
def _(q, k, v, scale, bits, fraction_bits, start_token, qk_bits=8, v_bits=8):
    return _empty_rows_first(q)


@operator("dgq::log_attention_running")
def log_attention_running(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, fraction_bits: int, block: int = 64
) -> Tensor:
    """Self-attention as `log_attention` in one pass over the keys, `block` at a time, for long sequences.

    A code counts below R, the row's largest t so far rounded up to whole octaves: code = clamp(rint((R - t) * 2^f), 0,
    2^bits - 1). When a block raises R by n octaves, the integer sums so far are divided by 2^n, rounded half up. So
    bytes use between 1 and 1/2 of their range where `log_attention` uses all of it: about 2 dB less at 8 bits
    (tests/kernels/test_triton_attention_forms.py holds the bound), for 2 int8 products instead of 3. R in the end does
    not depend on the order of the keys.

    Args:
        q: float16, bfloat16 or float32 (B, H, T, d), d at most 128; k, v: (B, H, S, d), dtypes as in `log_attention`.
        scale, bits, fraction_bits: as in `log_attention`, but fraction_bits < bits; q, k and v become 8-bit codes as
            there.
        block: keys per step, 32, 64 or 128.

    Returns:
        (B, H, T, d) in q's dtype, laid out as (B, T, H, d): what follows joins the heads of a row.

    Raises:
        ValueError: shapes or numbers outside the above; tensors on different devices, or not of floats.
    """
    reference.validate_running(q, k, v, scale, bits, fraction_bits, block)
    run = implementation(reference.log_attention_running, q)
    return _rows_first(run(*_in_one_dtype(q, k, v), scale, bits, fraction_bits, block).to(q.dtype))


@operator("dgq::log_attention_base2")
def log_attention_base2(q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, start_token: bool) -> Tensor:
    """Attention with probabilities as the DGQ paper publishes them: base 2, one maximum per sample.

    With A = softmax(scale * q k^T) and d a sample's largest A: A^ = d * 2^-clamp(rint(-log2(A / d)), 0, 2^bits - 1).
    Rows are not renormalised. With a start token its column stays as it is and d is taken over the others. q, k and v
    stay float.

    Args:
        q: float16, bfloat16 or float32 (B, H, T, d); k, v: (B, H, S, d), dtypes as in `log_attention`.
        scale: positive factor of the logits.
        bits: 2 to 8.
        start_token: key 0 is the start token; S >= 2 then.

    Returns:
        A^ v, (B, H, T, d) in q's dtype, contiguous.

    Raises:
        ValueError: shapes or numbers outside the above; tensors on different devices, or not of floats.
    """
    reference.validate(q, k, v, scale, bits, 0, start_token, 0, 0)
    run = implementation(reference.log_attention_base2, q)
    return _rows_first(run(*_in_one_dtype(q, k, v), scale, bits, start_token).to(q.dtype))


@register_fake(log_attention_running)
def _(q, k, v, scale, bits, fraction_bits, block=64):
    return _empty_rows_first(q)


@register_fake(log_attention_base2)
def _(q, k, v, scale, bits, start_token):
    return _empty_rows_first(q)
