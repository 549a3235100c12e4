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

    def ranges(self, pixels: int) -> bool:
        """Whether the range of what follows the norm is taken with them, a launch less."""
        return pixels <= 2 * self.rows


@functools.cache
def groups_for(pixels: int, group: int, most_parts: int) -> Groups:
    """One program for each group of a part, of up to 16384 values at once; parts of one tile or more. Two tiles are
    not shared: one program can go on with their range, which is a launch less."""
    channels = _power_of_2(group)
    rows = min(max(1, 16384 // channels), _power_of_2(pixels))
    tiles = -(-pixels // rows)
    parts = min(most_parts, _power_of_2(tiles)) if tiles > 2 else 1
    warps = min(16, max(4, rows * channels // 1024))
    return Groups(rows, channels, warps, parts, -(-tiles // parts) * rows)


def _power_of_2(n: int) -> int:
    """The smallest that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()
