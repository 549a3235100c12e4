"""The rotation of channels on CUDA: a program holds some rows of one block in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 2048  # of a program


@triton.jit
def _stage(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The butterfly of the last two bits of a channel's number, which become its first."""
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    low, high, total, difference = a + b, a - b, c + d, c - d
    first = tl.join(low + difference, high + total)
    second = tl.join(low - difference, total - high)
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 3, 1)), (ROWS, BLOCK))


@triton.jit
def rotate_kernel(
    x_ptr, inv_divisor_ptr, out_ptr, rows, channels, x_row,
    DIVIDE: tl.constexpr, FACTOR: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (rows, channels) with row stride x_row, inv_divisor (channels,), out float32 (rows, channels) contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * x_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if DIVIDE:
        x *= tl.load(inv_divisor_ptr + channel)[None, :]
    for _ in tl.static_range(STAGES):
        x = _stage(x, ROWS, BLOCK)
    out = out_ptr + row[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(out, x * FACTOR, mask=inside)


def constants(block: int) -> dict[str, Any]:
    """The kernel's, but for DIVIDE."""
    values = 65536 if triton.knobs.runtime.interpret else VALUES  # the interpreter's cost is per tile
    stages = (block.bit_length() - 1) // 2
    return {"FACTOR": block**-0.5, "STAGES": stages, "ROWS": values // block, "BLOCK": block}


def rotate(x: Tensor, block: int, inv_divisor: Tensor | None = None) -> Tensor:
    """See `dgq_kernels.rotate`.

    Raises:
        ValueError: inv_divisor is not contiguous.
    """
    if inv_divisor is not None and not inv_divisor.is_contiguous():
        raise ValueError("what is per channel must be contiguous")
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    given = constants(block)
    rotate_kernel[(triton.cdiv(rows, given["ROWS"]), channels // block)](
        x, inv_divisor, out, rows, channels, x.stride(0), DIVIDE=inv_divisor is not None, **given, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
