"""Where a byte is packed: nibbles and the two-level int4 weight (docs/method.md, "weights").

Layout of an int4 weight row, chosen for the GPU: K is cut into groups of `group` values and, inside a group, byte j
holds value j in its low nibble and value j + group/2 in its high nibble. A kernel then turns the low and the high
nibbles into two contiguous halves with one mask and one shift, instead of interleaving them.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZES = (32, 64)


def padded_length(k: int, group: int) -> int:
    """K rounded up to a whole number of groups."""
    return -(-k // group) * group


def pack_int4(codes: Tensor, group: int = 32) -> Tensor:
    """Pack int4 codes two to a byte, split-half inside each group.

    Args:
        codes: int8 (N, K), values -8..7. K is padded with zero codes to a multiple of `group`.
        group: values per group, even.

    Returns:
        uint8 (N, ceil(K / group) * group / 2).

    Raises:
        ValueError: a code lies outside -8..7.
    """
    if codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError("int4 codes must lie in -8..7")
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, padded_length(k, group) - k))
    halves = padded.reshape(n, -1, 2, group // 2).to(torch.uint8) & 0xF
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(n, -1)


def unpack_int4(packed: Tensor, k: int, group: int = 32) -> Tensor:
    """Inverse of `pack_int4`: uint8 (N, Kp / 2) -> int8 (N, k)."""
    n = packed.shape[0]
    grouped = packed.reshape(n, -1, 1, group // 2)
    nibbles = torch.cat((grouped & 0xF, grouped >> 4), dim=2).to(torch.int8)
    return (nibbles - ((nibbles & 8) << 1)).reshape(n, -1)[:, :k].contiguous()


def pack_subscales(subscales: Tensor) -> Tensor:
    """Pack 4-bit sub-scales two to a byte, low nibble first: uint8 (N, G) in 0..15 -> uint8 (N, ceil(G / 2)).

    Raises:
        ValueError: a sub-scale exceeds 15.
    """
    if subscales.numel() and subscales.max() > 15:
        raise ValueError("sub-scales must lie in 0..15")
    padded = torch.nn.functional.pad(subscales, (0, subscales.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack_subscales(packed: Tensor, groups: int) -> Tensor:
    """Inverse of `pack_subscales`: uint8 (N, ceil(G / 2)) -> uint8 (N, groups)."""
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return pairs.reshape(packed.shape[0], -1)[:, :groups].contiguous()


def expand_two_level(packed: Tensor, subscales: Tensor, k: int, group: int) -> Tensor:
    """The integer weight of a two-level int4 layer, W' = w4 * m.

    Args:
        packed: uint8 (N, Kp / 2) from `pack_int4`.
        subscales: uint8 (N, ceil(Kp / group / 2)) from `pack_subscales`.
        k: reduction length.
        group: values that share one sub-scale.

    Returns:
        int8 (N, k): |w4 * m| <= 8 * 15 = 120 always fits.
    """
    groups = padded_length(k, group) // group
    codes = unpack_int4(packed, groups * group, group).reshape(packed.shape[0], groups, group)
    m = unpack_subscales(subscales, groups).to(torch.int8)
    return (codes * m[:, :, None]).reshape(packed.shape[0], -1)[:, :k].contiguous()


def pack_two_level(weight: Tensor, subscales: Tensor, group: int) -> Tensor:
    """Inverse of `expand_two_level`: int8 (N, k) and its packed sub-scales -> uint8 (N, Kp / 2).

    Raises:
        ValueError: an element is not a 4-bit code times the sub-scale of its group.
    """
    n, k = weight.shape
    groups = padded_length(k, group) // group
    m = unpack_subscales(subscales, groups).to(torch.int8)[:, :, None]
    values = torch.nn.functional.pad(weight, (0, groups * group - k)).view(n, groups, group)
    # exact where there is a code, and four times as fast as a division of integers
    codes = (values / m.clamp(min=1)).to(torch.int8)
    if not torch.equal(codes * m, values):
        raise ValueError("the weight is no product of 4-bit codes and these sub-scales")
    return pack_int4(codes.reshape(n, -1), group)
