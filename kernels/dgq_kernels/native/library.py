"""The C++ library behind ctypes: its structures and functions as engine.cpp has them, how it is found, and which
instruction set is in use."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .build import DEFAULT, LIBRARY

ABI = 14
ISAS = ("portable", "avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-vbmi", "amx", "neon-dot", "neon-i8mm")
BLOCK = 16  # output channels in a block of the packed weight
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
Pointer = ctypes.c_void_p
Int, Long = ctypes.c_int32, ctypes.c_int64


class LayerStruct(ctypes.Structure):
    """`Layer` in engine.cpp."""

    _fields_ = (
        *((name, Pointer) for name in ("packed", "weight_scale", "column_sum", "bias", "inv_divisor")),
        *((name, Long) for name in ("n", "k", "channels")),
        *((name, Int) for name in ("bits", "kernel", "stride", "padding", "rotation", "group")),
    )


class StoredStruct(ctypes.Structure):
    """`Stored` in engine.cpp."""

    _fields_ = (
        *((name, Pointer) for name in ("weight", "packed", "subscales", "order")),
        *((name, Long) for name in ("n", "k", "channels", "group")),
    )


class NormStruct(ctypes.Structure):
    """`Norm` in engine.h."""

    _fields_ = (("gain", Pointer), ("shift", Pointer), ("eps", ctypes.c_float), ("groups", Int), ("silu", Int))


class AttentionStruct(ctypes.Structure):
    """`Attention` in engine.cpp."""

    _fields_ = (
        *((name, Pointer) for name in ("q", "k", "v", "out")),
        *((f"{tensor}_{axis}", Long) for tensor in "qkv" for axis in ("batch", "head", "token")),
        *((name, Long) for name in ("batch", "heads", "rows", "keys", "width")),
        ("logit_scale", ctypes.c_float),
        *((name, Int) for name in ("bits", "fraction_bits", "start_token", "qk_bits", "v_bits", "dtype")),
    )


STRUCTURES = (LayerStruct, StoredStruct, NormStruct, AttentionStruct)  # as dgq_struct_bytes numbers them
_NO_MEMORY = 1
_SIGNATURES: dict[str, tuple[type, Sequence[type]]] = {
    "dgq_abi": (Int, ()),
    "dgq_struct_bytes": (Long, (Int,)),
    "dgq_error": (ctypes.c_char_p, (Int,)),
    "dgq_supported": (Int, (Int,)),
    "dgq_use": (Int, (Int, Pointer)),
    "dgq_packed_bytes": (Long, (Long, Long, Long)),
    "dgq_pack": (Int, (Pointer, Long, Pointer, Pointer, Pointer, Int)),
    "dgq_unpack": (Int, (Pointer, Long, Long, Pointer, Int)),
    "dgq_check_layer": (Int, (Pointer,)),
    "dgq_linear": (
        Int,
        (Pointer, Long, Pointer, Long, Long, Int, Pointer, Pointer, Int, Pointer, Int),
    ),
    "dgq_conv2d": (
        Int,
        (Pointer, Pointer, Long, Long, Long, Int, Pointer, Pointer, Pointer, Pointer, Int),
    ),
    "dgq_group_norm": (Int, (Pointer, Pointer, *(Long,) * 4, Int, Pointer, Int)),
    "dgq_upsample": (Int, (Pointer, Pointer, Long, Long, Long, Int, Pointer, Int)),
    "dgq_attention": (Int, (Pointer, Int)),
    "dgq_round_columns": (
        Int,
        (*(Pointer, Long) * 3, *(Pointer,) * 3, Long, Long, ctypes.c_float, ctypes.c_float, Int),
    ),
    "dgq_search_subscales": (Int, (Pointer, Long, *(Pointer,) * 4, *(Long,) * 3, Int)),
}


class Engine:
    """The loaded library and the instruction set in use."""

    def __init__(self, library: ctypes.CDLL, region: int | None) -> None:
        self.library, self.region = library, region
        self.isas = [name for number, name in enumerate(ISAS) if library.dgq_supported(number)]
        self.isa = ""

    def use(self, isa: str) -> None:
        self.check(self.library.dgq_use(ISAS.index(isa), self.region))
        self.isa = isa

    def check(self, code: int) -> None:
        """Raise what a call's result stands for: MemoryError, or ValueError for arguments that it refused."""
        if code:
            text = self.library.dgq_error(code).decode()
            raise (MemoryError if code == _NO_MEMORY else ValueError)(f"the CPU engine: {text}")


def _parallel_region() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime torch has loaded (GNU's or LLVM's), so that there is one pool
    of threads in the process; None where there is none: one thread then."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    # the sixth field of a line is a path, which may have spaces
    paths = {fields[5] for fields in (line.split(maxsplit=5) for line in maps.splitlines()) if len(fields) > 5}
    names = sorted(path for path in paths if ".so" in path and "omp" in Path(path).name.lower())
    # other packages bring a runtime too, into an environment that may be called after torch
    names.sort(key=lambda name: not any("torch" in part for part in Path(name).parts[-3:]))
    for name in names:
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, Pointer).value
    return None


def _without(why: str) -> tuple[None, str]:
    """No engine; an error where the user named its library."""
    if LIBRARY != DEFAULT:
        raise ValueError(f"DGQ_CPU_LIBRARY={LIBRARY} is no CPU engine: {why}")
    return None, why


@functools.cache
def load() -> tuple[Engine | None, str]:
    """(the engine, "") or (None, why there is none)."""
    wish = os.environ.get("DGQ_CPU_ENGINE", "")
    if wish == "off":
        return None, "switched off by DGQ_CPU_ENGINE"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        sizes = [library.dgq_struct_bytes(i) for i in range(len(STRUCTURES))]
        if library.dgq_abi() != ABI or sizes != [ctypes.sizeof(struct) for struct in STRUCTURES]:
            return _without(f"{LIBRARY.name} belongs to another version: build it again")
    except (OSError, AttributeError) as error:
        if not LIBRARY.exists():
            why = "not built (a C++ compiler at installation builds it)"
        else:
            why = f"{LIBRARY.name} cannot be loaded ({error}): build it again"
        return _without(why)
    engine = Engine(library, _parallel_region())
    if wish and wish not in engine.isas:
        raise ValueError(f"DGQ_CPU_ENGINE={wish} is not one of off, {', '.join(engine.isas)} on this CPU")
    engine.use(wish or engine.isas[-1])
    return engine, ""


def available() -> bool:
    """Whether the engine is there.

    Raises:
        ValueError: DGQ_CPU_ENGINE asks for what this CPU has not, or DGQ_CPU_LIBRARY names no engine.
    """
    return load()[0] is not None


def describe() -> str:
    """The instruction set in use, or why there is no engine."""
    engine, why = load()
    return why if engine is None else engine.isa


def supported() -> list[str]:
    """The instruction sets of this CPU the engine can use, slowest first."""
    engine = load()[0]
    return engine.isas if engine is not None else []


def attention_pays() -> bool:
    """Whether `attention` is faster than float attention here: with AVX512 only. With AVX2 its products are 16-bit ones
    at little more than the rate of float32's, and codes and probabilities come on top (docs/cpu.md)."""
    engine = load()[0]
    return engine is not None and engine.isa.startswith(("avx512", "amx"))


def use(isa: str) -> str:
    """Switch to an instruction set of `supported()`; returns the one used before (for tests and comparisons)."""
    engine = loaded()
    before = engine.isa
    engine.use(isa)
    return before


def loaded() -> Engine:
    engine, why = load()
    if engine is None:
        raise RuntimeError(f"no CPU engine: {why}")
    return engine
