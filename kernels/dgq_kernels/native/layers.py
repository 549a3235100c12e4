"""Linear layers and convolutions: quantization, integer product and epilogue in one call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import GROUP_SIZES
from .checks import checked, laid_out, on_cpu, other_channels
from .library import BLOCK, DTYPES, LayerStruct, NormStruct, Pointer, StoredStruct, loaded
from .memory import empty

_PARTS = ("packed", "weight_scale", "column_sum", "bias")  # of layers that share an input, what is each one's own


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

    def over_groups(self, x: Tensor, in_place: bool = False) -> Tensor:
        """x (B, C, H, W) of a multiple of 16 channels, normalized in groups and activated: channels-last, in x's dtype,
        to 1e-5 of the activation's size. With `in_place` it may take the memory of x, whose values are lost then.

        Raises:
            ValueError: x is not 4-D, has other channels, is not on the CPU or holds no floats; a norm without groups.
        """
        engine = loaded()
        if x.dim() != 4 or x.shape[1] % BLOCK or not x.dtype.is_floating_point:
            got = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"a picture of floats of a multiple of {BLOCK} channels expected, got {got}")
        on_cpu(x, "an input")
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            return self.over_groups(x.float()).to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        y = x if in_place else empty(x.shape, x)
        if y.numel():
            code = engine.library.dgq_group_norm(
                self._address(channels), x.data_ptr(), batch, height, width, channels, dtype, y.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
            engine.check(code)
        return y

    @functools.cached_property
    def _structs(self) -> dict[int, tuple[int, NormStruct]]:
        return {}

    def _address(self, channels: int) -> int:
        """Of what the library reads before a layer of so many channels; checked and made once."""
        known = self._structs.get(channels)
        if known is None:
            gain, shift = (
                checked(f"a norm of {channels} channels", tensor, torch.float32, channels)
                for tensor in (self.gain, self.shift)
            )
            struct = NormStruct(gain.data_ptr(), shift.data_ptr(), self.eps, self.groups, self.silu)
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
        bits: of the activation codes, 2 to 8; of an upsampling (`upsample`) 16, too.
        kernel, stride, padding: of a convolution; 1, 1, 0 for a linear layer.
        order: int32 (C,), the natural channel that the weight stores at each place; None where they are the same.
        rotation: channels of a block that is rotated after the division (`dgq_kernels.rotation`), or 0.

    Attributes:
        packed: int8, the weight in the engine's blocks: in four bits where it came so, in its own order.
        group: of sub-scales in `packed`, 0 where that has eight bits.
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
        engine = loaded()
        if isinstance(weight, TwoLevel):
            n, k, group = weight.packed.shape[0], weight.k, weight.group
            groups = -(-k // group) if group > 0 else 0
            tensors = {
                "packed": checked("packed", weight.packed, torch.uint8, n, groups * group // 2),
                "subscales": checked("subscales", weight.subscales, torch.uint8, n, -(-groups // 2)),
            }
        else:
            n, k, group = weight.shape[0], weight.shape[-1], 0
            tensors = {"weight": checked("weight", weight, torch.int8, n, k)}
        channels = k // kernel**2 if kernel > 0 else 0
        if order is not None:
            tensors["order"] = checked("order", order, order.dtype, channels).to(torch.int32)
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        stored = StoredStruct(n=n, k=k, channels=channels, group=group, **pointers)
        kept = group if order is None and group in GROUP_SIZES else 0
        packed = torch.empty(engine.library.dgq_packed_bytes(n, k, kept), dtype=torch.int8)
        column_sum, sizes = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int64)
        results = packed.data_ptr(), column_sum.data_ptr(), sizes.data_ptr()
        engine.check(engine.library.dgq_pack(ctypes.addressof(stored), kept, *results, torch.get_num_threads()))
        if int(sizes.max()) * (2 ** min(bits, 8) - 1) >= 2**31:
            raise OverflowError(f"a sum over {k} products could overflow int32")
        self._bind(
            packed, weight_scale, column_sum, bias, inv_divisor, k, bits, kernel, stride, padding, rotation, kept
        )

    @classmethod
    def of_blocks(
        cls, packed: Tensor, weight_scale: Tensor, column_sum: Tensor, bias: Tensor | None, inv_divisor: Tensor | None,
        k: int, bits: int, kernel: int = 1, stride: int = 1, padding: int = 0, rotation: int = 0, group: int = 0,
    ) -> Layer:  # fmt: skip
        """The layer of the tensors that another one packed. Raises ValueError as the constructor."""
        layer = cls.__new__(cls)
        layer._bind(
            packed, weight_scale, column_sum, bias, inv_divisor, k, bits, kernel, stride, padding, rotation, group
        )
        return layer

    def _bind(
        self, packed: Tensor, weight_scale: Tensor, column_sum: Tensor, bias: Tensor | None, inv_divisor: Tensor | None,
        k: int, bits: int, kernel: int, stride: int, padding: int, rotation: int, group: int,
    ) -> None:  # fmt: skip
        engine = loaded()
        n, channels = column_sum.shape[0], k // kernel**2 if kernel > 0 else 0
        self.n, self.k, self.channels = n, k, channels
        self.bits, self.kernel, self.stride, self.padding = bits, kernel, stride, padding
        self.rotation, self.group = rotation, group
        self.packed = checked("packed", packed, torch.int8, engine.library.dgq_packed_bytes(n, k, group))
        self.column_sum = checked("column_sum", column_sum, torch.int32, n)
        self.read(weight_scale, inv_divisor, bias)

    def set_scales(self, weight_scale: Tensor, inv_divisor: Tensor | None) -> None:
        """Take other scales, as the constructor's; the packed weight stays. Raises ValueError as it."""
        self.read(weight_scale, inv_divisor, self.bias)

    def read(self, weight_scale: Tensor, inv_divisor: Tensor | None, bias: Tensor | None) -> None:
        """`set_scales`, and another bias."""
        engine = loaded()
        n, k, channels = self.n, self.k, self.channels
        bias = None if bias is None else checked("bias", bias, torch.float32, n)
        weight_scale = checked("weight_scale", weight_scale, torch.float32, n)
        if inv_divisor is not None:
            inv_divisor = checked("inv_divisor", inv_divisor, torch.float32, channels)
        # detached, they hold the memory that is read, whatever becomes of a parameter's
        self.weight_scale = weight_scale.detach()
        self.inv_divisor, self.bias = (None if x is None else x.detach() for x in (inv_divisor, bias))
        tensors = (self.packed, self.weight_scale, self.column_sum, self.bias, self.inv_divisor)
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits, kernel, stride, padding = self.bits, self.kernel, self.stride, self.padding
        self.divisor_address = addresses[-1]
        struct = LayerStruct(*addresses, n, k, channels, bits, kernel, stride, padding, self.rotation, self.group)
        # a call holds the structure that it began with, and that its tensors: another thread may come by meanwhile
        struct.kept = tensors
        struct.addresses = (Pointer * 1)(ctypes.addressof(struct))
        self._struct = struct
        self._engine = engine
        engine.check(engine.library.dgq_check_layer(ctypes.addressof(struct)))

    def weight(self) -> Tensor:
        """The int8 matrix (N, K) the layer was made of, from its blocks."""
        return self.rows(0, self.n)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the int8 matrix, from their blocks alone; start is a multiple of BLOCK."""
        first, count = start // BLOCK, -(-stop // BLOCK) - start // BLOCK
        block_bytes = self._engine.library.dgq_packed_bytes(2 * BLOCK, self.k, 0) // 2
        if self.group:
            packed = torch.empty(count * block_bytes, dtype=torch.int8)
            call, struct = self._engine.library.dgq_unpack, self._struct
            address = ctypes.addressof(struct)
            self._engine.check(call(address, first, count, packed.data_ptr(), torch.get_num_threads()))
            first = 0
        else:
            packed = self.packed
        quads = packed.view(torch.int32).view(packed.numel() // block_bytes, -1, BLOCK)  # 4 values, moved as one
        blocks = quads[first : first + count].transpose(1, 2)
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
        in_place: bool = False,
    ) -> Tensor:
        """x (B, C, H, W) convolved: (B, N, Ho, Wo), channels-last, in x's dtype, plus `residual` (shaped alike).

        `sample_bias`, float32 (B, N), takes the place of the layer's bias. With `in_place` the result may take the
        memory of the residual, or of x where there is none, if it fits: what is in there is lost then.

        Raises:
            ValueError: x is not 4-D, has other channels, or is smaller than the kernel; a tensor is not on the CPU;
                `sample_bias` has another shape; a norm without groups or of other channels.
        """
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.dgq.engine_conv2d(
                x, self.packed, self.weight_scale, self.column_sum, self.bias, self.inv_divisor, self.bits, self.kernel,
                self.stride, self.padding, self.rotation, self.group, residual, sample_bias, *norm_arguments(norm),
            )  # fmt: skip
            return y
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise other_channels(self.channels, x)
        on_cpu(x, "an input")
        on_cpu(residual, "a residual")
        batch, _, height, width = x.shape
        if min(height, width) + 2 * self.padding < self.kernel:
            raise ValueError(f"input {tuple(x.shape)} is smaller than the kernel of {self.kernel}")
        if sample_bias is not None:
            on_cpu(sample_bias, "a bias")
            if sample_bias.shape != (batch, self.n):
                raise ValueError(f"sample_bias {(batch, self.n)} expected, got {tuple(sample_bias.shape)}")
            sample_bias = sample_bias.float().contiguous()
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            half = None if residual is None else residual.float()
            return self.conv2d(x.float(), half, sample_bias, norm).to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        place = _in_place(x, residual, self) if in_place else None
        y = empty_picture(x, self.n, self.kernel, self.stride, self.padding) if place is None else place
        if residual is not None:
            residual = laid_out(residual, y, torch.channels_last)
        if batch:
            struct = self._struct
            code = self._engine.library.dgq_conv2d(
                ctypes.addressof(struct), x.data_ptr(), batch, height, width, dtype,
                None if norm is None else norm._address(self.channels),
                None if sample_bias is None else sample_bias.data_ptr(),
                None if residual is None else residual.data_ptr(), y.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            self._engine.check(code)
        return y

    def upsample(self, x: Tensor) -> Tensor:
        """`dgq_kernels.upsample_conv2d` of the codes of x (B, C, H, W), `wide` where they have 16 bits:
        (B, N / 4, 2 H, 2 W), channels-last, in x's dtype.

        Raises:
            ValueError: x is not 4-D, has other channels, or is not on the CPU; a layer of anything else than four times
                a multiple of 16 outputs, a kernel of 2, a stride and a padding of 1; of 16 bits with divisors or a
                rotation.
        """
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.dgq.engine_upsample(
                x, self.packed, self.weight_scale, self.column_sum, self.bias, self.inv_divisor, self.bits,
                self.rotation, self.group,
            )  # fmt: skip
            return y
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise other_channels(self.channels, x)
        on_cpu(x, "an input")
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            return self.upsample(x.float()).to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        y = empty_upsampled(x, self.n)
        batch, _, height, width = x.shape
        if batch:
            struct = self._struct
            code = self._engine.library.dgq_upsample(
                ctypes.addressof(struct), x.data_ptr(), batch, height, width, dtype, y.data_ptr(),
                torch.get_num_threads(),
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
            one.rotation, [layer.group for layer in layers], residual, gated, *norm_arguments(norm),
        )  # fmt: skip
        return compiled
    *lead, channels = x.shape
    if channels != one.k:
        raise other_channels(one.k, x)
    on_cpu(x, "an input")
    on_cpu(residual, "a residual")
    if gated and not one.can_gate:
        raise ValueError(f"{one.n} outputs cannot be gated in blocks of {BLOCK}")
    dtype = DTYPES.get(x.dtype)
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
        residual = laid_out(residual, outputs[0])
    if count:
        several, pointers = len(layers), Pointer * len(layers)
        structs = [layer._struct for layer in layers]
        code = one._engine.library.dgq_linear(
            structs[0].addresses if several == 1 else pointers(*map(ctypes.addressof, structs)), several, x.data_ptr(),
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


def norm_arguments(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float, int, bool]:
    return (None, None, 0.0, 0, False) if norm is None else (norm.gain, norm.shift, norm.eps, norm.groups, norm.silu)


def empty_upsampled(x: Tensor, n: int) -> Tensor:
    """Where the result of an upsampling of x (B, C, H, W) goes: (B, n / 4, 2 H, 2 W), channels-last."""
    return empty((x.shape[0], n // 4, *(2 * side for side in x.shape[2:])), x)


def empty_picture(x: Tensor, n: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Where the result of a convolution of x (B, C, H, W) goes: (B, n, Ho, Wo), channels-last."""
    return empty(_size_after(x, n, kernel, stride, padding), x)


def _size_after(x: Tensor, n: int, kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    return (x.shape[0], n, *((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:]))


def _in_place(x: Tensor, residual: Tensor | None, layer: Layer) -> Tensor | None:
    """The memory of a residual, or without one of x (channels-last), as the picture that a convolution makes; None
    where that does not fit. The library has quantized all of x before it writes a result, and adds each value of a
    residual right before it writes in that place."""
    size = _size_after(x, layer.n, layer.kernel, layer.stride, layer.padding)
    if residual is not None:
        alike = residual.dtype == x.dtype and residual.shape == size
        return residual if alike and residual.is_contiguous(memory_format=torch.channels_last) else None
    batch, channels, height, width = size
    if batch * channels * height * width > x.numel():
        return None
    strides = (channels * height * width, 1, channels * width, channels)
    # its memory alone: a view would hold x, too
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), size, strides)
