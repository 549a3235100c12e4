"""Activation quantization on CUDA, alone or fused with the norm or activation that precedes it.

Rows: one program holds whole rows in registers, so the input is read once. Samples: the range of a whole image is
needed before the first code, so a pass for the range and one for the codes. With a norm a pass for its statistics, from
which the range follows too, but where channels are rotated. Each pass is one kernel. Partial results go through memory,
and the next kernel makes them one, in a fixed order, never through atomics, so results do not vary from run to run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import centred
from ..launch import await_previous, cdiv, launch
from . import reference
from .groups import PROGRAMS, groups_for

_ROUND_TRICK = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small float to an integer, half to even
_SIGN = tl.constexpr(-(1 << 31))
# What a row is before its quantization: itself, normalized, gated, activated, or normalized over a group of pixels.
_PLAIN, _LAYER_NORM, _GEGLU, _SILU, _GROUP_NORM = (tl.constexpr(i) for i in range(5))
# Where x * sigmoid(x), which falls down to there, turns to rise, and what it is there.
_SILU_TURNS, _SILU_LEAST = tl.constexpr(reference.SILU_TURNS), tl.constexpr(reference.SILU_LEAST)
LONGEST_ROW = 8192  # channels that a program's registers hold
MOST_RANGES = 1024  # of a sample, which each program of its codes reads


class Config(NamedTuple):
    """Rows (or pixels) and channels per tile, warps."""

    rows: int
    channels: int
    warps: int


@triton.jit
def reach(x, AXIS: tl.constexpr):
    """(below, above) along an axis: how far x reaches to either side of 0, as the bits (int32) of a float >= 0.

    The bits of such floats are in order as integers, infinity and then NaN last: what is not finite stays, where a
    floating maximum drops NaN. Of a negative float they are a negative integer, and flipping their sign negates it.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.maximum(tl.max(bits ^ _SIGN, axis=AXIS), 0), tl.maximum(tl.max(bits, axis=AXIS), 0)


@triton.jit
def quantizer(below, above, SMALLEST: tl.constexpr, TOP: tl.constexpr):
    """(scale, 1 / scale, zero point as a float) of ranges from `reach`, as `reference._codes`; (NaN, 0, 0) where a
    range is not finite."""
    below = below.to(tl.float32, bitcast=True)
    scale = tl.div_rn(above.to(tl.float32, bitcast=True) + below, float(TOP))
    finite = scale < float("inf")
    scale = tl.where(scale > SMALLEST, scale, 1.0)
    inverse = tl.where(finite, tl.div_rn(1.0, scale), 0.0)
    zero_point = tl.where(finite, (below * inverse + _ROUND_TRICK) - _ROUND_TRICK, 0.0)
    return tl.where(finite, scale, float("nan")), inverse, zero_point


@triton.jit
def code(x, inverse, zero_point, TOP: tl.constexpr):
    """The code of x less 128, int8; NaN's is 0, for which the maximum takes the other."""
    rounded = ((x * inverse + _ROUND_TRICK) - _ROUND_TRICK) + (zero_point - 128.0)
    return tl.minimum(tl.maximum(rounded, -128.0), TOP - 128.0).to(tl.int8)


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The stage of `rotation.rotate` over the last two bits of a channel's number, which become its first."""
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    low, high, total, difference = a + b, a - b, c + d, c - d
    first = tl.join(low + difference, high + total)
    second = tl.join(low - difference, total - high)
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 3, 1)), (ROWS, BLOCK))


@triton.jit
def rotated(x, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    """VALUES values, channels last, as `rotation.rotate` has it: (VALUES / BLOCK, BLOCK), a block in each row."""
    x = tl.reshape(x, (VALUES // BLOCK, BLOCK))
    x = _butterfly(_butterfly(x, VALUES // BLOCK, BLOCK), VALUES // BLOCK, BLOCK)
    if BLOCK > 16:
        x = _butterfly(x, VALUES // BLOCK, BLOCK)
    if BLOCK > 64:
        x = _butterfly(x, VALUES // BLOCK, BLOCK)
    return x * (0.25 if BLOCK == 16 else 0.125 if BLOCK == 64 else 0.0625)


@triton.jit
def quantize_rows_kernel(
    x_ptr, centre_ptr, norm_weight_ptr, norm_bias_ptr, inv_divisor_ptr, position_ptr, codes_ptr, scale_ptr,
    zero_point_ptr, rows, channels, pixels, x_row, eps,
    INPUT: tl.constexpr, GAIN: tl.constexpr, OFFSET: tl.constexpr, DIVIDE: tl.constexpr, PLACE: tl.constexpr,
    ROTATION: tl.constexpr, SMALLEST: tl.constexpr, TOP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """x (rows, channels) with row stride x_row, for GEGLU (rows, 2 channels); codes (rows, channels) contiguous; norm
    weight and bias, inv_divisor and position (channels,); scale and zero_point (rows,). BLOCK_CHANNELS >= channels.
    Group norm: centre and norm weight are `group_statistics_kernel`'s (B, channels), each sample has `pixels` rows."""
    await_previous(PDL)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    inside = (row < rows)[:, None] & in_channels[None, :]
    x_offsets = row[:, None].to(tl.int64) * x_row + channel[None, :]
    x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(tl.float32)
    if INPUT == _LAYER_NORM:
        mean = tl.div_rn(tl.sum(x, axis=1), 1.0 * channels)
        x = tl.where(inside, x - mean[:, None], 0.0)
        variance = tl.div_rn(tl.sum(x * x, axis=1), 1.0 * channels)
        x *= tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
        if GAIN:
            x *= tl.load(norm_weight_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
        if OFFSET:
            x += tl.load(norm_bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    if INPUT == _GROUP_NORM:
        at = (row // pixels)[:, None] * channels + channel[None, :]
        x -= tl.load(centre_ptr + at, mask=inside, other=0.0)
        x *= tl.load(norm_weight_ptr + at, mask=inside, other=0.0)
        if OFFSET:
            x += tl.load(norm_bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    if INPUT == _SILU:
        x = x / (1.0 + tl.exp(-x))
    if INPUT == _GEGLU:
        gate = tl.load(x_ptr + x_offsets + channels, mask=inside, other=0.0).to(tl.float32)
        x *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    if DIVIDE:
        x *= tl.load(inv_divisor_ptr + channel, mask=in_channels, other=0.0)[None, :]
    if ROTATION:  # channels beyond the last are blocks of their own
        x = tl.reshape(rotated(x, BLOCK_ROWS * BLOCK_CHANNELS, ROTATION), (BLOCK_ROWS, BLOCK_CHANNELS))

    # masked places hold 0, which every row's range holds anyway
    below, above = reach(x, 1)
    scale, inverse, zero_point = quantizer(below, above, SMALLEST, TOP)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(zero_point_ptr + row, zero_point.to(tl.int32), mask=row < rows)
    place = channel
    if PLACE:
        place = tl.load(position_ptr + channel, mask=in_channels, other=0)
    code_offsets = row[:, None].to(tl.int64) * channels + place[None, :]
    tl.store(codes_ptr + code_offsets, code(x, inverse[:, None], zero_point[:, None], TOP), mask=inside)


@triton.jit
def _load_long(
    x_row, inv_divisor_ptr, channel, channels,
    DIVIDE: tl.constexpr, ROTATION: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A part of a row, divided and rotated, float32 (BLOCK_CHANNELS,)."""
    x = tl.load(x_row + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if DIVIDE:
        x *= tl.load(inv_divisor_ptr + channel, mask=channel < channels, other=0.0)
    if ROTATION:
        x = tl.reshape(rotated(x, BLOCK_CHANNELS, ROTATION), (BLOCK_CHANNELS,))
    return x


@triton.jit
def quantize_long_rows_kernel(
    x_ptr, inv_divisor_ptr, position_ptr, codes_ptr, scale_ptr, zero_point_ptr, rows, channels, x_row,
    DIVIDE: tl.constexpr, PLACE: tl.constexpr, ROTATION: tl.constexpr, SMALLEST: tl.constexpr, TOP: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """As `quantize_rows_kernel` on plain rows of any length, one row per program, read twice."""
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_CHANNELS)
    base = x_ptr + row * x_row
    below = 0
    above = 0
    for first in range(0, channels, BLOCK_CHANNELS):
        x = _load_long(base, inv_divisor_ptr, first + lane, channels, DIVIDE, ROTATION, BLOCK_CHANNELS)
        block_below, block_above = reach(x, 0)
        below = tl.maximum(below, block_below)
        above = tl.maximum(above, block_above)
    scale, inverse, zero_point = quantizer(below, above, SMALLEST, TOP)
    tl.store(scale_ptr + row, scale)
    tl.store(zero_point_ptr + row, zero_point.to(tl.int32))
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + lane
        x = _load_long(base, inv_divisor_ptr, channel, channels, DIVIDE, ROTATION, BLOCK_CHANNELS)
        place = channel
        if PLACE:
            place = tl.load(position_ptr + channel, mask=channel < channels, other=0)
        tl.store(codes_ptr + row * channels + place, code(x, inverse, zero_point, TOP), mask=channel < channels)


@triton.jit
def _load_group(base, pixel, length, channels, inside):
    """Channels of pixels, float32; the last one's for those beyond it, which changes no range."""
    x = tl.load(base + tl.minimum(pixel, length - 1)[:, None] * channels, mask=inside[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _finish_group(
    mean, squares, size, low, high, shift, sample, group, channel, in_group, channels, norm_weight_ptr, centre_ptr,
    gain_ptr, norm_bias_ptr, inv_divisor_ptr, below_ptr, above_ptr, eps,
    GAIN: tl.constexpr, RANGE: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Centre and gain of a group's channels, and the reach of what comes of low and high, the ends of each one's range,
    as `group_statistics_kernel` has them."""
    gain = tl.zeros_like(shift) + tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, size) + eps))
    if GAIN:
        gain *= tl.load(norm_weight_ptr + channel, mask=in_group, other=0.0).to(tl.float32)
    centre = mean - shift
    at = sample * channels + channel
    tl.store(centre_ptr + at, centre, mask=in_group)
    tl.store(gain_ptr + at, gain, mask=in_group)
    if RANGE:
        # the steps of `_load_sample`, each of which keeps values in order or turns it round
        low = (low - centre) * gain
        high = (high - centre) * gain
        if OFFSET:
            offset = tl.load(norm_bias_ptr + channel, mask=in_group, other=0.0).to(tl.float32)
            low += offset
            high += offset
        if SILU:
            turns = (tl.minimum(low, high) < _SILU_TURNS) & (tl.maximum(low, high) > _SILU_TURNS)
            low = low / (1.0 + tl.exp(-low))
            high = high / (1.0 + tl.exp(-high))
        divisor = tl.zeros_like(shift) + 1.0
        if DIVIDE:
            divisor = tl.load(inv_divisor_ptr + channel, mask=in_group, other=0.0)
            low *= divisor
            high *= divisor
        below, above = reach(tl.where(in_group, low, 0.0), 0)
        more_below, more_above = reach(tl.where(in_group, high, 0.0), 0)
        below, above = tl.maximum(below, more_below), tl.maximum(above, more_above)
        if SILU:
            more_below, more_above = reach(tl.where(in_group & turns, _SILU_LEAST * divisor, 0.0), 0)
            below, above = tl.maximum(below, more_below), tl.maximum(above, more_above)
        tl.store(below_ptr + sample * tl.num_programs(0) + group, below)
        tl.store(above_ptr + sample * tl.num_programs(0) + group, above)


@triton.jit
def group_statistics_kernel(
    x_ptr, shift_ptr, norm_weight_ptr, norm_bias_ptr, inv_divisor_ptr, centre_ptr, gain_ptr, low_ptr, high_ptr,
    below_ptr, above_ptr, pixels, channels, shift_row, share, eps,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, GAIN: tl.constexpr, RANGE: tl.constexpr,
    OFFSET: tl.constexpr, SILU: tl.constexpr, DIVIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Of one group in the `share` pixels of one part of a sample: x (B, pixels, channels) plus shift (B, channels),
    whose rows lie shift_row apart.

    One part: centre (its mean, less the shift) and gain (norm weight / deviation), float32 (B, channels); with RANGE
    also how far what the norm, and what follows it, make of the group reaches: below and above (B, groups) int32, as
    `reach` has them. It is a bound, from the range of each channel: SiLU's least value, where one lies to both sides.

    More: the part's mean, and the sum of squared differences to it, in the places of centre and gain, (B, PARTS,
    groups), with RANGE the ends of each channel's range, low and high (B, PARTS, channels). `merge_parts_kernel` makes
    of them what one part gives.
    """
    await_previous(PDL)
    group, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BLOCK_CHANNELS)
    channel = group * GROUP + lane
    in_group = lane < GROUP
    begin = part * share
    length = tl.minimum(share, pixels - begin)
    base = x_ptr + (sample.to(tl.int64) * pixels + begin) * channels + channel[None, :]
    shift = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + sample * shift_row + channel, mask=in_group, other=0.0).to(tl.float32)
    pixel = tl.arange(0, BLOCK_ROWS)
    x = _load_group(base, pixel, length, channels, in_group)
    inside = (pixel < length)[:, None] & in_group[None, :]
    # differences to the mean of the first pixels: it is near enough to that of all to keep the digits of the variance
    known = 1.0 * tl.maximum(GROUP * tl.minimum(length, BLOCK_ROWS), 1)
    pivot = tl.div_rn(tl.sum(tl.where(inside, x + shift[None, :], 0.0)), known)
    apart = tl.where(inside, x + shift[None, :] - pivot, 0.0)
    square = apart * apart
    low = x
    high = x
    for first in range(BLOCK_ROWS, length, BLOCK_ROWS):
        pixel = first + tl.arange(0, BLOCK_ROWS)
        x = _load_group(base, pixel, length, channels, in_group)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        x = tl.where((pixel < length)[:, None] & in_group[None, :], x + shift[None, :] - pivot, 0.0)
        apart += x
        square += x * x
    size = 1.0 * tl.maximum(GROUP * length, 1)
    total = tl.sum(apart)
    off = tl.div_rn(total, size)
    mean = pivot + off
    squares = tl.sum(square) - total * off
    # what is not finite may be missing in the ranges: the gain is NaN then
    low = tl.min(low, axis=0)
    high = tl.max(high, axis=0)
    if PARTS == 1:
        _finish_group(
            mean, squares, size, low, high, shift, sample, group, channel, in_group, channels, norm_weight_ptr,
            centre_ptr, gain_ptr, norm_bias_ptr, inv_divisor_ptr, below_ptr, above_ptr, eps,
            GAIN, RANGE, OFFSET, SILU, DIVIDE,
        )  # fmt: skip
    else:
        out = sample * PARTS + part
        tl.store(centre_ptr + out * tl.num_programs(0) + group, mean)
        tl.store(gain_ptr + out * tl.num_programs(0) + group, squares)
        if RANGE:
            tl.store(low_ptr + out * channels + channel, low, mask=in_group)
            tl.store(high_ptr + out * channels + channel, high, mask=in_group)


@triton.jit
def merge_parts_kernel(
    mean_ptr, square_ptr, low_ptr, high_ptr, shift_ptr, norm_weight_ptr, norm_bias_ptr, inv_divisor_ptr, centre_ptr,
    gain_ptr, below_ptr, above_ptr, pixels, channels, shift_row, share, eps,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, GAIN: tl.constexpr, RANGE: tl.constexpr,
    OFFSET: tl.constexpr, SILU: tl.constexpr, DIVIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Of one group of a sample, what `group_statistics_kernel` writes of one part, from what it writes of PARTS."""
    await_previous(PDL)
    group, sample = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK_CHANNELS)
    channel = group * GROUP + lane
    in_group = lane < GROUP
    shift = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    low = shift + float("inf")
    high = -low
    if SHIFT:
        shift = tl.load(shift_ptr + sample * shift_row + channel, mask=in_group, other=0.0).to(tl.float32)
    size = 0.0
    mean = 0.0
    squares = 0.0
    for part in tl.static_range(PARTS):
        at = sample * PARTS + part
        more = 1.0 * tl.maximum(tl.minimum(pixels - part * share, share), 0)
        size += more
        fraction = tl.div_rn(more, size)
        apart = tl.load(mean_ptr + at * tl.num_programs(0) + group) - mean
        squares += tl.load(square_ptr + at * tl.num_programs(0) + group)
        squares += apart * ((size - more) * fraction * GROUP) * apart
        mean += apart * fraction
        if RANGE:
            low = tl.minimum(low, tl.load(low_ptr + at * channels + channel, mask=in_group, other=0.0))
            high = tl.maximum(high, tl.load(high_ptr + at * channels + channel, mask=in_group, other=0.0))
    _finish_group(
        mean, squares, size * GROUP, low, high, shift, sample, group, channel, in_group, channels, norm_weight_ptr,
        centre_ptr, gain_ptr, norm_bias_ptr, inv_divisor_ptr, below_ptr, above_ptr, eps,
        GAIN, RANGE, OFFSET, SILU, DIVIDE,
    )  # fmt: skip


@triton.jit
def _load_sample(
    x_tile, centre, gain, norm_bias_ptr, inv_divisor_ptr, channel, channels, inside,
    NORM: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr, DIVIDE: tl.constexpr, ROTATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What is quantized, float32 (BLOCK_ROWS, BLOCK_CHANNELS); outside it is 0, which every sample's range holds
    anyway."""
    x = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)
    in_channels = channel < channels
    if NORM:
        x -= centre[None, :]
        x *= gain[None, :]
        if OFFSET:
            x += tl.load(norm_bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
        if SILU:
            x = x / (1.0 + tl.exp(-x))
        x = tl.where(inside, x, 0.0)
    if DIVIDE:
        x *= tl.load(inv_divisor_ptr + channel, mask=in_channels, other=0.0)[None, :]
    if ROTATION:
        x = tl.reshape(rotated(x, BLOCK_ROWS * BLOCK_CHANNELS, ROTATION), (BLOCK_ROWS, BLOCK_CHANNELS))
    return x


@triton.jit
def sample_range_kernel(
    x_ptr, centre_ptr, gain_ptr, norm_bias_ptr, inv_divisor_ptr, below_ptr, above_ptr, pixels, channels,
    NORM: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr, DIVIDE: tl.constexpr, ROTATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The range of each block of pixels over all channels: below and above (B, blocks) int32, as `reach` has them;
    centre and gain (B, channels) as `group_statistics_kernel` has them."""
    await_previous(PDL)
    block, sample = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_ROWS)
    pixel = block * BLOCK_ROWS + row
    base = x_ptr + (sample.to(tl.int64) * pixels + block * BLOCK_ROWS) * channels
    below = 0
    above = 0
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        in_channels = channel < channels
        inside = (pixel < pixels)[:, None] & in_channels[None, :]
        centre = tl.zeros((BLOCK_CHANNELS,), tl.float32)
        gain = tl.zeros((BLOCK_CHANNELS,), tl.float32)
        if NORM:
            centre = tl.load(centre_ptr + sample * channels + channel, mask=in_channels, other=0.0)
            gain = tl.load(gain_ptr + sample * channels + channel, mask=in_channels, other=0.0)
        x = _load_sample(
            base + row[:, None] * channels + channel[None, :], centre, gain, norm_bias_ptr, inv_divisor_ptr,
            channel, channels, inside, NORM, OFFSET, SILU, DIVIDE, ROTATION, BLOCK_ROWS, BLOCK_CHANNELS,
        )  # fmt: skip
        tile_below, tile_above = reach(x, None)
        below = tl.maximum(below, tile_below)
        above = tl.maximum(above, tile_above)
    tl.store(below_ptr + sample * tl.num_programs(0) + block, below)
    tl.store(above_ptr + sample * tl.num_programs(0) + block, above)


@triton.jit
def quantize_samples_kernel(
    x_ptr, centre_ptr, gain_ptr, norm_bias_ptr, inv_divisor_ptr, position_ptr, below_ptr, above_ptr, codes_ptr,
    scale_ptr, zero_point_ptr, height, width, channels, padding, blocks,
    NORM: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr, DIVIDE: tl.constexpr, PLACE: tl.constexpr,
    ROTATION: tl.constexpr, SMALLEST: tl.constexpr, TOP: tl.constexpr, BLOCK_RANGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Codes (B, height + 2 padding, width + 2 padding, channels) from x (B, height, width, channels): the zero point
    on the border; below and above (B, blocks) from `sample_range_kernel`, or from the norm's statistics."""
    await_previous(PDL)
    sample = tl.program_id(2)
    below = 0
    above = 0
    for first in range(0, blocks, BLOCK_RANGES):
        at = first + tl.arange(0, BLOCK_RANGES)
        below = tl.maximum(below, tl.max(tl.load(below_ptr + sample * blocks + at, mask=at < blocks, other=0)))
        above = tl.maximum(above, tl.max(tl.load(above_ptr + sample * blocks + at, mask=at < blocks, other=0)))
    scale, inverse, zero_point = quantizer(below, above, SMALLEST, TOP)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr + sample, scale)
        tl.store(zero_point_ptr + sample, zero_point.to(tl.int32))

    padded_width = width + 2 * padding
    padded = (height + 2 * padding) * padded_width
    first_pixel = tl.program_id(0) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    pixel = first_pixel + row
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    y = pixel // padded_width - padding
    x_at = pixel % padded_width - padding
    image = (y >= 0) & (y < height) & (x_at >= 0) & (x_at < width) & (pixel < padded)
    inside = image[:, None] & (channel < channels)[None, :]
    # a sample may have 2^31 values or more, a tile's lie near its first one
    top = first_pixel // padded_width - padding
    left = first_pixel % padded_width - padding
    base = x_ptr + (sample.to(tl.int64) * height * width + top * width + left) * channels
    centre = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    gain = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if NORM:
        centre = tl.load(centre_ptr + sample * channels + channel, mask=channel < channels, other=0.0)
        gain = tl.load(gain_ptr + sample * channels + channel, mask=channel < channels, other=0.0)
    x = _load_sample(
        base + ((y - top) * width + x_at - left)[:, None] * channels + channel[None, :], centre, gain, norm_bias_ptr,
        inv_divisor_ptr, channel, channels, inside, NORM, OFFSET, SILU, DIVIDE, ROTATION, BLOCK_ROWS, BLOCK_CHANNELS,
    )  # fmt: skip
    place = channel
    if PLACE:
        place = tl.load(position_ptr + channel, mask=channel < channels, other=0)
    out = codes_ptr + (sample.to(tl.int64) * padded + first_pixel) * channels + row[:, None] * channels + place[None, :]
    # outside the image x is 0, whose code is the zero point
    stored = (pixel < padded)[:, None] & (channel < channels)[None, :]
    tl.store(out, code(x, inverse, zero_point, TOP), mask=stored)


@functools.cache
def config_for(channels: int, rotation: int = 0) -> Config:
    """Whole rows, about 1024 values per program or one row: with 2048 a LayerNorm spills on 8.0, 9.0 and 10.0, and one
    that is rotated with more than 256 values a warp."""
    block = triton.next_power_of_2(channels)
    if triton.knobs.runtime.interpret:
        return Config(max(1, 65536 // block), block, 4)  # the interpreter's cost is per tile
    warps = max(4, block // 256) if rotation else 8 if block > 2048 else 4
    return Config(max(1, 1024 // block), block, warps)


@functools.cache
def sample_config_for(batch: int, pixels: int, channels: int, rotation: int = 0) -> Config:
    """About 256 blocks of pixels in all, so that small images still fill a device; tiles of about 4096 values, of
    2048 where they are rotated, which spills with more."""
    if triton.knobs.runtime.interpret:
        return Config(128, triton.next_power_of_2(channels), 4)
    values = 2048 if rotation else 4096
    rows = min(64, values // max(rotation, 64), max(4, triton.next_power_of_2(pixels * batch // 256)))
    return Config(rows, min(values // rows, triton.next_power_of_2(channels)), 4)


class Norm(NamedTuple):
    """Of a norm, what the passes behind its statistics take: centre and gain (B, C), and, where these have them, the
    ranges below and above (B, groups) of what follows it."""

    centre: Tensor | None = None
    gain: Tensor | None = None
    ranges: tuple[Tensor, Tensor] | None = None


def _pair(like: Tensor, dtype: torch.dtype, *size: int) -> tuple[Tensor, Tensor]:
    """Two empty tensors of a size, where another one is."""
    return like.new_empty(size, dtype=dtype), like.new_empty(size, dtype=dtype)


class After(NamedTuple):
    """What follows a norm before a convolution's codes: its bias, SiLU, the divisor."""

    bias: Tensor | None
    silu: bool
    inv_divisor: Tensor | None


def _check(position: Tensor | None, *vectors: Tensor | None) -> None:
    """Everything per channel is contiguous; positions are int32."""
    if position is not None and position.dtype != torch.int32:
        raise ValueError(f"position must be int32, not {position.dtype}")
    if any(vector is not None and not vector.is_contiguous() for vector in (position, *vectors)):
        raise ValueError("what is per channel must be contiguous")


def _rows(
    x: Tensor, channels: int, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int,
    out: tuple[Tensor, Tensor, Tensor] | None, mode: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 0.0, centre: Tensor | None = None, pixels: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(position, inv_divisor, weight, bias)
    rows = x.shape[0]
    codes, scale, zero_point = out or (
        torch.empty((rows, channels), dtype=torch.int8, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
        torch.empty(rows, dtype=torch.int32, device=x.device),
    )
    if rows == 0:
        return codes, scale, zero_point
    x = x if x.stride(1) == 1 else x.contiguous()
    common: dict[str, Any] = {
        "SMALLEST": reference.SMALLEST_SCALE, "TOP": 2**bits - 1, "DIVIDE": inv_divisor is not None,
        "PLACE": position is not None, "ROTATION": rotation,
        "enable_fp_fusion": False,  # x * inverse must be rounded before the integer rounding, as in the reference
    }  # fmt: skip
    if channels > LONGEST_ROW:
        launch(
            quantize_long_rows_kernel, (rows, 1, 1),
            x, inv_divisor, position, codes, scale, zero_point, rows, channels, x.stride(0),
            BLOCK_CHANNELS=4096, num_warps=8, **common,
        )  # fmt: skip
    else:
        config = config_for(channels, rotation)
        launch(
            quantize_rows_kernel, (cdiv(rows, config.rows), 1, 1),
            x, centre, weight, bias, inv_divisor, position, codes, scale, zero_point,
            rows, channels, pixels, x.stride(0), eps,
            INPUT=mode, GAIN=weight is not None, OFFSET=bias is not None,
            BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, num_warps=config.warps, **common,
        )  # fmt: skip
    return codes, scale, zero_point


def quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None = None, rotation: int = 0, *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.quantize_rows`; `out` gives contiguous buffers for codes, scale and zero point.

    Raises:
        ValueError: position is not int32, or something per channel is not contiguous.
    """
    return _rows(x, x.shape[1], bits, inv_divisor, position, rotation, out, _PLAIN.value)


def layer_norm_quantize_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int, inv_divisor: Tensor | None,
    position: Tensor | None, rotation: int = 0, *, out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.layer_norm_quantize_rows`; `out` and errors as in `quantize_rows`."""
    if x.shape[1] > LONGEST_ROW:
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        x = torch.nn.functional.layer_norm(x.float(), x.shape[1:], weight, bias, eps)
        return _rows(x, x.shape[1], bits, inv_divisor, position, rotation, out, _PLAIN.value)
    return _rows(x, x.shape[1], bits, inv_divisor, position, rotation, out, _LAYER_NORM.value, weight, bias, eps)


def geglu_quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0, *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.geglu_quantize_rows`; `out` and errors as in `quantize_rows`."""
    channels = x.shape[1] // 2
    if channels > LONGEST_ROW:
        value, gate = x.float().chunk(2, dim=1)
        x = value * torch.nn.functional.gelu(gate)
        return _rows(x, channels, bits, inv_divisor, position, rotation, out, _PLAIN.value)
    return _rows(x, channels, bits, inv_divisor, position, rotation, out, _GEGLU.value)


def silu_quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0, *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.silu_quantize_rows`; `out` and errors as in `quantize_rows`."""
    if x.shape[1] > LONGEST_ROW:
        x = torch.nn.functional.silu(x.float())
        return _rows(x, x.shape[1], bits, inv_divisor, position, rotation, out, _PLAIN.value)
    return _rows(x, x.shape[1], bits, inv_divisor, position, rotation, out, _SILU.value)


def group_norm_quantize_rows(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int,
    inv_divisor: Tensor | None, position: Tensor | None, rotation: int = 0, *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.group_norm_quantize_rows`; `out` and errors as in `quantize_rows`."""
    _check(None, weight, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    if channels > LONGEST_ROW:
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        y = torch.nn.functional.group_norm(x.float().contiguous(), groups, weight, bias, eps)
        rows = y.permute(0, 2, 3, 1).reshape(-1, channels)
        return _rows(rows, channels, bits, inv_divisor, position, rotation, out, _PLAIN.value)
    norm = _group_statistics(x, groups, weight, eps, None, 0)
    last = (_GROUP_NORM.value, norm.gain, bias, eps, norm.centre, pixels)
    return _rows(rows, channels, bits, inv_divisor, position, rotation, out, *last)


def quantize_samples(
    x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int, position: Tensor | None = None, rotation: int = 0,
    *, out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.quantize_samples`; `out` gives buffers for codes (channels-last), scale and zero point.

    Raises:
        ValueError: position is not int32, or something per channel is not contiguous.
    """
    return _samples(x, bits, inv_divisor, padding, position, out, Norm(), None, False, rotation)


def quantize_wide_samples(x: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_wide_samples`; by torch's own operations."""
    codes, scale, zero_point = reference.quantize_wide_samples(x, padding)
    return centred(codes), scale, zero_point


def group_norm_quantize_samples(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, bits: int,
    inv_divisor: Tensor | None, padding: int, position: Tensor | None, offset: Tensor | None = None,
    rotation: int = 0, *, out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `dgq_kernels.group_norm_quantize_samples`; `out` and errors as in `quantize_samples`."""
    _check(None, weight, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    if offset is not None and offset.stride(1) != 1:
        offset = offset.contiguous()
    after = None if rotation else After(bias, silu, inv_divisor)
    norm = _group_statistics(x, groups, weight, eps, offset, PROGRAMS, after)
    return _samples(x, bits, inv_divisor, padding, position, out, norm, bias, silu, rotation)


def _group_statistics(
    x: Tensor, groups: int, weight: Tensor | None, eps: float, shift: Tensor | None, programs: int,
    after: After | None = None,
) -> Norm:  # fmt: skip
    """Of x + shift (B, C), by about so many programs, or one for each group: (x - centre) * gain is its norm without
    the offset. `after`: the ranges are wanted too."""
    batch, channels, height, width = x.shape
    group, pixels = channels // groups, height * width
    # a part's offsets are of 32 bits; rows, which know no parts, are of pictures that have none as large
    least = max(1, cdiv(pixels * channels, 2**30)) if programs else 1
    tile = groups_for(max(1, pixels), group, max(least, programs // max(1, batch * groups)), after is not None)
    norm = Norm(*_pair(x, torch.float32, batch, channels), _pair(x, torch.int32, batch, groups) if after else None)
    if not x.numel():
        return norm
    mean, square, low, high = norm.centre, norm.gain, None, None
    if tile.parts > 1:
        mean, square = _pair(x, torch.float32, batch, tile.parts, groups)
        if after:
            low, high = _pair(x, torch.float32, batch, tile.parts, channels)
    bias, silu, inv_divisor = after or (None, False, None)
    ranges = norm.ranges or (None, None)
    sizes = (pixels, channels, 0 if shift is None else shift.stride(0), tile.share, eps)
    flags: dict[str, Any] = {
        "GROUP": group, "PARTS": tile.parts, "SHIFT": shift is not None, "GAIN": weight is not None,
        "RANGE": after is not None, "OFFSET": bias is not None, "SILU": silu, "DIVIDE": inv_divisor is not None,
        "BLOCK_CHANNELS": tile.channels, "enable_fp_fusion": False,
    }  # fmt: skip
    launch(
        group_statistics_kernel, (groups, tile.parts, batch),
        x, shift, weight, bias, inv_divisor, mean, square, low, high, *ranges, *sizes,
        BLOCK_ROWS=tile.rows, num_warps=tile.warps, **flags,
    )  # fmt: skip
    if tile.parts > 1:
        launch(
            merge_parts_kernel, (groups, batch, 1),
            mean, square, low, high, shift, weight, bias, inv_divisor, norm.centre, norm.gain, *ranges, *sizes,
            num_warps=1, **flags,
        )  # fmt: skip
    return norm


def _samples(
    x: Tensor, bits: int, inv_divisor: Tensor | None, padding: int, position: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor] | None, norm: Norm, bias: Tensor | None, silu: bool, rotation: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The range and the codes of x, or of its norm with `bias` and what follows it."""
    _check(position, inv_divisor)
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    size = (batch, channels, height + 2 * padding, width + 2 * padding)
    codes, scale, zero_point = out or (
        torch.empty(size, dtype=torch.int8, device=x.device, memory_format=torch.channels_last),
        torch.empty(batch, dtype=torch.float32, device=x.device),
        torch.empty(batch, dtype=torch.int32, device=x.device),
    )
    if not codes.numel():
        return codes, scale, zero_point
    config = sample_config_for(batch, height * width, channels, rotation)
    blocks = cdiv(height * width, config.rows)
    below, above = norm.ranges or _pair(x, torch.int32, batch, blocks)
    flags: dict[str, Any] = {
        "NORM": norm.gain is not None, "OFFSET": bias is not None, "SILU": silu, "DIVIDE": inv_divisor is not None,
        "ROTATION": rotation, "BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels, "num_warps": config.warps,
        "enable_fp_fusion": False,
    }  # fmt: skip
    if norm.ranges is None:
        launch(
            sample_range_kernel, (blocks, batch, 1),
            x, norm.centre, norm.gain, bias, inv_divisor, below, above, height * width, channels, **flags,
        )  # fmt: skip
    if below.shape[1] > MOST_RANGES:
        below, above = (part.amax(1, keepdim=True) for part in (below, above))
    grid = (cdiv(size[2] * size[3], config.rows), cdiv(channels, config.channels), batch)
    launch(
        quantize_samples_kernel, grid,
        x, norm.centre, norm.gain, bias, inv_divisor, position, below, above, codes, scale, zero_point,
        height, width, channels, padding, below.shape[1],
        PLACE=position is not None, SMALLEST=reference.SMALLEST_SCALE, TOP=2**bits - 1, BLOCK_RANGES=256, **flags,
    )  # fmt: skip
    return codes, scale, zero_point
