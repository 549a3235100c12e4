"""The CPU engine: a layer's quantization, integer product and epilogue in one call, and log attention.

A small C++ library (engine.cpp) called through ctypes, without torch's dispatcher: a layer of a small model costs a
few microseconds beside its arithmetic. The instruction set (AMX, AVX512-VNNI, AVX-VNNI, AVX2 or portable C++) is
chosen at run time; all give the same bits. Everything here is for CPU tensors without gradients.

DGQ_CPU_ENGINE=off leaves it out; DGQ_CPU_ENGINE=avx2 (or another name of ISAS) forces an instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .build import LIBRARY

ABI = 4
ISAS = ("portable", "avx2", "avx-vnni", "avx512-vnni", "avx512-vbmi", "amx")
BLOCK = 16  # output channels in a block of the packed weight
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_Pointer = ctypes.c_void_p
_Int, _Long = ctypes.c_int32, ctypes.c_int64


class _Layer(ctypes.Structure):
    """`Layer` in engine.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("packed", "weight_scale", "column_sum", "bias", "inv_divisor")),
        *((name, _Long) for name in ("n", "k", "channels")),
        *((name, _Int) for name in ("bits", "kernel", "stride", "padding")),
    )


class _Stored(ctypes.Structure):
    """`Stored` in engine.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("weight", "packed", "subscales", "order")),
        *((name, _Long) for name in ("n", "k", "channels", "group")),
    )


class _Norm(ctypes.Structure):
    """`Norm` in engine.h."""

    _fields_ = (("gain", _Pointer), ("shift", _Pointer), ("eps", ctypes.c_float), ("groups", _Int), ("silu", _Int))


class _Attention(ctypes.Structure):
    """`Attention` in engine.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("q", "k", "v", "out")),
        *((f"{tensor}_{axis}", _Long) for tensor in "qkv" for axis in ("batch", "head", "token")),
        *((name, _Long) for name in ("batch", "heads", "rows", "keys", "width")),
        ("logit_scale", ctypes.c_float),
        *((name, _Int) for name in ("bits", "fraction_bits", "start_token", "qk_bits", "v_bits", "dtype")),
    )


_SIGNATURES: dict[str, tuple[type | None, Sequence[type]]] = {
    "dgq_abi": (_Int, ()),
    "dgq_supported": (_Int, (_Int,)),
    "dgq_use": (None, (_Int, _Pointer)),
    "dgq_packed_bytes": (_Long, (_Long, _Long)),
    "dgq_pack": (_Int, (_Pointer, _Pointer, _Pointer, _Pointer, _Int)),
    "dgq_linear": (
        _Int,
        (_Pointer, _Long, _Pointer, _Long, _Long, _Int, _Pointer, _Pointer, _Int, _Pointer, _Int),
    ),
    "dgq_conv2d": (
        _Int,
        (_Pointer, _Pointer, _Long, _Long, _Long, _Int, _Pointer, _Pointer, _Pointer, _Pointer, _Int),
    ),
    "dgq_attention": (_Int, (_Pointer, _Int)),
}


class _Engine:
    """The loaded library and the instruction set in use."""

    def __init__(self, library: ctypes.CDLL, region: int | None) -> None:
        self.library, self.region = library, region
        self.isas = [name for number, name in enumerate(ISAS) if library.dgq_supported(number)]
        self.isa = ""

    def use(self, isa: str) -> None:
        self.library.dgq_use(ISAS.index(isa), self.region)
        self.isa = isa


def _parallel_region() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime torch has loaded (GNU's or LLVM's), so that there is one pool
    of threads in the process; None where there is none: one thread then."""
    try:
        maps = Path("/proc/self/maps").read_text().split()
    except OSError:
        return None
    names = sorted({part for part in maps if ".so" in part and "omp" in Path(part).name.lower()})
    names.sort(key=lambda name: "torch" not in name)
    for name in names:
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, _Pointer).value
    return None


@functools.cache
def _load() -> tuple[_Engine | None, str]:
    """(the engine, "") or (None, why there is none)."""
    wish = os.environ.get("DGQ_CPU_ENGINE", "")
    if wish == "off":
        return None, "switched off by DGQ_CPU_ENGINE"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        if library.dgq_abi() != ABI:
            return None, f"{LIBRARY.name} belongs to another version: build it again"
    except (OSError, AttributeError):
        return None, "not built (a C++ compiler at installation builds it)"
    engine = _Engine(library, _parallel_region())
    if wish and wish not in engine.isas:
        raise ValueError(f"DGQ_CPU_ENGINE={wish} is not one of off, {', '.join(engine.isas)} on this CPU")
    engine.use(wish or engine.isas[-1])
    return engine, ""


def page_out(tensor: Tensor) -> None:
    """Tell the system that a tensor's memory is not needed for now: pages of a mapped file leave the resident set, and
    come back from the file when they are read. A hint; does nothing where the system has none."""
    page, advice = mmap.PAGESIZE, 21  # MADV_PAGEOUT
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // page) * page, end // page * page
    if last > first and sys.platform == "linux":
        ctypes.CDLL(None).madvise(_Pointer(first), ctypes.c_size_t(last - first), _Int(advice))


def available() -> bool:
    """Whether the engine is there.

    Raises:
        ValueError: DGQ_CPU_ENGINE asks for what this CPU has not.
    """
    return _load()[0] is not None


def describe() -> str:
    """The instruction set in use, or why there is no engine."""
    engine, why = _load()
    return why if engine is None else engine.isa


def supported() -> list[str]:
    """The instruction sets of this CPU the engine can use, slowest first."""
    engine = _load()[0]
    return engine.isas if engine is not None else []


def attention_pays() -> bool:
    """Whether `attention` is faster than float attention here: with AVX512 only. Without VNNI its products are 16-bit
    ones at the rate of float32's, and codes and probabilities come on top (docs/cpu.md)."""
    engine = _load()[0]
    return engine is not None and engine.isa.startswith(("avx512", "amx"))


def use(isa: str) -> str:
    """Switch to an instruction set of `supported()`; returns the one used before (for tests and comparisons)."""
    engine = _engine()
    before = engine.isa
    engine.use(isa)
    return before


def _engine() -> _Engine:
    engine, why = _load()
    if engine is None:
        raise RuntimeError(f"no CPU engine: {why}")
    return engine


def _check(code: int) -> None:
    if code:
        raise MemoryError("the CPU engine is out of memory")


@dataclass(frozen=True)
class Norm:
    """A normalization that a layer applies to its input before it quantizes it.

    Attributes:
        gain, shift: float32 (C,).
        eps: added to the variance.
        groups: of channels, over the whole picture (convolutions); 0 for a LayerNorm (linear layers).
        silu: x * sigmoid(x) afterwards (convolutions).
    """

    gain: Tensor
    shift: Tensor
    eps: float
    groups: int = 0
    silu: bool = False

    def _struct(self, channels: int) -> _Norm:
        assert self.gain.dtype == self.shift.dtype == torch.float32
        if self.gain.shape != (channels,) or self.shift.shape != (channels,):
            raise ValueError(f"a norm of {channels} channels expected, got {tuple(self.gain.shape)}")
        if self.groups and channels % self.groups:
            raise ValueError(f"{channels} channels are not whole groups of {self.groups}")
        gain, shift = self.gain.contiguous(), self.shift.contiguous()
        struct = _Norm(gain.data_ptr(), shift.data_ptr(), self.eps, self.groups, self.silu)
        struct.kept = gain, shift
        return struct


class TwoLevel(NamedTuple):
    """A two-level int4 weight (N, k) as `packing` lays it out: uint8 `packed` and `subscales`, in groups of `group`."""

    packed: Tensor
    subscales: Tensor
    k: int
    group: int


class Layer:
    """The weight of a linear layer or convolution, packed for the engine.

    Args:
        weight: int8 (N, K) or two-level int4, K = kernel^2 * C in the order (row, column, channel).
        weight_scale: float32 (N,).
        bias: float32 (N,) or None.
        inv_divisor: float32 (C,) or None.
        bits: of the activation codes, 2 to 8.
        kernel, stride, padding: of a convolution; 1, 1, 0 for a linear layer.
        order: int32 (C,), the natural channel that the weight stores at each place; None where they are the same.

    Attributes:
        column_sum: int32 (N,), sums of the weight over K.

    Raises:
        OverflowError: a sum of products could leave int32.
    """

    def __init__(
        self, weight: Tensor | TwoLevel, weight_scale: Tensor, bias: Tensor | None, inv_divisor: Tensor | None,
        bits: int, kernel: int = 1, stride: int = 1, padding: int = 0, order: Tensor | None = None,
    ) -> None:  # fmt: skip
        library = _engine().library
        if isinstance(weight, TwoLevel):
            tensors = {"packed": weight.packed.contiguous(), "subscales": weight.subscales.contiguous()}
            self.n, self.k, group = weight.packed.shape[0], weight.k, weight.group
        else:
            tensors = {"weight": weight.contiguous()}
            (self.n, self.k), group = weight.shape, 0
        if order is not None:
            tensors["order"] = order.to(torch.int32).contiguous()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.bits, self.divided = bits, inv_divisor is not None
        channels = self.k // kernel**2
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        stored = _Stored(n=self.n, k=self.k, channels=channels, group=group, **pointers)
        size = library.dgq_packed_bytes(self.n, self.k)
        self.packed_k = size // (-(-self.n // (2 * BLOCK)) * 2 * BLOCK)
        self.packed = torch.empty(size + 63, dtype=torch.int8)
        start = self.packed.data_ptr() + 63 & ~63  # whole cache lines
        self.column_sum, sizes = torch.empty(self.n, dtype=torch.int32), torch.empty(self.n, dtype=torch.int64)
        sums = self.column_sum.data_ptr(), sizes.data_ptr()
        _check(library.dgq_pack(ctypes.addressof(stored), start, *sums, torch.get_num_threads()))
        if self.n and int(sizes.max()) * (2**bits - 1) >= 2**31:
            raise OverflowError(f"a sum over {self.k} products could overflow int32")
        vectors = [x if x is None else x.contiguous() for x in (weight_scale, self.column_sum, bias, inv_divisor)]
        for vector, dtype in zip(vectors, (torch.float32, torch.int32, torch.float32, torch.float32), strict=True):
            assert vector is None or vector.dtype == dtype
        self._kept = vectors
        addresses = [None if x is None else x.data_ptr() for x in vectors]
        self._struct = _Layer(start, *addresses, self.n, self.k, channels, bits, kernel, stride, padding)
        self._address = ctypes.addressof(self._struct)
        self._linear, self._conv2d = library.dgq_linear, library.dgq_conv2d

    def weight(self) -> Tensor:
        """The int8 matrix (N, K) the layer was made of, from its blocks."""
        start = -self.packed.data_ptr() % 64
        blocks = self.packed[start : start + self.packed.numel() - 63].view(-1, self.packed_k // 4, BLOCK, 4)
        return blocks.transpose(1, 2).reshape(-1, self.packed_k)[: self.n, : self.k].contiguous()

    @staticmethod
    def _check_input(x: Tensor, channels: int, expected: int) -> None:
        """The library trusts the sizes it is given."""
        if channels != expected:
            raise ValueError(f"{expected} input channels expected, got an input of {tuple(x.shape)}")
        if x.device.type != "cpu":
            raise ValueError(f"the CPU engine cannot read an input on {x.device}")

    @property
    def can_gate(self) -> bool:
        """Whether `linear` can gate: both halves of the outputs are whole blocks."""
        return self.n % (2 * BLOCK) == 0

    def linear(
        self, x: Tensor, residual: Tensor | None = None, gated: bool = False, norm: Norm | None = None
    ) -> Tensor:
        """x (..., K) times the weight: (..., N) in x's dtype, plus `residual` (shaped alike).

        With `gated` the result is (..., N / 2): value * gelu(gate), where the value is the first half of the outputs
        and the gate the second (GELU by the error function, to 1e-6 of the gate's size).

        Raises:
            ValueError: x has another number of channels, or is not on the CPU; `gated` with a residual, or where
                `can_gate` is false; a norm of groups, or of other channels.
        """
        return linear([self], x, residual, gated, norm)[0]

    def conv2d(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """x (B, C, H, W) convolved: (B, N, Ho, Wo), channels-last, in x's dtype, plus `residual` (shaped alike).

        `sample_bias`, float32 (B, N), takes the place of the layer's bias.

        Raises:
            ValueError: x is not 4-D, has other channels, is smaller than the kernel, or is not on the CPU;
                `sample_bias` has another shape; a norm without groups or of other channels, or before a layer with
                divisors.
        """
        self._check_input(x, x.shape[1] if x.dim() == 4 else -1, self.k // self.kernel**2)
        if min(x.shape[2:]) + 2 * self.padding < self.kernel:
            raise ValueError(f"input {tuple(x.shape)} is smaller than the kernel of {self.kernel}")
        if sample_bias is not None:
            if sample_bias.shape != (x.shape[0], self.n):
                raise ValueError(f"sample_bias {(x.shape[0], self.n)} expected, got {tuple(sample_bias.shape)}")
            sample_bias = sample_bias.float().contiguous()
        dtype = _DTYPES.get(x.dtype)
        if dtype is None:
            half = None if residual is None else residual.float()
            return self.conv2d(x.float(), half, sample_bias, norm).to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        size = [(side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (height, width)]
        y = torch.empty((batch, self.n, *size), dtype=x.dtype, memory_format=torch.channels_last)
        kept = None
        if residual is not None:
            kept = residual.to(x.dtype).expand(y.shape).contiguous(memory_format=torch.channels_last)
        if not batch:
            return y
        if norm is not None and (not norm.groups or self.divided):
            raise ValueError("a convolution's norm has groups, and no divisors behind it")
        before = None if norm is None else norm._struct(x.shape[1])
        pointers = [None if t is None else t.data_ptr() for t in (sample_bias, kept)]
        _check(
            self._conv2d(
                self._address, x.data_ptr(), batch, height, width, dtype,
                None if before is None else ctypes.addressof(before), *pointers, y.data_ptr(),
                torch.get_num_threads(),
            )
        )  # fmt: skip
        return y


def linear(
    layers: Sequence[Layer], x: Tensor, residual: Tensor | None = None, gated: bool = False, norm: Norm | None = None
) -> list[Tensor]:
    """`Layer.linear` of layers that share an input, which is normalized and quantized once.

    Raises:
        ValueError: as `Layer.linear`; the layers differ in sizes or bits, or have divisors of their own
            (`can_share`); several of them with a residual.
    """
    one = layers[0]
    one._check_input(x, x.shape[-1], one.k)
    if gated and (residual is not None or not one.can_gate):
        raise ValueError(f"{one.n} outputs cannot be gated in blocks of {BLOCK}, or beside a residual")
    if len(layers) > 1 and (residual is not None or not can_share(layers)):
        raise ValueError("layers that share an input need equal sizes and bits, and no divisors or residual")
    if norm is not None and norm.groups:
        raise ValueError("a linear layer's norm has no groups")
    dtype = _DTYPES.get(x.dtype)
    if dtype is None:
        full = linear(layers, x.float(), None if residual is None else residual.float(), gated, norm)
        return [y.to(x.dtype) for y in full]
    rows = x.reshape(-1, one.k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    n = one.n // 2 if gated else one.n
    outputs = [torch.empty((*x.shape[:-1], n), dtype=x.dtype) for _ in layers]
    if rows.shape[0]:
        kept = None if residual is None else residual.to(x.dtype).expand(outputs[0].shape).contiguous()
        before = None if norm is None else norm._struct(one.k)
        pointers = _Pointer * len(layers)
        _check(
            one._linear(
                pointers(*(layer._address for layer in layers)), len(layers), rows.data_ptr(), rows.stride(0),
                rows.shape[0], dtype, None if before is None else ctypes.addressof(before),
                None if kept is None else kept.data_ptr(), gated, pointers(*(y.data_ptr() for y in outputs)),
                torch.get_num_threads(),
            )
        )  # fmt: skip
    return outputs


def can_share(layers: Sequence[Layer]) -> bool:
    """Whether layers can share the codes of one input."""
    kinds = {(layer.n, layer.k, layer.bits) for layer in layers}
    return len(kinds) == 1 and not any(layer.divided for layer in layers)


def attention(
    q: Tensor, k: Tensor, v: Tensor, logit_scale: float, bits: int, fraction_bits: int, start_token: bool,
    qk_bits: int, v_bits: int,
) -> Tensor:  # fmt: skip
    """`dgq_kernels.log_attention` with integer operands (qk_bits and v_bits not 0).

    Args:
        logit_scale: scale * log2(e). The others as in `log_attention`; q, k, v may be strided, but for their last axis.

    Returns:
        (B, H, T, d), a view of (B, T, H, d).
    """
    dtype = _DTYPES.get(q.dtype)
    if dtype is None:
        args = (logit_scale, bits, fraction_bits, start_token, qk_bits, v_bits)
        return attention(q.float(), k.float(), v.float(), *args).to(q.dtype)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, rows, width = q.shape
    out = torch.empty((batch, rows, heads, width), dtype=q.dtype)
    strides = [x.stride(axis) for x in (q, k, v) for axis in range(3)]
    job = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *strides, batch, heads, rows, k.shape[2], width,
        logit_scale, bits, fraction_bits, start_token, qk_bits, v_bits, dtype,
    )  # fmt: skip
    if out.numel():
        _check(_engine().library.dgq_attention(ctypes.addressof(job), torch.get_num_threads()))
    return out.transpose(1, 2)
