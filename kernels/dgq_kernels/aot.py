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
import importlib
import importlib.util
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

from .aot_case import Case
from .backend import folders

NVIDIA_TARGETS = ("80", "86", "89", "90", "100", "120")
TARGETS = (*NVIDIA_TARGETS, "gfx942")
# Row lengths and strides that count as multiples of 16, as in every layer that matters.
_ALIGNED = (
    "reduction",
    "channels",
    "in_channels",
    "packed_row",
    "weight_row",
    "padded_keys",
    "x_row",
    *(f"{name}_{axis}" for name in ("q", "k", "v", "out") for axis in ("batch", "head", "row")),
)
_MMA = re.compile(r"IMMA|IGMMA|UTCIMMA|HMMA|HGMMA|UTCHMMA|QMMA|v_mfma_\w+|v_wmma_\w+")
_INTEGER_MMA = re.compile(r"IMMA|IGMMA|v_mfma_i32|v_wmma_i32")
_INSTRUCTION = re.compile(r"^\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b.*;")
_WAIT_OR_MEMORY = re.compile(r"ACQBULK|U?(?:LD|ST)G|U?(?:LD|ST)\.|RED|ATOM(?!S)|UBLKCP|UTMA")  # ATOMS: shared
_LABEL = re.compile(r"^(\.L_\w+|\.LBB\w+):")
_BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L_?\w+)")


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


def cases(target: str) -> Iterator[Case]:
    """Every kernel in every configuration that a device of this target can be given: `cases(major)` of the file
    `aot.py` in the folders of the operators."""
    for folder in folders():
        if importlib.util.find_spec(f"{folder}.aot"):
            yield from importlib.import_module(f"{folder}.aot").cases(major_of(target))


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
    constants = {**case.constants, "PDL": major_of(target) >= 9}  # as `launch` has it
    source = ASTSource(case.kernel, case.types, constants, attributes)
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
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
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
        "loop_mma": count(_MMA.pattern),
        "prmt": count(r"U?PRMT|v_perm"),
        "i2f": count(r"I2F|v_cvt_f32_[iu]"),
        "shf": count(r"U?SHF|v_lsh|v_ash"),
        "mufu": count(r"MUFU|v_exp|v_log|v_rcp"),
    }
    return {"loop": len(loop), **counts, "other": len(loop) - sum(counts.values())}


def waits_first(code: str) -> bool:
    """Whether NVIDIA machine code waits for the kernel before (`launch.await_previous`) ahead of all its memory."""
    opcodes = [match[1] for match in map(_INSTRUCTION.match, code.splitlines()) if match]
    return next((opcode for opcode in opcodes if _WAIT_OR_MEMORY.match(opcode)), "").startswith("ACQBULK")


def measure(case: Case, target: str) -> tuple[Row, bool]:
    """Compile one case and read the binary with the disassemblers that the Triton wheel ships.

    Returns:
        Its row, and whether it may be launched before the kernel before it ends: `waits_first`, from 9.0 on.

    Raises:
        RuntimeError: the disassembler's report is not understood.
    """
    compiled = compile_case(case, target)
    if target.isdigit():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
            code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
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
    row = Row(
        triton.__version__,
        target,
        case.kernel.__name__,
        case.config,
        registers,
        compiled.metadata.shared,
        spills,
        name,
        products.total(),
        **loop_counts(code),
    )
    return row, major_of(target) < 9 or waits_first(code)


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults(row: Row, case: Case, waits: bool) -> list[str]:
    """What is wrong with what `measure` found: a spill, no int8 product, too many byte permutes, memory before the
    wait."""
    found = [] if waits else ["reads or writes before it waits for the kernel before"]
    limit = case.permutes
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
        row, waits = measure(case, target)
    except Exception as error:
        name = f"{target} {case.kernel.__name__} {case.config}"
        return None, [f"{name}: does not compile: {str(error).strip().splitlines()[-1:]}"]
    return row, [f"{target} {row.kernel} {row.config}: {fault}" for fault in faults(row, case, waits)]


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
                row
                for row in csv.DictReader(file)
                if row["triton"] not in releases or row["target"] not in targets or kernels not in row["kernel"]
            ]
    table.sort(key=lambda row: [row[name] for name in ("triton", "target", "kernel", "config")])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    sys.exit(main())
