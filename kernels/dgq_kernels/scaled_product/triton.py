"""Products of float activations and a packed weight on CUDA, in both directions: training's forward and backward pass.

Integers become floats in registers, a tile at a time; of the weight nothing is written to memory. A convolution is an
implicit GEMM over pixels, tap by tap, and a linear layer one whose pixels are rows. Backwards the reduction runs over
the weight's rows, so that a tile of it is read the same way and multiplied as it lies.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import await_previous, cdiv, launch
from ..linear.tiles import multiprocessors
from ..linear.triton import aligned, in_order, store, subscales, tile_of, unpack_two_level
from ..packing import expand_two_level


class Config(NamedTuple):
    """A tile: rows and channels of the output, step of the reduction, warps and stages as Triton takes them."""

    rows: int
    channels: int
    step: int
    warps: int
    stages: int


# The large tile where it gives every multiprocessor one, and the small one, by bytes of an activation. Chosen by the
# compile table; none has been timed.
TILES = {
    2: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    4: (Config(128, 64, 64, 8, 2), Config(64, 64, 64, 8, 2)),
}
INTERPRETER = Config(128, 128, 128, 4, 1)


@triton.jit
def _weights(
    weight_ptr, subscale_ptr, row, first, stored, weight_row, subscale_row,
    ROWS: tl.constexpr, LENGTH: tl.constexpr, GROUP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The integers (ROWS, LENGTH) int8 of weight rows `row`, from K = first on.

    stored (LENGTH,) says which lie within the row's tap; what the others are does not matter. GROUP: 0 for an int8
    weight, otherwise `first` and LENGTH are multiples of it.
    """
    at = row[:, None].to(tl.int64)
    if GROUP == 0:
        lane = tl.arange(0, LENGTH)
        return tl.load(weight_ptr + at * weight_row + (first + lane)[None, :], mask=stored[None, :], other=0)
    else:
        GROUPS: tl.constexpr = LENGTH // GROUP
        byte = first // 2 + tl.arange(0, LENGTH // 2)
        group = first // GROUP + tl.arange(0, GROUPS)
        packed = tl.load(weight_ptr + at * weight_row + byte[None, :], mask=(byte < weight_row)[None, :], other=0)
        pair = tl.load(
            subscale_ptr + at * subscale_row + (group // 2)[None, :], mask=(group // 2 < subscale_row)[None, :], other=0
        )
        m, offset = subscales(pair, group % 2, ROWS, GROUPS, GROUP)
        low, high = unpack_two_level(packed, m, offset, ASSEMBLY)
        return in_order(low, high, ROWS, GROUPS, GROUP)


@triton.jit
def unscaled_product_kernel(
    x_ptr, weight_ptr, subscale_ptr, out_ptr, rows, channels, reduction, in_channels, weight_row, subscale_row,
    out_height, out_width, height, width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BACK: tl.constexpr, GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """x (B, height, width, reduction) -> out (rows = B * out_height * out_width, channels); contiguous.

    weight (N, weight_row), rows of K = (tap row, tap column, in_channels). Forward, channels are N and the reduction
    is in_channels, of each tap; BACK, x is the gradient of the output, channels are in_channels and the reduction is N.
    """
    await_previous(PDL)
    row_block, channel_block = tile_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(channels, BLOCK_CHANNELS))
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pixel = tl.minimum(row, rows - 1)
    line = pixel // out_width
    sample = line // out_height
    top = line - sample * out_height
    left = pixel - line * out_width
    begin = channel_block * BLOCK_CHANNELS
    channel = begin + tl.arange(0, BLOCK_CHANNELS)
    steps = tl.cdiv(reduction, STEP)
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for step in range(0, KERNEL * KERNEL * steps):
        tap = step // steps if KERNEL > 1 else 0
        first = (step - tap * steps) * STEP
        lane = first + tl.arange(0, STEP)
        within = lane < reduction
        if KERNEL == 1 and STRIDE == 1 and PADDING == 0:
            at = pixel.to(tl.int64)
            mask = within[None, :]
        else:
            if BACK:  # the output pixel that this tap took the input pixel for
                y = top + PADDING - tap // KERNEL
                x = left + PADDING - tap % KERNEL
                inside = (y >= 0) & (x >= 0) & (y % STRIDE == 0) & (x % STRIDE == 0)
                y = y // STRIDE
                x = x // STRIDE
            else:
                y = top * STRIDE + tap // KERNEL - PADDING
                x = left * STRIDE + tap % KERNEL - PADDING
                inside = (y >= 0) & (x >= 0)
            at = (sample * height + y).to(tl.int64) * width + x
            mask = (inside & (y < height) & (x < width))[:, None] & within[None, :]
        values = tl.load(x_ptr + at[:, None] * reduction + lane[None, :], mask=mask, other=0.0)
        if BACK:
            weight = _weights(
                weight_ptr, subscale_ptr, tl.minimum(lane, reduction - 1), tap * in_channels + begin,
                channel < in_channels, weight_row, subscale_row, STEP, BLOCK_CHANNELS, GROUP, ASSEMBLY,
            )  # fmt: skip
        else:
            weight = _weights(
                weight_ptr, subscale_ptr, tl.minimum(channel, channels - 1), tap * in_channels + first,
                within, weight_row, subscale_row, BLOCK_CHANNELS, STEP, GROUP, ASSEMBLY,
            ).T  # fmt: skip
        if not ASSEMBLY:  # the interpreter knows no arithmetic of bfloat16
            values = values.to(tl.float32)
        weight = weight.to(values.dtype)
        if values.dtype == tl.float32:  # tensor cores take 11 bits of it: all of an integer, half of an activation
            upper = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            accumulator = tl.dot(values - upper, weight, accumulator, input_precision="tf32")
            accumulator = tl.dot(upper, weight, accumulator, input_precision="tf32")
        else:
            accumulator = tl.dot(values, weight, accumulator)
    store(accumulator, out_ptr, out_ptr, row, channel, rows, channels, False)


def _run(
    x: Tensor, weight: Tensor, subscales: Tensor | None, group: int, in_channels: int, kernel: int, stride: int,
    padding: int, back: bool, out: Tensor, config: Config | None,
) -> Tensor:  # fmt: skip
    """Launch `unscaled_product_kernel`. A convolution whose groups cross from tap to tap runs on int8: conv_in's kind,
    with few channels."""
    if subscales is not None and kernel > 1 and in_channels % group:
        weight, subscales = expand_two_level(weight, subscales, kernel**2 * in_channels, group), None
    if not (x.is_contiguous() and weight.is_contiguous() and (subscales is None or subscales.is_contiguous())):
        raise ValueError("activations and weights must be contiguous")
    weight = weight if subscales is None else aligned(weight)
    if not out.numel():
        return out
    rows, channels = out[..., 0].numel(), out.shape[-1]
    config = config or _tile(rows, channels, x)
    launch(
        unscaled_product_kernel,
        (cdiv(rows, config.rows) * cdiv(channels, config.channels), 1, 1),
        x, weight, subscales, out, rows, channels, x.shape[3], in_channels, weight.shape[1],
        0 if subscales is None else subscales.shape[1], out.shape[1], out.shape[2], x.shape[1], x.shape[2],
        KERNEL=kernel, STRIDE=stride, PADDING=padding, BACK=back, GROUP=0 if subscales is None else group,
        ASSEMBLY=not triton.knobs.runtime.interpret,
        BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, STEP=config.step,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _tile(rows: int, channels: int, x: Tensor) -> Config:
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    large, small = TILES[x.element_size()]
    programs = cdiv(rows, large.rows) * cdiv(channels, large.channels)
    return large if programs >= multiprocessors(x.device) else small


def unscaled_product(
    x: Tensor, weight: Tensor, subscales: Tensor | None, group: int, kernel: int, stride: int, padding: int, *,
    out: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.unscaled_product`; `out`: a contiguous buffer to write to.

    Raises:
        ValueError: operands are not contiguous.
    """
    batch, height, width, channels = x.shape
    if out is None:
        size = ((length + 2 * padding - kernel) // stride + 1 for length in (height, width))
        out = x.new_empty(batch, *size, weight.shape[0])
    return _run(x, weight, subscales, group, channels, kernel, stride, padding, False, out, config)


def unscaled_product_input(
    gradient: Tensor, weight: Tensor, subscales: Tensor | None, group: int, size: list[int], kernel: int, stride: int,
    padding: int, *, out: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `dgq_kernels.unscaled_product_input`; `out`: a contiguous buffer to write to.

    Raises:
        ValueError: operands are not contiguous.
    """
    out = gradient.new_empty(size) if out is None else out
    return _run(gradient, weight, subscales, group, size[3], kernel, stride, padding, True, out, config)
