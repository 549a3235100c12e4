"""Fractional-log attention on the CPU: the engine's int8 products and table of probabilities.

Where there is no engine, integer codes are carried by float32 products, a slice of the rows at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import native
from ..backend import select
from .reference import combine_start, finite_step, probability_bytes, quantize_operands

LOG2_E = math.log2(math.e)
# Logits held at once. With their int64 table indices 12 bytes each: 12 MiB, near the caches.
CHUNK = 1 << 20
# Keys whose products p * v (at most 255 * 127 each) float32 sums exactly: below 2^24.
EXACT_KEYS = 2**24 // (255 * 127)


def engine_takes(device: torch.device, qk_bits: int, v_bits: int) -> bool:
    """Whether the CPU engine runs attention with these operands: integers on the CPU."""
    return qk_bits > 0 and v_bits > 0 and select(device) == "cpu" and native.available()


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
    if engine_takes(q.device, qk_bits, v_bits):
        factor = scale * LOG2_E
        return native.attention(q, k, v, factor, bits, fraction_bits, start_token, qk_bits, v_bits)
    return carried_by_floats(q, k, v, scale, bits, fraction_bits, start_token, qk_bits, v_bits)


def carried_by_floats(
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
    """Attention on torch's float32 products.

    With integer operands every sum is exact: q . k stays below 2^24, and P V is summed over EXACT_KEYS keys at a time
    and those sums in float64. Only the float epilogue rounds.
    """
    operands = quantize_operands(q, k, v, scale, fraction_bits, start_token, qk_bits, v_bits)
    batch, heads, rows, width = q.shape
    keys = operands.k.shape[2]
    row_codes = operands.q.flatten(0, 1)
    key_codes = operands.k.flatten(0, 1).mT
    row_step, poison = finite_step(operands)
    step = row_step.flatten(0, 1)
    values = operands.v.flatten(0, 1)
    values = torch.cat((values, values.new_ones(*values.shape[:2], 1)), dim=2)  # the last channel sums p
    table = torch.tensor(probability_bytes(bits, fraction_bits), dtype=torch.float32, device=q.device)
    top = 2**bits - 1

    sums = q.new_empty((batch * heads, rows, width + 1), dtype=torch.float32)
    largest = q.new_empty((batch * heads, rows, 1), dtype=torch.float32)
    chunk_rows = min(rows, max(1, CHUNK // keys))
    chunk_heads = max(1, CHUNK // (chunk_rows * keys))
    for head in range(0, batch * heads, chunk_heads):
        at_heads = slice(head, head + chunk_heads)
        for row in range(0, rows, chunk_rows):
            at = (at_heads, slice(row, row + chunk_rows))
            products = torch.bmm(row_codes[at], key_codes[at_heads])
            highest = products.amax(-1, keepdim=True)
            torch.sub(highest, products, out=products)
            indices = products.mul_(step[at]).clamp_(max=top).round_().to(torch.int64)
            torch.take(table, indices, out=products)
            total = torch.zeros((*products.shape[:2], width + 1), dtype=torch.float64, device=q.device)
            for key in range(0, keys, EXACT_KEYS):
                some = slice(key, key + EXACT_KEYS)
                total += torch.bmm(products[:, :, some], values[at_heads, some])
            sums[at] = total
            largest[at] = highest

    numerator = sums[..., :-1].unflatten(0, (batch, heads)) * operands.v_scale
    normaliser = sums[..., -1:].unflatten(0, (batch, heads)) + poison
    if operands.start_k is None or operands.start_v is None:
        return (numerator / normaliser).to(q.dtype)
    octave = row_step * 2.0**-fraction_bits
    start_logit = (q.float() @ operands.start_k.mT) * (scale * LOG2_E)
    highest = largest.unflatten(0, (batch, heads)) * octave
    return combine_start(numerator, normaliser, highest, start_logit, operands.start_v).to(q.dtype)
