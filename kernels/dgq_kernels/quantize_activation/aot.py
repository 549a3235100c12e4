"""What `dgq_kernels.aot` compiles of activation quantization."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from .. import aot_case
from . import triton as quantize


def cases(major: int) -> Iterator[aot_case.Case]:
    """On any major compute capability."""
    pointers = {
        "x_ptr": "*fp16",
        "norm_weight_ptr": "*fp32",
        "norm_bias_ptr": "*fp32",
        "inv_divisor_ptr": "*fp32",
        "position_ptr": "*i32",
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "zero_point_ptr": "*i32",
        **{f"{name}_ptr": "*fp32" for name in ("mean", "square", "low", "high", "shift", "centre", "gain")},
        "below_ptr": "*i32",
        "above_ptr": "*i32",
    }
    usual = {
        "DIVIDE": True,
        "PLACE": True,
        "ROTATION": 0,
        "OFFSET": True,
        "GAIN": True,
        "SHIFT": False,
        "SILU": True,
        "RANGE": False,
        "SMALLEST": 1e-30,
        "TOP": 255,
    }

    def case(kernel: Any, config: quantize.Config, note: str, **constants: Any) -> aot_case.Case:
        tile = {"BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels}
        every = {**usual, **tile, **constants}
        mine = {name: value for name, value in every.items() if name in kernel.arg_names}
        return aot_case.case(kernel, config, pointers, mine, config.warps, 3, note, integer=False)

    for mode, note in enumerate(("plain", "layer norm", "geglu", "silu", "group norm")):
        for channels in (320, 1280, 5120):
            if channels == 5120 and note not in ("plain", "geglu"):
                continue
            yield case(quantize.quantize_rows_kernel, quantize.config_for(channels), note, INPUT=mode)
    long = quantize.Config(1, 4096, 8)
    yield case(quantize.quantize_long_rows_kernel, long, "plain")
    turned = {"PLACE": False, "ROTATION": 256}
    yield case(quantize.quantize_long_rows_kernel, long, "plain rotated", **turned)
    for mode, note, channels, block in (
        (0, "plain", 1280, 256),
        (0, "plain", 5120, 256),
        (0, "plain", 336, 16),
        (1, "layer norm", 320, 64),
        (1, "layer norm", 1280, 256),
        (2, "geglu", 5120, 256),
        (3, "silu", 1280, 256),
        (4, "group norm", 1280, 256),
    ):
        turned = {"PLACE": False, "ROTATION": block, "INPUT": mode}
        config, note = quantize.config_for(channels, block), f"{note} rotated by {block}"
        yield case(quantize.quantize_rows_kernel, config, note, **turned)
    for pixels, channels in ((4096, 320), (256, 1280)):
        tile = quantize.sample_config_for(2, pixels, channels)
        group = channels // 32
        for most, ranges in itertools.product((1, 4), (False, True)):
            groups = quantize.groups_for(pixels, group, most, ranges)
            if most > groups.parts:
                continue
            note = f"group={group} parts={groups.parts}" + (" range" if ranges else "")
            flags = {"GROUP": group, "PARTS": groups.parts, "SHIFT": True, "RANGE": ranges}
            whole = quantize.Config(groups.rows, groups.channels, groups.warps)
            yield case(quantize.group_statistics_kernel, whole, note, **flags)
            if groups.parts > 1:
                yield case(quantize.merge_parts_kernel, quantize.Config(1, groups.channels, 1), note, **flags)
        for norm, note in ((False, "plain"), (True, "norm silu")):
            fused = {"NORM": norm, "SILU": norm, "OFFSET": norm}
            if not norm:
                yield case(quantize.sample_range_kernel, tile, note, **fused)
            yield case(quantize.quantize_samples_kernel, tile, note, BLOCK_RANGES=256, **fused)
            block = 256 if channels % 256 == 0 else 64
            turned = {"PLACE": False, "ROTATION": block, **fused}
            wide, note = quantize.sample_config_for(2, pixels, channels, block), f"{note} rotated by {block}"
            yield case(quantize.sample_range_kernel, wide, note, **turned)
            yield case(quantize.quantize_samples_kernel, wide, note, BLOCK_RANGES=256, **turned)
