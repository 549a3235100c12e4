"""The CPU engine: a layer's quantization, integer product and epilogue in one call, log attention, and the inner loops
of rounding a weight.

A small C++ library (engine.cpp) called through ctypes, without torch's dispatcher: a layer of a small model costs a
few microseconds beside its arithmetic. The instruction set (AMX, AVX512-VNNI, AVX-VNNI or AVX2; NEON's i8mm or dot
product; or portable C++) is chosen at run time; all give the same bits. Everything here is for CPU tensors without
gradients.

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

ABI = 8
ISAS = ("portable", "avx2", "avx-vnni", "avx512-vnni", "avx512-vbmi", "amx", "neon-dot", "neon-i8mm")
BLOCK = 16  # output channels in a block of the packed weight
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_Pointer = ctypes.c_void_p
_Int, _Long = ctypes.c_int32, ctypes.c_int64


class _Layer(ctypes.Structure):
    """`Layer` in engine.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("packed", "weight_scale", "column_sum", "bias", "inv_divisor")),
        *((name, _Long) for name in ("n", "k", "channels")),
        *((name, _Int) for name in ("bits", "kernel", "stride", "padding", "rotation")),
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


_STRUCTURES = (_Layer, _Stored, _Norm, _Attention)  # as dgq_struct_bytes numbers them
_NO_MEMORY = 1
_SIGNATURES: dict[str, tuple[type, Sequence[type]]] = {
    "dgq_abi": (_Int, ()),
    "dgq_struct_bytes": (_Long, (_Int,)),
    "dgq_error": (ctypes.c_char_p, (_Int,)),
    "dgq_supported": (_Int, (_Int,)),
    "dgq_use": (_Int, (_Int, _Pointer)),
    "dgq_packed_bytes": (_Long, (_Long, _Long)),
    "dgq_pack": (_Int, (_Pointer, _Pointer, _Pointer, _Pointer, _Int)),
    "dgq_check_layer": (_Int, (_Pointer,)),
    "dgq_linear": (
        _Int,
        (_Pointer, _Long, _Pointer, _Long, _Long, _Int, _Pointer, _Pointer, _Int, _Pointer, _Int),
    ),
    "dgq_conv2d": (
        _Int,
        (_Pointer, _Pointer, _Long, _Long, _Long, _Int, _Pointer, _Pointer, _Pointer, _Pointer, _Int),
    ),
    "dgq_attention": (_Int, (_Pointer, _Int)),
    "dgq_round_columns": (
        _Int,
        (*(_Pointer, _Long) * 3, *(_Pointer,) * 3, _Long, _Long, ctypes.c_float, ctypes.c_float, _Int),
    ),
    "dgq_search_subscales": (_Int, (_Pointer, _Long, *(_Pointer,) * 4, *(_Long,) * 3, _Int)),
}


class _Engine:
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
        sizes = [library.dgq_struct_bytes(i) for i in range(len(_STRUCTURES))]
        if library.dgq_abi() != ABI or sizes != [ctypes.sizeof(struct) for struct in _STRUCTURES]:
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


def give_back() -> None:
    """Return to the system what was freed of this process's heap, which else may stay as large as its fragments make
    it; does nothing where the C library has no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


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


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """ValueError where a tensor is not what the library will read."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu:
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: {dtype} {shape} on the CPU expected, got {got}")


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor in one piece; ValueError where it is not what the library will read."""
    _expect(name, tensor, dtype, *shape)
    return tensor.contiguous()


def _other_channels(expected: int, x: Tensor) -> ValueError:
    return ValueError(f"{expected} input channels expected, got an input of {tuple(x.shape)}")


def _on_cpu(tensor: Tensor | None, what: str) -> None:
    """The library cannot see what lies behind a pointer."""
    if tensor is not None and not tensor.is_cpu:
        raise ValueError(f"the CPU engine cannot read {what} on {tensor.device}")


def _laid_out(residual: Tensor, y: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A residual as the library adds it to y: most are, and then no operator is called."""
    if residual.dtype != y.dtype:
        residual = residual.to(y.dtype)
    if residual.shape != y.shape:
        residual = residual.expand(y.shape)
    return residual.contiguous(memory_format=memory_format)


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

    @functools.cached_property
    def _structs(self) -> dict[int, tuple[int, _Norm]]:
        return {}

    def _address(self, channels: int) -> int:
        """Of what the library reads before a layer of so many channels; checked and made once."""
        known = self._structs.get(channels)
        if known is None:
            gain, shift = (
                _checked(f"a norm of {channels} channels", tensor, torch.float32, channels)
                for tensor in (self.gain, self.shift)
            )
            struct = _Norm(gain.data_ptr(), shift.data_ptr(), self.eps, self.groups, self.silu)
            struct.kept = gain, shift
            known = self._structs[channels] = ctypes.addressof(struct), struct
        return known[0]


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
        rotation: channels of a block that is rotated after the division (`dgq_kernels.rotation`), or 0.

    Attributes:
        packed: int8, the weight in the engine's blocks.
        column_sum: int32 (N,), sums of the weight over K.

    Raises:
        OverflowError: a sum of products could leave int32.
        ValueError: a tensor has another shape or dtype, or is not on the CPU; `order` is no permutation; other numbers
            outside the above.
    """

    def __init__(
        self, weight: Tensor | TwoLevel, weight_scale: Tensor, bias: Tensor | None, inv_divisor: Tensor | None,
        bits: int, kernel: int = 1, stride: int = 1, padding: int = 0, order: Tensor | None = None, rotation: int = 0,
    ) -> None:  # fmt: skip
        engine = _engine()
        if isinstance(weight, TwoLevel):
            n, k, group = weight.packed.shape[0], weight.k, weight.group
            groups = -(-k // group) if group > 0 else 0
            tensors = {
                "packed": _checked("packed", weight.packed, torch.uint8, n, groups * group // 2),
                "subscales": _checked("subscales", weight.subscales, torch.uint8, n, -(-groups // 2)),
            }
        else:
            n, k, group = weight.shape[0], weight.shape[-1], 0
            tensors = {"weight": _checked("weight", weight, torch.int8, n, k)}
        channels = k // kernel**2 if kernel > 0 else 0
        if order is not None:
            tensors["order"] = _checked("order", order, order.dtype, channels).to(torch.int32)
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        stored = _Stored(n=n, k=k, channels=channels, group=group, **pointers)
        packed = torch.empty(engine.library.dgq_packed_bytes(n, k), dtype=torch.int8)
        column_sum, sizes = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int64)
        results = packed.data_ptr(), column_sum.data_ptr(), sizes.data_ptr()
        engine.check(engine.library.dgq_pack(ctypes.addressof(stored), *results, torch.get_num_threads()))
        if int(sizes.max()) * (2**bits - 1) >= 2**31:
            raise OverflowError(f"a sum over {k} products could overflow int32")
        self._bind(packed, weight_scale, column_sum, bias, inv_divisor, k, bits, kernel, stride, padding, rotation)

    @classmethod
    def of_blocks(
        cls, packed: Tensor, weight_scale: Tensor, column_sum: Tensor, bias: Tensor | None, inv_divisor: Tensor | None,
        k: int, bits: int, kernel: int = 1, stride: int = 1, padding: int = 0, rotation: int = 0,
    ) -> Layer:  # fmt: skip
        """The layer of the tensors that another one packed. Raises ValueError as the constructor."""
        layer = cls.__new__(cls)
        layer._bind(packed, weight_scale, column_sum, bias, inv_divisor, k, bits, kernel, stride, padding, rotation)
        return layer

    def _bind(
        self, packed: Tensor, weight_scale: Tensor, column_sum: Tensor, bias: Tensor | None,
        inv_divisor: Tensor | None, k: int, bits: int, kernel: int, stride: int, padding: int, rotation: int,
    ) -> None:  # fmt: skip
        engine = _engine()
        n, channels = column_sum.shape[0], k // kernel**2 if kernel > 0 else 0
        self.n, self.k, self.channels = n, k, channels
        self.bits, self.kernel, self.stride, self.padding = bits, kernel, stride, padding
        self.rotation = rotation
        self.packed = _checked("packed", packed, torch.int8, engine.library.dgq_packed_bytes(n, k))
        self.column_sum = _checked("column_sum", column_sum, torch.int32, n)
        self.bias = None if bias is None else _checked("bias", bias, torch.float32, n)
        self.set_scales(weight_scale, inv_divisor)

    def set_scales(self, weight_scale: Tensor, inv_divisor: Tensor | None) -> None:
        """Take other scales, as the constructor's; the packed weight stays. Raises ValueError as it."""
        engine = _engine()
        n, k, channels = self.n, self.k, self.channels
        weight_scale = _checked("weight_scale", weight_scale, torch.float32, n)
        if inv_divisor is not None:
            inv_divisor = _checked("inv_divisor", inv_divisor, torch.float32, channels)
        self.weight_scale, self.inv_divisor = weight_scale, inv_divisor
        tensors = (self.packed, self.weight_scale, self.column_sum, self.bias, self.inv_divisor)
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits, kernel, stride, padding = self.bits, self.kernel, self.stride, self.padding
        self.divisor_address = addresses[-1]
        self._struct = _Layer(*addresses, n, k, channels, bits, kernel, stride, padding, self.rotation)
        self._address = ctypes.addressof(self._struct)
        self._addresses = (_Pointer * 1)(self._address)
        self._engine = engine
        engine.check(engine.library.dgq_check_layer(self._address))

    def weight(self) -> Tensor:
        """The int8 matrix (N, K) the layer was made of, from its blocks."""
        return self.rows(0, self.n)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the int8 matrix, from their blocks alone; start is a multiple of BLOCK."""
        quads = self.packed.view(torch.int32).view(-(-self.n // (2 * BLOCK)) * 2, -1, BLOCK)  # 4 values, moved as one
        blocks = quads[start // BLOCK : -(-stop // BLOCK)].transpose(1, 2)
        rows = blocks.contiguous().view(torch.int8).flatten(0, 1)
        return rows[: stop - start, : self.k].contiguous()

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
            ValueError: x has another number of channels; a tensor is not on the CPU; `gated` with a residual, or where
                `can_gate` is false; a norm of groups, of other channels or with SiLU; a layer of a convolution.
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
            ValueError: x is not 4-D, has other channels, or is smaller than the kernel; a tensor is not on the CPU;
                `sample_bias` has another shape; a norm without groups or of other channels.
        """
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.dgq.engine_conv2d(
                x, self.packed, self.weight_scale, self.column_sum, self.bias, self.inv_divisor, self.bits, self.kernel,
                self.stride, self.padding, self.rotation, residual, sample_bias, *_norm_arguments(norm),
            )  # fmt: skip
            return y
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise _other_channels(self.channels, x)
        _on_cpu(x, "an input")
        _on_cpu(residual, "a residual")
        batch, _, height, width = x.shape
        if min(height, width) + 2 * self.padding < self.kernel:
            raise ValueError(f"input {tuple(x.shape)} is smaller than the kernel of {self.kernel}")
        if sample_bias is not None:
            _on_cpu(sample_bias, "a bias")
            if sample_bias.shape != (batch, self.n):
                raise ValueError(f"sample_bias {(batch, self.n)} expected, got {tuple(sample_bias.shape)}")
            sample_bias = sample_bias.float().contiguous()
        dtype = _DTYPES.get(x.dtype)
        if dtype is None:
            half = None if residual is None else residual.float()
            return self.conv2d(x.float(), half, sample_bias, norm).to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        y = _empty_picture(x, self.n, self.kernel, self.stride, self.padding)
        if residual is not None:
            residual = _laid_out(residual, y, torch.channels_last)
        if batch:
            code = self._engine.library.dgq_conv2d(
                self._address, x.data_ptr(), batch, height, width, dtype,
                None if norm is None else norm._address(self.channels),
                None if sample_bias is None else sample_bias.data_ptr(),
                None if residual is None else residual.data_ptr(), y.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            self._engine.check(code)
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
    if torch.compiler.is_compiling():
        compiled: list[Tensor] = torch.ops.dgq.engine_linear(
            x, *([getattr(layer, name) for layer in layers] for name in _PARTS), one.inv_divisor, one.bits,
            one.rotation, residual, gated, *_norm_arguments(norm),
        )  # fmt: skip
        return compiled
    *lead, channels = x.shape
    if channels != one.k:
        raise _other_channels(one.k, x)
    _on_cpu(x, "an input")
    _on_cpu(residual, "a residual")
    if gated and not one.can_gate:
        raise ValueError(f"{one.n} outputs cannot be gated in blocks of {BLOCK}")
    dtype = _DTYPES.get(x.dtype)
    if dtype is None:
        full = linear(layers, x.float(), None if residual is None else residual.float(), gated, norm)
        return [y.to(x.dtype) for y in full]
    if x.is_contiguous():
        count, stride = x.numel() // channels, channels
    else:
        x = x.reshape(-1, channels)
        if x.stride(1) != 1:
            x = x.contiguous()
        count, stride = len(x), x.stride(0)
    size = (*lead, one.n // 2 if gated else one.n)
    outputs = [x.new_empty(size) for _ in layers]
    if residual is not None:
        residual = _laid_out(residual, outputs[0])
    if count:
        several, pointers = len(layers), _Pointer * len(layers)
        code = one._engine.library.dgq_linear(
            one._addresses if several == 1 else pointers(*[layer._address for layer in layers]), several, x.data_ptr(),
            stride, count, dtype, None if norm is None else norm._address(channels),
            None if residual is None else residual.data_ptr(), gated, pointers(*[y.data_ptr() for y in outputs]),
            torch.get_num_threads(),
        )  # fmt: skip
        one._engine.check(code)
    return outputs


def can_share(layers: Sequence[Layer]) -> bool:
    """Whether layers can share the codes of one input. Those of equal divisors get one tensor of them, by which the
    library knows."""
    one = layers[0]
    for other in layers[1:]:
        if (other.n, other.k, other.bits, other.rotation) != (one.n, one.k, one.bits, one.rotation):
            return False
        if other.divisor_address == one.divisor_address:
            continue
        if one.inv_divisor is None or other.inv_divisor is None or torch.compiler.is_compiling():
            return False
        if not torch.equal(one.inv_divisor, other.inv_divisor):
            return False
        other.set_scales(other.weight_scale, one.inv_divisor)
    return True


def attention(
    q: Tensor, k: Tensor, v: Tensor, logit_scale: float, bits: int, fraction_bits: int, start_token: bool,
    qk_bits: int, v_bits: int,
) -> Tensor:  # fmt: skip
    """`dgq_kernels.log_attention` with integer operands (qk_bits and v_bits not 0).

    Args:
        logit_scale: scale * log2(e). The others as in `log_attention`; q, k, v may be strided, but for their last axis.

    Returns:
        (B, H, T, d), a view of (B, T, H, d).

    Raises:
        ValueError: shapes or numbers outside the above; the tensors differ in dtype, or are not on the CPU.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise _other_shapes(q, k, v)
    batch, heads, rows, width = q.shape
    if k.shape[:2] != (batch, heads) or k.shape[3] != width:
        raise _other_shapes(q, k, v)
    kind = q.dtype
    if k.dtype != kind or v.dtype != kind or not (q.is_cpu and k.is_cpu and v.is_cpu and kind.is_floating_point):
        kinds = [f"{x.dtype} on {x.device}" for x in (q, k, v)]
        raise ValueError(f"q, k and v of floats of one dtype on the CPU expected, got {kinds}")
    dtype = _DTYPES.get(kind)
    if dtype is None:
        args = (logit_scale, bits, fraction_bits, start_token, qk_bits, v_bits)
        return attention(q.float(), k.float(), v.float(), *args).to(kind)
    strides: list[int] = []
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    for x in (q, k, v):
        strides += x.stride()[:3]
    out = q.new_empty((batch, rows, heads, width))
    job = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *strides, batch, heads, rows, k.shape[2], width,
        logit_scale, bits, fraction_bits, start_token, qk_bits, v_bits, dtype,
    )  # fmt: skip
    if out.numel():
        engine = _engine()
        engine.check(engine.library.dgq_attention(ctypes.addressof(job), torch.get_num_threads()))
    return out.transpose(1, 2)


def _other_shapes(q: Tensor, k: Tensor, v: Tensor) -> ValueError:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    return ValueError(f"q (B, H, T, d) and k, v (B, H, S, d) expected, got {shapes}")


def _matrix(name: str, tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A float32 matrix on the CPU whose rows may lie apart; ValueError where it is something else."""
    _expect(name, tensor, torch.float32, rows, columns)
    in_rows = tensor.stride(1) == 1 and (rows == 1 or tensor.stride(0) >= columns)
    return tensor if in_rows else tensor.contiguous()


def _row(matrix: Tensor) -> int:
    """How far the rows lie apart."""
    return max(matrix.stride(0), matrix.shape[1])


def round_columns(
    values: Tensor, pull: Tensor, ahead: Tensor, diagonal: Tensor, step: Tensor, low: int, high: int
) -> Tensor:
    """`dgq_kernels.weight_rounding.round_columns`; `values`' last axis has to be dense.

    Raises:
        ValueError: shapes or dtypes outside of what is said there; the tensors are not on the CPU.
    """
    rows, columns = values.shape
    if (found := _matrix("values", values, rows, columns)) is not values:
        raise ValueError("values: rows in one piece expected, which are rounded in place")
    pull = _matrix("pull", pull, rows, columns)
    ahead = _matrix("ahead", ahead[:, :columns], columns, columns)
    diagonal = _checked("diagonal", diagonal, torch.float32, columns)
    step = _checked("step", step, torch.float32, rows)
    change = torch.empty(rows, columns)
    if rows:
        engine = _engine()
        matrices = [part for matrix in (found, pull, ahead) for part in (matrix.data_ptr(), _row(matrix))]
        vectors = [tensor.data_ptr() for tensor in (diagonal, step, change)]
        code = engine.library.dgq_round_columns(*matrices, *vectors, rows, columns, low, high, torch.get_num_threads())
        engine.check(code)
    return change


def search_subscales(groups: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`dgq_kernels.weight_rounding.search_subscales`.

    Raises:
        ValueError: shapes or dtypes outside of what is said there; the tensors are not on the CPU.
    """
    rows, count, size = groups.shape
    if not (groups.stride(2) == 1 and groups.stride(1) == size) and count > 1:
        groups = groups.contiguous()
    values = _matrix("groups", groups.flatten(1), rows, count * size)
    importance = _checked("importance", importance, torch.float32, count, size)
    scale = _checked("scale", scale, torch.float32, rows)
    best, error = torch.empty(rows, count, dtype=torch.uint8), torch.empty(rows, count)
    if best.numel():
        engine = _engine()
        others = [tensor.data_ptr() for tensor in (importance, scale, best, error)]
        code = engine.library.dgq_search_subscales(
            values.data_ptr(), _row(values), *others, rows, count, size, torch.get_num_threads()
        )
        engine.check(code)
    return best, error


# The same calls as operators, which torch.compile and torch.export can trace: the packed weight and all else that a
# layer reads are arguments. Outside of traces Python calls the library itself, which takes less time.
_PARTS = ("packed", "weight_scale", "column_sum", "bias")
# The compiler need not copy an input into the layout that it had in eager mode: pictures may stay channels-last.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)
_NORM = "Tensor? gain, Tensor? shift, float eps, int groups, bool silu"
torch.library.define(
    "dgq::engine_linear",
    "(Tensor x, Tensor[] packed, Tensor[] weight_scale, Tensor[] column_sum, Tensor?[] bias, Tensor? inv_divisor, "
    f"int bits, int rotation, Tensor? residual, bool gated, {_NORM}) -> Tensor[]",
    tags=_ANY_LAYOUT,
)
torch.library.define(
    "dgq::engine_conv2d",
    "(Tensor x, Tensor packed, Tensor weight_scale, Tensor column_sum, Tensor? bias, Tensor? inv_divisor, int bits, "
    f"int kernel, int stride, int padding, int rotation, Tensor? residual, Tensor? sample_bias, {_NORM}) -> Tensor",
    tags=_ANY_LAYOUT,
)


def _norm_arguments(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float, int, bool]:
    return (None, None, 0.0, 0, False) if norm is None else (norm.gain, norm.shift, norm.eps, norm.groups, norm.silu)


def _norm_of(gain: Tensor | None, shift: Tensor | None, eps: float, groups: int, silu: bool) -> Norm | None:
    return None if gain is None or shift is None else Norm(gain, shift, eps, groups, silu)


def _empty_picture(x: Tensor, n: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Where the result of a convolution of x (B, C, H, W) goes: (B, n, Ho, Wo), channels-last."""
    size = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:]]
    return torch.empty((x.shape[0], n, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.impl("dgq::engine_linear", "CPU")
def _(x, packed, weight_scale, column_sum, bias, inv_divisor, bits, rotation, residual, gated, *norm):
    parts = zip(packed, weight_scale, column_sum, bias, strict=True)
    layers = [Layer.of_blocks(*part, inv_divisor, x.shape[-1], bits, rotation=rotation) for part in parts]
    return linear(layers, x, residual, gated, _norm_of(*norm))


@torch.library.register_fake("dgq::engine_linear")
def _(x, packed, weight_scale, column_sum, bias, inv_divisor, bits, rotation, residual, gated, *norm):
    shrink = 2 if gated else 1
    return [x.new_empty((*x.shape[:-1], scale.shape[0] // shrink)) for scale in weight_scale]


@torch.library.impl("dgq::engine_conv2d", "CPU")
def _(
    x, packed, weight_scale, column_sum, bias, inv_divisor, bits, kernel, stride, padding, rotation, residual,
    sample_bias, *norm,
):  # fmt: skip
    k = kernel**2 * x.shape[1]
    layer = Layer.of_blocks(
        packed, weight_scale, column_sum, bias, inv_divisor, k, bits, kernel, stride, padding, rotation
    )
    return layer.conv2d(x, residual, sample_bias, _norm_of(*norm))


@torch.library.register_fake("dgq::engine_conv2d")
def _(
    x, packed, weight_scale, column_sum, bias, inv_divisor, bits, kernel, stride, padding, rotation, residual,
    sample_bias, *norm,
):  # fmt: skip
    return _empty_picture(x, weight_scale.shape[0], kernel, stride, padding)
