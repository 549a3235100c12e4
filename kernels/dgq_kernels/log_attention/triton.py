"""Log attention on CUDA: int8 products and no exponential but the start column's.

`log_attention_kernel` makes two passes over the keys: the first finds each row's largest integer logit, the second
turns differences to it into bytes and multiplies them by int8 v, which gives the reference's codes exactly.
`running_kernel` makes one pass: bytes count below the row's largest logit so far, rounded up to whole octaves, and when
that grows the int32 sums are shifted (sums, not bytes), so a byte is never rounded more coarsely than two passes round
it. The largest octave does not depend on the order of the keys, the last digits do; the reference fixes the order.
The published form (one maximum for the tensor, base 2) needs each row's normaliser before the first code: two passes.

q is quantized by the kernels that read it; k and v, which every tile of rows reads again, by two kernels before them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..launch import await_previous, cdiv, launch
from . import cpu


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
# Parts that a head's keys are cut into for quantization: enough programs, and few results for each to gather.
_CHUNKS = tl.constexpr(16)
MOST_HEADS = 65535  # of all samples, in one launch: programs along a grid's second axis


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
def magnitude_bits(x, AXIS: tl.constexpr):
    """The largest |x| along an axis, as the bits (int32) of a float: in order as integers, infinity and then NaN last,
    so that what is not finite stays, where a floating maximum drops NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)


@triton.jit
def _symmetric(largest_bits, TOP: tl.constexpr):
    """(scale, 1 / scale) as `reference.symmetric_scale`, of `magnitude_bits`; (NaN, 0) of what is not finite."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    finite = largest < float("inf")
    scale = tl.where(largest > _SMALLEST, tl.div_rn(largest, float(TOP)), 1.0)
    return tl.where(finite, scale, float("nan")), tl.where(finite, tl.div_rn(1.0, scale), 0.0)


@triton.jit
def _symmetric_codes(x, inverse, TOP: tl.constexpr):
    scaled = tl.minimum(tl.maximum(x * inverse, -float(TOP)), float(TOP))
    return ((scaled + _ROUND_TRICK) - _ROUND_TRICK).to(tl.int8)


@triton.jit
def row_codes(q_values, key_step, QK_TOP: tl.constexpr):
    """(int8 codes, step, poison) of each row: codes symmetric, as `reference.quantize_operands`; step and poison as
    `reference.finite_step`."""
    q_scale, q_inverse = _symmetric(magnitude_bits(q_values, 1), QK_TOP)
    step = q_scale * key_step
    return _symmetric_codes(q_values, q_inverse[:, None], QK_TOP), tl.where(step < float("inf"), step, 0.0), step * 0.0


@triton.jit
def key_statistics_kernel(
    k_ptr, v_ptr, statistics_ptr, keys, chunk, heads, k_batch, k_head, k_row, v_batch, v_head, v_row,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr, START: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Of each channel in a chunk of keys: the sum, the least and the largest k, and the largest |v|.

    k and v (B, H, START + keys, d) with the strides given; the start key is left out. statistics float32
    (4, BH, chunks, WIDTH), 0 past d.
    """
    await_previous(PDL)
    part, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    in_head = channel < HEAD_DIM
    k_tile = k_ptr + (head // heads).to(tl.int64) * k_batch + (head % heads).to(tl.int64) * k_head + channel[None, :]
    v_tile = v_ptr + (head // heads).to(tl.int64) * v_batch + (head % heads).to(tl.int64) * v_head + channel[None, :]
    total = tl.zeros((WIDTH,), tl.float32)
    low = tl.full((WIDTH,), float("inf"), tl.float32)
    high = tl.full((WIDTH,), float("-inf"), tl.float32)
    magnitude = tl.zeros((WIDTH,), tl.int32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, keys), BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        inside = (key < keys)[:, None] & in_head[None, :]
        row = (key + START)[:, None].to(tl.int64)
        v = tl.load(v_tile + row * v_row, mask=inside, other=0.0).to(tl.float32)
        magnitude = tl.maximum(magnitude, magnitude_bits(v, 0))
        k = tl.load(k_tile + row * k_row, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(k, axis=0)
        low = tl.minimum(low, tl.min(tl.where(inside, k, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, k, float("-inf")), axis=0))
    plane = tl.num_programs(0) * tl.num_programs(1) * WIDTH
    out = statistics_ptr + (head * tl.num_programs(0) + part) * WIDTH + channel
    tl.store(out, total)
    tl.store(out + plane, tl.where(in_head, low, 0.0))
    tl.store(out + 2 * plane, tl.where(in_head, high, 0.0))
    tl.store(out + 3 * plane, magnitude.to(tl.float32, bitcast=True))


@triton.jit
def key_codes_kernel(
    k_ptr, v_ptr, statistics_ptr, k_codes_ptr, v_codes_ptr, v_scale_ptr, v_sum_ptr, key_step_ptr,
    start_k_ptr, start_v_ptr, keys, chunk, padded_keys, heads, k_batch, k_head, k_row, v_batch, v_head, v_row,
    step_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr, QK_TOP: tl.constexpr, V_TOP: tl.constexpr,
    START: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """`reference.quantize_operands` of k and v, as `log_attention_kernel` takes them, from `key_statistics_kernel`'s
    results; k and v as there. The first chunk of a head writes what belongs to the head."""
    await_previous(PDL)
    part, head = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    channel = tl.arange(0, WIDTH)
    in_head = channel < HEAD_DIM
    other = tl.arange(0, _CHUNKS)
    gathered = statistics_ptr + (head * chunks + other[:, None]) * WIDTH + channel[None, :]
    plane = chunks * tl.num_programs(1) * WIDTH
    known = (other < chunks)[:, None]
    # no method of keys, which is a constant where it is 1
    mean = tl.div_rn(tl.sum(tl.load(gathered, mask=known, other=0.0), axis=0), 1.0 * keys)
    low = tl.min(tl.load(gathered + plane, mask=known, other=float("inf")), axis=0)
    high = tl.max(tl.load(gathered + 2 * plane, mask=known, other=float("-inf")), axis=0)
    # a rounded difference grows with what is subtracted from: the largest |k - mean| is one of these
    k_scale, k_inverse = _symmetric(magnitude_bits(tl.maximum(high - mean, mean - low), 0), QK_TOP)
    v_scale, v_inverse = _symmetric(magnitude_bits(tl.load(gathered + 3 * plane, mask=known, other=0.0), 0), V_TOP)

    k_start = k_ptr + (head // heads).to(tl.int64) * k_batch + (head % heads).to(tl.int64) * k_head + channel
    v_start = v_ptr + (head // heads).to(tl.int64) * v_batch + (head % heads).to(tl.int64) * v_head + channel
    if part == 0:
        # 0, or NaN where k or v is not finite: a mean is not either then
        poison = (mean + v_scale) * 0.0
        tl.store(v_scale_ptr + head * WIDTH + channel, v_scale)
        if START:
            start_k = tl.load(k_start, mask=in_head, other=0.0).to(tl.float32) - mean
            tl.store(start_k_ptr + head * WIDTH + channel, tl.where(in_head, start_k, 0.0))
            start_v = tl.load(v_start, mask=in_head, other=0.0).to(tl.float32)
            tl.store(start_v_ptr + head * WIDTH + channel, start_v)
            poison += (start_k + start_v) * 0.0
        tl.store(key_step_ptr + head, k_scale * step_scale + tl.sum(poison, axis=0))
    total = tl.zeros((WIDTH,), tl.int32)
    out = head.to(tl.int64) * padded_keys * WIDTH
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, padded_keys), BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        inside = (key < keys)[:, None] & in_head[None, :]
        row = (key + START)[:, None].to(tl.int64)
        k = tl.load(k_start[None, :] + row * k_row, mask=inside, other=0.0).to(tl.float32)
        k_codes = tl.where(inside, _symmetric_codes(k - mean[None, :], k_inverse, QK_TOP), 0)
        tl.store(k_codes_ptr + out + key[:, None] * WIDTH + channel[None, :], k_codes)
        v = tl.load(v_start[None, :] + row * v_row, mask=inside, other=0.0).to(tl.float32)
        v_codes = _symmetric_codes(v, v_inverse[None, :], V_TOP)
        tl.store(v_codes_ptr + out + channel[None, :] * padded_keys + key[:, None], v_codes)
        total += tl.sum(v_codes.to(tl.int32), axis=0)
    tl.store(v_sum_ptr + (head * chunks + part) * WIDTH + channel, total)


@triton.jit
def log_attention_kernel(
    q_ptr, k_ptr, v_ptr, v_scale_ptr, v_sum_ptr, key_step_ptr, start_k_ptr, start_v_ptr, out_ptr,
    rows, keys, padded_keys, chunks, heads, q_batch, q_head, q_row, out_batch, out_head, out_row, logit_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    FRACTION_BITS: tl.constexpr, TOP: tl.constexpr, QK_TOP: tl.constexpr,
    START: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of rows of one head.

    q and out (B, H, T, d) with the strides given; k (BH, padded_keys, WIDTH) and v (BH, WIDTH, padded_keys), int8,
    zero-padded; v_scale, start_k, start_v (BH, WIDTH); v_sum (BH, chunks, WIDTH) int32, sums of v's codes;
    key_step (BH,).
    """
    await_previous(PDL)
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
    q_codes, step, poison = row_codes(q_values, tl.load(key_step_ptr + head), QK_TOP)
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

    part = tl.arange(0, _CHUNKS)
    v_sums = v_sum_ptr + (head * chunks + part[:, None]) * WIDTH + channel[None, :]
    accumulator += 128 * tl.sum(tl.load(v_sums, mask=(part < chunks)[:, None], other=0), axis=0)[None, :]
    numerator = accumulator.to(tl.float32) * tl.load(v_scale_ptr + head * WIDTH + channel)[None, :]
    total = normaliser.to(tl.float32) + poison
    if START:
        start_v = tl.load(start_v_ptr + head * WIDTH + channel)
        gap = start_logit - largest.to(tl.float32) * step * (1.0 / (1 << FRACTION_BITS))
        others = tl.exp2(-tl.maximum(gap, 0.0))
        start = 255.0 * tl.exp2(tl.minimum(gap, 0.0))
        numerator = others[:, None] * numerator + start[:, None] * start_v[None, :]
        total = others * total + start
    out_base = (head // heads).to(tl.int64) * out_batch + (head % heads).to(tl.int64) * out_head
    out_offsets = out_base + row[:, None].to(tl.int64) * out_row + channel[None, :]
    numerator *= tl.div_rn(1.0, total)[:, None]
    tl.store(out_ptr + out_offsets, numerator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def running_kernel(
    q_ptr, k_ptr, v_ptr, v_scale_ptr, v_prefix_ptr, key_step_ptr, out_ptr,
    rows, keys, padded_keys, heads, q_batch, q_head, q_row, out_batch, out_head, out_row,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    FRACTION_BITS: tl.constexpr, TOP: tl.constexpr, QK_TOP: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of rows of one head; operands as in `log_attention_kernel`, v_prefix (BH, blocks + 1, WIDTH) int32, the
    sums of v's codes before each block of keys."""
    await_previous(PDL)
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    base = (head // heads).to(tl.int64) * q_batch + (head % heads).to(tl.int64) * q_head
    q_offsets = base + row[:, None].to(tl.int64) * q_row + channel[None, :]
    q_values = tl.load(q_ptr + q_offsets, mask=inside, other=0.0).to(tl.float32)
    q_codes, step, poison = row_codes(q_values, tl.load(key_step_ptr + head), QK_TOP)
    per_octave: tl.constexpr = float(1 << FRACTION_BITS)

    key = tl.arange(0, BLOCK_KEYS)
    k_tile = k_ptr + head.to(tl.int64) * padded_keys * WIDTH + key[None, :] * WIDTH + channel[:, None]
    v_tile = v_ptr + head.to(tl.int64) * padded_keys * WIDTH + channel[None, :] * padded_keys + key[:, None]
    prefix = v_prefix_ptr + head.to(tl.int64) * (padded_keys // BLOCK_KEYS + 1) * WIDTH + channel
    octave = tl.full((BLOCK_ROWS,), -3e38, tl.float32)
    normaliser = tl.zeros((BLOCK_ROWS,), tl.int32)
    accumulator = tl.zeros((BLOCK_ROWS, WIDTH), tl.int32)  # of p - 128: 128 * prefix is missing
    for first in range(0, keys, BLOCK_KEYS):
        k_codes = tl.load(k_tile + first * WIDTH)
        products = tl.dot(q_codes, k_codes, out_dtype=tl.int32)
        valid = (first + key < keys)[None, :]
        largest = tl.max(tl.where(valid, products, _LOWEST), axis=1)
        higher = tl.maximum(octave, tl.ceil(largest.to(tl.float32) * step * (1.0 / per_octave)))
        shift = tl.minimum(higher - octave, 30.0).to(tl.int32)  # 1 << 31 is negative
        octave = higher
        if tl.max(shift, axis=0) > 0:  # seldom after the first blocks
            half = (1 << shift) >> 1
            normaliser = (normaliser + half) >> shift
            offset = 128 * tl.load(prefix + first // BLOCK_KEYS * WIDTH)[None, :]
            accumulator = ((accumulator + offset + half[:, None]) >> shift[:, None]) - offset
        below = octave[:, None] * per_octave - products.to(tl.float32) * step[:, None]
        rounded = tl.minimum(tl.maximum(below, 0.0), float(TOP)) + _ROUND_TRICK
        code = rounded.to(tl.int32, bitcast=True) & 0xFF
        p = tl.where(valid, probability(code, FRACTION_BITS, TOP), 0)
        normaliser += tl.sum(p, axis=1)
        v_codes = tl.load(v_tile + first)
        accumulator = tl.dot((p - 128).to(tl.int8), v_codes, accumulator, out_dtype=tl.int32)

    accumulator += 128 * tl.load(prefix + padded_keys // BLOCK_KEYS * WIDTH)[None, :]
    numerator = accumulator.to(tl.float32) * tl.load(v_scale_ptr + head * WIDTH + channel)[None, :]
    out_base = (head // heads).to(tl.int64) * out_batch + (head % heads).to(tl.int64) * out_head
    out_offsets = out_base + row[:, None].to(tl.int64) * out_row + channel[None, :]
    numerator *= tl.div_rn(1.0, normaliser.to(tl.float32) + poison)[:, None]
    tl.store(out_ptr + out_offsets, numerator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _base2_tile(q_ptr, head, row, rows, channel, HEAD_DIM: tl.constexpr):
    """(q rows, offsets, mask) of one tile; q (BH, rows, HEAD_DIM) contiguous."""
    inside = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    offsets = (head.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + channel[None, :]
    return tl.load(q_ptr + offsets, mask=inside, other=0.0), offsets, inside


@triton.jit
def _logits(q, k_ptr, head, first, keys, logit_scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Logits (rows, KEYS) in octaves of keys first.., minus infinity past the end; k (BH, keys, HEAD_DIM)."""
    key = first + tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH)
    offsets = (head.to(tl.int64) * keys + key[None, :]) * HEAD_DIM + channel[:, None]
    k = tl.load(k_ptr + offsets, mask=(key < keys)[None, :] & (channel < HEAD_DIM)[:, None], other=0.0)
    logits = tl.dot(q, k, input_precision="ieee") * logit_scale
    return tl.where((key < keys)[None, :], logits, float("-inf")), key


@triton.jit
def base2_rows_kernel(
    q_ptr, k_ptr, normaliser_ptr, peak_ptr, rows, keys, logit_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    START: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """First pass: each row's log2 of the sum of exponentials, and its largest quantized logit; both (BH, rows)."""
    await_previous(PDL)
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q, _, _ = _base2_tile(q_ptr, head, row, rows, tl.arange(0, WIDTH), HEAD_DIM)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        logits, key = _logits(q, k_ptr, head, first, keys, logit_scale, HEAD_DIM, WIDTH, BLOCK_KEYS)
        higher = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        largest = higher
        if START:
            logits = tl.where((key > 0)[None, :], logits, float("-inf"))
        peak = tl.maximum(peak, tl.max(logits, axis=1))
    at = head.to(tl.int64) * rows + row
    tl.store(normaliser_ptr + at, largest + tl.log2(total), mask=row < rows)
    tl.store(peak_ptr + at, peak, mask=row < rows)


@triton.jit
def base2_kernel(
    q_ptr, k_ptr, v_ptr, normaliser_ptr, peak_ptr, reference_ptr, out_ptr, rows, keys, heads, logit_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    TOP: tl.constexpr, START: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Second pass: codes below the sample's largest log2 probability, reference (B,); a power of two is built from its
    exponent's bits, so only the start column takes an exponential."""
    await_previous(PDL)
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, WIDTH)
    q, out_offsets, inside = _base2_tile(q_ptr, head, row, rows, channel, HEAD_DIM)
    at = head.to(tl.int64) * rows + row
    normaliser = tl.load(normaliser_ptr + at, mask=row < rows, other=0.0)
    reference = tl.load(reference_ptr + head // heads)
    ceiling = reference + normaliser  # the logit of code 0
    lowest = tl.load(peak_ptr + at, mask=row < rows, other=0.0)
    lowest = tl.minimum(tl.maximum(ceiling - lowest, 0.0), float(TOP))
    lowest = (lowest + _ROUND_TRICK) - _ROUND_TRICK  # a row's smallest code; powers count from it, for half precision
    accumulator = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    start = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        logits, key = _logits(q, k_ptr, head, first, keys, logit_scale, HEAD_DIM, WIDTH, BLOCK_KEYS)
        code = tl.minimum(tl.maximum(ceiling[:, None] - logits, 0.0), float(TOP))
        code = ((code + _ROUND_TRICK) - _ROUND_TRICK) - lowest[:, None]
        exponent = 127 - tl.minimum(code, 127.0).to(tl.int32)
        p = (exponent << 23).to(tl.float32, bitcast=True)
        quantized = (key < keys)[None, :]
        if START:
            quantized = quantized & (key > 0)[None, :]
            if first == 0:
                start = tl.sum(tl.where((key == 0)[None, :], logits, 0.0), axis=1)
        p = tl.where(quantized, p, 0.0)
        v_offsets = (head.to(tl.int64) * keys + key[:, None]) * HEAD_DIM + channel[None, :]
        v = tl.load(v_ptr + v_offsets, mask=(key < keys)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision="ieee")
    y = accumulator * tl.exp2(reference - lowest)[:, None]
    if START:
        v_offsets = head.to(tl.int64) * keys * HEAD_DIM + channel
        start_v = tl.load(v_ptr + v_offsets, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        y += tl.exp2(start - normaliser)[:, None] * start_v[None, :]
    tl.store(out_ptr + out_offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


def padded_width(head_dim: int) -> int:
    """The head width that tiles use: a power of two, and at least the 32 that an int8 product takes."""
    return max(32, triton.next_power_of_2(head_dim))


def _major(device: torch.device) -> int:
    """The major compute capability, 0 without a GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def config_for(width: int, major: int, start: bool) -> Config:
    """The largest tiles that do not spill: for a padded head width, a compute capability, a start token or none."""
    if triton.knobs.runtime.interpret:
        return Config(128, 128, 4, 1)  # the interpreter's cost is per tile
    if (width, major, start) == (64, 9, True):
        return Config(128, 64, 8, 1)  # the start token takes registers too; two tiles of keys need no pipeline
    if (width, major) == (128, 10):
        return Config(64, 32, 8, 2)  # products arrive from tensor memory: one more copy in registers
    return {32: Config(128, 64, 8, 3), 64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2)}.get(
        width, Config(64, 32, 8, 2)
    )


def key_warps(block: int, width: int) -> int:
    """Warps of the kernels that quantize k and v, for tiles of `block` keys."""
    return 8 if block * width > 4096 else 4


class Keys(NamedTuple):
    """What the products of attention take of k and v.

    Attributes:
        k: int8 codes (BH, padded_keys, WIDTH); v: int8 codes (BH, WIDTH, padded_keys), both 0 where padded.
        v_scale: float32 (BH, WIDTH); v_sum: int32 (BH, chunks, WIDTH), sums of v's codes over chunks of the keys.
        key_step: float32 (BH,), times a row's scale it turns q . k into codes.
        start_k, start_v: float32 (BH, WIDTH), the start key minus the mean of the others, and its value; or None.
    """

    k: Tensor
    v: Tensor
    v_scale: Tensor
    v_sum: Tensor
    key_step: Tensor
    start_k: Tensor | None
    start_v: Tensor | None


def quantize_keys(
    k: Tensor, v: Tensor, scale: float, fraction_bits: int, start_token: bool, qk_bits: int, v_bits: int, block: int
) -> Keys:
    """Codes of k (per head, minus its mean) and v (per head and channel), as `reference.quantize_operands`.

    Args:
        k, v: float (B, H, S, d); scale, fraction_bits, start_token, qk_bits, v_bits: as in
            `dgq_kernels.log_attention`, the bits not 0.
        block: keys are padded to a multiple of it.
    """
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    batch, heads, keys, head_dim = k.shape
    keys -= int(start_token)
    width = padded_width(head_dim)
    blocks = cdiv(keys, block)
    chunk = cdiv(blocks, _CHUNKS.value) * block
    chunks = cdiv(keys, chunk)
    every = batch * heads

    def buffer(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=k.device)

    statistics = buffer(torch.float32, 4, every, chunks, width)
    padded = blocks * block
    starts = [buffer(torch.float32, every, width) if start_token else None for _ in range(2)]
    out = Keys(
        buffer(torch.int8, every, padded, width), buffer(torch.int8, every, width, padded),
        buffer(torch.float32, every, width), buffer(torch.int32, every, chunks, width), buffer(torch.float32, every),
        *starts,
    )  # fmt: skip
    strides = (*k.stride()[:3], *v.stride()[:3])
    tile: dict[str, Any] = {
        "HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_KEYS": block, "START": int(start_token),
        "num_warps": key_warps(block, width), "enable_fp_fusion": False,
    }  # fmt: skip
    launch(key_statistics_kernel, (chunks, every, 1), k, v, statistics, keys, chunk, heads, *strides, **tile)
    launch(
        key_codes_kernel, (chunks, every, 1),
        k, v, statistics, out.k, out.v, out.v_scale, out.v_sum, out.key_step, out.start_k, out.start_v,
        keys, chunk, padded, heads, *strides, scale * math.log2(math.e) * 2**fraction_bits,
        QK_TOP=2 ** (qk_bits - 1) - 1, V_TOP=2 ** (v_bits - 1) - 1, **tile,
    )  # fmt: skip
    return out


def _empty_output(q: Tensor) -> Tensor:
    """(B, H, T, d) laid out as (B, T, H, d)."""
    batch, heads, rows, head_dim = q.shape
    return torch.empty((batch, rows, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)


def _in_launches(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator of q, k, v that runs on as many samples at a time as have `MOST_HEADS` heads: attention over the
    frames of a video has a sample for each of its pixels."""

    @functools.wraps(run)
    def in_launches(q: Tensor, k: Tensor, v: Tensor, *args: Any, out: Tensor | None = None) -> Tensor:
        most = MOST_HEADS // max(1, q.shape[1])
        if len(q) <= most:
            return run(q, k, v, *args, out=out)
        out = q.new_empty(q.shape) if out is None else out
        for parts in zip(*(x.split(most) for x in (q, k, v)), out.split(most), strict=True):
            run(*parts[:3], *args, out=parts[3])
        return out

    return in_launches


@_in_launches
def log_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, fraction_bits: int, start_token: bool,
    qk_bits: int, v_bits: int, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.log_attention`; `out` is a (B, H, T, d) buffer to write to, of dense channels.

    Float q, k or v, which only comparisons ask for, have no kernel: torch runs them, a slice of the rows at a time.
    The sums are exact in int32: 255 * 127 * S stays below 2^31 (`reference.MAX_KEYS`).
    """
    if not (qk_bits and v_bits):
        y = cpu.log_attention(q, k, v, scale, bits, fraction_bits, start_token, qk_bits, v_bits)
        return y if out is None else out.copy_(y)
    out = _empty_output(q) if out is None else out
    if not out.numel():
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    batch, heads, rows, head_dim = q.shape
    width = padded_width(head_dim)
    config = config_for(width, _major(q.device), start_token)
    own = quantize_keys(k, v, scale, fraction_bits, start_token, qk_bits, v_bits, config.keys)
    launch(
        log_attention_kernel, (cdiv(rows, config.rows), batch * heads, 1),
        q, own.k, own.v, own.v_scale, own.v_sum, own.key_step, own.start_k, own.start_v, out,
        rows, k.shape[2] - int(start_token), own.k.shape[1], own.v_sum.shape[1], heads,
        *q.stride()[:3], *out.stride()[:3], scale * math.log2(math.e),
        HEAD_DIM=head_dim, WIDTH=width, BLOCK_ROWS=config.rows, BLOCK_KEYS=config.keys,
        FRACTION_BITS=fraction_bits, TOP=2**bits - 1, QK_TOP=2 ** (qk_bits - 1) - 1, START=start_token,
        num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=False,  # a fused multiply-add would round the codes differently
    )  # fmt: skip
    return out


@_in_launches
def log_attention_running(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, fraction_bits: int, block: int, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.log_attention_running`; `out` is a (B, H, T, d) buffer to write to, of dense channels."""
    out = _empty_output(q) if out is None else out
    if not out.numel():
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    batch, heads, rows, head_dim = q.shape
    width = padded_width(head_dim)
    own = quantize_keys(k, v, scale, fraction_bits, False, 8, 8, block)
    sums = own.v.unflatten(2, (-1, block)).sum(3, dtype=torch.int32)
    prefix = pad(sums.cumsum(2, dtype=torch.int32), (1, 0)).mT.contiguous()
    config = running_config_for(width, _major(q.device))
    launch(
        running_kernel, (cdiv(rows, config.rows), batch * heads, 1),
        q, own.k, own.v, own.v_scale, prefix, own.key_step, out,
        rows, k.shape[2], own.k.shape[1], heads, *q.stride()[:3], *out.stride()[:3],
        HEAD_DIM=head_dim, WIDTH=width, BLOCK_ROWS=config.rows, BLOCK_KEYS=block,
        FRACTION_BITS=fraction_bits, TOP=2**bits - 1, QK_TOP=127,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def running_config_for(width: int, major: int) -> Config:
    """Rows, warps and stages of the one-pass kernel; the keys of a block belong to what it computes."""
    if triton.knobs.runtime.interpret:
        return Config(128, 64, 4, 1)
    if (width, major) == (64, 10):
        return Config(64, 64, 8, 2)
    return {32: Config(128, 64, 8, 3), 64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2)}[width]


def base2_config_for(width: int, major: int, size: int) -> Config:
    """Tiles of the published form's passes, by bytes of a value of q, k and v too."""
    if triton.knobs.runtime.interpret:
        return Config(128, 128, 4, 1)
    if size == 4 and width >= 128:  # larger ones need more than the 99 KiB of 8.6, 8.9 and 12.0, or spill
        return Config(64, 32, 8, 2) if width == 128 else Config(32, 16, 8, 2)
    if (width, major) == (64, 10):
        return Config(64, 64, 8, 2)
    return {32: Config(128, 64, 8, 2), 64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2)}.get(
        width, Config(64, 32, 8, 2)
    )


@_in_launches
def log_attention_base2(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bits: int, start_token: bool, *, out: Tensor | None = None
) -> Tensor:
    """See `dgq_kernels.log_attention_base2`; `out` is a contiguous (B, H, T, d) buffer to write to."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if not out.numel():
        return out
    batch, heads, rows, head_dim = q.shape
    keys = k.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    width = padded_width(head_dim)
    config = base2_config_for(width, _major(q.device), q.element_size())
    normaliser, peak = q.new_empty((2, batch * heads, rows), dtype=torch.float32)
    grid = (cdiv(rows, config.rows), batch * heads, 1)
    tile = {
        "HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_ROWS": config.rows, "BLOCK_KEYS": config.keys,
        "START": start_token, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    factor = scale * math.log2(math.e)
    launch(base2_rows_kernel, grid, q, k, normaliser, peak, rows, keys, factor, **tile)
    reference = (peak - normaliser).view(batch, -1).amax(1)
    launch(
        base2_kernel, grid, q, k, v, normaliser, peak, reference, out, rows, keys, heads, factor,
        TOP=2**bits - 1, **tile,
    )  # fmt: skip
    return out
