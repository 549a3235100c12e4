"""The quantized convolution on CUDA: an implicit GEMM over pixels, no column matrix.

Codes are channels-last and already padded with each sample's zero point, so a tap at the border is a plain load: no
mask, and exact (a fill value other than 0 would also cost the asynchronous copies). With K = (tap row, tap column,
channel), a row of taps is one contiguous run of kernel width * C codes; only between such rows does the address jump.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import centred
from ..launch import await_previous
from ..linear.tiles import Tiling
from ..linear.triton import (
    aligned,
    check,
    class_ends_on,
    class_range,
    class_steps,
    finish,
    in_order,
    load_pairs,
    run_product,
    split_range,
    subscales,
    tile_of,
    unpack_two_level,
    within,
)
from . import reference


@triton.jit
def window_offsets(row, rows, out_height, out_width, height, width, STRIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the window of output pixel `row` begins in the codes; pixels past the end repeat the last one."""
    pixel = tl.minimum(row, rows - 1)
    line = pixel // out_width
    sample = line // out_height
    y = (line - sample * out_height) * STRIDE
    x = (pixel - line * out_width) * STRIDE
    return ((sample * height + y).to(tl.int64) * width + x) * CHANNELS


@triton.jit
def tap_offsets(k, first, jump, SEGMENT: tl.constexpr, SPAN: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr):
    """Where the codes of K `k`, all in first..first + SPAN - 1, lie from the window's start.

    RUN: neighbours in k come in aligned runs of this length.
    """
    if SEGMENT % SPAN == 0:  # the step lies within one row of taps
        offsets = k + first // SEGMENT * jump
    elif SEGMENT >= SPAN:  # it crosses at most one end of a row: a comparison instead of a division per code
        segment = first // SEGMENT
        offsets = k + segment * jump + tl.where(k >= (segment + 1) * SEGMENT, jump, 0)
    else:
        offsets = k + k // SEGMENT * jump
    if CHANNELS % RUN == 0:  # no run crosses the end of a row: wide loads
        offsets = tl.max_contiguous(tl.multiple_of(offsets, RUN), RUN)
    return offsets


@triton.jit
def _load_codes(
    x_tile, first, lane, jump,
    SEGMENT: tl.constexpr, REDUCTION: tl.constexpr, LENGTH: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The codes (BLOCK_ROWS, LENGTH) of K first..; x_tile (BLOCK_ROWS, 1) points at the windows."""
    k = first + lane
    offsets = tap_offsets(k, first, jump, SEGMENT, LENGTH, CHANNELS, 16)
    if REDUCTION % STEP == 0:
        return tl.load(x_tile + offsets[None, :])
    return tl.load(x_tile + offsets[None, :], mask=(k < REDUCTION)[None, :], other=0)


@triton.jit
def _load_weight(w_tile, first, lane, REDUCTION: tl.constexpr, STEP: tl.constexpr):
    """The weights (length of `lane`, BLOCK_CHANNELS) of K first..; 0 past the end, where codes may then be anything."""
    if REDUCTION % STEP == 0:
        return tl.load(w_tile + first)
    return tl.load(w_tile + first, mask=(first + lane < REDUCTION)[:, None], other=0)


@triton.jit
def _load_tap(
    x_tile, w_tile, tap, channel, line, TAPS: tl.constexpr, KERNEL_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Codes (BLOCK_ROWS, lanes) and weights (lanes, BLOCK_CHANNELS) of one tap; w_tile points at K = 0."""
    x_offsets = (tap // KERNEL_WIDTH * line + tap % KERNEL_WIDTH * CHANNELS + channel)[None, :]
    w_offsets = (tap * CHANNELS + channel)[:, None]
    if MASK:
        stored = channel < CHANNELS
        x = tl.load(x_tile + x_offsets, mask=stored[None, :], other=0)
        w = tl.load(w_tile + w_offsets, mask=stored[:, None], other=0)
    else:
        x = tl.load(x_tile + x_offsets)
        w = tl.load(w_tile + w_offsets)
    return x, w


@triton.jit
def conv2d_int8_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, weight_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr,
    out_ptr, ends_ptr, rows, channels, out_height, out_width, height, width, partial_ptr,
    CHANNELS: tl.constexpr, KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    CLASSES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """codes (B, height, width, CHANNELS), weight (channels, KERNEL_HEIGHT, KERNEL_WIDTH, CHANNELS), out
    (rows = B * out_height * out_width, channels), all contiguous; scale and zero_point (B,); ends (CLASSES,) int32."""
    await_previous(PDL)
    SEGMENT: tl.constexpr = KERNEL_WIDTH * CHANNELS
    REDUCTION: tl.constexpr = KERNEL_HEIGHT * SEGMENT
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    STEP: tl.constexpr = 2 * HALF
    lane = tl.arange(0, STEP if WHOLE else HALF)
    x_tile = codes_ptr + window_offsets(row, rows, out_height, out_width, height, width, STRIDE, CHANNELS)[:, None]
    w_tile = weight_ptr + tl.minimum(channel, channels - 1)[None, :].to(tl.int64) * REDUCTION + lane[:, None]
    jump = (width - KERNEL_WIDTH) * CHANNELS
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
    if WHOLE:
        low, high = split_range(REDUCTION, STEP, SPLIT)
        for first in range(low, high, STEP):
            x = _load_codes(x_tile, first, lane, jump, SEGMENT, REDUCTION, STEP, STEP, CHANNELS)
            w = _load_weight(w_tile, first, lane, REDUCTION, STEP)
            accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
    elif CLASSES == 1:
        # Two products per step, as in the linear kernel.
        low, high = split_range(REDUCTION, STEP, SPLIT)
        for first in range(low, high, STEP):
            x0 = _load_codes(x_tile, first, lane, jump, SEGMENT, REDUCTION, HALF, STEP, CHANNELS)
            w0 = _load_weight(w_tile, first, lane, REDUCTION, STEP)
            x1 = _load_codes(x_tile, first + HALF, lane, jump, SEGMENT, REDUCTION, HALF, STEP, CHANNELS)
            w1 = _load_weight(w_tile, first + HALF, lane, REDUCTION, STEP)
            accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
    else:
        TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
        line = width * CHANNELS
        w_tile = weight_ptr + tl.minimum(channel, channels - 1)[None, :].to(tl.int64) * REDUCTION
        low, high = split_range(CHANNELS, STEP, SPLIT)
        for reverse in range(CLASSES):
            accumulator += accumulator  # Horner: what the higher classes have summed so far counts twice
            begin, end = class_range(ends_ptr, CLASSES - 1 - reverse, low, high)
            edge, gap, inner_begin, inner_end = class_steps(begin, end, STEP)
            edges = tl.maximum(tl.cdiv(end - edge, gap), 0)
            for part in range(0, edges * TAPS):
                c0 = edge + part % edges * gap + lane
                x0, w0 = _load_tap(x_tile, w_tile, part // edges, c0, line, TAPS, KERNEL_WIDTH, CHANNELS, True)
                x1, w1 = _load_tap(x_tile, w_tile, part // edges, c0 + HALF, line, TAPS, KERNEL_WIDTH, CHANNELS, True)
                x0 = within(x0, c0[None, :], begin, end, ASSEMBLY)
                x1 = within(x1, (c0 + HALF)[None, :], begin, end, ASSEMBLY)
                accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
                accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
            # Unmasked steps, those of one tap after those of another; k is where a step begins in K.
            span = tl.maximum(inner_end - inner_begin, 0)
            k = inner_begin
            left = span
            for _ in range(0, span // STEP * TAPS):
                x_inner = x_tile + (k + k // SEGMENT * jump) + lane[None, :]
                w_inner = w_tile + k + lane[:, None]
                x0 = tl.load(x_inner)
                w0 = tl.load(w_inner)
                x1 = tl.load(x_inner + HALF)
                w1 = tl.load(w_inner + HALF)
                accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
                accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
                k += STEP
                left -= STEP
                k += tl.where(left == 0, CHANNELS - span, 0)
                left = tl.where(left == 0, span, left)
    finish(
        accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
        partial_ptr, row, row // (out_height * out_width), channel_block * BLOCK_CHANNELS, rows, channels, HAS_BIAS,
        HAS_RESIDUAL, False, SPLIT, 2 if WHOLE else 1,
    )  # fmt: skip


@triton.jit
def conv2d_int4_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, packed_ptr, subscale_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    residual_ptr, out_ptr, rows, channels, packed_row, subscale_row, out_height, out_width, height, width, partial_ptr,
    CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """As `conv2d_int8_kernel`, the weight as `linear_int4_kernel` takes it, over K = (tap row, tap column, channel)."""
    await_previous(PDL)
    SEGMENT: tl.constexpr = KERNEL_SIZE * CHANNELS
    REDUCTION: tl.constexpr = KERNEL_SIZE * SEGMENT
    GROUPS: tl.constexpr = 2 * HALF // GROUP
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    byte = tl.arange(0, HALF)
    low_lane = byte // (GROUP // 2) * GROUP + byte % (GROUP // 2)
    high_lane = low_lane + GROUP // 2
    lane = tl.arange(0, 2 * HALF)
    x_tile = codes_ptr + window_offsets(row, rows, out_height, out_width, height, width, STRIDE, CHANNELS)
    x_tile = x_tile[:, None] if WHOLE else x_tile[None, :]
    last = tl.minimum(channel, channels - 1)[:, None].to(tl.int64)
    w_tile = packed_ptr + last * packed_row + byte[None, :]
    group = tl.arange(0, GROUPS)
    m_tile = subscale_ptr + last * subscale_row + (group // 2)[None, :]
    jump = (width - KERNEL_SIZE) * CHANNELS
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
            x = _load_codes(x_tile, 2 * first, lane, jump, SEGMENT, REDUCTION, 2 * HALF, 2 * HALF, CHANNELS)
            w = in_order(low, high, BLOCK_CHANNELS, GROUPS, GROUP)
            accumulator = tl.dot(x, w.T, accumulator, out_dtype=tl.int32)
        else:
            low_k = 2 * first + low_lane
            high_k = 2 * first + high_lane
            low_at = tap_offsets(low_k, 2 * first, jump, SEGMENT, 2 * HALF, CHANNELS, 16)[:, None]
            if CHANNELS % GROUP == 0:  # a group does not cross the end of a row
                high_at = low_at + GROUP // 2
            else:
                high_at = tap_offsets(high_k, 2 * first, jump, SEGMENT, 2 * HALF, CHANNELS, 16)[:, None]
            x_low = tl.load(x_tile + low_at, mask=(low_k < REDUCTION)[:, None], other=0)
            x_high = tl.load(x_tile + high_at, mask=(high_k < REDUCTION)[:, None], other=0)
            accumulator = tl.dot(low, x_low, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(high, x_high, accumulator, out_dtype=tl.int32)
        pair = next_pair
    if not WHOLE:
        accumulator = accumulator.T
    finish(
        accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr, residual_ptr, out_ptr,
        partial_ptr, row, row // (out_height * out_width), channel_block * BLOCK_CHANNELS, rows, channels, HAS_BIAS,
        HAS_RESIDUAL, False, SPLIT, 2 if WHOLE else 1,
    )  # fmt: skip


def _output(
    codes: Tensor, channels: int, kernel: tuple[int, int], stride: int, out_dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """`out`, or a new channels-last tensor (B, N, Ho, Wo)."""
    batch, _, height, width = codes.shape
    size = (batch, channels, (height - kernel[0]) // stride + 1, (width - kernel[1]) // stride + 1)
    if out is None:
        return torch.empty(size, dtype=out_dtype, device=codes.device, memory_format=torch.channels_last)
    if tuple(out.shape) != size or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out must be channels-last {size}")
    return out


def conv2d(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, stride: int, out_dtype: torch.dtype, class_ends: list[int], residual: Tensor | None = None, *,
    out: Tensor | None = None, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.conv2d`; a weight that is not channels-last is copied. `out`: channels-last buffer to write to.

    Raises:
        ValueError: the reduction is so long that int32 may overflow, or `out` does not fit.
    """
    codes = centred(codes).contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    n, channels, *kernel = weight.shape
    reduction = channels * kernel[0] * kernel[1]
    check(reduction)
    out = _output(codes, n, (kernel[0], kernel[1]), stride, out_dtype, out)
    batch, _, out_height, out_width = out.shape
    pixels = out_height * out_width
    rows = batch * pixels
    if not rows * n:
        return out
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    shifted = len(class_ends) > 1
    ends = class_ends_on(tuple(class_ends), codes.device) if shifted else None
    return run_product(
        conv2d_int8_kernel,
        (codes, scale, zero_point, weight, weight_scale, column_sum, bias, residual, out, ends,
         rows, n, out_height, out_width, *codes.shape[2:]),
        {"CHANNELS": channels, "KERNEL_HEIGHT": kernel[0], "KERNEL_WIDTH": kernel[1], "STRIDE": stride,
         "CLASSES": len(class_ends)},
        out, (scale, zero_point, weight_scale, column_sum, bias, residual), "shifted" if shifted else "int8",
        (rows, n, reduction), channels if shifted else reduction, tiling, pixels=pixels,
    )  # fmt: skip


def conv2d_int4(
    codes: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, subscales: Tensor, weight_scale: Tensor,
    column_sum: Tensor, bias: Tensor | None, kernel_size: int, stride: int, out_dtype: torch.dtype, group: int,
    residual: Tensor | None = None, *, out: Tensor | None = None, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.conv2d_int4`; `out` as in `conv2d`.

    Raises:
        ValueError: the reduction is so long that int32 may overflow, operands are not contiguous, or `out` does not
            fit.
    """
    codes = centred(codes).contiguous(memory_format=torch.channels_last)
    n, channels = packed.shape[0], codes.shape[1]
    reduction = kernel_size**2 * channels
    check(reduction, packed, subscales)
    packed = aligned(packed)
    out = _output(codes, n, (kernel_size, kernel_size), stride, out_dtype, out)
    batch, _, out_height, out_width = out.shape
    pixels = out_height * out_width
    rows = batch * pixels
    if not rows * n:
        return out
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return run_product(
        conv2d_int4_kernel,
        (codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, residual, out,
         rows, n, packed.shape[1], subscales.shape[1], out_height, out_width, *codes.shape[2:]),
        {"CHANNELS": channels, "KERNEL_SIZE": kernel_size, "STRIDE": stride, "GROUP": group},
        out, (scale, zero_point, weight_scale, column_sum, bias, residual), "int4",
        (rows, n, reduction), reduction, tiling, pixels=pixels,
    )  # fmt: skip


def upsample_conv2d(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, wide: bool,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.upsample_conv2d`: one product of `conv2d`'s kernel, or two, and a copy."""
    parts = (codes, scale, zero_point, weight, weight_scale, column_sum, bias, out_dtype, wide)
    return reference.upsample_conv2d(*parts, conv2d)


def upsample_conv2d_int4(
    codes: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, subscales: Tensor, weight_scale: Tensor,
    column_sum: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.upsample_conv2d_int4`: one product of `conv2d_int4`'s kernel, and a copy."""
    parts = (codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, out_dtype, group)
    return reference.upsample_conv2d_int4(*parts, conv2d_int4)
