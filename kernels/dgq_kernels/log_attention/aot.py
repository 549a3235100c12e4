"""What `dgq_kernels.aot` compiles of attention."""

from __future__ import annotations

from collections.abc import Iterator

from .. import aot_case
from . import triton as attention


def cases(major: int) -> Iterator[aot_case.Case]:
    """On a major compute capability, 0 for AMD."""
    for head_dim in (40, 64, 80, 128, 160):
        width = attention.padded_width(head_dim)
        for start in (False, True):
            tiles = attention.config_for(width, major, start)
            yield aot_case.case(
                attention.log_attention_kernel,
                tiles,
                {
                    "q_ptr": "*fp16",
                    "k_ptr": "*i8",
                    "v_ptr": "*i8",
                    "v_scale_ptr": "*fp32",
                    "v_sum_ptr": "*i32",
                    "key_step_ptr": "*fp32",
                    "start_k_ptr": "*fp32",
                    "start_v_ptr": "*fp32",
                    "out_ptr": "*fp16",
                },
                {
                    "HEAD_DIM": head_dim,
                    "WIDTH": width,
                    "BLOCK_ROWS": tiles.rows,
                    "BLOCK_KEYS": tiles.keys,
                    "FRACTION_BITS": 4,
                    "TOP": 255,
                    "QK_TOP": 127,
                    "START": start,
                    **({} if start else {"start_k_ptr": None, "start_v_ptr": None}),
                },
                tiles.warps,
                tiles.stages,
                f"d={head_dim} {'cross' if start else 'self'}",
                permutes=64,
            )
        if width <= 128:
            tiles = attention.running_config_for(width, major)
            yield aot_case.case(
                attention.running_kernel,
                tiles,
                {
                    "q_ptr": "*fp16",
                    "k_ptr": "*i8",
                    "v_ptr": "*i8",
                    "v_scale_ptr": "*fp32",
                    "v_prefix_ptr": "*i32",
                    "key_step_ptr": "*fp32",
                    "out_ptr": "*fp16",
                },
                {
                    "HEAD_DIM": head_dim,
                    "WIDTH": width,
                    "BLOCK_ROWS": tiles.rows,
                    "BLOCK_KEYS": tiles.keys,
                    "FRACTION_BITS": 4,
                    "TOP": 255,
                    "QK_TOP": 127,
                },
                tiles.warps,
                tiles.stages,
                f"d={head_dim} self",
                permutes=64,
            )
        tile = (attention.config_for(width, major, True).keys, width)
        halves = {f"{name}_ptr": "*fp16" for name in ("k", "v")}
        floats = {f"{name}_ptr": "*fp32" for name in ("statistics", "v_scale", "key_step", "start_k", "start_v")}
        codes = {"k_codes_ptr": "*i8", "v_codes_ptr": "*i8", "v_sum_ptr": "*i32"}
        for kernel in (attention.key_statistics_kernel, attention.key_codes_kernel):
            constants = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_KEYS": tile[0], "START": 1}
            constants |= {"QK_TOP": 127, "V_TOP": 127} if kernel is attention.key_codes_kernel else {}
            warps = attention.key_warps(*tile)
            yield aot_case.case(
                kernel,
                (*tile, warps),
                {**halves, **floats, **codes},
                constants,
                warps,
                note=f"d={head_dim} cross",
                integer=False,
            )
        tiles = attention.base2_config_for(width, major, 2)
        halves = {f"{name}_ptr": "*fp16" for name in ("q", "k", "v", "out")}
        floats = {f"{name}_ptr": "*fp32" for name in ("normaliser", "peak", "reference")}
        for kernel in (attention.base2_rows_kernel, attention.base2_kernel):
            constants = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
            constants |= {"START": True, **({"TOP": 255} if kernel is attention.base2_kernel else {})}
            yield aot_case.case(
                kernel,
                tiles,
                {**halves, **floats},
                constants,
                tiles.warps,
                tiles.stages,
                f"d={head_dim} cross",
                integer=False,
            )
