"""The two forms of activation codes, which a tensor's dtype tells: uint8, the codes 0..255 themselves, and int8, the
codes minus 128. The product ops take either; quantizing ops return what their device multiplies.

A CPU's instructions multiply unsigned codes with signed weights. The tensor cores do with signed ones, and those of
9.0 read them from shared memory only as they lie there. Zero points are those of the codes themselves in both forms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsigned(codes: Tensor) -> Tensor:
    """The codes 0..255, uint8, of either form."""
    return codes.view(torch.uint8) ^ 0x80 if codes.dtype == torch.int8 else codes


def centred(codes: Tensor) -> Tensor:
    """The codes minus 128, int8, of either form."""
    return codes if codes.dtype == torch.int8 else (codes ^ 0x80).view(torch.int8)
