"""The machine that a measurement is made on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from dgq_kernels import backend, native

from .version import __version__

# The instruction sets that decide how fast int8 and bfloat16 are
ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where a measurement was made, as a JSON object."""
    device = device or torch.device("cpu")
    kernels, reason = describe_backend(device)
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_flags": isa_flags(),
        "cpu_path": backend.cpu_path(),
        "cpu_engine": engine_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": kernels,
        "backend_reason": reason,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dgq": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Those of `ISA_FLAGS` that the CPU has; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            present = set(found[1].split())
            return [flag for flag in ISA_FLAGS if flag in present]
    return []


def describe_backend(device: torch.device) -> tuple[str, str]:
    """`backend.describe`, with a bad DGQ_BACKEND as an answer rather than an error."""
    try:
        return backend.describe(device)
    except ValueError as error:
        return "none", str(error)


def engine_name() -> str:
    """`native.describe`, with a bad DGQ_CPU_ENGINE as an answer rather than an error."""
    try:
        return native.describe()
    except ValueError as error:
        return str(error)
