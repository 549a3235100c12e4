"""Row-wise activation quantization on CUDA: one read for the range, one (from the cache) for the codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SMALLEST_SCALE

_ROUND_TRICK = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small float to an integer, half to even


class Config(NamedTuple):
    """Rows and channels per tile, warps."""

    rows: int
    channels: int
    warps: int


@triton.jit
def _load(x_ptr, inv_divisor_ptr, offsets, channel, channels, mask, DIVIDE: tl.constexpr):
    """x' = x * inv_divisor, float32; masked places read 0, which every row's range holds anyway."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if DIVIDE:
        x *= tl.load(inv_divisor_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    return x


@triton.jit
def quantize_rows_kernel(
    x_ptr, inv_divisor_ptr, codes_ptr, scale_ptr, zero_point_ptr, rows, channels, x_row,
    SMALLEST: tl.constexpr, TOP: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """x (rows, channels) with row stride x_row; codes (rows, channels) contiguous; the others (rows,)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    low = tl.zeros((BLOCK_ROWS,), tl.float32)
    high = tl.zeros((BLOCK_ROWS,), tl.float32)
    x_offsets = row[:, None].to(tl.int64) * x_row
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        x = _load(x_ptr, inv_divisor_ptr, x_offsets + channel[None, :], channel, channels, mask, DIVIDE)
        low = tl.minimum(low, tl.min(x, axis=1))
        high = tl.maximum(high, tl.max(x, axis=1))

    scale = tl.div_rn(high - low, float(TOP))
    scale = tl.where(scale > SMALLEST, scale, 1.0)
    inverse = tl.div_rn(1.0, scale)
    zero_point = (-low * inverse + _ROUND_TRICK) - _ROUND_TRICK
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(zero_point_ptr + row, zero_point.to(tl.int32), mask=row < rows)

    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        x = _load(x_ptr, inv_divisor_ptr, x_offsets + channel[None, :], channel, channels, mask, DIVIDE)
        codes = ((x * inverse[:, None] + _ROUND_TRICK) - _ROUND_TRICK) + zero_point[:, None]
        codes = tl.minimum(tl.maximum(codes, 0.0), float(TOP))
        code_offsets = row[:, None].to(tl.int64) * channels + channel[None, :]
        tl.store(codes_ptr + code_offsets, codes.to(tl.uint8), mask=mask)


def config_for(channels: int) -> Config:
    """About 4096 values per tile: several short rows, or a long row in steps."""
    if triton.knobs.runtime.interpret:
        return Config(64, 1024, 4)  # the interpreter's cost is per tile
    block = min(1024, triton.next_power_of_2(channels))
    return Config(max(1, 4096 // block), block, 4)


def quantize_rows(
    x: Tensor, bits: int, inv_divisor: Tensor | None, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dgq_kernels.quantize_rows`; `out` gives contiguous buffers for codes, scale and zero point."""
    rows, channels = x.shape
    codes, scale, zero_point = out or (
        torch.empty((rows, channels), dtype=torch.uint8, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
        torch.empty(rows, dtype=torch.int32, device=x.device),
    )
    if rows:
        x = x if x.stride(1) == 1 else x.contiguous()
        config = config_for(channels)
        quantize_rows_kernel[(triton.cdiv(rows, config.rows),)](
            x, inv_divisor, codes, scale, zero_point, rows, channels, x.stride(0),
            SMALLEST=SMALLEST_SCALE, TOP=2**bits - 1, DIVIDE=inv_divisor is not None,
            BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, num_warps=config.warps,
            enable_fp_fusion=False,  # x * inverse must be rounded before the integer rounding, as in the reference
        )  # fmt: skip
    return codes, scale, zero_point
