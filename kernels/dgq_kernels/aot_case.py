"""What `aot` compiles: a kernel in one configuration. The operators' folders list theirs in a file `aot.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A kernel with its parameter types, constants and launch options.

    Attributes:
        integer: it must hold int8 products.
        permutes: byte permutes that its main loop may hold: more mean that int8 operands are taken apart.
    """

    kernel: Any
    config: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    integer: bool = True
    permutes: int | None = None


def case(
    kernel: Any,
    config: tuple[int, ...],
    pointers: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int = 3,
    note: str = "",
    integer: bool = True,
    permutes: int | None = None,
    registers: int | None = None,
) -> Case:
    """A case whose remaining parameters are int32 sizes, or float where the name says scale or eps; `registers` is the
    most that a thread may have."""
    types = {}
    for name in kernel.arg_names:
        if name in constants or name == "PDL":
            types[name] = "constexpr"
        else:
            types[name] = pointers.get(name, "fp32" if name.endswith("_scale") or name == "eps" else "i32")
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if registers is not None:
        options["maxnreg"] = registers
    label = "x".join(str(value) for value in config) + (f" {note}" if note else "")
    return Case(kernel, label, types, constants, options, integer, permutes)
