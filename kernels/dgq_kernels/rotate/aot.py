"""What `dgq_kernels.aot` compiles of the rotation."""

from __future__ import annotations

from collections.abc import Iterator

from .. import aot_case
from . import BLOCKS
from . import triton as kernels


def cases(major: int) -> Iterator[aot_case.Case]:
    """On any major compute capability."""
    for block in BLOCKS:
        for dtype in ("*fp16", "*fp32"):
            pointers = {"x_ptr": dtype, "inv_divisor_ptr": "*fp32", "out_ptr": "*fp32"}
            constants = {"DIVIDE": True, **kernels.constants(block)}
            config = (kernels.VALUES // block, block)
            yield aot_case.case(kernels.rotate_kernel, config, pointers, constants, 4, 3, dtype[1:], integer=False)
