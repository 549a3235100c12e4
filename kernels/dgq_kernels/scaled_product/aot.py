"""What `dgq_kernels.aot` compiles of the products of float activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import aot_case
from ..packing import GROUP_SIZES
from . import triton as product


def cases(major: int) -> Iterator[aot_case.Case]:
    """On a major compute capability; none for AMD (0), whose compiler ends with an error of its own in Triton 3.6."""
    kinds = (("bf16", 2, (0, *GROUP_SIZES)), ("fp16", 2, (0,)), ("fp32", 4, (0, 32)))
    for dtype, size, groups in kinds if major else ():
        for back in (False, True):
            for group in groups:
                for config in product.TILES[size]:
                    constants: dict[str, Any] = {
                        "KERNEL": 3,
                        "STRIDE": 1,
                        "PADDING": 1,
                        "BACK": back,
                        "GROUP": group,
                        "ASSEMBLY": True,
                        "BLOCK_ROWS": config.rows,
                        "BLOCK_CHANNELS": config.channels,
                        "STEP": config.step,
                        **({} if group else {"subscale_ptr": None}),
                    }
                    pointers = {
                        "x_ptr": f"*{dtype}",
                        "out_ptr": f"*{dtype}",
                        "weight_ptr": "*u8" if group else "*i8",
                        "subscale_ptr": "*u8",
                    }
                    note = " ".join((dtype, "back" if back else "forward", f"group={group}" if group else "int8"))
                    yield aot_case.case(
                        product.unscaled_product_kernel,
                        config,
                        pointers,
                        constants,
                        config.warps,
                        config.stages,
                        note,
                        integer=False,
                    )
