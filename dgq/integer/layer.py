"""The layers of an integer checkpoint: packed weights, run-time activation codes, one int8 product."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dgq_kernels
from dgq_kernels import backend, native, packing
from dgq_kernels.conv2d import cpu as conv2d_cpu
from dgq_kernels.linear import cpu as linear_cpu

from ..errors import DgqError
from ..recipe import LayerPlan
from .channels import ChannelGroups, from_matrix, to_matrix
from .prepared import Codes, Prepared
from .stored import StoredWeight, buffer_specs
from .weights import IntegerWeight, column_sum

# What a layer does to its input first, after a norm.
Activation = Literal["none", "silu"]


# Layers may be used from several threads, and packing takes the stored form away.
_preparing = threading.Lock()


class IntegerLayer(nn.Module):
    """A quantized linear layer or convolution (docs/method.md, "integer recipe").

    Weights stay packed integers; no float copy of them exists. The layer takes and returns the dtype of its input.
    Where the CPU engine has packed the weight, its blocks are the only copy: the stored form, which state_dict and
    moves to another device need, is made from them (`StoredWeight`).

    It is an `nn.Linear` or an `nn.Conv2d` for everything that looks for those (adapters, offloading), by the plan's
    kind; what is stored are parameters that take no gradient.

    Args:
        plan: sizes, bits and channel handling. Parameters are allocated uninitialised (on the current default device).
    """

    packed: Tensor
    subscales: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    inv_divisor: Tensor
    order: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`IntegerLayer(plan)` is of the class that the plan's kind asks for."""
        plan = args[0] if args else kwargs.get("plan")
        if cls is IntegerLayer and plan is not None:
            cls = IntegerLinear if plan.kind == "linear" else IntegerConv2d
        return super().__new__(cls)

    def __init__(self, plan: LayerPlan) -> None:
        nn.Module.__init__(self)  # not nn.Linear's or nn.Conv2d's, which allocate a float weight
        self.plan = plan
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self._prepared: Prepared | None = None
        self._stored_name = "weight" if plan.wbits == 8 else "packed"
        self._norm: tuple[Any, native.Norm] | None = None  # its state, the engine's form of it
        self._tuned: tuple[Tensor, Tensor | None] | None = None  # what `set_scales` was given
        for name, (shape, dtype) in buffer_specs(plan).items():
            self.set_stored(name, torch.empty(shape, dtype=dtype))
        if not plan.bias:
            self.register_parameter("bias", None)

    @classmethod
    def from_quantized(
        cls, plan: LayerPlan, weight: IntegerWeight, groups: ChannelGroups, bias: Tensor | None
    ) -> IntegerLayer:
        """Pack a quantized weight matrix (N, K), its channels in the stored order of `groups`."""
        layer: IntegerLayer = cls(plan)
        tensors = {"weight_scale": weight.scale, "bias": bias, "order": groups.order, "inv_divisor": 1 / groups.divisor}
        if plan.wbits == 8:
            tensors["weight"] = weight.codes
        else:
            assert weight.subscales is not None
            tensors["packed"] = packing.pack_int4(weight.codes, plan.weight_group)
            tensors["subscales"] = packing.pack_subscales(weight.subscales)
        for name, (shape, dtype) in buffer_specs(plan).items():
            value = tensors[name]
            assert value is not None
            layer.set_stored(name, value.detach().to(dtype).contiguous())
            kept = layer.get_parameter(name)
            assert tuple(kept.shape) == shape, f"{name}: {tuple(kept.shape)} instead of {shape}"
        return layer

    def set_stored(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in the place of a stored one: shaped as `stored.buffer_specs` has it, or the weight as a matrix
        (N, kh * kw * C), as files of format 1 have it."""
        self._prepared = None
        self._hold(name, _shaped(tensor, self.plan) if name == "weight" else tensor)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    @property
    def stored(self) -> Tensor:
        """The parameter that holds the weight: `weight` (8 bits) or `packed`."""
        parameter = self._parameters[self._stored_name]
        assert parameter is not None
        return parameter

    @property
    def weight(self) -> Tensor:
        """int8, shaped as the float layer's weight, channels in stored order; made when it is read where the layer
        stores 4 bits."""
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        shape = _shaped(torch.empty(self.out_features, self.plan.reduction, device="meta"), self.plan).shape
        return StoredWeight.of(shape, torch.int8, self.stored.device, lambda: _shaped(self.integer_weight(), self.plan))

    def integer_weight(self) -> Tensor:
        """The int8 matrix W' (N, K), channels in stored order."""
        weight, subscales = self._stored(), self.subscales if self.plan.wbits == 4 else None
        if subscales is None:
            return weight
        return packing.expand_two_level(weight, subscales, self.plan.reduction, self.plan.weight_group)

    def _stored(self) -> Tensor:
        """What `stored` holds, as files have it: the int8 matrix (N, K), or packed."""
        stored = self.stored
        tensor = stored.make() if isinstance(stored, StoredWeight) else stored.detach()
        return to_matrix(tensor) if self.plan.wbits == 8 else tensor

    def restore(self) -> None:
        """Give up the backend's form of the weight; the next call makes it again."""
        if isinstance(self.stored, StoredWeight):
            self._hold(self._stored_name, self.stored.make())
        self._prepared = None

    @property
    def natural_weight(self) -> Tensor:
        """The int8 matrix W' (N, K) with the input channels in natural order."""
        return self._natural(self.integer_weight())

    def natural_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of `natural_weight`, made from the form that the weight is in; start is a multiple of
        16."""
        plan, ready = self.plan, self._prepared
        if ready is not None and ready.engine is not None:
            return ready.engine.rows(start, stop)
        stored = self.stored.detach()[start:stop]
        if plan.wbits == 8:
            return self._natural(to_matrix(stored))
        subscales = self.subscales[start:stop]
        return self._natural(packing.expand_two_level(stored, subscales, plan.reduction, plan.weight_group))

    def _natural(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, K) of stored order in natural order."""
        if not self.plan.reordered:
            return matrix
        by_channel = matrix.reshape(len(matrix), -1, self.in_features)
        natural = torch.empty_like(by_channel)
        natural[:, :, self.order.long()] = by_channel
        return natural.view_as(matrix)

    def _prepare(self, device: torch.device) -> Prepared:
        """Pack for the backend of `device`. A sum that could overflow int32 is refused here (DgqError)."""
        plan = self.plan
        shifts = len(plan.class_ends) > 1
        if backend.select(device) == "cpu" and native.available() and not shifts:
            return self._pack(device)
        # Without shift classes the stored order only served the sub-scale groups: int8 weights go back to natural
        # order, and the codes need no gather. The int4 kernels read the packed form, so there the codes follow.
        kernel_unpacks = backend.select(device) == "triton" and plan.wbits == 4
        gather = plan.reordered and (shifts or kernel_unpacks)
        matrix = self.integer_weight() if gather else self.natural_weight
        class_of = None
        if shifts:
            bounds = torch.tensor(plan.class_ends[:-1], device=matrix.device)
            channel = torch.arange(plan.in_features, device=matrix.device)
            class_of = torch.bucketize(channel, bounds, right=True).repeat(plan.kernel_size**2)
        sums = column_sum(matrix, class_of)
        prepared = Prepared(device, sums, self.order.argsort().to(torch.int32) if gather else None)
        prepared.fuses = backend.select(device) == "triton"
        if kernel_unpacks:
            return prepared
        if backend.select(device) == "cpu" and backend.cpu_path() != "reference":
            weight = from_matrix(matrix, plan).contiguous()
            prepared.split = linear_cpu.needs_split(plan.abits, matrix)
            if plan.kind == "conv2d":
                prepared.onednn = conv2d_cpu.prepack(weight, plan.stride, plan.class_ends)
            else:
                prepared.onednn = linear_cpu.prepack(weight, plan.class_ends)
        elif plan.wbits == 4 or (plan.reordered and not gather):
            prepared.weight = from_matrix(matrix, plan)
        return prepared

    def _pack(self, device: torch.device) -> Prepared:
        """For the CPU engine, straight from the stored form."""
        plan = self.plan
        weight: Tensor | native.TwoLevel = self._stored()
        if plan.wbits == 4:
            weight = native.TwoLevel(self._stored(), self.subscales, plan.reduction, plan.weight_group)
        try:
            engine = native.Layer(
                weight, self._scale(), self.bias, self._inv_divisor(), plan.abits, plan.kernel_size, plan.stride,
                plan.padding, self.order if plan.reordered else None,
            )  # fmt: skip
        except OverflowError as error:
            raise DgqError(str(error), "quantize this layer to 4 bits") from None
        return Prepared(device, engine.column_sum, None, engine)

    def prepare(self, device: torch.device) -> Prepared:
        """The backend's form of the weight, made at the first call on a device and kept while the stored tensor is."""
        ready = self._prepared
        if ready is not None and ready.device == device and (torch.compiler.is_compiling() or self._is_of(ready)):
            return ready
        with _preparing:
            ready = self._prepared
            if ready is None or ready.device != device or not self._is_of(ready):
                self.restore()
                ready = self._prepare(device)
                if ready.engine is not None:
                    self._leave_to(ready.engine)
                self._keep(ready)
            return ready

    def _is_of(self, ready: Prepared) -> bool:
        return ready.source is not None and ready.source() is self._parameters[self._stored_name]

    def _keep(self, ready: Prepared) -> None:
        """Until whoever holds the stored tensor lets go of it: offloading puts another one in its place."""
        layer, kept = weakref.ref(self), weakref.ref(ready)

        def drop(_: Any) -> None:
            owner = layer()
            if owner is not None and owner._prepared is kept():
                owner._prepared = None

        ready.source = weakref.ref(self.stored, drop)
        self._prepared = ready

    def _leave_to(self, engine: native.Layer) -> None:
        """Let go of the stored weight: the engine's blocks hold it."""
        plan, stored = self.plan, self.stored
        order = self.order.long() if plan.reordered else None
        subscales = self.subscales.detach() if plan.wbits == 4 else None

        def make() -> Tensor:
            matrix = engine.weight()
            if order is not None:
                by_channel = matrix.view(plan.out_features, -1, plan.in_features)
                matrix = by_channel[:, :, order].view_as(matrix)
            if subscales is None:
                return _shaped(matrix, plan)
            return packing.pack_two_level(matrix, subscales, plan.weight_group)

        native.page_out(stored)
        self._hold(self._stored_name, StoredWeight.of(stored.shape, stored.dtype, stored.device, make))

    def operand(self) -> Tensor | None:
        """The int8 weight that the product ops read, (N, C) or channels-last (N, C, kh, kw); None where they read the
        packed one. For layers prepared without the engine."""
        ready = self._prepared
        if ready is not None and ready.weight is not None:
            return ready.weight
        if self.plan.wbits == 4:
            return None
        weight = self.stored
        return weight.flatten(1) if self.plan.kind == "pointwise" else weight

    @property
    def prepared_bytes(self) -> int:
        """Bytes of the weight's form that a backend keeps beside the stored tensors, and not in their memory."""
        ready = self._prepared
        if ready is None:
            return 0
        if ready.onednn is not None:  # tensors in oneDNN's layout do not tell their size
            return self.plan.reduction * self.plan.out_features
        held = [tensor for tensor in self.parameters() if not isinstance(tensor, StoredWeight)]
        stored = {tensor.untyped_storage().data_ptr() for tensor in held}
        return sum(tensor.nbytes for tensor in ready.tensors if tensor.untyped_storage().data_ptr() not in stored)

    def fuses(self, device: torch.device) -> bool:
        """Whether the ops on this device quantize together with what comes before (`forward`'s norm and the rest)."""
        ready = self._prepared  # nothing is packed for the answer: the weight may be away until the layer is called
        return ready.fuses if ready is not None else backend.select(device) == "triton"

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        norm: nn.Module | None = None,
        activation: Activation = "none",
        offset: Tensor | None = None,
    ) -> Tensor:
        """x (..., C) for a linear layer, (B, C, H, W) for a convolution; returns x's dtype.

        What happens to x before the product is done while it is quantized, where engine or ops can: in this order.

        Args:
            residual: added to the result, shaped like it.
            sample_bias: (B, N), added too; of a convolution larger than 1x1.
            norm: applied to x.
            activation: applied after the norm.
            offset: (B, C), added to the x of a convolution before its norm.
        """
        kind, ready = self.plan.kind, self.prepare(x.device)
        if kind == "pointwise":
            y = self.over_pixels(x, norm, None if residual is None else residual.permute(0, 2, 3, 1), activation)
            return y.permute(0, 3, 1, 2)
        before = self._engine_norm(norm, activation, x)
        if ready.fuses:
            codes = self._fused_codes(x, norm, activation, offset)
            if codes is not None:
                return self._finish(codes, x, residual, sample_bias)
        if before is None:
            x = _apply(x, norm, activation, offset)
        if ready.engine is None:
            return self._finish(self._codes(x), x, residual, sample_bias)
        if kind == "linear":
            return ready.engine.linear(x, residual, norm=before)
        if sample_bias is not None and self.bias is not None:
            sample_bias = sample_bias.float() + self.bias
        return ready.engine.conv2d(x, residual, sample_bias, before)

    def over_pixels(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
        activation: Activation = "none",
    ) -> Tensor:
        """A linear layer or 1x1 convolution over pixels: x (B, C, H, W) -> (B, H, W, N), like the residual."""
        ready, known = self.prepare(x.device), norm
        size = (x.shape[0], *x.shape[2:], self.out_features)
        if ready.fuses and activation == "none" and type(known) is nn.GroupNorm:
            codes = dgq_kernels.group_norm_quantize_rows(
                x, known.num_groups, known.weight, known.bias, known.eps, self.plan.abits, self._inv_divisor(),
                ready.position,
            )  # fmt: skip
            return self._multiply(Codes(*codes), x.dtype, residual).view(size)
        x = _apply(x, norm, activation, None).permute(0, 2, 3, 1)
        if ready.engine is not None:
            return ready.engine.linear(x, residual)
        y = self._multiply(self._codes(x), x.dtype, residual if ready.fuses else None).view(size)
        return y if residual is None or ready.fuses else y + residual

    def _engine_norm(self, norm: nn.Module | None, activation: Activation, x: Tensor) -> native.Norm | None:
        """The norm, and SiLU, as the engine takes them; None where it does not."""
        kind, engine = self.plan.kind, None if norm is None else self.prepare(x.device).engine
        if engine is None:
            return None
        known: Any = norm
        silu = activation == "silu"
        kind_fits = (
            type(norm) is nn.GroupNorm and known.affine
            if kind == "conv2d"
            else kind == "linear" and type(norm) is nn.LayerNorm and known.bias is not None and not silu
        )
        if not kind_fits:
            return None
        if torch.compiler.is_compiling():
            return _native_norm(known, silu)
        state = (norm, silu, *_state_of(known.weight), *_state_of(known.bias))
        if self._norm is None or self._norm[0] != state:
            self._norm = state, _native_norm(known, silu)
        return self._norm[1]

    def gated(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """value * gelu(gate) (..., N / 2) of the two halves (..., N) that `forward` gives for x (..., C)."""
        ready = self.prepare(x.device)
        if ready.engine is not None and ready.engine.can_gate:
            before = self._engine_norm(norm, "none", x)
            x = x if norm is None or before is not None else norm(x)
            return ready.engine.linear(x, gated=True, norm=before)
        if ready.fuses:
            return self._multiply(self._codes_of(x, norm), x.dtype, None, gated=True).view(*x.shape[:-1], -1)
        value, gate = self(x, norm=norm).chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)

    def _codes(self, x: Tensor) -> Codes:
        """The codes of x itself: of its rows, or of samples with their padding."""
        plan, position = self.plan, self.prepare(x.device).position
        if plan.kind == "conv2d":
            return Codes(*dgq_kernels.quantize_samples(x, plan.abits, self._inv_divisor(), plan.padding, position))
        rows = x.reshape(-1, plan.in_features)
        return Codes(*dgq_kernels.quantize_rows(rows, plan.abits, self._inv_divisor(), position))

    def _codes_of(self, x: Tensor, norm: nn.Module | None) -> Codes:
        """The codes of rows, normalized first, by one op where there is one."""
        codes = None if norm is None else self._fused_codes(x, norm, "none")
        return self._codes(x if norm is None else norm(x)) if codes is None else codes

    def _fused_codes(
        self, x: Tensor, norm: nn.Module | None, activation: Activation, offset: Tensor | None = None
    ) -> Codes | None:
        """The codes of what norm and activation make of x, by one op; None where there is no op for them."""
        plan, position = self.plan, self.prepare(x.device).position
        known: Any = norm
        if plan.kind == "conv2d":
            if type(norm) is not nn.GroupNorm:
                return None
            return Codes(
                *dgq_kernels.group_norm_quantize_samples(
                    x, known.num_groups, known.weight, known.bias, known.eps, activation == "silu", plan.abits,
                    self._inv_divisor(), plan.padding, position, offset,
                )
            )  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        last = (plan.abits, self._inv_divisor(), position)
        if type(norm) is nn.LayerNorm and activation == "none" and known.normalized_shape == x.shape[-1:]:
            return Codes(*dgq_kernels.layer_norm_quantize_rows(rows, known.weight, known.bias, known.eps, *last))
        if norm is not None or activation == "none":
            return None
        return Codes(*dgq_kernels.silu_quantize_rows(rows, *last))

    def _finish(self, codes: Codes, x: Tensor, residual: Tensor | None, sample_bias: Tensor | None) -> Tensor:
        """The layer's result from its input's codes; x gives dtype and shape."""
        fuses = self.prepare(x.device).fuses and sample_bias is None
        y = self._multiply(codes, x.dtype, residual if fuses else None)
        if self.plan.kind == "linear":
            assert sample_bias is None
            y = y.view(*x.shape[:-1], self.plan.out_features)
        elif sample_bias is not None:
            y = y + sample_bias.to(y.dtype)[:, :, None, None]
        return y if residual is None or fuses else y + residual

    def _multiply(self, codes: Codes, dtype: torch.dtype, residual: Tensor | None, gated: bool = False) -> Tensor:
        """The product op: (rows, N), or (B, N, H, W) of a convolution. Residual and gate (of a linear layer) only
        where the backend fuses."""
        plan, bias = self.plan, self.bias
        ready = self._prepared
        assert ready is not None
        weight = None if ready.onednn is not None else self.operand()
        after = (self._scale(), ready.column_sum, bias)
        if plan.kind == "conv2d":
            if ready.onednn is not None:
                return dgq_kernels.conv2d_prepacked(
                    *codes, ready.onednn, plan.class_ends, ready.split, *after, plan.kernel_size, plan.stride, dtype
                )
            if weight is not None:
                return dgq_kernels.conv2d(*codes, weight, *after, plan.stride, dtype, plan.class_ends, residual)
            return dgq_kernels.conv2d_int4(
                *codes, self.packed, self.subscales, *after, plan.kernel_size, plan.stride, dtype, plan.weight_group,
                residual,
            )  # fmt: skip
        if residual is not None:
            residual = residual.reshape(-1, plan.out_features)
        if ready.onednn is not None:
            return dgq_kernels.linear_prepacked(*codes, ready.onednn, plan.class_ends, ready.split, *after, dtype)
        if weight is not None:
            return dgq_kernels.linear_int8(*codes, weight, *after, dtype, plan.class_ends, residual, gated)
        return dgq_kernels.linear_int4(
            *codes, self.packed, self.subscales, *after, dtype, plan.weight_group, residual, gated
        )

    def set_scales(self, weight_scale: Tensor, inv_divisor: Tensor | None) -> None:
        """Run with other scales than the stored ones, which stay as they are; nothing is packed anew.

        Args:
            weight_scale: float32 (N,).
            inv_divisor: float32 (C,), what the input is multiplied by; None: nothing. Layers that are to share a
                quantized input are given the same tensor.
        """
        self._tuned = weight_scale, inv_divisor
        self._rescale()

    def clear_scales(self) -> None:
        """Run with the stored scales again."""
        self._tuned = None
        self._rescale()

    def _rescale(self) -> None:
        ready = self._prepared
        if ready is not None and ready.engine is not None:
            ready.engine.set_scales(self._scale(), self._inv_divisor())

    def _scale(self) -> Tensor:
        return self.weight_scale if self._tuned is None else self._tuned[0]

    def _inv_divisor(self) -> Tensor | None:
        if self._tuned is not None:
            return self._tuned[1]
        return self.inv_divisor if self.plan.channels != "none" else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        """Move between devices, but never change a dtype: scales in half precision would be another model."""
        here = self.weight_scale.device
        if fn(torch.empty(0, device=here)).device == here:
            return self
        self.restore()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            return moved.contiguous(memory_format=torch.channels_last) if moved.dim() == 4 else moved

        if self._tuned is not None:
            scale, divisor = self._tuned
            self._tuned = move(scale), None if divisor is None else move(divisor)
        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self.stored
        made = stored.make() if isinstance(stored, StoredWeight) else stored.detach()
        destination[prefix + self._stored_name] = _unshared(made)
        if self.plan.wbits == 4:
            destination[prefix + "subscales"] = _unshared(self.subscales.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.restore()
        name = prefix + "weight"
        if name in state_dict and tuple(state_dict[name].shape) == (self.out_features, self.plan.reduction):
            state_dict[name] = _shaped(state_dict[name], self.plan)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return {
            **self.__dict__,
            "_prepared": None,
            "_norm": None,
        }  # opaque tensors and addresses cannot be copied or pickled

    def extra_repr(self) -> str:
        p = self.plan
        return f"{p.kind} {p.in_features} -> {p.out_features}, W{p.wbits}A{p.abits}, channels {p.channels}"


def is_direct(module: object, kind: str | None = None) -> bool:
    """Whether a module is an integer layer (of this kind) with nothing around it. Only such a one may be asked for more
    than `layer(x)`: an adapter computes from its own input, an offloading hook fetches the weight at the call."""
    return (
        isinstance(module, IntegerLayer)
        and kind in (None, module.plan.kind)
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
    )


class IntegerLinear(IntegerLayer, nn.Linear):  # type: ignore[misc, override]
    """An integer layer that is an `nn.Linear`."""


class IntegerConv2d(IntegerLayer, nn.Conv2d):  # type: ignore[override]
    """An integer layer that is an `nn.Conv2d`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Adapters make float convolutions of `type(layer)`: they get them."""
        if args and not isinstance(args[0], LayerPlan):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.in_channels, self.out_channels = plan.in_features, plan.out_features
        self.kernel_size, self.stride = (plan.kernel_size,) * 2, (plan.stride,) * 2
        self.padding, self.dilation, self.output_padding = (plan.padding,) * 2, (1, 1), (0, 0)
        self.groups, self.transposed, self.padding_mode = 1, False, "zeros"


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """Changes where a tensor's values may have."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _native_norm(norm: Any, silu: bool) -> native.Norm:
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
    return native.Norm(norm.weight.float(), norm.bias.float(), norm.eps, groups, silu)


def _shaped(weight: Tensor, plan: LayerPlan) -> Tensor:
    """A weight, or its matrix (N, K), as a layer keeps it: (N, C), or channels-last (N, C, kh, kw)."""
    if plan.kind == "linear":
        return weight
    if weight.dim() == 2:
        kernel = plan.kernel_size
        weight = weight.view(plan.out_features, kernel, kernel, plan.in_features).permute(0, 3, 1, 2)
    return weight.contiguous(memory_format=torch.channels_last)


def _apply(x: Tensor, norm: nn.Module | None, activation: Activation, offset: Tensor | None) -> Tensor:
    """`IntegerLayer.forward`'s steps before the product, by torch."""
    if offset is not None:
        x = x + offset.to(x.dtype)[:, :, None, None]
    x = x if norm is None else norm(x)
    if activation == "silu":
        return nn.functional.silu(x)
    return x


def _unshared(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, as files want it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
