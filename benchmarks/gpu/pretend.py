"""A pretended CUDA device, of compute capability 9.0 unless another is asked for: Triton specialises and compiles each
launch for it, nothing runs.

Triton must not have been imported for its interpreter before.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from dgq_kernels import backend
from dgq_kernels.linear import tiles
from dgq_kernels.log_attention import triton as attention

HOPPER = tiles.Machine((9, 0), 132, 50 * 2**20, 12.8)
MOST_SHARED = 227 * 1024  # bytes a block may ask for
MOST_STACK = 16  # bytes: arguments of calls; more is a spill
CURRENT = [0]  # the device that is current


class Driver:
    """What Triton asks of a device, but for running: loading a kernel tells what it needs, launching it is noted."""

    def __init__(
        self, loaded: Callable[..., None], launched: Callable[..., None], machine: tiles.Machine, shared: int
    ) -> None:
        self.loaded, self.launched = loaded, launched
        major, minor = machine.capability
        self.utils = self
        self.get_current_device = lambda: CURRENT[0]
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", 10 * major + minor, 32)
        self.get_device_properties = lambda device: {"max_shared_mem": shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used = re.search(r"REG:(\d+) STACK:(\d+)", said)
        assert used is not None, said
        registers, stack = map(int, used.groups())
        self.loaded(kernel=name, registers=registers, stack=stack, shared=shared)
        return object(), object(), registers, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: object, *rest: Any) -> None:
            assert metadata.launch_pdl == rest[-1], f"{metadata.name} waits where it may start early, and only there"
            self.launched(metadata.name, CURRENT[0], function, rest[4:])

        return launch

    def unload_module(self, module: object) -> None:
        pass


def pretend(
    loaded: Callable[..., None],
    launched: Callable[..., None] = lambda *_: None,
    machine: tiles.Machine = HOPPER,
    shared: int = MOST_SHARED,
) -> None:
    """From here on operators launch there whatever device their tensors are on.

    Args:
        loaded: told kernel, registers, stack and shared (bytes) of each kernel that was compiled.
        launched: told of each launch: the kernel's name, the device, which compiled kernel, its arguments.
        machine: the device.
        shared: bytes of shared memory that a block of it may ask for.
    """
    triton.runtime.driver.set_active(Driver(loaded, launched, machine, shared))
    os.environ["DGQ_BACKEND"] = "triton"
    backend.launches = lambda device: True  # type: ignore[assignment]
    tiles._machine = lambda device: machine  # type: ignore[assignment]
    attention._major = lambda device: machine.capability[0]  # type: ignore[assignment]
    importlib.import_module("dgq_kernels.log_attention").FORCED = False  # as on a real one
