"""The quantized linear layer on CUDA: int8 tensor-core products, int32 sums, one float epilogue.

Codes are unsigned and weights signed, which `tl.dot` does not mix: bit 7 of a code is flipped, which makes it
code - 128 in int8, and the epilogue subtracts (zero point - 128) times the column sum. Nothing may overflow on the way
(sm_80's product saturates): partial sums stay below 128 * sum_k 2^e |W'|, half of what the centred result needs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CODE_LIMIT = 255 * 128  # the largest product of a code and an int8 weight


class Config(NamedTuple):
    """Tile of rows, output channels and reduction length (one of the two products of a step), warps and stages."""

    rows: int
    channels: int
    half: int
    warps: int
    stages: int


# (large, small) tiles per major compute capability; the small one where large tiles would leave multiprocessors idle.
# Chosen by the compile table (kernels/aot.csv): instructions per product in the loop, no spill under any release.
INT8_CONFIGS = {
    8: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 3)),
    9: (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 3)),
    12: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 2)),  # 99 KiB of shared memory, as 8.6 and 8.9
}
# By weights per sub-scale: groups of 32 unpack cheapest in narrow tiles, where a thread's bytes share sub-scales.
INT4_CONFIGS = {
    32: {8: (Config(128, 64, 64, 4, 3), Config(64, 64, 32, 4, 4))},
    64: {8: (Config(128, 128, 64, 8, 3), Config(64, 64, 32, 4, 4))},
}
_INTERPRETER = Config(128, 128, 256, 4, 1)  # its cost is per tile


@triton.jit
def signed(codes, ASSEMBLY: tl.constexpr):
    """Codes 0..255 as int8 -128..127; the assembly flips four at once where the compiler would take them apart."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", args=[codes], dtype=tl.int8, is_pure=True, pack=4
        )
    return (codes ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def signed_within(codes, lane, begin, end, ASSEMBLY: tl.constexpr):
    """`signed`, and 0 where a lane (the same shape as codes, or to be broadcast to it) lies outside begin..end - 1."""
    within = (lane >= begin) & (lane < end)
    if ASSEMBLY:
        # Bytes of a mask, the same for every row: the flip and the mask are then one instruction for four codes.
        mask = tl.broadcast_to(tl.where(within, -1, 0).to(tl.int8), codes.shape)
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80808080, $2, 0x28;", "=r,r,r", args=[codes, mask], dtype=tl.int8, is_pure=True, pack=4
        )
    return tl.where(within, signed(codes, ASSEMBLY), 0)


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
def linear_int8_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, weight_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    residual_ptr, out_ptr, ends_ptr,
    rows, channels, reduction,
    CLASSES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """codes (rows, reduction), weight (channels, reduction), ends (CLASSES,) int32; all contiguous."""
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    lane = tl.arange(0, HALF)
    # Rows and channels past the end repeat the last one: they are never stored, and their loads need no mask.
    x_tile = codes_ptr + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * reduction + lane[None, :]
    w_tile = weight_ptr + tl.minimum(channel, channels - 1)[None, :].to(tl.int64) * reduction + lane[:, None]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
    STEP: tl.constexpr = 2 * HALF
    for reverse in range(CLASSES):
        index = CLASSES - 1 - reverse
        if CLASSES == 1:
            begin = 0
            end = reduction
        else:
            accumulator += accumulator  # Horner: what the higher classes have summed so far counts twice
            class_end = tl.load(ends_ptr + index)
            class_begin = tl.load(ends_ptr + index - 1, mask=index > 0, other=0)
            edge, gap, begin, end = class_steps(class_begin, class_end, STEP)
            for first in range(edge, class_end, gap):
                second = first + HALF
                x0 = tl.load(x_tile + first, mask=(first + lane < reduction)[None, :], other=0)
                w0 = tl.load(w_tile + first, mask=(first + lane < reduction)[:, None], other=0)
                x1 = tl.load(x_tile + second, mask=(second + lane < reduction)[None, :], other=0)
                w1 = tl.load(w_tile + second, mask=(second + lane < reduction)[:, None], other=0)
                x0 = signed_within(x0, (first + lane)[None, :], class_begin, class_end, ASSEMBLY)
                x1 = signed_within(x1, (second + lane)[None, :], class_begin, class_end, ASSEMBLY)
                accumulator = tl.dot(x0, w0, accumulator, out_dtype=tl.int32)
                accumulator = tl.dot(x1, w1, accumulator, out_dtype=tl.int32)
        for first in range(begin, end, STEP):
            # Two products per step: with one, Triton 3.9 carries int8 operands bytewise through its prefetch.
            second = first + HALF
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
            accumulator = tl.dot(signed(x0, ASSEMBLY), w0, accumulator, out_dtype=tl.int32)
            accumulator = tl.dot(signed(x1, ASSEMBLY), w1, accumulator, out_dtype=tl.int32)
    y = dequantize(
        accumulator, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
        row, channel, row < rows, channel < channels, HAS_BIAS,
    )  # fmt: skip
    store(y, residual_ptr, out_ptr, row, channel, rows, channels, HAS_RESIDUAL)


@triton.jit
def unpack_two_level(packed, m, offset, ASSEMBLY: tl.constexpr):
    """(low, high) int8 weights w4 * m of the nibbles of `packed` uint8; m and offset int32 of the same shape.

    The assembly does four bytes at once, in unsigned arithmetic: with u = w4 + 8, u * m + 128 - 8 m = w4 * m + 128 lies
    in 8..233, so no byte carries into the next, and flipping bit 7 makes it the int8 w4 * m. Four neighbouring bytes
    must share their m. offset is `word_offset(m)`, computed once for all words that share it.
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
def linear_int4_kernel(
    codes_ptr, scale_ptr, zero_point_ptr, packed_ptr, subscale_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    residual_ptr, out_ptr, rows, channels, reduction, packed_row, subscale_row,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """codes (rows, reduction); packed (channels, packed_row), subscale (channels, subscale_row); all contiguous.

    A step covers HALF bytes, 2 * HALF weights in GROUPS whole groups: one product takes the low nibbles of all its
    groups, one the high ones, and the codes are loaded with the gaps that this order needs. Weights are the left
    operand: unpacked, they stay in registers.
    """
    GROUPS: tl.constexpr = 2 * HALF // GROUP
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    byte = tl.arange(0, HALF)
    low_lane = byte // (GROUP // 2) * GROUP + byte % (GROUP // 2)
    high_lane = low_lane + GROUP // 2
    x_tile = codes_ptr + tl.minimum(row, rows - 1)[None, :].to(tl.int64) * reduction
    last = tl.minimum(channel, channels - 1)[:, None].to(tl.int64)
    w_tile = packed_ptr + last * packed_row + byte[None, :]
    group = tl.arange(0, GROUPS)
    m_tile = subscale_ptr + last * subscale_row + (group // 2)[None, :]
    accumulator = tl.zeros((BLOCK_CHANNELS, BLOCK_ROWS), tl.int32)
    for first in range(0, packed_row, HALF):
        packed = tl.load(w_tile + first, mask=(first + byte < packed_row)[None, :], other=0)
        at = first // GROUP  # of the sub-scale bytes: 2 * first weights, GROUP to a nibble
        pair = tl.load(m_tile + at, mask=(at + group // 2 < subscale_row)[None, :], other=0)
        m, offset = subscales(pair, group % 2, BLOCK_CHANNELS, GROUPS, GROUP)
        low, high = unpack_two_level(packed, m, offset, ASSEMBLY)
        low_k = 2 * first + low_lane[:, None]
        high_k = 2 * first + high_lane[:, None]
        x_low = signed(tl.load(x_tile + low_k, mask=low_k < reduction, other=0), ASSEMBLY)
        x_high = signed(tl.load(x_tile + high_k, mask=high_k < reduction, other=0), ASSEMBLY)
        accumulator = tl.dot(low, x_low, accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(high, x_high, accumulator, out_dtype=tl.int32)
    y = dequantize(
        accumulator.T, scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
        row, channel, row < rows, channel < channels, HAS_BIAS,
    )  # fmt: skip
    store(y, residual_ptr, out_ptr, row, channel, rows, channels, HAS_RESIDUAL)


def configs_for(configs: dict[int, tuple[Config, Config]], major: int) -> tuple[Config, Config]:
    """(large, small) tiles for a compute capability: the newest entry that is not newer."""
    return configs[max((known for known in configs if known <= major), default=min(configs))]


def choose(configs: dict[int, tuple[Config, Config]], rows: int, channels: int, device: torch.device) -> Config:
    """The tile for a product of this size on this device."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    large, small = configs_for(configs, properties.major)
    tiles = triton.cdiv(rows, large.rows) * triton.cdiv(channels, large.channels)
    return large if tiles >= properties.multi_processor_count else small


def check(reduction: int, *tensors: Tensor) -> None:
    """Refuse operands that are not contiguous, and a reduction so long that int32 may overflow (ValueError)."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("codes and weights must be contiguous")
    if reduction * _CODE_LIMIT >= 2**31:
        raise ValueError(f"reduction of {reduction} channels may overflow int32 (at most {2**31 // _CODE_LIMIT})")


@functools.cache
def class_ends_on(ends: tuple[int, ...], device: torch.device) -> Tensor:
    """The class ends on the device, int32; kept, since a copy per call would stall the stream and break CUDA graphs."""
    return torch.tensor(ends, dtype=torch.int32, device=device)


def linear_int8(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, class_ends: list[int], residual: Tensor | None = None, *,
    out: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.linear_int8`; `out` is a contiguous (M, N) buffer to write to.

    Raises:
        ValueError: operands are not contiguous, or K is so long that int32 may overflow even without shifts (whether
            shifted classes fit is a property of the weights, which whoever forms the classes proves).
    """
    residual = None if residual is None else residual.contiguous()
    check(codes.shape[1], codes, weight)
    rows, reduction = codes.shape
    channels = weight.shape[0]
    out = torch.empty((rows, channels), dtype=out_dtype, device=codes.device) if out is None else out
    if not out.numel():
        return out
    config = config or choose(INT8_CONFIGS, rows, channels, codes.device)
    ends = class_ends_on(tuple(class_ends), codes.device) if len(class_ends) > 1 else None
    linear_int8_kernel[(triton.cdiv(rows, config.rows) * triton.cdiv(channels, config.channels),)](
        codes, scale, zero_point, weight, weight_scale, column_sum, bias, residual, out, ends,
        rows, channels, reduction, CLASSES=len(class_ends), HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ASSEMBLY=not triton.knobs.runtime.interpret,
        BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, HALF=config.half,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def linear_int4(
    codes: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, subscales: Tensor, weight_scale: Tensor,
    column_sum: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int, residual: Tensor | None = None, *,
    out: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.linear_int4`; `out` is a contiguous (M, N) buffer to write to.

    Raises:
        ValueError: operands are not contiguous, or K is so long that int32 may overflow.
    """
    residual = None if residual is None else residual.contiguous()
    check(codes.shape[1], codes, packed, subscales)
    rows, reduction = codes.shape
    channels = packed.shape[0]
    out = torch.empty((rows, channels), dtype=out_dtype, device=codes.device) if out is None else out
    if not out.numel():
        return out
    config = config or choose(INT4_CONFIGS[group], rows, channels, codes.device)
    linear_int4_kernel[(triton.cdiv(rows, config.rows) * triton.cdiv(channels, config.channels),)](
        codes, scale, zero_point, packed, subscales, weight_scale, column_sum, bias, residual, out,
        rows, channels, reduction, packed.shape[1], subscales.shape[1],
        GROUP=group, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        ASSEMBLY=not triton.knobs.runtime.interpret,
        BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, HALF=config.half,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
