"""Compiles the CPU engine: a shared library with a plain C interface, independent of torch and of Python.

Run by the package's build (hatch_build.py); `python -m dgq_kernels.native.build` does it again by hand. The package
works without it: the ops then run on torch's own integer products.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DEFAULT = FOLDER / "libdgq_cpu.so"
# DGQ_CPU_LIBRARY names another file to build and load: one with sanitizers, for instance.
LIBRARY = Path(os.environ.get("DGQ_CPU_LIBRARY") or DEFAULT).absolute()
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # no contraction: every instruction set must give the reference's bits
]


def compiler() -> list[str]:
    """The C++ compiler: $CXX, or the one Python was built with, or c++."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def build(library: Path = LIBRARY) -> Path:
    """Compile the library to a file, by default the one that is loaded, and return its path.

    Raises:
        RuntimeError: no compiler, or it failed; the message holds its output.
    """
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    command = [*compiler(), *FLAGS, str(FOLDER / "engine.cpp"), "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror or error}") from None
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr.strip()}")
    partial.replace(library)
    return library


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as failure:
        sys.exit(f"the CPU engine was not built: {failure}")
