"""How a norm's statistics are taken on CUDA: plain Python, which a prediction reads without Triton."""

from __future__ import annotations

import functools
from typing import NamedTuple

PROGRAMS = 128  # of a norm's statistics, at most, where more than one share a group: about one for a multiprocessor


class Groups(NamedTuple):
    """How a norm's statistics are taken: pixels and channels per tile, warps, parts of a sample and their pixels."""

    rows: int
    channels: int
    warps: int
    parts: int
    share: int


@functools.cache
def groups_for(pixels: int, group: int, most_parts: int, ranges: bool) -> Groups:
    """One program for each group of a part, of up to 16384 values at once, or of 8192 where the ranges of channels,
    which take registers, are wanted too; parts of one tile or more. So many as two large tiles hold are not shared: to
    make parts one takes a launch."""
    channels = _power_of_2(group)
    values = 8192 if ranges else 16384
    rows = min(max(1, values // channels), _power_of_2(pixels))
    tiles = -(-pixels // rows)
    parts = min(most_parts, _power_of_2(tiles)) if pixels * channels > 32768 else 1
    warps = min(16, max(4, rows * channels * 16 // values))
    return Groups(rows, channels, warps, parts, -(-tiles // parts) * rows)


def _power_of_2(n: int) -> int:
    """The smallest that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()
