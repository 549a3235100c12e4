"""The quantized linear layer on CUDA: int8 tensor-core products, int32 sums, one float epilogue.

Codes are of int8, code - 128 (`codes`), as `tl.dot` multiplies signed operands, and the epilogue subtracts
(zero point - 128) times the column sum. Nothing may overflow on the way (sm_80's product saturates): partial sums stay
below 128 * sum_k 2^e |W'|, half of what the centred result needs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import centred
from ..launch import await_previous, cdiv, launch
from .tiles import FLOAT_GROUPS, INTERPRETER, Config, Tiling, pick

SUM_ROWS, SUM_CHANNELS = 16, 128  # tile of `sum_splits_kernel`
_CODE_LIMIT = 255 * 128  # the largest product of a code and an int8 weight


@triton.jit
def within(codes, lane, begin, end, ASSEMBLY: tl.constexpr):
    """Codes, and 0 where a lane (the same shape as codes, or to be broadcast to it) lies outside begin..end - 1; the
    assembly masks four at once where the compiler would take them apart."""
    inside = (lane >= begin) & (lane < end)
    if ASSEMBLY:
        mask = tl.broadcast_to(tl.where(inside, -1, 0).to(tl.int8), codes.shape)  # bytes, the same for every row
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", args=[codes, mask], dtype=tl.int8, is_pure=True, pack=4
        )
    return tl.where(inside, codes, 0)


@triton.jit
def class_steps(begin, end, STEP: tl.constexpr):
    """How a shift class begin..end - 1 is cut: (edge, gap, inner_begin, inner_end).

    Whole aligned steps inner_begin..inner_end belong to the class alone and need no mask. The steps that it shares
    with a neighbour, at most two, are those of range(edge, end, gap).
    """
    inner_begin = tl.cdiv(begin, STEP) * STEP
    inner_end = end // STEP * STEP
    edge = tl.where(begin < inner_begin, inner_begin - STEP, inner_end)
    return edge, tl.maximum(inner_end - edge, STEP), inner_begin, inner_end


@triton.jit
def tile_of(row_blocks, channel_blocks):
    """(row block, channel block) of this program: bands of 8 row blocks, so that neighbours share weights in L2."""
    program = tl.program_id(0)
    band = 8 * channel_blocks
    first = program // band * 8
    height = tl.minimum(row_blocks - first, 8)
    return first + program % band % height, program % band // height


@triton.jit
def dequantize(
    accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    scale_row, channel, in_rows, in_channels, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`reference.dequantize` of an accumulator (BLOCK_ROWS, BLOCK_CHANNELS) of codes - 128, in float32.

    scale_row is each row's place in scale and zero_point: the row itself, or the sample that a pixel belongs to.
    """
    scale = tl.load(scale_ptr + scale_row, mask=in_rows, other=0.0)
    zero_point = tl.load(zero_point_ptr + scale_row, mask=in_rows, other=0)
    weight_scale = tl.load(weight_scale_ptr + channel, mask=in_channels, other=0.0)
    column_sum = tl.load(column_sum_ptr + channel, mask=in_channels, other=0)
    centred = accumulator - (zero_point - 128)[:, None] * column_sum[None, :]
    y = centred.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def store(y, residual_ptr, out_ptr, row, channel, rows, channels, HAS_RESIDUAL: tl.constexpr):
    """Add the residual, if any, in float32, round once to the type of `out` (rows, channels), and write."""
    offsets = row[:, None].to(tl.int64) * channels + channel[None, :]
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu(x):
    """The exact form, as torch's default."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def weight_row(place, channels, GATED: tl.constexpr):
    """The weight's row in column `place` of the tiles, the last one past the end.

    Gated, values (the first half of the rows) and their gates alternate, so that one tile holds both of an output.
    """
    place = tl.minimum(place, channels - 1)
    return place % 2 * (channels // 2) + place // 2 if GATED else place


@triton.jit
def _finish_part(
    accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
    partial_ptr, row, scale_row, first, rows, channels, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`finish` of one part."""
    place = first + tl.arange(0, accumulator.shape[1])
    if SPLIT:
        # 32-bit offsets: splits are for small outputs, and 64-bit ones spill
        partial_ptr += tl.program_id(1).to(tl.int64) * rows * channels
        offsets = row[:, None] * channels + weight_row(place, channels, GATED)[None, :]
        tl.store(partial_ptr + offsets, accumulator, mask=(row < rows)[:, None] & (place < channels)[None, :])
    elif GATED:
        HALF: tl.constexpr = accumulator.shape[1] // 2
        outputs = channels // 2
        value, gate = tl.split(accumulator.reshape(accumulator.shape[0], HALF, 2))
        out = first // 2 + tl.arange(0, HALF)
        y = dequantize(
            gate, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            scale_row, outputs + out, row < rows, out < outputs, HAS_BIAS,
        )  # fmt: skip
        y = gelu(y) * dequantize(
            value, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            scale_row, out, row < rows, out < outputs, HAS_BIAS,
        )  # fmt: skip
        store(y, residual_ptr, out_ptr, row, out, rows, outputs, HAS_RESIDUAL)
    else:
        y = dequantize(
            accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            scale_row, place, row < rows, place < channels, HAS_BIAS,
        )  # fmt: skip
        store(y, residual_ptr, out_ptr, row, place, rows, channels, HAS_RESIDUAL)


@triton.jit
def finish(
    accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
    partial_ptr, row, scale_row, first, rows, channels, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Dequantize, gate and write an accumulator (row, place first.., a number and not a vector: its alignment is what
    makes stores wide); of a split reduction, write it to `partial` as it is.

    PARTS: 2 to do its left and right half one after the other, which needs fewer registers.
    """
    if PARTS == 2:
        WIDTH: tl.constexpr = accumulator.shape[1] // 2
        left, right = tl.split(accumulator.reshape(accumulator.shape[0], 2, WIDTH).permute(0, 2, 1))
        _finish_part(
            left, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
            partial_ptr, row, scale_row, first, rows, channels, HAS_BIAS, HAS_RESIDUAL, GATED, SPLIT,
        )  # fmt: skip
        _finish_part(
            right, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
            partial_ptr, row, scale_row, first + WIDTH, rows, channels, HAS_BIAS, HAS_RESIDUAL, GATED, SPLIT,
        )  # fmt: skip
    else:
        _finish_part(
            accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
            partial_ptr, row, scale_row, first, rows, channels, HAS_BIAS, HAS_RESIDUAL, GATED, SPLIT,
        )  # fmt: skip


@triton.jit
def _partial_sum(partial_ptr, splits, row, channel, rows, channels, inside):
    offsets = row[:, None].to(tl.int64) * channels + channel[None, :]
    total = tl.zeros(inside.shape, tl.int32)
    for _ in range(0, splits):
        total += tl.load(partial_ptr + offsets, mask=inside, other=0)
        offsets += rows * channels
    return total


@triton.jit
def sum_splits_kernel(
    partial_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
    splits, rows, channels, pixels,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """What `finish` does, from partial (splits, rows, channels) int32; integers, so any order of adding is exact.

    pixels: rows that share a scale, 1 in a linear layer.
    """
    await_previous(PDL)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    outputs = channels // 2 if GATED else channels
    inside = (row < rows)[:, None] & (channel < outputs)[None, :]
    total = _partial_sum(partial_ptr, splits, row, channel, rows, channels, inside)
    y = dequantize(
        total, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
        row // pixels, channel, row < rows, channel < outputs, HAS_BIAS,
    )  # fmt: skip
    if GATED:
        total = _partial_sum(partial_ptr, splits, row, channel + outputs, rows, channels, inside)
        gate = dequantize(
            total, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            row // pixels, channel + outputs, row < rows, channel < outputs, HAS_BIAS,
        )  # fmt: skip
        y *= gelu(gate)
    store(y, residual_ptr, out_ptr, row, channel, rows, outputs, HAS_RESIDUAL)


@triton.jit
def split_range(length, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """(begin, end) of this program's share of 0..length - 1: whole steps, for all but the last one."""
    if SPLIT:
        share = tl.cdiv(tl.cdiv(length, STEP), tl.num_programs(1)) * STEP
        begin = tl.minimum(tl.program_id(1) * share, length)
        return begin, tl.minimum(begin + share, length)
    else:
        return 0, length


@triton.jit
def class_range(ends_ptr, index, low, high):
    """(begin, end) of shift class `index`, cut to low..high - 1."""
    begin = tl.load(ends_ptr + index - 1, mask=index > 0, other=0)
    end = tl.load(ends_ptr + index)
    return tl.minimum(tl.maximum(begin, low), high), tl.minimum(tl.maximum(end, low), high)


@triton.jit
def linear_int8_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, weight_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    residual_ptr, out_ptr, ends_ptr, rows, channels, reduction, partial_ptr,
    CLASSES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    SPLIT: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """codes (rows, reduction), weight (channels, reduction), ends (CLASSES,) int32; all contiguous."""
    await_previous(PDL)
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    STEP: tl.constexpr = 2 * HALF
    lane = tl.arange(0, STEP if WHOLE else HALF)
    # Rows and channels past the end repeat the last one: they are never stored, and their loads need no mask.
    x_tile = codes_ptr + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * reduction + lane[None, :]
    w_tile = weight_ptr + weight_row(place, channels, GATED)[None, :].to(tl.int64) * reduction + lane[:, None]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
    low, high = split_range(reduction, STEP, SPLIT)
    for reverse in range(CLASSES):
        if CLASSES == 1:
            begin = low
            end = high
        else:
            accumulator += accumulator  # Horner: what the higher classes have summed so far counts twice
            class_begin, class_end = class_range(ends_ptr, CLASSES - 1 - reverse, low, high)
            edge, gap, begin, end = class_steps(class_begin, class_end, STEP)
            for first in range(edge, class_end, gap):
                second = first + HALF
                x0 = tl.load(x_tile + first, mask=(first + lane < reduction)[None, :], other=0)
                w0 = tl.load(w_tile + first, mask=(first + lane < reduction)[:, None], other=0)
                x1 = tl.load(x_tile + second, mask=(second + lane < reduction)[None, :], other=0)
                w1 = tl.load(w_tile + second, mask=(second + lane < reduction)[:, None], other=0)
                x0 = within(x0, (first + lane)[None, :], class_begin, class_end, ASSEMBLY)
                x1 = within(x1, (second + lane)[None, :], class_begin, class_end, ASSEMBLY)
                accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
                accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
        for first in range(begin, end, STEP):
            second = first + HALF
            if WHOLE:
                x = tl.load(x_tile + first, mask=(first + lane < reduction)[None, :], other=0)
                w = tl.load(w_tile + first, mask=(first + lane < reduction)[:, None], other=0)
                accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
            else:
                # Two products per step: on 8.x Triton 3.9 carries int8 operands bytewise through its prefetch of one.
                if CLASSES == 1:
                    # Past the end weights are 0, so codes may be anything; only with `other` 0 are loads asynchronous.
                    x0 = tl.load(x_tile + first, mask=(first + lane < reduction)[None, :], other=0)
                    w0 = tl.load(w_tile + first, mask=(first + lane < reduction)[:, None], other=0)
                    x1 = tl.load(x_tile + second, mask=(second + lane < reduction)[None, :], other=0)
                    w1 = tl.load(w_tile + second, mask=(second + lane < reduction)[:, None], other=0)
                else:  # whole steps lie within the class
                    x0 = tl.load(x_tile + first)
                    w0 = tl.load(w_tile + first)
                    x1 = tl.load(x_tile + second)
                    w1 = tl.load(w_tile + second)
                accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
                accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
    finish(
        accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
        partial_ptr, row, row, channel_block * BLOCK_CHANNELS, rows, channels, HAS_BIAS, HAS_RESIDUAL, GATED, SPLIT,
        2 if WHOLE else 1,
    )  # fmt: skip


@triton.jit
def linear_float_groups_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, weight_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, out_ptr, ends_ptr,
    rows, channels, reduction, groups,
    HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """As `linear_int8_kernel`, but each group's int32 sum is rescaled into a float accumulator.

    scale and zero_point (groups,), column_sum (groups, channels), ends (groups,) int32.
    """
    await_previous(PDL)
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    lane = tl.arange(0, HALF)
    x_tile = codes_ptr + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * reduction + lane[None, :]
    w_tile = weight_ptr + tl.minimum(channel, channels - 1)[None, :].to(tl.int64) * reduction + lane[:, None]
    STEP: tl.constexpr = 2 * HALF
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for index in range(0, groups):
        begin, end = class_range(ends_ptr, index, 0, reduction)
        accumulator = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
        # Groups are short: a loop of their own for whole steps would not pay.
        for first in range(begin // STEP * STEP, end, STEP):
            second = first + HALF
            x0 = tl.load(x_tile + first, mask=(first + lane < reduction)[None, :], other=0)
            w0 = tl.load(w_tile + first, mask=(first + lane < reduction)[:, None], other=0)
            x1 = tl.load(x_tile + second, mask=(second + lane < reduction)[None, :], other=0)
            w1 = tl.load(w_tile + second, mask=(second + lane < reduction)[:, None], other=0)
            x0 = within(x0, (first + lane)[None, :], begin, end, ASSEMBLY)
            x1 = within(x1, (second + lane)[None, :], begin, end, ASSEMBLY)
            accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
        column_sum = tl.load(column_sum_ptr + index * channels + channel, mask=channel < channels, other=0)
        accumulator -= (tl.load(zero_point_ptr + index) - 128) * column_sum[None, :]
        total += accumulator.to(tl.float32) * tl.load(scale_ptr + index)
    y = total * tl.load(weight_scale_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    store(y, y, out_ptr, row, channel, rows, channels, False)


@triton.jit
def unpack_two_level(packed, m, offset, ASSEMBLY: tl.constexpr):
    """(low, high) int8 weights w4 * m of the nibbles of `packed` uint8; m and offset int32 of the same shape.

    The assembly does four bytes at once, in unsigned arithmetic: with u = w4 + 8, u * m + 128 - 8 m = w4 * m + 128 lies
    in 8..233, so no byte carries into the next, and flipping bit 7 makes it the int8 w4 * m. Four neighbouring bytes
    must share their m, and lie in one thread (`aligned`). offset is `word_offset(m)`, computed once for all words that
    share it.
    """
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u;
            and.b32 u, $2, 0x0F0F0F0F;
            xor.b32 u, u, 0x08080808;
            mad.lo.u32 u, u, $3, $7;
            xor.b32 $0, u, 0x80808080;
            shr.u32 u, $2, 4;
            and.b32 u, u, 0x0F0F0F0F;
            xor.b32 u, u, 0x08080808;
            mad.lo.u32 u, u, $3, $7;
            xor.b32 $1, u, 0x80808080;
            }
            """,
            "=r,=r,r,r,r,r,r,r,r,r,r", args=[packed, m, offset], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = ((packed << 4).to(tl.int8, bitcast=True) >> 4) * m.to(tl.int8)
        high = (packed.to(tl.int8, bitcast=True) >> 4) * m.to(tl.int8)
    return low, high


@triton.jit
def load_pairs(m_tile, first, group, subscale_row, GROUP: tl.constexpr):
    """The sub-scale bytes of the step that begins at byte `first`, 0 past the end.

    A step loads those of the next one: so few bytes are not copied asynchronously, and would be waited for.
    """
    at = first // GROUP  # 2 * first weights, GROUP to a nibble
    return tl.load(m_tile + at, mask=(at + group // 2 < subscale_row)[None, :], other=0)


@triton.jit
def subscales(pair, odd, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """(m, offset) int32 (CHANNELS, GROUPS * GROUP // 2): each group's sub-scale beside its bytes.

    pair uint8 (CHANNELS, GROUPS) holds two sub-scales to a byte, odd (GROUPS,) says which one counts.
    """
    m = (pair.to(tl.int32) >> (odd * 4)[None, :]) & 0xF
    offset = m * -0x08080808 - 0x7F7F7F80  # (128 - 8 m) in each byte, modulo 2^32
    HALF: tl.constexpr = GROUPS * GROUP // 2
    m = tl.broadcast_to(m[:, :, None], (CHANNELS, GROUPS, GROUP // 2)).reshape(CHANNELS, HALF)
    offset = tl.broadcast_to(offset[:, :, None], (CHANNELS, GROUPS, GROUP // 2)).reshape(CHANNELS, HALF)
    return m, offset


@triton.jit
def in_order(low, high, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The weights (CHANNELS, GROUPS * GROUP) in the order of K, from the nibbles (CHANNELS, half of it) of a step.

    No thread needs another one's: the halves of a group are at least as long as what a thread loads at once.
    """
    low = low.reshape(CHANNELS, GROUPS, GROUP // 2)
    high = high.reshape(CHANNELS, GROUPS, GROUP // 2)
    return tl.join(low, high).permute(0, 1, 3, 2).reshape(CHANNELS, GROUPS * GROUP)


@triton.jit
def linear_int4_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, packed_ptr, subscale_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    residual_ptr, out_ptr, rows, channels, reduction, packed_row, subscale_row, partial_ptr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    SPLIT: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """codes (rows, reduction); packed (channels, packed_row), subscale (channels, subscale_row); all contiguous.

    A step covers HALF bytes, 2 * HALF weights in GROUPS whole groups: one product takes the low nibbles of all its
    groups, one the high ones, and the codes are loaded with the gaps that this order needs. Weights are the left
    operand: unpacked, they stay in registers.

    WHOLE: one product of codes and weights in their own order, for 9.0. There the right operand lies in shared memory
    in any case, so it is the weights, which must be written anyway, and codes go no further than registers.
    """
    await_previous(PDL)
    GROUPS: tl.constexpr = 2 * HALF // GROUP
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    byte = tl.arange(0, HALF)
    low_lane = byte // (GROUP // 2) * GROUP + byte % (GROUP // 2)
    high_lane = low_lane + GROUP // 2
    lane = tl.arange(0, 2 * HALF)
    x_row = tl.minimum(row, rows - 1)[:, None] if WHOLE else tl.minimum(row, rows - 1)[None, :]
    x_tile = codes_ptr + x_row.to(tl.int64) * reduction
    last = weight_row(place, channels, GATED)[:, None].to(tl.int64)
    w_tile = packed_ptr + last * packed_row + byte[None, :]
    group = tl.arange(0, GROUPS)
    m_tile = subscale_ptr + last * subscale_row + (group // 2)[None, :]
    if WHOLE:
        accumulator = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
    else:
        accumulator = tl.zeros((BLOCK_CHANNELS, BLOCK_ROWS), tl.int32)
    low_byte, high_byte = split_range(packed_row, HALF, SPLIT)
    pair = load_pairs(m_tile, low_byte, group, subscale_row, GROUP)
    for first in range(low_byte, high_byte, HALF):
        next_pair = load_pairs(m_tile, first + HALF, group, subscale_row, GROUP)
        packed = tl.load(w_tile + first, mask=(first + byte < packed_row)[None, :], other=0)
        m, offset = subscales(pair, group % 2, BLOCK_CHANNELS, GROUPS, GROUP)
        low, high = unpack_two_level(packed, m, offset, ASSEMBLY)
        if WHOLE:
            k = (2 * first + lane)[None, :]
            x = tl.load(x_tile + k, mask=k < reduction, other=0)
            w = in_order(low, high, BLOCK_CHANNELS, GROUPS, GROUP)
            accumulator = tl.dot(x, w.T, accumulator, out_dtype=tl.int32)
        else:
            low_k = 2 * first + low_lane[:, None]
            high_k = 2 * first + high_lane[:, None]
            x_low = tl.load(x_tile + low_k, mask=low_k < reduction, other=0)
            x_high = tl.load(x_tile + high_k, mask=high_k < reduction, other=0)
            accumulator = tl.dot(low, x_low, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(high, x_high, accumulator, out_dtype=tl.int32)
        pair = next_pair
    if not WHOLE:
        accumulator = accumulator.T
    finish(
        accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
        partial_ptr, row, row, channel_block * BLOCK_CHANNELS, rows, channels, HAS_BIAS, HAS_RESIDUAL, GATED, SPLIT,
        2 if WHOLE else 1,
    )  # fmt: skip


def check(reduction: int, *tensors: Tensor) -> None:
    """Refuse operands that are not contiguous, and a reduction so long that int32 may overflow (ValueError)."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("codes and weights must be contiguous")
    if reduction * _CODE_LIMIT >= 2**31:
        raise ValueError(f"reduction of {reduction} channels may overflow int32 (at most {2**31 // _CODE_LIMIT})")


def aligned(packed: Tensor) -> Tensor:
    """A packed weight for `unpack_two_level`, copied where it begins at no multiple of 16 bytes. Triton then lets a
    thread load single bytes, and the four that the assembly takes at once are of four rows, with an m each."""
    return packed.clone() if packed.data_ptr() % 16 else packed


@functools.cache
def class_ends_on(ends: tuple[int, ...], device: torch.device) -> Tensor:
    """The class ends on the device, int32; kept, since a copy per call would stall the stream and break CUDA graphs."""
    return torch.tensor(ends, dtype=torch.int32, device=device)


def run_product(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], out: Tensor, epilogue: tuple[Any, ...],
    kind: str, shape: tuple[int, int, int], length: int, tiling: Tiling | None, *, pixels: int = 1,
) -> Tensor:  # fmt: skip
    """Launch a product, and the sum of its parts where the tiling splits the reduction.

    Args:
        kernel, arguments, constants: without the tile, `partial`, and what every product has in common.
        out: written to, and returned.
        epilogue: scale, zero_point, weight_scale, column_sum, bias, residual.
        shape: rows, channels, reduction; kind, length: as `tiles.pick` takes them.
        tiling: to use instead of `tiles.pick`'s.
        pixels: rows that share a scale.
    """
    rows, channels, _ = shape
    *head, bias, residual = epilogue
    flags = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}

    def run(tiling: Tiling) -> None:
        config, splits = tiling
        options = {"maxnreg": config.registers} if config.resident else {}
        partial = None
        if splits > 1:
            partial = torch.empty((splits, rows, channels), dtype=torch.int32, device=out.device)
        launch(
            kernel, (cdiv(rows, config.rows) * cdiv(channels, config.channels), splits, 1),
            *arguments, partial, SPLIT=splits > 1, ASSEMBLY=not triton.knobs.runtime.interpret,
            BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, HALF=config.half, WHOLE=config.whole,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False, **flags, **constants, **options,
        )  # fmt: skip
        if partial is not None:
            gated = constants.get("GATED", False)
            launch(
                sum_splits_kernel, (cdiv(rows, SUM_ROWS), cdiv(channels // (1 + gated), SUM_CHANNELS), 1),
                partial, *head, bias, residual, out, splits, rows, channels, pixels, GATED=gated,
                BLOCK_ROWS=SUM_ROWS, BLOCK_CHANNELS=SUM_CHANNELS, num_warps=4, enable_fp_fusion=False, **flags,
            )  # fmt: skip

    run(tiling or pick(kind, *shape, length, out.device, kernel.__name__, run))
    return out


def _output(rows: int, channels: int, dtype: torch.dtype, codes: Tensor, gated: bool, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor."""
    if out is None:
        return torch.empty((rows, channels // (1 + gated)), dtype=dtype, device=codes.device)
    return out


def linear_int8(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, class_ends: list[int], residual: Tensor | None = None,
    gated: bool = False, *, out: Tensor | None = None, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.linear_int8`; `out` is a contiguous (M, N) buffer to write to, (M, N / 2) if gated.

    Raises:
        ValueError: operands are not contiguous, or K is so long that int32 may overflow even without shifts (whether
            shifted classes fit is a property of the weights, which whoever forms the classes proves).
    """
    residual = None if residual is None else residual.contiguous()
    codes = centred(codes)
    check(codes.shape[1], codes, weight)
    rows, reduction = codes.shape
    channels = weight.shape[0]
    out = _output(rows, channels, out_dtype, codes, gated, out)
    if not out.numel():
        return out
    shifted = len(class_ends) > 1
    ends = class_ends_on(tuple(class_ends), codes.device) if shifted else None
    return run_product(
        linear_int8_kernel,
        (codes, scale, zero_point, weight, weight_scale, column_sum, bias, residual, out, ends,
         rows, channels, reduction),
        {"CLASSES": len(class_ends), "GATED": gated}, out,
        (scale, zero_point, weight_scale, column_sum, bias, residual),
        "shifted" if shifted else "int8", (rows, channels, reduction), reduction, tiling,
    )  # fmt: skip


def linear_int4(
    codes: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, subscales: Tensor, weight_scale: Tensor,
    column_sum: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int, residual: Tensor | None = None,
    gated: bool = False, *, out: Tensor | None = None, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.linear_int4`; `out` is a contiguous (M, N) buffer to write to, (M, N / 2) if gated.

    Raises:
        ValueError: operands are not contiguous, or K is so long that int32 may overflow.
    """
    residual = None if residual is None else residual.contiguous()
    codes = centred(codes)
    check(codes.shape[1], codes, packed, subscales)
    packed = aligned(packed)
    rows, reduction = codes.shape
    channels = packed.shape[0]
    out = _output(rows, channels, out_dtype, codes, gated, out)
    if not out.numel():
        return out
    return run_product(
        linear_int4_kernel,
        (codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, residual, out,
         rows, channels, reduction, packed.shape[1], subscales.shape[1]),
        {"GROUP": group, "GATED": gated}, out, (scale, zero_point, weight_scale, column_sum, bias, residual),
        "int4", (rows, channels, reduction), reduction, tiling,
    )  # fmt: skip


def linear_float_groups(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, group_ends: list[int], *, out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.linear_float_groups`; `out` is a contiguous (M, N) buffer to write to.

    Raises:
        ValueError: operands are not contiguous, or K is so long that int32 may overflow.
    """
    codes = centred(codes)
    check(codes.shape[1], codes, weight, column_sum)
    rows, reduction = codes.shape
    channels = weight.shape[0]
    out = _output(rows, channels, out_dtype, codes, False, out)
    if not out.numel():
        return out
    config = config or (INTERPRETER if triton.knobs.runtime.interpret else FLOAT_GROUPS)
    launch(
        linear_float_groups_kernel,
        (cdiv(rows, config.rows) * cdiv(channels, config.channels), 1, 1),
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, out,
        class_ends_on(tuple(group_ends), codes.device), rows, channels, reduction, len(group_ends),
        HAS_BIAS=bias is not None, ASSEMBLY=not triton.knobs.runtime.interpret,
        BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, HALF=config.half,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
