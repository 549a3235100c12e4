"""What `dgq_kernels.aot` compiles of the convolutions."""

from __future__ import annotations

from collections.abc import Iterator

from .. import aot_case
from ..linear.aot import products
from . import triton as conv2d


def cases(major: int) -> Iterator[aot_case.Case]:
    """On a major compute capability, 0 for AMD."""
    yield from products(major, conv2d.conv2d_int8_kernel, conv2d.conv2d_int4_kernel, gates=False)
