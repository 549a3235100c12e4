"""Compiles every Triton kernel for every target without a GPU and tabulates what came out.

    python -m dgq_kernels.aot --csv FILE [--targets 80 90] [--quick]

A spill, a missing tensor-core opcode or a jump in registers shows here before any device runs the kernel.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .linear import triton as linear
from .log_attention import triton as attention
from .quantize_activation import triton as quantize

TARGETS = (80, 86, 89, 90, 100, 120)
_ALIGNED = ("reduction", "channels", "packed_row", "padded_keys", "q_batch", "q_head", "q_row", "x_row")
_MMA = re.compile(r"mma\.sync\S*\.s32\.s8\.s8|wgmma\.mma_async\S*\.s32\.s8\.s8|tcgen05\.mma\S*kind::i8")


@dataclass(frozen=True)
class Case:
    """A kernel with its parameter types, constants and launch options; `integer`: it must hold int8 products."""

    kernel: Any
    config: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    integer: bool = True


@dataclass(frozen=True)
class Row:
    """What one case became on one target.

    Attributes:
        target: compute capability times 10.
        config: tile sizes, warps and stages, and what distinguishes the case.
        registers: per thread.
        shared: bytes of shared memory per block.
        spills: bytes of stack per thread.
        mma: int8 tensor-core instructions in the PTX.
        prmt: byte permutes in the machine code; many mean that int8 operands are being taken apart.
    """

    target: int
    kernel: str
    config: str
    registers: int
    shared: int
    spills: int
    mma: int
    prmt: int


def _case(
    kernel: Any, config: tuple[int, ...], pointers: dict[str, str], constants: dict[str, Any], warps: int,
    stages: int = 3, note: str = "", integer: bool = True,
) -> Case:  # fmt: skip
    """A case whose remaining parameters are int32 sizes, or float where the name says scale."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        else:
            types[name] = pointers.get(name, "fp32" if name.endswith("_scale") else "i32")
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    label = "x".join(str(value) for value in config) + (f" {note}" if note else "")
    return Case(kernel, label, types, constants, options, integer)


def cases(target: int) -> Iterator[Case]:
    """Every kernel in every configuration that a device of this compute capability can be given."""
    epilogue = {
        "codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_point_ptr": "*i32", "weight_scale_ptr": "*fp32",
        "column_sum_ptr": "*i32", "bias_ptr": "*fp16", "out_ptr": "*fp16",
    }  # fmt: skip
    for config in linear.configs_for(linear.INT8_CONFIGS, target // 10):
        tile = {"BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels, "HALF": config.half}
        for classes in (1, 3):
            pointers = {**epilogue, "weight_ptr": "*i8", "ends_ptr": "*i32"}
            constants: dict[str, Any] = {**tile, "CLASSES": classes, "HAS_BIAS": True, "ASSEMBLY": True}
            if classes == 1:
                constants["ends_ptr"] = None
            yield _case(
                linear.linear_int8_kernel, config, pointers, constants, config.warps, config.stages,
                f"classes={classes}",
            )  # fmt: skip
    for config in linear.configs_for(linear.INT4_CONFIGS, target // 10):
        tile = {"BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels, "HALF": config.half}
        for group in (32, 64):
            yield _case(
                linear.linear_int4_kernel, config, {**epilogue, "packed_ptr": "*u8", "subscale_ptr": "*u8"},
                {**tile, "GROUP": group, "HAS_BIAS": True, "ASSEMBLY": True}, config.warps, config.stages,
                f"group={group}",
            )  # fmt: skip
    for channels in (320, 1280):
        rows = quantize.config_for(channels)
        yield _case(
            quantize.quantize_rows_kernel, rows,
            {"x_ptr": "*fp16", "inv_divisor_ptr": "*fp32", "codes_ptr": "*u8", "scale_ptr": "*fp32",
             "zero_point_ptr": "*i32"},
            {"SMALLEST": 1e-30, "TOP": 255, "DIVIDE": True, "BLOCK_ROWS": rows.rows, "BLOCK_CHANNELS": rows.channels},
            rows.warps,
            integer=False,
        )  # fmt: skip
    for head_dim in (40, 32, 64, 80, 160):
        width = attention.padded_width(head_dim)
        tiles = attention.config_for(width)
        for start in (False, True):
            yield _case(
                attention.log_attention_kernel, tiles,
                {"q_ptr": "*fp16", "k_ptr": "*i8", "v_ptr": "*i8", "v_scale_ptr": "*fp32", "v_sum_ptr": "*i32",
                 "key_step_ptr": "*fp32", "start_k_ptr": "*fp32", "start_v_ptr": "*fp32", "out_ptr": "*fp16"},
                {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys,
                 "FRACTION_BITS": 4, "TOP": 255, "QK_TOP": 127, "START": start,
                 **({} if start else {"start_k_ptr": None, "start_v_ptr": None})},
                tiles.warps, tiles.stages, f"d={head_dim} {'cross' if start else 'self'}",
            )  # fmt: skip


def compile_case(case: Case, target: int) -> Any:
    """Compile one case; pointers and row lengths count as multiples of 16, as in every layer that matters."""
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(case.kernel.arg_names)
        if case.types[name].startswith("*") or name in _ALIGNED
    }
    source = ASTSource(case.kernel, case.types, case.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.options)


def measure(case: Case, target: int) -> Row:
    """Compile one case and read the binary with the disassemblers that the Triton wheel ships.

    Raises:
        RuntimeError: the disassembler's report is not understood.
    """
    compiled = compile_case(case, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"no resource usage in cuobjdump's report: {usage}")
    return Row(
        target, case.kernel.__name__, case.config, int(resources[1]), compiled.metadata.shared, int(resources[2]),
        len(_MMA.findall(compiled.asm["ptx"])), sass.count("PRMT"),
    )  # fmt: skip


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Command line: prints the table, writes it to --csv; exit code 1 where a kernel spills or has no int8 product."""
    parser = argparse.ArgumentParser(prog="python -m dgq_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, metavar="CC", help="e.g. 80 90")
    parser.add_argument("--quick", action="store_true", help="one case per kernel, the largest tile")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    bad = False
    rows = []
    print(*(field.name for field in fields(Row)), sep="\t")
    for target in options.targets:
        chosen: list[Case] = []
        for case in cases(target):
            if not (options.quick and any(case.kernel is other.kernel for other in chosen)):
                chosen.append(case)
        for case in chosen:
            row = measure(case, target)
            rows.append(row)
            bad |= bool(row.spills) or (case.integer and not row.mma)
            print(*asdict(row).values(), sep="\t", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
