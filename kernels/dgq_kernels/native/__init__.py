"""The CPU engine: a layer's quantization, integer product and epilogue in one call, log attention, and the inner loops
of rounding a weight.

A small C++ library (engine.cpp) called through ctypes, without torch's dispatcher: a layer of a small model costs a
few microseconds beside its arithmetic. The instruction set (AMX, AVX512-VNNI, AVX-VNNI or AVX2; NEON's i8mm or dot
product; or portable C++) is chosen at run time; all give the same bits. Everything here is for CPU tensors without
gradients.

DGQ_CPU_ENGINE=off leaves it out; DGQ_CPU_ENGINE=avx2 (or another name of ISAS) forces an instruction set.
"""

from . import operators as operators
from .layers import Layer, Norm, TwoLevel, can_share, linear
from .library import ISAS, LIBRARY, attention_pays, available, describe, supported, use
from .log_attention import attention
from .memory import give_back, let_go, page_out, recycled
from .rounding import round_columns, search_subscales

__all__ = [
    "ISAS",
    "LIBRARY",
    "Layer",
    "Norm",
    "TwoLevel",
    "attention",
    "attention_pays",
    "available",
    "can_share",
    "describe",
    "give_back",
    "let_go",
    "linear",
    "page_out",
    "recycled",
    "round_columns",
    "search_subscales",
    "supported",
    "use",
]
