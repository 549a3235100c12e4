"""Shift classes: input channels whose products count 2^i, added by Horner's rule as an int32 accumulator would."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def accumulate(class_ends: list[int], product: Callable[[int, int, int], Tensor]) -> Tensor:
    """Sum the classes' products, the highest class first, doubling in between.

    Args:
        class_ends: ascending ends of the classes; class i holds channels [class_ends[i-1], class_ends[i]).
        product: product(number, start, end) -> a fresh tensor of sums over channels [start, end); `number` counts
            the non-empty classes from 0. Never called for an empty class.

    Raises:
        ValueError: every class is empty.
    """
    bounds = list(zip([0, *class_ends[:-1]], class_ends, strict=True))
    number = sum(end > start for start, end in bounds)
    total: Tensor | None = None
    for start, end in reversed(bounds):
        if total is not None:
            total.mul_(2)
        if end > start:
            number -= 1
            part = product(number, start, end)
            total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError(f"no channel in the classes {class_ends}")
    return total
