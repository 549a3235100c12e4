"""Definition of fractional-log attention in integers (docs/method.md, "fractional log attention")."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FRACTION_BITS = 5
# 255 * 127 per key and channel must stay below 2^31.
MAX_KEYS = 2**31 // (255 * 127)


class Operands(NamedTuple):
    """What the products are made of; S' counts the keys without the start key.

    Attributes:
        q: float32 (B, H, T, d), integer codes (or plain values where qk_bits is 0).
        q_scale: float32 (B, H, T, 1).
        k: float32 (B, H, S', d), codes of the keys minus their mean.
        key_step: float32 (B, H, 1, 1); q_scale * key_step turns q . k into codes (2^-f octaves); NaN where k or v,
            the start token's included, is not finite.
        v: float32 (B, H, S', d), codes.
        v_scale: float32 (B, H, 1, d).
        start_k: float32 (B, H, 1, d), the start key minus the mean of the others; None without a start token.
        start_v: float32 (B, H, 1, d) or None.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    key_step: Tensor
    v: Tensor
    v_scale: Tensor
    start_k: Tensor | None
    start_v: Tensor | None


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bits: int,
    fraction_bits: int,
    start_token: bool,
    qk_bits: int,
    v_bits: int,
) -> None:
    """Raise ValueError where the arguments of `dgq_kernels.log_attention` make no sense."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q (B, H, T, d) and k, v (B, H, S, d) expected: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    keys = k.shape[2] - int(start_token)
    if not 0 < keys <= MAX_KEYS:
        raise ValueError(f"1 to {MAX_KEYS} keys (the start key apart) expected, got {keys}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if not 2 <= bits <= 8 or not 0 <= fraction_bits <= min(bits, MAX_FRACTION_BITS):
        raise ValueError(f"2..8 bits, of which 0..{MAX_FRACTION_BITS} fractional, expected: {bits}, {fraction_bits}")
    for name, value in (("qk_bits", qk_bits), ("v_bits", v_bits)):
        if value != 0 and not 2 <= value <= 8:
            raise ValueError(f"{name} must be 0 (float) or 2..8, got {value}")


@functools.cache
def probability_bytes(bits: int, fraction_bits: int) -> tuple[int, ...]:
    """The probability, in units of 1/255 of the row's largest, that each of the 2^bits codes stands for.

    A code counts 2^-fraction_bits octaves below the largest; the top code means zero. A kernel gets p from the entry
    `code mod 2^f` of a small table with more than 8 bits, shifted right by `code div 2^f` and rounded once. (A table of
    bytes, shifted down, biases the tail of every row: up to 8 dB on 1024 keys.)
    """
    return (*(round(255 * 2 ** (-code / 2**fraction_bits)) for code in range(2**bits - 1)), 0)


def symmetric_scale(x: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
    """Scale of symmetric codes: float32, largest |x| over `dims` (kept) / (2^(bits-1) - 1); 1 where x is all zero, NaN
    where x somewhere is not finite.

    Magnitudes below 1e-30 count as zero, so that the reciprocal of a scale is always finite.
    """
    largest = x.abs().amax(dims, keepdim=True)
    top = torch.full_like(largest, 2 ** (bits - 1) - 1)  # a tensor: on CUDA torch multiplies by 1 / a number instead
    scale = torch.where(largest > 1e-30, largest / top, torch.ones_like(largest))
    return scale.masked_fill_(~(largest < torch.inf), torch.nan)


def _symmetric_codes(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """(codes as float32, scale); bits = 0 leaves x as it is, with scale 1. A scale is NaN where x is not finite, which
    becomes 0 in the codes."""
    if not bits:
        finite = x.isfinite()
        return x.where(finite, 0), torch.where(finite.all(dims, keepdim=True), 1.0, torch.nan)
    scale = symmetric_scale(x, dims, bits)
    top = 2 ** (bits - 1) - 1
    return (x * (1 / scale)).round_().clamp_(-top, top).nan_to_num_(0), scale


def quantize_operands(
    q: Tensor, k: Tensor, v: Tensor, scale: float, fraction_bits: int, start_token: bool, qk_bits: int, v_bits: int
) -> Operands:
    """Codes and scales of q (per row), k (per head, minus its mean) and v (per head and channel)."""
    first = int(start_token)
    keys, values = k.float(), v.float()
    centred = keys - keys[:, :, first:].mean(2, keepdim=True)
    q_codes, q_scale = _symmetric_codes(q.float(), (-1,), qk_bits)
    k_codes, k_scale = _symmetric_codes(centred[:, :, first:], (-2, -1), qk_bits)
    v_codes, v_scale = _symmetric_codes(values[:, :, first:], (-2,), v_bits)
    key_step = k_scale * (scale * math.log2(math.e) * 2**fraction_bits) + (0 * v_scale).sum(-1, keepdim=True)
    if not start_token:
        return Operands(q_codes, q_scale, k_codes, key_step, v_codes, v_scale, None, None)
    start_k, start_v = centred[:, :, :1], values[:, :, :1]
    key_step = key_step + (0 * (start_k + start_v)).sum(-1, keepdim=True)
    return Operands(q_codes, q_scale, k_codes, key_step, v_codes, v_scale, start_k, start_v)


def finite_step(operands: Operands) -> tuple[Tensor, Tensor]:
    """(step, poison) float32 (B, H, T, 1): q_scale * key_step, which turns q . k into codes, and 0 to add to a row's
    normaliser; where an operand of a row is not finite, 0 and NaN, so that the row becomes NaN and no code does."""
    step = operands.q_scale * operands.key_step
    return step.where(step < torch.inf, 0), step * 0


def combine_start(
    numerator: Tensor, normaliser: Tensor, largest: Tensor, start_logit: Tensor, start_v: Tensor
) -> Tensor:
    """The output once the start column joins in float; written so that neither exponential can overflow.

    Args:
        numerator: float32 (..., T, d), the quantized columns' P V, in units of 1/255 of the row's largest.
        normaliser: float32 (..., T, 1), the sum of their p.
        largest, start_logit: float32 (..., T, 1), the largest quantized logit and the start logit, in octaves.
        start_v: float32 (..., 1, d).
    """
    gap = start_logit - largest
    others = torch.exp2(-gap.clamp(min=0))
    start = 255 * torch.exp2(gap.clamp(max=0))
    return (others * numerator + start * start_v) / (others * normaliser + start)


def log_codes(operands: Operands, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int64 (B, H, T, S') and each row's largest q . k, float32 (B, H, T, 1).

    Sums are exact for integer codes (float64 holds them, and |q . k| < 2^24 makes their float32 form exact), and the
    difference to the row's largest is taken before the one rounding multiplication: every backend gets these codes.
    """
    products = (operands.q.double() @ operands.k.double().mT).float()
    largest = products.amax(-1, keepdim=True)
    step, _ = finite_step(operands)
    codes = ((largest - products) * step).clamp_(max=2**bits - 1).round_()
    return codes.to(torch.int64), largest


def log_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bits: int,
    fraction_bits: int,
    start_token: bool,
    qk_bits: int,
    v_bits: int,
) -> Tensor:
    """See `dgq_kernels.log_attention`."""
    operands = quantize_operands(q, k, v, scale, fraction_bits, start_token, qk_bits, v_bits)
    codes, largest = log_codes(operands, bits)
    p = torch.tensor(probability_bytes(bits, fraction_bits), dtype=torch.float64, device=q.device)[codes]
    numerator = (p @ operands.v.double()).float() * operands.v_scale
    step, poison = finite_step(operands)
    normaliser = p.sum(-1, keepdim=True).float() + poison
    if operands.start_k is None or operands.start_v is None:
        return (numerator / normaliser).to(q.dtype)
    octave = step * 2.0**-fraction_bits
    start_logit = (q.float() @ operands.start_k.mT) * (scale * math.log2(math.e))
    return combine_start(numerator, normaliser, largest * octave, start_logit, operands.start_v).to(q.dtype)


def validate_running(q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, fraction_bits: int, block: int) -> None:
    """Raise ValueError where the arguments of `dgq_kernels.log_attention_running` make no sense."""
    validate(q, k, v, scale, bits, fraction_bits, False, 8, 8)
    if fraction_bits == bits:  # a row's largest logit may lie an octave below R, and would be zero with the rest
        raise ValueError(f"codes of {bits} bits must reach two octaves: fewer than {bits} fractional bits expected")
    if k.shape[2] > MAX_KEYS // 2:  # the rounding of a shift needs one bit more
        raise ValueError(f"at most {MAX_KEYS // 2} keys expected, got {k.shape[2]}")
    if q.shape[3] > 128:  # the accumulators of wider heads would spill; only short sequences have them
        raise ValueError(f"heads of at most 128 channels expected, got {q.shape[3]}")
    if block not in (32, 64, 128):
        raise ValueError(f"block must be 32, 64 or 128, got {block}")


def log_attention_running(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, fraction_bits: int, block: int
) -> Tensor:
    """See `dgq_kernels.log_attention_running`."""
    operands = quantize_operands(q, k, v, scale, fraction_bits, False, 8, 8)
    table = torch.tensor(probability_bytes(bits, fraction_bits), dtype=torch.int64, device=q.device)
    step, poison = finite_step(operands)
    octave: Tensor | None = None
    numerator = normaliser = torch.zeros((), dtype=torch.int64, device=q.device)
    for start in range(0, operands.k.shape[2], block):
        products = (operands.q.double() @ operands.k[:, :, start : start + block].double().mT).float()
        higher = (products.amax(-1, keepdim=True) * step * 2.0**-fraction_bits).ceil()
        if octave is not None:
            higher = torch.maximum(octave, higher)
            shift = (higher - octave).clamp(max=30).to(torch.int64)
            half = (1 << shift) >> 1
            numerator, normaliser = (numerator + half) >> shift, (normaliser + half) >> shift
        octave = higher
        codes = (octave * 2.0**fraction_bits - products * step).clamp_(0, 2**bits - 1).round_()
        p = table[codes.to(torch.int64)]
        values = operands.v[:, :, start : start + block].double()
        numerator = numerator + (p.double() @ values).to(torch.int64)
        normaliser = normaliser + p.sum(-1, keepdim=True)
    y = numerator.float() * operands.v_scale * (1 / (normaliser.float() + poison))
    return y.to(q.dtype)


def log_attention_base2(q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, start_token: bool) -> Tensor:
    """See `dgq_kernels.log_attention_base2`."""
    first = int(start_token)
    p = torch.softmax(q.float() @ k.float().mT * scale, dim=-1)
    largest = p[..., first:].flatten(1).amax(1).view(-1, 1, 1, 1)
    codes = torch.log2(p[..., first:] / largest).neg_().round_().clamp_(0, 2**bits - 1)
    quantized = torch.exp2(-codes) * largest
    values = v.float()
    return (p[..., :first] @ values[:, :, :first] + quantized @ values[:, :, first:]).to(q.dtype)
