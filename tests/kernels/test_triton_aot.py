"""Every kernel compiles for real GPUs: int8 tensor-core products are there, nothing spills."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dgq_kernels

pytest.importorskip("triton")

FLOAT_KERNELS = {
    "quantize_rows_kernel",
    "quantize_long_rows_kernel",
    "group_statistics_kernel",
    "merge_parts_kernel",
    "sample_range_kernel",
    "quantize_samples_kernel",
    "base2_rows_kernel",
    "base2_kernel",
    "key_statistics_kernel",
    "key_codes_kernel",
    "sum_splits_kernel",
    "unscaled_product_kernel",
}


# Prints the kernels' divisions, square roots and fused products in PTX, one case a line.
LIST_ROUNDING = """
import collections, json, re
from dgq_kernels import aot
from dgq_kernels.log_attention import aot as attention
from dgq_kernels.quantize_activation import aot as quantize
seen = set()
for case in (*quantize.cases(9), *attention.cases(9)):
    kind = case.kernel.__name__, *(case.constants.get(name) for name in ("INPUT", "SILU", "ROTATION"))
    if kind not in seen:
        seen.add(kind)
        found = re.findall(r"\\b(?:div|sqrt|rsqrt|rcp|fma|mad)\\.[a-z.]*f32", aot.compile_case(case, "90").asm["ptx"])
        print(json.dumps([f"{case.kernel.__name__} {case.config}", collections.Counter(found)]))
"""

# Prints the shared memory and the spills of the published form's second pass on float32.
LIST_FLOAT32 = """
import dataclasses
from dgq_kernels import aot
from dgq_kernels.log_attention import aot as attention, triton as kernels
for case in attention.cases(8):
    if case.kernel is kernels.base2_kernel and case.constants["HEAD_DIM"] in (128, 160):
        tile = kernels.base2_config_for(case.constants["WIDTH"], 8, 4)
        own = {"BLOCK_ROWS": tile.rows, "BLOCK_KEYS": tile.keys}
        types = {name: "*fp32" if kind == "*fp16" else kind for name, kind in case.types.items()}
        options = {**case.options, "num_warps": tile.warps, "num_stages": tile.stages}
        case = dataclasses.replace(case, types=types, constants=case.constants | own, options=options)
        row, _ = aot.measure(case, "86")
        print(row.shared, row.spills)
"""


def uninterpreted(*command):
    """What a Python process without the interpreter prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table for one target per kernel family of instructions; in a process without the interpreter."""
    path = tmp_path_factory.mktemp("aot") / "aot.csv"
    uninterpreted("-m", "dgq_kernels.aot", "--csv", str(path), "--quick", "--targets", "80", "90")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_kernel_compiles_for_every_target(table):
    kernels = {
        "linear_int8_kernel",
        "linear_int4_kernel",
        "linear_float_groups_kernel",
        "conv2d_int8_kernel",
        "conv2d_int4_kernel",
        "log_attention_kernel",
        "running_kernel",
        *FLOAT_KERNELS,
    }
    assert {(row["target"], row["kernel"]) for row in table} == {
        (target, kernel) for target in ("80", "90") for kernel in kernels
    }


def test_products_are_int8_and_nothing_spills(table):
    for row in table:
        assert row["kernel"] in FLOAT_KERNELS or re.match(r"IG?MMA", row["mma"]), row
        assert int(row["spills"]) == 0, row
        assert int(row["registers"]) <= 255, row


def test_plain_int8_operands_stay_packed(table):
    """Not one byte permute in the plain int8 product, in the main loop, a handful in the int4 one."""
    for row in table:
        if "int8" in row["kernel"]:
            assert int(row["prmt"]) == 0, row
        if "int4" in row["kernel"]:
            assert int(row["prmt"]) < 8, row


def test_quantizers_round_as_the_reference():
    """No approximate division or root, no fused product, where the interpreter would not show it: left are GELU's and
    SiLU's own, which the reference computes in another way too. (`log_attention_base2` is not of integers.)"""
    cases = [json.loads(line) for line in uninterpreted("-c", LIST_ROUNDING).splitlines()]
    assert len(cases) > 20
    assert any(found.get("div.rn.f32") for _, found in cases)
    for case, found in cases:
        if "base2" not in case:
            allowed = {"div.full.f32"} if "silu" in case else {"fma.rn.ftz.f32"} if "geglu" in case else set()
            assert set(found) <= {"div.rn.f32", "sqrt.rn.f32", *allowed}, case


def test_float32_fits_into_small_shared_memories():
    """The 99 KiB of 8.6, 8.9 and 12.0."""
    used = [tuple(map(int, line.split())) for line in uninterpreted("-c", LIST_FLOAT32).splitlines()]
    assert len(used) == 2
    assert all(shared <= 99 * 1024 and not spills for shared, spills in used), used


@pytest.mark.parametrize("target", ["80", "86", "89"])
@pytest.mark.parametrize("kernel", ["linear", "conv2d"])
def test_the_table_keeps_the_main_loops_short(kernel, target):
    """aot.csv of the package, by every release: int4 at most 40% above int8 in its tile, shift classes at most 2%."""
    with Path(dgq_kernels.__file__).with_name("aot.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == target and row["kernel"].startswith(kernel)]
    for release in {row["triton"] for row in rows}:
        mine = [row for row in rows if row["triton"] == release and int(row["loop_mma"])]  # 0: the loop was not found
        loops = {row["config"]: int(row["loop"]) for row in mine}
        beside = next(config for config in loops if config.endswith(" beside int4"))
        tile = beside.split()[0]
        for group in (32, 64):
            assert loops[f"{tile} group={group}"] <= 1.4 * loops[beside], (release, group)
        tiles = [config.split()[0] for config in loops if config.endswith("classes=3")]
        shared = [tile for tile in tiles if f"{tile} classes=1" in loops]
        assert len(shared) >= 2
        for tile in shared:
            assert loops[f"{tile} classes=3"] <= 1.02 * loops[f"{tile} classes=1"], (release, tile)


def test_a_part_of_the_table_replaces_its_own_rows(tmp_path):
    from dgq_kernels import aot

    def row(release, target, kernel, registers):
        return aot.Row(release, target, kernel, "64x64", registers, *(0,) * 2, "-", *(0,) * 8)

    path = tmp_path / "aot.csv"
    every = [row("3.6.0", "80", "a_kernel", 1), row("3.9.0", "80", "b_kernel", 2), row("3.9.0", "90", "b_kernel", 3)]
    aot.write(path, [*every, row("3.9.0", "90", "a_kernel", 4)])
    aot.write(path, [row("3.9.0", "90", "a_kernel", 9)], ["90"], "a_")
    with path.open(newline="") as file:
        got = [(x["triton"], x["target"], x["kernel"], int(x["registers"])) for x in csv.DictReader(file)]
    assert got == [
        ("3.6.0", "80", "a_kernel", 1),
        ("3.9.0", "80", "b_kernel", 2),
        ("3.9.0", "90", "a_kernel", 9),
        ("3.9.0", "90", "b_kernel", 3),
    ]
