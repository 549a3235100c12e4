"""Launches of Triton kernels that take little of the host's time.

At each launch Triton binds the arguments by name and looks at every one to find the compiled kernel they want: 20 to 40
microseconds, where the device runs most kernels in less. Here one dictionary finds it, by the arguments themselves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

_MOST = 16384  # launches that are remembered: forms of calls are many where sizes vary without end
# What a launch depends on -> the compiled kernel, its compile-time arguments, the kernel (whose id is in the key).
_known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes its host two microseconds."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the current device and stream.

    Args:
        kernel: decorated by `triton.jit`.
        grid: programs along each axis.
        arguments: its first ones, those of run time: tensors, numbers and None.
        constants: its other ones, and Triton's options.
    """
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if type(kernel) is not JITFunction or (enter and enter.calls) or (leave and leave.calls):
        kernel[grid](*arguments, **constants)  # interpreted, or watched by a profiler
        return
    active = driver.active
    device = active.get_current_device()
    # Triton specializes numbers by less than their values, and pointers by this.
    key = (
        id(kernel),
        device,
        *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else x for x in arguments],
        *constants,
        *constants.values(),
    )
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST:
            _known.clear()
        compiled = kernel[grid](*arguments, **constants)
        _known[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :]), kernel
        return
    compiled, rest, _ = known
    stream = active.get_current_stream(device)
    # as Triton's own launch ends, without what hooks take
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *rest)
