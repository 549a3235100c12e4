"""Compiles every Triton kernel for every target without a GPU and tabulates what came out.

    python -m dgq_kernels.aot --csv FILE [--targets 80 90 gfx942] [--quick] [--jobs 2]

A spill, a missing tensor-core opcode or a jump in registers or in the main loop shows here before any device runs the
kernel. What the machine code says is exact; how fast it runs is not known without the device.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .conv2d import triton as conv2d
from .linear import tiles
from .linear import triton as linear
from .log_attention import triton as attention
from .packing import GROUP_SIZES
from .quantize_activation import triton as quantize

NVIDIA_TARGETS = ("80", "86", "89", "90", "100", "120")
TARGETS = (*NVIDIA_TARGETS, "gfx942")
# Row lengths and strides that count as multiples of 16, as in every layer that matters.
_ALIGNED = (
    "reduction", "channels", "packed_row", "padded_keys", "x_row",
    *(f"{name}_{axis}" for name in ("q", "k", "v", "out") for axis in ("batch", "head", "row")),
)  # fmt: skip
_MMA = re.compile(r"IMMA|IGMMA|UTCIMMA|HMMA|HGMMA|UTCHMMA|QMMA|v_mfma_\w+|v_wmma_\w+")
_INTEGER_MMA = re.compile(r"IMMA|IGMMA|v_mfma_i32|v_wmma_i32")
_INSTRUCTION = re.compile(r"^\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b.*;")
_LABEL = re.compile(r"^(\.L_\w+|\.LBB\w+):")
_BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L_?\w+)")


# Byte permutes that a main loop may hold: more mean that int8 operands are taken apart.
PRMT_BUDGETS = {
    "linear_int8_kernel": 0, "conv2d_int8_kernel": 0, "linear_int4_kernel": 24, "conv2d_int4_kernel": 24,
    "linear_float_groups_kernel": 24, "log_attention_kernel": 64, "running_kernel": 64,
}  # fmt: skip


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
        triton: release of the compiler.
        target: compute capability times 10, or an AMD architecture.
        config: tile sizes, warps and stages, and what distinguishes the case.
        registers: per thread.
        shared: bytes of shared memory per block.
        spills: bytes of stack per thread.
        mma: the tensor-core instructions' name in the machine code, "-" where there is none.
        mma_count: how many, in the whole kernel.
        loop: instructions in the innermost loop with a product (the shorter, where there are
            two; the longest one where there is no product); loop_mma of them are products.
        prmt, i2f, shf, mufu: of them byte permutes, conversions of integers to floats, shifts, and uses of the
            transcendental unit.
        other: what is left of the loop.
    """

    triton: str
    target: str
    kernel: str
    config: str
    registers: int
    shared: int
    spills: int
    mma: str
    mma_count: int
    loop: int
    loop_mma: int
    prmt: int
    i2f: int
    shf: int
    mufu: int
    other: int


def _case(
    kernel: Any, config: tuple[int, ...], pointers: dict[str, str], constants: dict[str, Any], warps: int,
    stages: int = 3, note: str = "", integer: bool = True,
) -> Case:  # fmt: skip
    """A case whose remaining parameters are int32 sizes, or float where the name says scale or eps."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        else:
            types[name] = pointers.get(name, "fp32" if name.endswith("_scale") or name == "eps" else "i32")
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    label = "x".join(str(value) for value in config) + (f" {note}" if note else "")
    return Case(kernel, label, types, constants, options, integer)


_EPILOGUE = {
    "codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_point_ptr": "*i32", "weight_scale_ptr": "*fp32",
    "column_sum_ptr": "*i32", "bias_ptr": "*fp32", "residual_ptr": "*fp16", "out_ptr": "*fp16",
    "weight_ptr": "*i8", "ends_ptr": "*i32", "packed_ptr": "*u8", "subscale_ptr": "*u8",
    "partial_ptr": "*i32",
}  # fmt: skip


def _product_cases(major: int) -> Iterator[Case]:
    """The linear layers and convolutions: every tile, gated and with a split reduction where that may be chosen."""
    window = {"CHANNELS": 320, "STRIDE": 1}
    square = {"KERNEL_HEIGHT": 3, "KERNEL_WIDTH": 3}

    def case(kernel: Any, config: tiles.Config, note: str, constants: dict[str, Any], **mode: bool) -> Case:
        every = {
            "HAS_BIAS": True, "HAS_RESIDUAL": True, "GATED": False, "SPLIT": False, "ASSEMBLY": major > 0,
            "BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels, "HALF": config.half, **window, **constants,
            **mode,
        }  # fmt: skip
        if every["GATED"]:
            every |= {"HAS_RESIDUAL": False, "residual_ptr": None}
        if not every["SPLIT"]:
            every |= {"partial_ptr": None}
        mine = {name: value for name, value in every.items() if name in kernel.arg_names}
        note = " ".join((note, *(name.lower() for name, on in mode.items() if on)))
        return _case(kernel, config, _EPILOGUE, mine, config.warps, config.stages, note)

    for kind, classes in (("int8", 1), ("shifted", 3)):
        constants: dict[str, Any] = {"CLASSES": classes, **({"ends_ptr": None} if classes == 1 else {}), **square}
        for config in tiles.tiles_of(kind, major):
            for kernel in (linear.linear_int8_kernel, conv2d.conv2d_int8_kernel):
                yield case(kernel, config, f"classes={classes}", constants)
                yield case(kernel, config, f"classes={classes}", constants, SPLIT=True)
            yield case(linear.linear_int8_kernel, config, f"classes={classes}", constants, GATED=True)
    for group in GROUP_SIZES:
        constants = {"GROUP": group, "KERNEL_SIZE": 3}
        for config in tiles.tiles_of("int4", major):
            for kernel in (linear.linear_int4_kernel, conv2d.conv2d_int4_kernel):
                yield case(kernel, config, f"group={group}", constants)
                yield case(kernel, config, f"group={group}", constants, SPLIT=True)
            yield case(linear.linear_int4_kernel, config, f"group={group}", constants, GATED=True)
    if major == 8:  # what unpacking costs: int8 in the tile of int4
        config = tiles.tiles_of("int4", major)[0]
        constants = {"CLASSES": 1, "ends_ptr": None, **square}
        for kernel in (linear.linear_int8_kernel, conv2d.conv2d_int8_kernel):
            yield case(kernel, config, "classes=1 beside int4", constants)
    config = tiles.FLOAT_GROUPS
    constants = {
        "HAS_BIAS": True, "ASSEMBLY": major > 0, "BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels,
        "HALF": config.half,
    }  # fmt: skip
    yield _case(linear.linear_float_groups_kernel, config, _EPILOGUE, constants, config.warps, config.stages)
    for gated in (False, True):
        constants = {
            "HAS_BIAS": True, "HAS_RESIDUAL": not gated, "GATED": gated, "BLOCK_ROWS": linear.SUM_ROWS,
            "BLOCK_CHANNELS": linear.SUM_CHANNELS, **({"residual_ptr": None} if gated else {}),
        }  # fmt: skip
        yield _case(
            linear.sum_splits_kernel, (linear.SUM_ROWS, linear.SUM_CHANNELS, 4), _EPILOGUE, constants, 4,
            note="gated" if gated else "", integer=False,
        )  # fmt: skip


def _quantize_cases() -> Iterator[Case]:
    pointers = {
        "x_ptr": "*fp16", "norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32", "inv_divisor_ptr": "*fp32",
        "position_ptr": "*i32", "codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_point_ptr": "*i32",
        **{f"{name}_ptr": "*fp32" for name in ("mean", "square", "shift", "centre", "gain")},
        "below_ptr": "*i32", "above_ptr": "*i32",
    }  # fmt: skip
    flags = {"DIVIDE": True, "PLACE": True, "OFFSET": True, "GAIN": True, "SMALLEST": 1e-30, "TOP": 255}

    def case(kernel: Any, config: quantize.Config, note: str, **constants: Any) -> Case:
        tile = {"BLOCK_ROWS": config.rows, "BLOCK_CHANNELS": config.channels}
        every = {**flags, **tile, **constants}
        mine = {name: value for name, value in every.items() if name in kernel.arg_names}
        return _case(kernel, config, pointers, mine, config.warps, 3, note, integer=False)

    for mode, note in enumerate(("plain", "layer norm", "geglu", "silu", "group norm")):
        for channels in (320, 1280, 5120):
            if channels == 5120 and note not in ("plain", "geglu"):
                continue
            yield case(quantize.quantize_rows_kernel, quantize.config_for(channels), note, INPUT=mode)
    long = quantize.Config(1, 4096, 8)
    yield case(quantize.quantize_long_rows_kernel, long, "plain")
    for pixels, channels in ((4096, 320), (256, 1280)):
        tile = quantize.sample_config_for(2, pixels, channels)
        group = channels // 32
        width = 16 if group < 16 else 64
        yield case(quantize.sample_statistics_kernel, tile, "")
        whole = quantize.Config(32, width, 4)
        yield case(quantize.group_statistics_kernel, whole, f"group={group}", GROUP=group, SHIFT=True)
        for norm, note in ((False, "plain"), (True, "norm silu")):
            fused = {"NORM": norm, "SILU": norm, "OFFSET": norm}
            yield case(quantize.sample_range_kernel, tile, note, **fused)
            yield case(quantize.quantize_samples_kernel, tile, note, BLOCK_RANGES=256, **fused)


def _attention_cases(major: int) -> Iterator[Case]:
    for head_dim in (40, 64, 80, 128, 160):
        width = attention.padded_width(head_dim)
        tiles = attention.config_for(width, major)
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
        if width <= 128:
            tiles = attention.running_config_for(width, major)
            yield _case(
                attention.running_kernel, tiles,
                {"q_ptr": "*fp16", "k_ptr": "*i8", "v_ptr": "*i8", "v_scale_ptr": "*fp32", "v_prefix_ptr": "*i32",
                 "key_step_ptr": "*fp32", "out_ptr": "*fp16"},
                {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys,
                 "FRACTION_BITS": 4, "TOP": 255, "QK_TOP": 127},
                tiles.warps, tiles.stages, f"d={head_dim} self",
            )  # fmt: skip
        tile = (attention.config_for(width, major).keys, width)
        halves = {f"{name}_ptr": "*fp16" for name in ("k", "v")}
        floats = {f"{name}_ptr": "*fp32" for name in ("statistics", "v_scale", "key_step", "start_k", "start_v")}
        codes = {"k_codes_ptr": "*i8", "v_codes_ptr": "*i8", "v_sum_ptr": "*i32"}
        for kernel in (attention.key_statistics_kernel, attention.key_codes_kernel):
            constants = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_KEYS": tile[0], "START": 1}
            constants |= {"QK_TOP": 127, "V_TOP": 127} if kernel is attention.key_codes_kernel else {}
            warps = attention.key_warps(*tile)
            yield _case(kernel, (*tile, warps), {**halves, **floats, **codes}, constants, warps,
                        note=f"d={head_dim} cross", integer=False)  # fmt: skip
        tiles = attention.base2_config_for(width, major)
        halves = {f"{name}_ptr": "*fp16" for name in ("q", "k", "v", "out")}
        floats = {f"{name}_ptr": "*fp32" for name in ("normaliser", "peak", "reference")}
        for kernel in (attention.base2_rows_kernel, attention.base2_kernel):
            constants = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys}
            constants |= {"START": True, **({"TOP": 255} if kernel is attention.base2_kernel else {})}
            yield _case(
                kernel, tiles, {**halves, **floats}, constants, tiles.warps, tiles.stages, f"d={head_dim} cross",
                integer=False,
            )  # fmt: skip


def cases(target: str) -> Iterator[Case]:
    """Every kernel in every configuration that a device of this target can be given."""
    yield from _product_cases(major_of(target))
    yield from _quantize_cases()
    yield from _attention_cases(major_of(target))


def major_of(target: str) -> int:
    """The major compute capability, 0 for AMD."""
    return int(target) // 10 if target.isdigit() else 0


def compile_case(case: Case, target: str) -> Any:
    """Compile one case; pointers and row lengths count as multiples of 16, as in every layer that matters."""
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(case.kernel.arg_names)
        if case.types[name].startswith("*") or (name in _ALIGNED and case.types[name] == "i32")
    }
    source = ASTSource(case.kernel, case.types, case.constants, attributes)
    device = GPUTarget("cuda", int(target), 32) if target.isdigit() else GPUTarget("hip", target, 64)
    return triton.compile(source, target=device, options=case.options)


def innermost_loops(code: str) -> list[list[str]]:
    """The opcodes of each loop (from a label to a backward branch to it) that holds no other loop."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(opcodes)
            continue
        amd = re.match(r"^\t([sv]_\w+|ds_\w+|buffer_\w+|global_\w+)", line)
        found = _INSTRUCTION.match(line)
        if not (found or amd):
            continue
        opcodes.append(found[1] if found else amd[1])  # type: ignore[index]
        branch = _BRANCH.search(line)
        if branch and branch[1] in labels:
            loops.append((labels[branch[1]], len(opcodes)))
    inner = [
        loop for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]  # fmt: skip
    return [opcodes[start:end] for start, end in inner]


def loop_counts(code: str) -> dict[str, int]:
    """The columns of `Row` that describe the main loop."""
    loops = innermost_loops(code)
    with_products = [loop for loop in loops if any(_MMA.match(opcode) for opcode in loop)]
    # The kernels with shift classes have two such loops; the shorter, unmasked one runs in all but the shared steps.
    loop = min(with_products, key=len) if with_products else max(loops, key=len, default=[])

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in loop)

    counts = {
        "loop_mma": count(_MMA.pattern), "prmt": count(r"U?PRMT|v_perm"), "i2f": count(r"I2F|v_cvt_f32_[iu]"),
        "shf": count(r"U?SHF|v_lsh|v_ash"), "mufu": count(r"MUFU|v_exp|v_log|v_rcp"),
    }  # fmt: skip
    return {"loop": len(loop), **counts, "other": len(loop) - sum(counts.values())}


def measure(case: Case, target: str) -> Row:
    """Compile one case and read the binary with the disassemblers that the Triton wheel ships.

    Raises:
        RuntimeError: the disassembler's report is not understood.
    """
    compiled = compile_case(case, target)
    if target.isdigit():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
            code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if resources is None:
            raise RuntimeError(f"no resource usage in cuobjdump's report: {usage}")
        registers, spills = int(resources[1]), int(resources[2])
    else:
        code = compiled.asm["amdgcn"]
        found = [re.search(rf"\.{name}:\s*(\d+)", code) for name in ("vgpr_count", "private_segment_fixed_size")]
        if not all(found):
            raise RuntimeError("no resource usage in the AMD assembly")
        registers, spills = (int(match[1]) for match in found if match)
    products = collections.Counter(match[0] for match in re.finditer(rf"(?:{_MMA.pattern})[\w.]*", code))
    name = products.most_common(1)[0][0] if products else "-"
    return Row(
        triton.__version__, target, case.kernel.__name__, case.config, registers, compiled.metadata.shared, spills,
        name, products.total(), **loop_counts(code),
    )  # fmt: skip


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults(row: Row, case: Case) -> list[str]:
    """What is wrong with a row: a spill, no int8 product, too many byte permutes."""
    found = []
    limit = PRMT_BUDGETS.get(row.kernel)
    if limit is not None and row.target.isdigit() and row.prmt > limit:
        found.append(f"{row.prmt} byte permutes in the loop, {limit} allowed")
    if row.spills:
        found.append(f"{row.spills} bytes spilled")
    if case.integer and not _INTEGER_MMA.search(row.mma):
        found.append(f"no int8 tensor-core product ({row.mma})")
    return found


@functools.cache
def _chosen(target: str, quick: bool) -> list[Case]:
    chosen: list[Case] = []
    for case in cases(target):
        if not (quick and any(case.kernel is other.kernel for other in chosen)):
            chosen.append(case)
    return chosen


def _work(job: tuple[str, int, bool]) -> tuple[Row | None, list[str]]:
    target, index, quick = job
    case = _chosen(target, quick)[index]
    try:
        row = measure(case, target)
    except Exception as error:
        name = f"{target} {case.kernel.__name__} {case.config}"
        return None, [f"{name}: does not compile: {str(error).strip().splitlines()[-1:]}"]
    return row, [f"{target} {row.kernel} {row.config}: {fault}" for fault in faults(row, case)]


def main(arguments: list[str] | None = None) -> int:
    """Command line: prints the table, writes it to --csv; exit code 1 where a row is at fault."""
    parser = argparse.ArgumentParser(prog="python -m dgq_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table here; other rows stay")
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="TARGET", help="e.g. 80 90 gfx942")
    parser.add_argument("--quick", action="store_true", help="one case per kernel, the largest tile")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only kernels whose name holds TEXT")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    jobs = [
        (target, index, options.quick)
        for target in options.targets
        for index, case in enumerate(_chosen(target, options.quick))
        if options.kernels in case.kernel.__name__
    ]
    print(*(field.name for field in fields(Row)), sep="\t")
    rows: list[Row] = []
    problems: list[str] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        results = map(_work, jobs) if options.jobs == 1 else pool.imap(_work, jobs)
        for row, found in results:
            problems += found
            if row is not None:
                rows.append(row)
                print(*asdict(row).values(), sep="\t", flush=True)
    if options.csv:
        write(options.csv, rows, options.targets, options.kernels)
    for problem in problems:
        print(problem, file=sys.stderr)
    # AMD rows tell how far the kernels are from running there; no configuration is chosen for it yet.
    return int(any(not problem.startswith("gfx") for problem in problems))


def write(path: Path, rows: list[Row], targets: Sequence[str] = TARGETS, kernels: str = "") -> None:
    """Write the table, in order. Rows that are there stay, but for those of this release's `targets` and of kernels
    whose name holds `kernels`, which `rows` replace."""
    table = [{name: str(value) for name, value in asdict(row).items()} for row in rows]
    if path.exists():
        with path.open(newline="") as file:
            releases = {row.triton for row in rows}
            table += [
                row for row in csv.DictReader(file)
                if row["triton"] not in releases or row["target"] not in targets or kernels not in row["kernel"]
            ]  # fmt: skip
    table.sort(key=lambda row: [row[name] for name in ("triton", "target", "kernel", "config")])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    sys.exit(main())
