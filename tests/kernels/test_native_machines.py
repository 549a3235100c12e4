"""The CPU engine gives the same bits on every instruction set, from every compiler, on x86-64 and on aarch64.

native_cases.cpp is the engine with a main function that prints hashes of results. What an x86-64 machine prints is the
reference's (test_native.py); an emulator runs the others.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dgq_kernels import native
from dgq_kernels.native import build

SOURCE = Path(__file__).with_name("native_cases.cpp")
ROOT = Path(__file__).parents[2]
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"  # of Debian's cross compilers
ZIG = f"{ROOT}/build/tools/bin/python-zig c++ -target aarch64-linux-gnu.2.28"  # of `make wheel-aarch64`
COMPILED = native.available() or native.describe().startswith("switched off")

pytestmark = pytest.mark.skipif(not COMPILED, reason="the installation found no C++ compiler")


def compiled(compiler, folder, optimize):
    flags = [optimize if flag.startswith("-O") else flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    program = folder / "cases"
    subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    return program


def printed(*command):
    """{instruction set: {case: hash}}"""
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    results = {}
    for line in lines:
        isa, case, hashed = line.split()
        results.setdefault(isa, {})[case] = hashed
    return results


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(build.compiler(), tmp_path_factory.mktemp("own"), "-O1")


@pytest.fixture(scope="module")
def expected(program):
    results = printed(program)["portable"]
    assert len(set(results.values())) == len(results) > 50
    lived = [case.split("-lived-")[1].split("-of-") for case in results if "-lived-" in case]
    assert any(2 * int(some) < int(every) for some, every in lived)  # blocks of keys were passed over
    assert any(some == every for some, every in lived)
    return results


def test_instruction_sets_and_sizes_of_the_cache_change_no_bit(program, expected):
    for panel in ([], ["1"], ["60000"], ["100000000"]):  # bytes: a tile of rows at a time, some, all
        results = printed(program, *panel)
        assert list(results) == native.supported()
        assert all(result == expected for result in results.values())


def compilers(*named):
    return [pytest.param(shlex.split(command), id=Path(command.split()[0]).name) for command in named]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", compilers("g++", "clang++"))
def test_compilers_change_no_bit(compiler, expected, tmp_path):
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} here")
    results = printed(compiled(compiler, tmp_path, "-O3"))
    assert list(results) == native.supported()  # none that one compiler leaves out
    assert all(result == expected for result in results.values())


ARM = ("portable", "neon-dot", "neon-i8mm")
CPUS = {"cortex-a72": ARM[:1], "neoverse-n1": ARM[:2], "max": ARM}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", compilers("aarch64-linux-gnu-g++", ZIG))
def test_aarch64_gives_the_same_bits(compiler, expected, tmp_path):
    for tool in (compiler[0], "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here (make test-aarch64)")
    program = compiled(compiler, tmp_path, "-O3")
    for cpu, isas in CPUS.items():
        results = printed("qemu-aarch64", "-L", ARM_LIBRARIES, "-cpu", cpu, program)
        assert tuple(results) == isas, cpu
        assert all(result == expected for result in results.values()), cpu
