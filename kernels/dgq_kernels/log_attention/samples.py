"""Small arguments of attention."""

from __future__ import annotations

from collections.abc import Iterator

from ..samples import Sample, floats


def samples() -> Iterator[Sample]:
    """Of each operator here."""
    q, k, v = floats(2, 2, 9, 16), floats(2, 2, 24, 16).flip(2) + 1, floats(2, 2, 24, 16) + 0.5
    for start in (False, True):
        yield Sample("log_attention", (q, k, v, 0.25, 8, 4, start, 8, 8))
        yield Sample("log_attention_base2", (q, k, v, 0.25, 8, start), exact=False)
    yield Sample("log_attention_running", (q, k, v, 0.25, 8, 4, 32), exact=False)
