"""What `dgq_kernels.aot` compiles of the linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import aot_case
from ..packing import GROUP_SIZES
from . import tiles
from . import triton as linear

EPILOGUE = {
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
    "zero_point_ptr": "*i32",
    "weight_scale_ptr": "*fp32",
    "column_sum_ptr": "*i32",
    "bias_ptr": "*fp32",
    "residual_ptr": "*fp16",
    "out_ptr": "*fp16",
    "weight_ptr": "*i8",
    "ends_ptr": "*i32",
    "packed_ptr": "*u8",
    "subscale_ptr": "*u8",
    "partial_ptr": "*i32",
}


def products(major: int, int8: Any, int4: Any, gates: bool) -> Iterator[aot_case.Case]:
    """A kernel of int8 and one of int4 weights: every tile, with a split reduction and gated where that may be."""
    window = {"CHANNELS": 320, "STRIDE": 1}
    square = {"KERNEL_HEIGHT": 3, "KERNEL_WIDTH": 3}

    def case(kernel: Any, config: tiles.Config, note: str, constants: dict[str, Any], **mode: bool) -> aot_case.Case:
        every = {
            "HAS_BIAS": True,
            "HAS_RESIDUAL": True,
            "GATED": False,
            "SPLIT": False,
            "ASSEMBLY": major > 0,
            "BLOCK_ROWS": config.rows,
            "BLOCK_CHANNELS": config.channels,
            "HALF": config.half,
            "WHOLE": config.whole,
            **window,
            **constants,
            **mode,
        }
        if every["GATED"]:
            every |= {"HAS_RESIDUAL": False, "residual_ptr": None}
        if not every["SPLIT"]:
            every |= {"partial_ptr": None}
        mine = {name: value for name, value in every.items() if name in kernel.arg_names}
        note = " ".join((note, *(name.lower() for name, on in mode.items() if on)))
        permutes = 24 if kernel is int4 else 0
        length = config.half * (2 if config.whole else 1)  # of a product
        tile = (config.rows, config.channels, length, config.warps, config.stages)
        registers = config.registers if config.resident else None
        return aot_case.case(
            kernel, tile, EPILOGUE, mine, config.warps, config.stages, note, permutes=permutes, registers=registers
        )

    for kind, classes in (("int8", 1), ("shifted", 3)):
        constants: dict[str, Any] = {"CLASSES": classes, **({"ends_ptr": None} if classes == 1 else {}), **square}
        for config in tiles.tiles_of(kind, major):
            yield case(int8, config, f"classes={classes}", constants)
            yield case(int8, config, f"classes={classes}", constants, SPLIT=True)
            if gates:
                yield case(int8, config, f"classes={classes}", constants, GATED=True)
    for group in GROUP_SIZES:
        constants = {"GROUP": group, "KERNEL_SIZE": 3}
        for config in tiles.tiles_of("int4", major):
            yield case(int4, config, f"group={group}", constants)
            yield case(int4, config, f"group={group}", constants, SPLIT=True)
            if gates:
                yield case(int4, config, f"group={group}", constants, GATED=True)
    if major == 8:  # what unpacking costs: int8 in the tile of int4
        config = tiles.tiles_of("int4", major)[0]
        constants = {"CLASSES": 1, "ends_ptr": None, **square}
        yield case(int8, config, "classes=1 beside int4", constants)


def cases(major: int) -> Iterator[aot_case.Case]:
    """On a major compute capability, 0 for AMD."""
    yield from products(major, linear.linear_int8_kernel, linear.linear_int4_kernel, gates=True)
    config = tiles.FLOAT_GROUPS
    constants: dict[str, Any] = {
        "HAS_BIAS": True,
        "ASSEMBLY": major > 0,
        "BLOCK_ROWS": config.rows,
        "BLOCK_CHANNELS": config.channels,
        "HALF": config.half,
    }
    yield aot_case.case(
        linear.linear_float_groups_kernel, config[:5], EPILOGUE, constants, config.warps, config.stages, permutes=24
    )
    for gated in (False, True):
        constants = {
            "HAS_BIAS": True,
            "HAS_RESIDUAL": not gated,
            "GATED": gated,
            "BLOCK_ROWS": linear.SUM_ROWS,
            "BLOCK_CHANNELS": linear.SUM_CHANNELS,
            **({"residual_ptr": None} if gated else {}),
        }
        yield aot_case.case(
            linear.sum_splits_kernel,
            (linear.SUM_ROWS, linear.SUM_CHANNELS, 4),
            EPILOGUE,
            constants,
            4,
            note="gated" if gated else "",
            integer=False,
        )
