"""How far two tensors are from each other, and what is said where they are too far."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference|, in norm, of tensors on any devices."""
    out, reference = out.detach().cpu().double(), reference.detach().cpu().double()
    return float((out - reference).norm() / reference.norm().clamp(min=1e-30))


def sqnr(reference: Tensor, out: Tensor) -> float:
    """Signal to noise in dB: how much larger the reference is than what `out` differs by."""
    return -20 * math.log10(max(relative_error(out, reference), 1e-15))


def assert_close(name: str, out: Tensor, reference: Tensor, ratio: float) -> None:
    """`out` has the reference's shape, is not finite where it is not, and its relative error is below `ratio`."""
    assert out.shape == reference.shape, f"{name}: {tuple(out.shape)} instead of {tuple(reference.shape)}"
    out, reference = out.detach().cpu().double(), reference.detach().cpu().double()
    finite = torch.isfinite(reference)
    wrong = torch.isfinite(out) != finite
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} values finite in one and not in the other"
    out, reference = out[finite], reference[finite]
    error = relative_error(out, reference)
    if error < ratio:
        return
    away = (out - reference).abs()
    worst = int(away.argmax())
    place = tuple(int(i) for i in finite.nonzero()[worst])
    raise AssertionError(
        f"{name}: relative error {error:.3g}, not below {ratio:g}; worst at {place}: "
        f"{float(out[worst]):.6g} instead of {float(reference[worst]):.6g}"
    )
