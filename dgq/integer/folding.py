"""A nearest upsampling by two and a 3x3 convolution as four 2x2 convolutions of the small picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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


def interleaved(y: Tensor) -> Tensor:
    """The upsampled picture (B, N, 2 H, 2 W) of the four convolutions' results (B, 4 N, H + 1, W + 1), differentiable:
    of each all but the first or the last row and column. (That of the ops is one strided view, whose gradient torch
    gathers value by value.)"""
    batch, n, height, width = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    places = y.view(batch, 4, n, height + 1, width + 1)
    rows = [
        torch.stack([places[:, 2 * r + c, :, r : r + height, c : c + width] for c in (0, 1)], dim=-1) for r in (0, 1)
    ]
    return torch.stack(rows, dim=3).view(batch, n, 2 * height, 2 * width)


def cut(run: Callable[[Tensor], Tensor], x: Tensor, size: Sequence[int], bias: Tensor | None) -> Tensor:
    """The convolution of a picture that was upsampled to `size`, of which a side may be one less than twice as large.

    It ends with zeros where four small convolutions would see the last pixel once more: what that adds is what they
    give for a picture of nothing else, and is taken off.

    Args:
        run: (B, C, H, W) -> (B, N, 2 H, 2 W).
        x: the small picture.
        size: height and width.
        bias: (N,) or more, what `run` adds to every pixel.
    """
    height, width = size
    y = run(x)[:, :, :height, :width]
    ends = [2 * side != whole for side, whole in zip(x.shape[2:], size, strict=True)]
    for axes in [(2,)] * ends[0] + [(3,)] * ends[1] + [(2, 3)] * all(ends):
        last = x
        for axis in axes:
            last = last.narrow(axis, last.shape[axis] - 1, 1)
            last = torch.cat((torch.zeros_like(last), last), axis)
        beyond = run(last)
        if bias is not None:
            beyond = beyond - bias[: y.shape[1], None, None].to(beyond.dtype)
        for axis in axes:
            beyond = beyond.narrow(axis, 1, 1)
        beyond = beyond[:, :, :height, :width]
        there = nn.functional.pad(beyond, (width - beyond.shape[3], 0, height - beyond.shape[2], 0))
        y = y + there if len(axes) == 2 else y - there
    return y
