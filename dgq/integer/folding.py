"""A nearest upsampling by two and a 3x3 convolution as four 2x2 convolutions of the small picture."""

from __future__ import annotations

import torch
from torch import Tensor

# Which of the three taps along an axis meet the first and the second pixel that an output sees, at the first and the
# second of two equal pixels: (place, pixel, tap); and the least squares of the way back.
_TAPS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device="cpu")
_BACK = torch.tensor([[[3.0, -2, 1], [-1, 2, 1]], [[1, 2, -1], [1, -2, 3]]], device="cpu") / 4
_FOLD, _UNFOLD = (torch.einsum("rai,scj->ijrsac", one, one).reshape(9, 16) for one in (_TAPS, _BACK))


def fold(weight: Tensor) -> Tensor:
    """The weight (N, C, 3, 3) of the convolution as (4 N, C, 2, 2): at 2 r + c of the first axis' quarters that for
    pixels of even (r = 0) or odd rows and even (c = 0) or odd columns."""
    n, channels = weight.shape[:2]
    folded = weight.flatten(2) @ _FOLD.to(weight.device, weight.dtype)
    return folded.view(n, channels, 4, 2, 2).permute(2, 0, 1, 3, 4).reshape(4 * n, channels, 2, 2)


def unfold(folded: Tensor) -> Tensor:
    """The weight (N, C, 3, 3) whose folded form is nearest to (4 N, C, 2, 2)."""
    n, channels = len(folded) // 4, folded.shape[1]
    places = folded.reshape(4, n, channels, 4).permute(1, 2, 0, 3).flatten(2)
    return (places @ _UNFOLD.t().to(folded.device, folded.dtype)).view(n, channels, 3, 3)
