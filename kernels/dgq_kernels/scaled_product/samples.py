"""Small arguments of the products of float activations."""

from __future__ import annotations

from collections.abc import Iterator

from ..samples import Sample, floats, two_level, weights


def samples() -> Iterator[Sample]:
    """Of each operator here."""
    window = (3, 2, 1)
    x, gradient, size = floats(2, 5, 6, 32), floats(2, 3, 3, 40), [2, 5, 6, 32]
    packed, subscales, _ = two_level(40, 9 * 32, 32)
    for weight, more in ((weights(40, 9 * 32), (None, 0)), (packed, (subscales, 32))):
        yield Sample("unscaled_product", (x, weight, *more, *window))
        yield Sample("unscaled_product_input", (gradient, weight, *more, size, *window))
