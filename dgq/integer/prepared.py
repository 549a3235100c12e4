"""What a backend makes of an integer layer's stored tensors, once, to run it: a class for each form of the weight.

A form runs the layer; the layer has plan and stored tensors. `FORMS` lists them, and the first that serves is taken.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import dgq_kernels
from dgq_kernels import backend, native, packing
from dgq_kernels.conv2d import cpu as conv2d_cpu
from dgq_kernels.linear import cpu as linear_cpu
from dgq_kernels.native.library import BLOCK

from ..errors import DgqError
from ..recipe import LayerPlan
from .channels import from_matrix
from .weights import column_sum

if TYPE_CHECKING:
    from .layer import IntegerLayer
    from .shared_input import Shared

# What a layer does to its input first, after a norm.
Activation = Literal["none", "silu"]


class Codes(NamedTuple):
    """A quantized input: codes, and the scale and zero point of each row or sample, as the product ops take them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class Prepared:
    """What a backend needs at run time, made once from the stored tensors.

    It lives no longer than the parameter `source` that it was made from, whoever takes that away, and serves while
    that is the layer's. It holds no stored tensor itself: it is handed the layer at each call.

    Attributes:
        device: where it runs.
        fuses: quantization comes together with what precedes it, and residuals and gates with the product.
        tensors: the forms of the weight kept beside the stored tensors.
        column_sum: int32 (N,).
        source: gives the stored tensor, while that is alive.
        shared: with the layers that read the same tensor (`shared_input.share`).
    """

    fuses = False
    shared: Shared | None = None
    column_sum: Tensor

    def __init__(self, layer: IntegerLayer, device: torch.device) -> None:
        self.device = device
        self.tensors: list[Tensor] = []
        self.source: Callable[[], Tensor | None] = lambda: None

    @staticmethod
    def serves(plan: LayerPlan, which: backend.Backend) -> bool:
        """Whether a layer takes this form on a backend; asked in the order of `FORMS`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def run(
        self,
        layer: IntegerLayer,
        x: Tensor,
        residual: Tensor | None,
        sample_bias: Tensor | None,
        norm: nn.Module | None,
        activation: Activation,
        offset: Tensor | None,
        in_place: bool = False,
    ) -> Tensor:
        """`IntegerLayer.forward` of a linear layer or a convolution with taps, `IntegerLayer.upsample` of one that
        upsamples."""
        raise NotImplementedError

    def over_pixels(
        self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None, residual: Tensor | None, activation: Activation
    ) -> Tensor:
        """`IntegerLayer.over_pixels`."""
        raise NotImplementedError

    def gated(self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None) -> Tensor:
        """`IntegerLayer.gated`."""
        return gate(self.run(layer, x, None, None, norm, "none", None))

    def rows(self, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) of the int8 matrix in natural order where they come from this form; start is a multiple
        of 16."""
        return None

    def rescale(self, layer: IntegerLayer) -> None:
        """Take the layer's scales and bias anew."""

    def follow(self, layer: IntegerLayer) -> None:
        """`rescale` where other tensors, or other memory, have taken the place of these since."""

    def together(
        self,
        layers: Sequence[IntegerLayer],
        ready: Sequence[Prepared],
        x: Tensor,
        norm: nn.Module | None,
        activation: Activation = "none",
    ) -> list[Tensor] | None:
        """The results of linear layers on one input, prepared as `ready`, of which this is the first; None where they
        share nothing."""
        return None


class Engine(Prepared):
    """The weight in the CPU engine's blocks, which take the place of the stored one.

    Attributes:
        engine: the packed layer.
    """

    def __init__(self, layer: IntegerLayer, device: torch.device) -> None:
        """Raises DgqError where a sum could overflow int32."""
        super().__init__(layer, device)
        plan, stored = layer.plan, layer.stored_tensor()
        weight: Tensor | native.TwoLevel = stored
        if plan.wbits == 4:
            weight = native.TwoLevel(stored, layer.subscales, plan.reduction, plan.weight_group)
        try:
            self.engine = native.Layer(
                weight,
                layer._scale(),
                layer.bias,
                layer._inv_divisor(),
                plan.abits,
                plan.kernel_size,
                plan.stride,
                plan.padding,
                layer.order if plan.reordered else None,
                plan.rotation,
            )
        except OverflowError as error:
            raise DgqError(str(error), "quantize this layer to 4 bits") from None
        self.tensors, self.column_sum = [self.engine.packed], self.engine.column_sum
        self._read = _addresses(layer, layer._tuned)  # the engine reads scales and bias where they lie
        self._norm: tuple[Any, native.Norm] | None = None  # its state, the engine's form of it
        layer.leave(_unpacker(layer, self.engine))

    @staticmethod
    def serves(plan: LayerPlan, which: backend.Backend) -> bool:
        """On the CPU, but for shift classes, and for upsampled pictures whose channels are no whole blocks."""
        whole = not plan.upsampled or plan.out_features % (4 * BLOCK) == 0
        return which.name == "cpu" and native.available() and len(plan.class_ends) == 1 and whole

    def run(
        self,
        layer: IntegerLayer,
        x: Tensor,
        residual: Tensor | None,
        sample_bias: Tensor | None,
        norm: nn.Module | None,
        activation: Activation,
        offset: Tensor | None,
        in_place: bool = False,
    ) -> Tensor:
        kind = layer.plan.kind
        if layer.plan.upsampled:
            return self.engine.upsample(x)
        before = None if norm is None or offset is not None else self._norm_of(kind, norm, activation)
        if before is None:
            x = apply(x, norm, activation, offset)
        if kind == "linear":
            return self.engine.linear(x, residual, norm=before)
        if sample_bias is not None and layer.bias is not None:
            sample_bias = sample_bias.float() + layer.bias
        return self.engine.conv2d(x, residual, sample_bias, before, in_place)

    def over_pixels(
        self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None, residual: Tensor | None, activation: Activation
    ) -> Tensor:
        return self.engine.linear(apply(x, norm, activation, None).permute(0, 2, 3, 1), residual)

    def gated(self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None) -> Tensor:
        if not self.engine.can_gate:
            return super().gated(layer, x, norm)
        before = None if norm is None else self._norm_of("linear", norm, "none")
        x = x if norm is None or before is not None else norm(x)
        return self.engine.linear(x, gated=True, norm=before)

    def together(
        self,
        layers: Sequence[IntegerLayer],
        ready: Sequence[Prepared],
        x: Tensor,
        norm: nn.Module | None,
        activation: Activation = "none",
    ) -> list[Tensor] | None:
        engines = [one.engine for one in ready if isinstance(one, Engine)]
        if len(engines) < len(layers) or not native.can_share(engines):
            return None
        before = None if norm is None else self._norm_of("linear", norm, activation)
        x = apply(x, norm, activation, None) if before is None else x
        return native.linear(engines, x, norm=before)

    def rows(self, start: int, stop: int) -> Tensor | None:
        return self.engine.rows(start, stop)

    def rescale(self, layer: IntegerLayer) -> None:
        self.engine.read(layer._scale(), layer._inv_divisor(), layer.bias)
        self._read = _addresses(layer, layer._tuned)

    def follow(self, layer: IntegerLayer) -> None:
        if self._read != _addresses(layer, layer._tuned):
            self.rescale(layer)

    def _norm_of(self, kind: str, norm: nn.Module, activation: Activation) -> native.Norm | None:
        """The norm, and SiLU, as the engine takes them; None where it does not."""
        known: Any = norm
        silu = activation == "silu"
        fits = (
            type(norm) is nn.GroupNorm and known.affine
            if kind == "conv2d"
            else kind == "linear" and type(norm) is nn.LayerNorm and known.bias is not None and not silu
        )
        if not fits or is_hooked(norm):
            return None
        if torch.compiler.is_compiling():
            return native_norm(known, silu)
        state = (norm, silu, *_state_of(known.weight), *_state_of(known.bias))
        if self._norm is None or self._norm[0] != state:
            self._norm = state, native_norm(known, silu)
        return self._norm[1]


class ByOps(Prepared):
    """A weight that the product ops multiply with codes of the quantizing ops, each with the fused forms it has.

    Attributes:
        position: int32 (C,), where each channel's code is stored for the product; None: in order.
        joined: with the layers that read the same input.
    """

    reads_packed = False

    def __init__(self, layer: IntegerLayer, device: torch.device) -> None:
        super().__init__(layer, device)
        self.joined: Joined | None = None
        self.fuses = backend.chosen(device).fuses
        plan = layer.plan
        # Without shift classes the stored order only served the sub-scale groups: int8 weights go back to natural
        # order, and the codes need no gather. The int4 kernels read the packed form, so there the codes follow.
        shifts = len(plan.class_ends) > 1
        gather = plan.reordered and (shifts or self.reads_packed)
        matrix = layer.integer_weight() if gather else layer.natural_weight
        class_of = None
        if shifts:
            bounds = torch.tensor(plan.class_ends[:-1], device=matrix.device)
            channel = torch.arange(plan.in_features, device=matrix.device)
            class_of = torch.bucketize(channel, bounds, right=True).repeat(plan.kernel_size**2)
        self.column_sum = column_sum(matrix, class_of)
        self.position = layer.order.argsort().to(torch.int32) if gather else None
        self._pack(plan, matrix)

    def _pack(self, plan: LayerPlan, matrix: Tensor) -> None:
        """Make the form of the int8 matrix (N, K)."""

    def multiply(
        self, layer: IntegerLayer, codes: Codes, dtype: torch.dtype, residual: Tensor | None, gated: bool = False
    ) -> Tensor:
        """The product op: (rows, N), or (B, N, H, W) of a convolution. Residual and gate (of a linear layer) only
        where the backend fuses."""
        raise NotImplementedError

    def run(
        self,
        layer: IntegerLayer,
        x: Tensor,
        residual: Tensor | None,
        sample_bias: Tensor | None,
        norm: nn.Module | None,
        activation: Activation,
        offset: Tensor | None,
        in_place: bool = False,
    ) -> Tensor:
        codes = self._fused_codes(layer, x, norm, activation, offset) if self.fuses else None
        if codes is None:
            codes = self._codes(layer, apply(x, norm, activation, offset))
        fuses = self.fuses and sample_bias is None
        added = residual if fuses else None
        if layer.plan.kind == "linear":
            assert sample_bias is None
            rows = None if added is None else added.reshape(-1, layer.out_features)
            y = self.multiply(layer, codes, x.dtype, rows).view(*x.shape[:-1], layer.out_features)
        else:
            y = self.multiply(layer, codes, x.dtype, added)
            if sample_bias is not None:
                y = y + sample_bias.to(y.dtype)[:, :, None, None]
        return y if residual is None or fuses else y + residual

    def over_pixels(
        self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None, residual: Tensor | None, activation: Activation
    ) -> Tensor:
        known: Any = norm
        size = (x.shape[0], *x.shape[2:], layer.out_features)
        if self.fuses and activation == "none" and type(norm) is nn.GroupNorm and not is_hooked(norm):
            codes = Codes(
                *dgq_kernels.group_norm_quantize_rows(
                    x,
                    known.num_groups,
                    known.weight,
                    known.bias,
                    known.eps,
                    layer.plan.abits,
                    layer._inv_divisor(),
                    self.position,
                    layer.plan.rotation,
                )
            )
        else:
            codes = self._codes(layer, apply(x, norm, activation, None).permute(0, 2, 3, 1))
        if residual is None or not self.fuses:
            y = self.multiply(layer, codes, x.dtype, None).view(size)
            return y if residual is None else y + residual
        return self.multiply(layer, codes, x.dtype, residual.reshape(-1, layer.out_features)).view(size)

    def gated(self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None) -> Tensor:
        if not self.fuses:
            return super().gated(layer, x, norm)
        y = self.multiply(layer, self.codes_of(layer, x, norm), x.dtype, None, True)
        return y.view(*x.shape[:-1], layer.out_features // 2)

    def together(
        self,
        layers: Sequence[IntegerLayer],
        ready: Sequence[Prepared],
        x: Tensor,
        norm: nn.Module | None,
        activation: Activation = "none",
    ) -> list[Tensor] | None:
        joined = self.joined
        if joined is not None and joined.fits(layers):
            return joined.multiply(layers[0].plan, self.codes_of(layers[0], x, norm, activation), x)
        if all(one.fuses for one in ready):
            return [
                one.run(layer, x, None, None, norm, activation, None) for layer, one in zip(layers, ready, strict=True)
            ]
        return None

    def codes_of(
        self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None, activation: Activation = "none"
    ) -> Codes:
        """The codes of rows, normalized and activated first, by one op where there is one."""
        codes = self._fused_codes(layer, x, norm, activation, None)
        return self._codes(layer, apply(x, norm, activation, None)) if codes is None else codes

    def _codes(self, layer: IntegerLayer, x: Tensor) -> Codes:
        """The codes of x itself: of its rows, or of samples with their padding."""
        plan = layer.plan
        if plan.wide:
            return Codes(*dgq_kernels.quantize_wide_samples(x, plan.padding))
        first, last = (plan.abits, layer._inv_divisor()), (self.position, plan.rotation)
        if plan.kind == "conv2d":
            return Codes(*dgq_kernels.quantize_samples(x, *first, plan.padding, *last))
        return Codes(*dgq_kernels.quantize_rows(x.reshape(-1, plan.in_features), *first, *last))

    def _fused_codes(
        self, layer: IntegerLayer, x: Tensor, norm: nn.Module | None, activation: Activation, offset: Tensor | None
    ) -> Codes | None:
        """The codes of what norm and activation make of x, by one op; None where there is no op for them."""
        if norm is not None and is_hooked(norm):
            return None
        plan, inverse = layer.plan, layer._inv_divisor()
        known: Any = norm
        if plan.kind == "conv2d":
            if type(norm) is not nn.GroupNorm:
                return None
            return Codes(
                *dgq_kernels.group_norm_quantize_samples(
                    x,
                    known.num_groups,
                    known.weight,
                    known.bias,
                    known.eps,
                    activation == "silu",
                    plan.abits,
                    inverse,
                    plan.padding,
                    self.position,
                    offset,
                    plan.rotation,
                )
            )
        rows = x.reshape(-1, x.shape[-1])
        last = (plan.abits, inverse, self.position, plan.rotation)
        if type(norm) is nn.LayerNorm and activation == "none" and known.normalized_shape == x.shape[-1:]:
            return Codes(*dgq_kernels.layer_norm_quantize_rows(rows, known.weight, known.bias, known.eps, *last))
        if norm is not None or activation == "none":
            return None
        return Codes(*dgq_kernels.silu_quantize_rows(rows, *last))


class OneDnn(ByOps):
    """int8 in oneDNN's blocked layout, a tensor for each shift class.

    Attributes:
        split: 8-bit codes run as two products.
    """

    @staticmethod
    def serves(plan: LayerPlan, which: backend.Backend) -> bool:
        """On the CPU, where its products are exact; of codes of 8 bits."""
        return which.name == "cpu" and backend.cpu_path() != "reference" and not plan.upsampled

    def _pack(self, plan: LayerPlan, matrix: Tensor) -> None:
        weight = from_matrix(matrix, plan).contiguous()
        self.split = linear_cpu.needs_split(plan.abits, matrix)
        self._bytes = matrix.nbytes  # tensors in oneDNN's layout do not tell their size
        if plan.kind == "conv2d":
            self.tensors = conv2d_cpu.prepack(weight, plan.stride, plan.class_ends)
        else:
            self.tensors = linear_cpu.prepack(weight, plan.class_ends)

    @property
    def nbytes(self) -> int:
        return self._bytes

    def multiply(
        self, layer: IntegerLayer, codes: Codes, dtype: torch.dtype, residual: Tensor | None, gated: bool = False
    ) -> Tensor:
        plan = layer.plan
        parts = (*codes, self.tensors, plan.class_ends, self.split, layer._scale(), self.column_sum, layer.bias)
        if plan.kind == "conv2d":
            return dgq_kernels.conv2d_prepacked(*parts, plan.kernel_size, plan.stride, dtype)
        return dgq_kernels.linear_prepacked(*parts, dtype)


class Packed(ByOps):
    """The stored int4 weight, which the backend's ops unpack."""

    reads_packed = True

    @staticmethod
    def serves(plan: LayerPlan, which: backend.Backend) -> bool:
        """4 bits, where the ops unpack them."""
        return plan.wbits == 4 and which.unpacks

    def multiply(
        self, layer: IntegerLayer, codes: Codes, dtype: torch.dtype, residual: Tensor | None, gated: bool = False
    ) -> Tensor:
        plan = layer.plan
        parts = (*codes, layer.packed, layer.subscales, layer._scale(), self.column_sum, layer.bias)
        if plan.upsampled:
            return dgq_kernels.upsample_conv2d_int4(*parts, dtype, plan.weight_group)
        if plan.kind == "conv2d":
            return dgq_kernels.conv2d_int4(*parts, plan.kernel_size, plan.stride, dtype, plan.weight_group, residual)
        return dgq_kernels.linear_int4(*parts, dtype, plan.weight_group, residual, gated)


class Dense(ByOps):
    """The int8 weight, (N, C) or channels-last (N, C, kh, kw): the stored one, or one made from it (`tensors`)."""

    @staticmethod
    def serves(plan: LayerPlan, which: backend.Backend) -> bool:
        """Everywhere."""
        return True

    def _pack(self, plan: LayerPlan, matrix: Tensor) -> None:
        if plan.wbits == 4 or (plan.reordered and self.position is None):
            self.tensors = [from_matrix(matrix, plan)]

    def operand(self, layer: IntegerLayer) -> Tensor:
        """The weight as the product ops take it."""
        if self.tensors:
            return self.tensors[0]
        return layer.stored.flatten(1) if layer.plan.kind == "pointwise" else layer.stored

    def multiply(
        self, layer: IntegerLayer, codes: Codes, dtype: torch.dtype, residual: Tensor | None, gated: bool = False
    ) -> Tensor:
        plan = layer.plan
        parts = (*codes, self.operand(layer), layer._scale(), self.column_sum, layer.bias)
        if plan.upsampled:
            return dgq_kernels.upsample_conv2d(*parts, dtype, plan.wide)
        if plan.kind == "conv2d":
            return dgq_kernels.conv2d(*parts, plan.stride, dtype, plan.class_ends, residual)
        return dgq_kernels.linear_int8(*parts, dtype, plan.class_ends, residual, gated)


FORMS: list[type[Prepared]] = [Engine, OneDnn, Packed, Dense]


def form_of(plan: LayerPlan, device: torch.device) -> type[Prepared]:
    """The class of `FORMS` that runs a layer on a device."""
    which = backend.chosen(device)
    return next(form for form in FORMS if form.serves(plan, which))


@dataclass
class Joined:
    """Layers on one input whose weights lie behind each other: their outputs are slices of one product.

    Of the stored tensors the layers' own are slices, so what is written into one of them counts here, too. The layers
    hold this, and it holds none of them.
    """

    owners: list[weakref.ref[IntegerLayer]]
    parts: list[weakref.ref[ByOps]]
    sizes: list[int]
    weight: Tensor  # int8 (N, K), or packed
    subscales: Tensor | None
    stored_scale: Tensor
    column_sum: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        self._places = [_addresses(layer, None) for layer in self.layers]
        self.rescale()

    @property
    def layers(self) -> list[IntegerLayer]:
        """Those that are still there."""
        return [layer for owner in self.owners if (layer := owner()) is not None]

    def rescale(self) -> None:
        """Take the layers' scales anew, after `IntegerLayer.set_scales` or `clear_scales` of any of them."""
        layers = self.layers
        self._scales = [layer._scale() for layer in layers]
        own = all(layer._tuned is None for layer in layers)
        self.weight_scale = self.stored_scale if own else torch.cat(self._scales)
        # whether one input's codes serve all
        self.alike = len(layers) == len(self.owners) and same([layer._inv_divisor() for layer in layers])

    def fits(self, layers: Sequence[IntegerLayer]) -> bool:
        """Whether these are the layers, of one divisor, and none was loaded, moved or given other tensors since."""
        return (
            self.alike
            and len(layers) == len(self.owners)
            and all(
                layer is owner() and layer._prepared is part() and layer._scale() is scale
                for layer, owner, part, scale in zip(layers, self.owners, self.parts, self._scales, strict=True)
            )
            and (torch.compiler.is_compiling() or self._places == [_addresses(layer, None) for layer in layers])
        )

    def multiply(self, plan: LayerPlan, codes: Codes, x: Tensor) -> list[Tensor]:
        """The layers' results from the codes of x; `plan` is of any of them."""
        after = (self.weight_scale, self.column_sum, self.bias, x.dtype)
        if self.subscales is None:
            y = dgq_kernels.linear_int8(*codes, self.weight, *after, plan.class_ends)
        else:
            y = dgq_kernels.linear_int4(*codes, self.weight, self.subscales, *after, plan.weight_group)
        return list(y.view(*x.shape[:-1], sum(self.sizes)).split(self.sizes, dim=-1))


def same(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are None, or all equal."""
    first, *others = tensors
    if first is None or any(other is None for other in others):
        return all(tensor is None for tensor in tensors)
    return all(other is first or (other is not None and torch.equal(first, other)) for other in others)


def shaped(weight: Tensor, plan: LayerPlan) -> Tensor:
    """A weight, or its matrix (N, K), as a layer keeps it: (N, C), or channels-last (N, C, kh, kw)."""
    if plan.kind == "linear":
        return weight
    if weight.dim() == 2:
        kernel = plan.kernel_size
        weight = weight.view(plan.out_features, kernel, kernel, plan.in_features).permute(0, 3, 1, 2)
    return weight.contiguous(memory_format=torch.channels_last)


def _unpacker(layer: IntegerLayer, engine: native.Layer) -> Callable[[], Tensor]:
    """What makes the stored weight again from the engine's blocks."""
    plan = layer.plan
    order = layer.order.long() if plan.reordered else None
    subscales = layer.subscales.detach() if plan.wbits == 4 else None

    def make() -> Tensor:
        matrix = engine.weight()
        if order is not None:
            by_channel = matrix.view(plan.out_features, -1, plan.in_features)
            matrix = by_channel[:, :, order].view_as(matrix)
        if subscales is None:
            return shaped(matrix, plan)
        return packing.pack_two_level(matrix, subscales, plan.weight_group)

    return make


def gate(y: Tensor) -> Tensor:
    """value * gelu(gate) of the two halves."""
    value, gates = y.chunk(2, dim=-1)
    return value * nn.functional.gelu(gates)


def is_hooked(*modules: nn.Module | None) -> bool:
    """Whether others may see what goes into one of these modules or comes out of it, or do its work: then it has to be
    called. None stands for what is not there."""
    for module in modules:
        if module is not None:
            own = module.__dict__
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return True
    return False


def hooks_within(module: nn.Module, *names: str) -> bool:
    """`is_hooked` of some of a module's own, past nn.Module.__getattr__: a step asks hundreds of times."""
    held = module._modules
    return is_hooked(*[held.get(name) for name in names])


def apply(x: Tensor, norm: nn.Module | None, activation: Activation, offset: Tensor | None) -> Tensor:
    """`IntegerLayer.forward`'s steps before the product, by torch."""
    if offset is not None:
        x = x + offset.to(x.dtype)[:, :, None, None]
    if isinstance(norm, nn.GroupNorm) and torch.is_grad_enabled() and not x.requires_grad:
        x = x.contiguous()  # torch's backward of a channels-last one that takes no gradient ends the process
    x = x if norm is None else norm(x)
    return nn.functional.silu(x) if activation == "silu" else x


def _addresses(layer: IntegerLayer, tuned: tuple[Tensor, Tensor | None] | None) -> tuple[int | None, ...]:
    """Of scales, the stored ones unless others are given, and bias: other ones where parameters were exchanged, or
    given other memory. Past nn.Module.__getattr__: a step asks hundreds of times."""
    stored = layer._parameters
    bias: Any = stored["bias"]
    scale, divisor = (stored["weight_scale"], stored.get("inv_divisor")) if tuned is None else tuned
    assert scale is not None
    return (
        scale.data_ptr(),
        None if divisor is None else divisor.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )


def _state_of(tensor: Tensor) -> tuple[int | bytes, int]:
    """Changes where a tensor's values may have. The engine reads float32 where it lies; of others it has a copy, which
    nothing tells of a change through `.data` or of an inference tensor: that is seen by the values."""
    if tensor.dtype != torch.float32 and tensor.is_cpu and tensor.is_contiguous():
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes), 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def native_norm(norm: Any, silu: bool) -> native.Norm:
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
    return native.Norm(norm.weight.float(), norm.bias.float(), norm.eps, groups, silu)
