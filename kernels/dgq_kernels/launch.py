"""Launches of Triton kernels that take little of the host's time, and of the device's.

At each launch Triton binds the arguments by name and looks at every one to find the compiled kernel they want: 20 to 40
microseconds, where the device runs most kernels in less. Here one dictionary finds it, by the arguments themselves.

On devices of 9.0 and newer a kernel's programs are placed while the kernel before it ends (CUDA's programmatic
dependent launch, which graphs keep), and wait in `await_previous`.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

from . import async_wgmma
from .backend import check_capability

_MOST = 16384  # launches that are remembered: forms of calls are many where sizes vary without end
# What a launch depends on -> the compiled kernel, its compile-time arguments, the kernel (whose id is in the key).
_known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
_finding = threading.Lock()
# Whether kernels are launched before the one before them has ended, where the device can; DGQ_PDL=0: they are not.
DEPENDENT = os.environ.get("DGQ_PDL") != "0"


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes its host two microseconds."""
    return -(-a // b)


@triton.jit
def await_previous(PDL: tl.constexpr):
    """The first statement of every kernel: wait until the kernel before it on the stream has ended and what it wrote is
    visible, then let the next one be placed. No program may read, write or return before: who waits for this kernel
    counts on it to have waited for the one before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def _has_dependent(device: int) -> bool:
    """Whether the device, the current one, has launches that wait in `await_previous`."""
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


@functools.cache
def _check(device: int) -> None:
    """Refuse the device, the current one, where kernels do not compile for it (ValueError)."""
    target = driver.active.get_current_target()
    if target.backend == "cuda":
        check_capability(*divmod(target.arch, 10))


def _dependent(device: int) -> dict[str, bool]:
    """What makes a launch one that waits in `await_previous`; nothing where that cannot be, or is not wanted."""
    return {"PDL": True, "launch_pdl": True} if DEPENDENT and _has_dependent(device) else {}


def _found(
    kernel: Any, grid: tuple[int, int, int], device: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], Any]:
    """What `_known` is to hold of a launch: compiled, and on the device."""
    _check(device)
    constants |= _dependent(device)
    with _finding:
        if len(_known) >= _MOST:
            _known.clear()
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        if async_wgmma.ASKED:
            compiled = async_wgmma.edited(compiled)
        # loads it: meanwhile another thread would find it launchable, and launch nothing
        compiled.run  # noqa: B018
    every = {"PDL": False, **constants}
    return compiled, tuple(every[name] for name in kernel.arg_names[len(arguments) :]), kernel


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the current device and stream.

    Args:
        kernel: decorated by `triton.jit`; it begins with `await_previous(PDL)`, its last constant.
        grid: programs along each axis.
        arguments: its first ones, those of run time: tensors, numbers and None.
        constants: its other ones, and Triton's options.
    """
    if type(kernel) is not JITFunction:
        kernel[grid](*arguments, **constants)  # interpreted
        return
    active = driver.active
    device = active.get_current_device()
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if (enter and enter.calls) or (leave and leave.calls):  # watched by a profiler
        kernel[grid](*arguments, **constants, **_dependent(device))
        return
    # Triton specializes numbers by less than their values, and pointers by this.
    key = (
        id(kernel),
        device,
        DEPENDENT,
        async_wgmma.ASKED,
        *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else x for x in arguments],
        *constants,
        *constants.values(),
    )
    known = _known.get(key)
    if known is None:
        known = _known[key] = _found(kernel, grid, device, arguments, constants)
    compiled, rest, _ = known
    stream = active.get_current_stream(device)
    # as Triton's own launch ends, without what hooks take
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *rest)
