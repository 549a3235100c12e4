"""Fractional-log attention on CUDA: two passes over int8 keys, no exponential but the start column's.

The first pass finds each row's largest integer logit, the second turns differences to it into bytes and multiplies them
by int8 v. One pass with a running maximum would have to shift sums of already truncated bytes, which depends on the
order of the keys; two passes give the reference's codes exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import cpu
from .reference import quantize_operands


class Config(NamedTuple):
    """Rows and keys per tile, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# A cubic in i, in units of 2^-20, for 255 * 2^(-i / 32): within 0.02, which rounds to the table's entries at every
# fraction_bits up to 5 (a test goes through all codes). No table lookup, no exponential unit.
_CUBIC = tl.constexpr((267386880, -5781381, 60673, -331))
_ROUND_TRICK = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small float to an integer, half to even
_SMALLEST = tl.constexpr(1e-30)
_LOWEST = tl.constexpr(-(1 << 30))  # below every q . k


@triton.jit
def probability(code, FRACTION_BITS: tl.constexpr, TOP: tl.constexpr):
    """The byte that an int32 code in 0..TOP stands for, as int32 (`reference.probability_bytes`)."""
    step = (code & ((1 << FRACTION_BITS) - 1)) << (5 - FRACTION_BITS)
    octave = code >> FRACTION_BITS
    if (TOP >> FRACTION_BITS) > 31:
        octave = tl.minimum(octave, 31)  # a shift by 32 or more is undefined
    fine = ((_CUBIC[3] * step + _CUBIC[2]) * step + _CUBIC[1]) * step + _CUBIC[0]
    p = ((fine >> octave) + (1 << 19)) >> 20
    return tl.where(code == TOP, 0, p)


@triton.jit
def log_attention_kernel(
    q_ptr, k_ptr, v_ptr, v_scale_ptr, v_sum_ptr, key_step_ptr, start_k_ptr, start_v_ptr, out_ptr,
    rows, keys, padded_keys, heads, q_batch, q_head, q_row, logit_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    FRACTION_BITS: tl.constexpr, TOP: tl.constexpr, QK_TOP: tl.constexpr,
    START: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head.

    q (B, H, T, d) with the strides given; k (BH, padded_keys, WIDTH) and v (BH, WIDTH, padded_keys), int8, zero-padded;
    v_scale, v_sum, start_k, start_v (BH, WIDTH); key_step (BH,); out (BH, T, d).
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    base = (head // heads).to(tl.int64) * q_batch + (head % heads).to(tl.int64) * q_head
    q_offsets = base + row[:, None].to(tl.int64) * q_row + channel[None, :]
    q_values = tl.load(q_ptr + q_offsets, mask=inside, other=0.0).to(tl.float32)
    if START:
        start_k = tl.load(start_k_ptr + head * WIDTH + channel)
        start_logit = tl.sum(q_values * start_k[None, :], axis=1) * logit_scale
    magnitude = tl.max(tl.abs(q_values), axis=1)
    q_scale = tl.where(magnitude > _SMALLEST, tl.div_rn(magnitude, float(QK_TOP)), 1.0)
    scaled = q_values * tl.div_rn(1.0, q_scale)[:, None]
    scaled = tl.minimum(tl.maximum(scaled, -float(QK_TOP)), float(QK_TOP))
    q_codes = ((scaled + _ROUND_TRICK) - _ROUND_TRICK).to(tl.int8)
    step = q_scale * tl.load(key_step_ptr + head)
    largest = tl.full((BLOCK_ROWS,), _LOWEST, tl.int32)

    key = tl.arange(0, BLOCK_KEYS)
    k_start = k_ptr + head.to(tl.int64) * padded_keys * WIDTH
    k_tile = k_start + key[None, :] * WIDTH + channel[:, None]
    for first in range(0, keys, BLOCK_KEYS):
        k_codes = tl.load(k_tile + first * WIDTH)
        products = tl.dot(q_codes, k_codes, out_dtype=tl.int32)
        products = tl.where((first + key < keys)[None, :], products, _LOWEST)
        largest = tl.maximum(largest, tl.max(products, axis=1))

    v_start = v_ptr + head.to(tl.int64) * padded_keys * WIDTH
    v_tile = v_start + channel[None, :] * padded_keys + key[:, None]
    normaliser = tl.zeros((BLOCK_ROWS,), tl.int32)
    accumulator = tl.zeros((BLOCK_ROWS, WIDTH), tl.int32)
    for first in range(0, keys, BLOCK_KEYS):
        k_codes = tl.load(k_tile + first * WIDTH)
        products = tl.dot(q_codes, k_codes, out_dtype=tl.int32)
        below = (largest[:, None] - products).to(tl.float32) * step[:, None]
        rounded = tl.minimum(below, float(TOP)) + _ROUND_TRICK
        code = rounded.to(tl.int32, bitcast=True) & 0xFF  # the low bits of the rounded float's mantissa
        p = tl.where((first + key < keys)[None, :], probability(code, FRACTION_BITS, TOP), 0)
        normaliser += tl.sum(p, axis=1)
        v_codes = tl.load(v_tile + first)
        # No uint8 times int8 product: shift p to -128..127 and add 128 times v's column sums back at the end.
        accumulator = tl.dot((p - 128).to(tl.int8), v_codes, accumulator, out_dtype=tl.int32)

    accumulator += 128 * tl.load(v_sum_ptr + head * WIDTH + channel)[None, :]
    numerator = accumulator.to(tl.float32) * tl.load(v_scale_ptr + head * WIDTH + channel)[None, :]
    total = normaliser.to(tl.float32)
    if START:
        start_v = tl.load(start_v_ptr + head * WIDTH + channel)
        gap = start_logit - largest.to(tl.float32) * step * (1.0 / (1 << FRACTION_BITS))
        others = tl.exp2(-tl.maximum(gap, 0.0))
        start = 255.0 * tl.exp2(tl.minimum(gap, 0.0))
        numerator = others[:, None] * numerator + start[:, None] * start_v[None, :]
        total = others * total + start
    out_offsets = (head.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + channel[None, :]
    numerator *= (1.0 / total)[:, None]
    tl.store(out_ptr + out_offsets, numerator.to(out_ptr.dtype.element_ty), mask=inside)


def padded_width(head_dim: int) -> int:
    """The head width that tiles use: a power of two, and at least the 32 that an int8 product takes."""
    return max(32, triton.next_power_of_2(head_dim))


def config_for(width: int) -> Config:
    """Tile sizes for a padded head width, the largest that do not spill."""
    if triton.knobs.runtime.interpret:
        return Config(128, 128, 4, 1)  # the interpreter's cost is per tile
    return {32: Config(128, 64, 8, 3), 64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2)}.get(
        width, Config(64, 32, 8, 2)
    )


def _padded(x: Tensor, width: int, keys: int) -> Tensor:
    """Codes (B, H, S, d) -> int8 (B * H, keys, width), zero-padded."""
    return pad(x.to(torch.int8), (0, width - x.shape[3], 0, keys - x.shape[2])).flatten(0, 1)


def log_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, fraction_bits: int, start_token: bool,
    qk_bits: int, v_bits: int, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.log_attention`; `out` is a contiguous (B, H, T, d) buffer to write to.

    Float q, k or v, which only comparisons ask for, have no kernel: torch runs them, a slice of the rows at a time.
    The sums are exact in int32: 255 * 127 * S stays below 2^31 (`reference.MAX_KEYS`).
    """
    if not (qk_bits and v_bits):
        y = cpu.log_attention(q, k, v, scale, bits, fraction_bits, start_token, qk_bits, v_bits)
        return y if out is None else out.copy_(y)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if not out.numel():
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    # The kernel quantizes q itself; k and v do not depend on it, so one row stands in for it here.
    operands = quantize_operands(q[:, :, :1], k, v, scale, fraction_bits, start_token, qk_bits, v_bits)
    batch, heads, rows, head_dim = q.shape
    width = padded_width(head_dim)
    config = config_for(width)
    keys = operands.k.shape[2]
    padded_keys = triton.cdiv(keys, config.keys) * config.keys
    k_codes = _padded(operands.k, width, padded_keys)
    v_codes = _padded(operands.v, width, padded_keys)
    v_sum = v_codes.sum(1, dtype=torch.int32)
    per_channel = [
        None if x is None else pad(x, (0, width - head_dim)).flatten(0, 2)
        for x in (operands.v_scale, operands.start_k, operands.start_v)
    ]
    log_attention_kernel[(triton.cdiv(rows, config.rows), batch * heads)](
        q, k_codes, v_codes.mT.contiguous(), per_channel[0], v_sum, operands.key_step.flatten(),
        per_channel[1], per_channel[2], out,
        rows, keys, padded_keys, heads, q.stride(0), q.stride(1), q.stride(2), scale * math.log2(math.e),
        HEAD_DIM=head_dim, WIDTH=width, BLOCK_ROWS=config.rows, BLOCK_KEYS=config.keys,
        FRACTION_BITS=fraction_bits, TOP=2**bits - 1, QK_TOP=2 ** (qk_bits - 1) - 1, START=start_token,
        num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=False,  # a fused multiply-add would round the codes differently
    )  # fmt: skip
    return out
