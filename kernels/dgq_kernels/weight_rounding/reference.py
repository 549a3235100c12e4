"""Definitions of what rounds weights (docs/method.md, "weights")."""

from __future__ import annotations

import torch
from torch import Tensor

SUBSCALE_MAX = 15

# Values of the temporary that tries all sub-scales at once: it stays in the cache.
_SEARCHED = 2**19


def round_columns(
    values: Tensor, pull: Tensor, ahead: Tensor, diagonal: Tensor, step: Tensor, low: int, high: int
) -> Tensor:
    """See `dgq_kernels.weight_rounding.round_columns`."""
    columns = values.shape[1]
    # a column's values side by side
    before, pull = (x.t().clone(memory_format=torch.contiguous_format) for x in (values, pull))
    after = torch.empty_like(before)
    for i in range(columns):
        codes = (before[i] - pull[i] / diagonal[i]).div_(step).round_().clamp_(low, high)
        torch.mul(codes, step, out=after[i])
        # not addr_, which may fuse the product and the sum
        pull[i + 1 :] += ahead[i, i + 1 : columns, None] * (after[i] - before[i])
    values.copy_(after.t())
    return after.sub_(before).t()


def search_subscales(groups: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `dgq_kernels.weight_rounding.search_subscales`."""
    candidates = torch.arange(1, SUBSCALE_MAX + 1, device=groups.device, dtype=torch.float32)
    best, errors = [], []
    rows = max(1, _SEARCHED // (max(1, groups.shape[1]) * SUBSCALE_MAX))
    for part, part_scale in zip(groups.split(rows), scale.split(rows), strict=True):
        steps = (part_scale[:, None] * candidates)[:, None, :]
        error = part.new_zeros(*part.shape[:2], SUBSCALE_MAX)
        for i in range(part.shape[2]):
            value = part[:, :, i, None]
            off = (value / steps).round_().clamp_(-8, 7).mul_(steps).sub_(value).square_()
            error += off.mul_(importance[:, i, None])
        least, index = error.min(-1)
        best.append((index + 1).to(torch.uint8))
        errors.append(least)
    return torch.cat(best), torch.cat(errors)
