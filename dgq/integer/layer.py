"""The layers of an integer checkpoint: packed weights, run-time activation codes, one int8 product."""

from __future__ import annotations

import threading
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
from .channels import ChannelGroups, from_matrix
from .prepared import Codes, Prepared
from .stored import buffer_specs
from .weights import IntegerWeight, column_sum

# What a layer does to its input first, after a norm.
Activation = Literal["none", "silu"]


# Layers may be used from several threads, and packing takes the stored form away.
_preparing = threading.Lock()


class IntegerLayer(nn.Module):
    """A quantized linear layer or convolution (docs/method.md, "integer recipe").

    Weights stay packed integers; no float copy of them exists. The layer takes and returns the dtype of its input.
    Where the CPU engine has packed the weight, its blocks are the only copy: the stored form, which state_dict and
    moves to another device need, is made from them.

    Args:
        plan: sizes, bits and channel handling. Buffers are allocated uninitialised (on the current default device).
    """

    weight: Tensor
    packed: Tensor
    subscales: Tensor
    weight_scale: Tensor
    bias: Tensor
    inv_divisor: Tensor
    order: Tensor

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.plan = plan
        self.in_features, self.out_features = plan.in_features, plan.out_features
        for name, (shape, dtype) in buffer_specs(plan).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self._prepared: Prepared | None = None

    @classmethod
    def from_quantized(
        cls, plan: LayerPlan, weight: IntegerWeight, groups: ChannelGroups, bias: Tensor | None
    ) -> IntegerLayer:
        """Pack a quantized weight matrix (N, K), its channels in the stored order of `groups`."""
        layer = cls(plan)
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
            assert tuple(value.shape) == shape, f"{name}: {tuple(value.shape)} instead of {shape}"
            setattr(layer, name, value.detach().to(dtype).contiguous())
        return layer

    def integer_weight(self) -> Tensor:
        """The int8 matrix W' (N, K), channels in stored order."""
        weight, subscales = self._stored(), self.subscales if self.plan.wbits == 4 else None
        if subscales is None:
            return weight
        return packing.expand_two_level(weight, subscales, self.plan.reduction, self.plan.weight_group)

    @property
    def _stored_name(self) -> str:
        return "weight" if self.plan.wbits == 8 else "packed"

    def _stored(self) -> Tensor:
        """The buffer `weight` or `packed`, made again from the engine's blocks where it was dropped."""
        plan, ready = self.plan, self._prepared
        buffer: Tensor = getattr(self, self._stored_name)
        if ready is None or ready.engine is None:
            return buffer
        matrix = ready.engine.weight()
        if plan.reordered:
            by_channel = matrix.view(plan.out_features, -1, plan.in_features)
            matrix = by_channel[:, :, self.order.long()].view_as(matrix)
        if plan.wbits == 8:
            return matrix
        return packing.pack_two_level(matrix, self.subscales, plan.weight_group)

    def restore(self) -> None:
        """Give up the backend's form of the weight; the next call makes it again."""
        if self._prepared is not None and self._prepared.engine is not None:
            setattr(self, self._stored_name, self._stored())
        self._prepared = None

    @property
    def natural_weight(self) -> Tensor:
        """The int8 matrix W' (N, K) with the input channels in natural order."""
        matrix = self.integer_weight()
        if not self.plan.reordered:
            return matrix
        by_channel = matrix.view(self.out_features, -1, self.in_features)
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
        weight = from_matrix(matrix, plan)
        if backend.select(device) == "cpu" and backend.cpu_path() != "reference":
            prepared.split = linear_cpu.needs_split(plan.abits, matrix)
            if plan.kind == "conv2d":
                prepared.onednn = conv2d_cpu.prepack(weight.contiguous(), plan.stride, plan.class_ends)
            else:
                prepared.onednn = linear_cpu.prepack(weight, plan.class_ends)
        elif plan.kind == "conv2d":
            # As the kernel reads it, and as the matrix lies in memory: no copy of a matrix stored in this order.
            prepared.weight = weight.contiguous(memory_format=torch.channels_last)
        else:
            prepared.weight = weight
        return prepared

    def _pack(self, device: torch.device) -> Prepared:
        """For the CPU engine, straight from the stored form."""
        plan = self.plan
        weight: Tensor | native.TwoLevel = self._stored()
        if plan.wbits == 4:
            weight = native.TwoLevel(self._stored(), self.subscales, plan.reduction, plan.weight_group)
        try:
            engine = native.Layer(
                weight, self.weight_scale, self._bias(), self._inv_divisor(), plan.abits, plan.kernel_size, plan.stride,
                plan.padding, self.order if plan.reordered else None,
            )  # fmt: skip
        except OverflowError as error:
            raise DgqError(str(error), "quantize this layer to 4 bits") from None
        return Prepared(device, engine.column_sum, None, engine)

    def prepare(self, device: torch.device) -> Prepared:
        """The backend's form of the weight, made at the first call on a device and kept."""
        ready = self._prepared
        if ready is not None and ready.device == device:
            return ready
        with _preparing:
            if self._prepared is None or self._prepared.device != device:
                self.restore()
                ready = self._prepare(device)
                if ready.engine is not None:
                    name = self._stored_name
                    native.page_out(getattr(self, name))
                    setattr(self, name, getattr(self, name).new_empty(0))
                self._prepared = ready
            return self._prepared

    @property
    def prepared_bytes(self) -> int:
        """Bytes of the weight's form that a backend keeps beside the buffers, and not in their memory."""
        ready = self._prepared
        if ready is None:
            return 0
        if ready.onednn is not None:  # tensors in oneDNN's layout do not tell their size
            return self.plan.reduction * self.plan.out_features
        stored = {buffer.untyped_storage().data_ptr() for buffer in self.buffers()}
        return sum(tensor.nbytes for tensor in ready.tensors if tensor.untyped_storage().data_ptr() not in stored)

    def fuses(self, device: torch.device) -> bool:
        """Whether the ops on this device quantize together with what comes before (`forward`'s norm and the rest)."""
        return self.prepare(device).fuses

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
        if sample_bias is not None and self.plan.bias:
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
        if kind == "conv2d" and type(norm) is nn.GroupNorm and known.affine and not engine.divided:
            return native.Norm(known.weight.float(), known.bias.float(), known.eps, known.num_groups, silu)
        if kind == "linear" and type(norm) is nn.LayerNorm and known.bias is not None and not silu:
            return native.Norm(known.weight.float(), known.bias.float(), known.eps)
        return None

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
        plan, bias = self.plan, self._bias()
        ready = self._prepared
        assert ready is not None
        after = (self.weight_scale, ready.column_sum, bias)
        if plan.kind == "conv2d":
            if ready.onednn is not None:
                return dgq_kernels.conv2d_prepacked(
                    *codes, ready.onednn, plan.class_ends, ready.split, *after, plan.kernel_size, plan.stride, dtype
                )
            if ready.weight is not None:
                return dgq_kernels.conv2d(*codes, ready.weight, *after, plan.stride, dtype, plan.class_ends, residual)
            return dgq_kernels.conv2d_int4(
                *codes, self.packed, self.subscales, *after, plan.kernel_size, plan.stride, dtype, plan.weight_group,
                residual,
            )  # fmt: skip
        if residual is not None:
            residual = residual.reshape(-1, plan.out_features)
        if ready.onednn is not None:
            return dgq_kernels.linear_prepacked(*codes, ready.onednn, plan.class_ends, ready.split, *after, dtype)
        if ready.weight is not None:
            return dgq_kernels.linear_int8(*codes, ready.weight, *after, dtype, plan.class_ends, residual, gated)
        return dgq_kernels.linear_int4(
            *codes, self.packed, self.subscales, *after, dtype, plan.weight_group, residual, gated
        )

    def _inv_divisor(self) -> Tensor | None:
        return self.inv_divisor if self.plan.channels != "none" else None

    def _bias(self) -> Tensor | None:
        return self.bias if self.plan.bias else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        """Move between devices, but never change a dtype: scales in half precision would be another model."""
        self.restore()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self._stored_name] = _unshared(self._stored())
        if self.plan.wbits == 4:
            destination[prefix + "subscales"] = _unshared(self.subscales)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return {**self.__dict__, "_prepared": None}  # opaque tensors and addresses cannot be copied or pickled

    def extra_repr(self) -> str:
        p = self.plan
        return f"{p.kind} {p.in_features} -> {p.out_features}, W{p.wbits}A{p.abits}, channels {p.channels}"


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
