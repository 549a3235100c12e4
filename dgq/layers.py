"""The layers of an integer checkpoint: packed weights, run-time activation codes, one int8 product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dgq_kernels
from dgq_kernels import backend, native, packing
from dgq_kernels.conv2d import cpu as conv2d_cpu
from dgq_kernels.linear import cpu as linear_cpu

from .quantizers.channels import ChannelGroups, from_matrix
from .quantizers.weights import IntegerWeight, column_sum
from .recipe import LayerPlan


def buffer_specs(plan: LayerPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of everything a layer stores; the file format of one layer.

    weight (int8) or packed and subscales (int4, see `dgq_kernels.packing`) hold the matrix (N, kh * kw * C) with the
    input channels in stored order; order[i] is the channel stored at place i; inv_divisor is in natural order.
    """
    n, k, c = plan.out_features, plan.reduction, plan.in_features
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if plan.wbits == 8:
        specs["weight"] = ((n, k), torch.int8)
    else:
        padded = packing.padded_length(k, plan.weight_group)
        specs["packed"] = ((n, padded // 2), torch.uint8)
        specs["subscales"] = ((n, -(-padded // plan.weight_group // 2)), torch.uint8)
    specs["weight_scale"] = ((n,), torch.float32)
    if plan.bias:
        specs["bias"] = ((n,), torch.float32)
    if plan.channels != "none":
        specs["inv_divisor"] = ((c,), torch.float32)
    if plan.reordered:
        specs["order"] = ((c,), torch.int32)
    return specs


@dataclass
class _Prepared:
    """What a backend needs at run time, made once from the stored buffers."""

    device: torch.device
    column_sum: Tensor
    position: Tensor | None  # int32, where each channel's code is stored for the product; None: in order
    engine: native.Layer | None = None  # int8 in the CPU engine's blocks
    weight: Tensor | None = None  # int8, dense
    onednn: list[Tensor] | None = None  # int8 in oneDNN's blocked layout
    split: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """The forms of the weight kept beside the stored buffers."""
        dense = [] if self.weight is None else [self.weight]
        return [*dense, *(self.onednn or []), *([] if self.engine is None else [self.engine.packed])]


class IntegerLayer(nn.Module):
    """A quantized linear layer or convolution (docs/method.md, "integer recipe").

    Weights stay packed integers; no float copy of them exists. The layer takes and returns the dtype of its input.

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
        self._prepared: _Prepared | None = None

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
        if self.plan.wbits == 8:
            return self.weight
        return packing.expand_two_level(self.packed, self.subscales, self.plan.reduction, self.plan.weight_group)

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

    def _prepare(self, device: torch.device) -> _Prepared:
        """Pack for the backend of `device`. A sum that could overflow int32 is refused here (DgqError)."""
        plan = self.plan
        shifts = len(plan.class_ends) > 1
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
        prepared = _Prepared(device, sums, self.order.argsort().to(torch.int32) if gather else None)
        if kernel_unpacks:
            return prepared
        if backend.select(device) == "cpu" and native.available() and not shifts:
            prepared.engine = native.Layer(
                matrix, self.weight_scale, sums, self._bias(), self._inv_divisor(), plan.abits,
                plan.kernel_size, plan.stride, plan.padding,
            )  # fmt: skip
            return prepared
        weight = from_matrix(matrix, plan).contiguous()
        if backend.select(device) == "cpu" and backend.cpu_path() != "reference":
            prepared.split = linear_cpu.needs_split(plan.abits, matrix)
            if plan.kind == "conv2d":
                prepared.onednn = conv2d_cpu.prepack(weight, plan.stride, plan.class_ends)
            else:
                prepared.onednn = linear_cpu.prepack(weight, plan.class_ends)
        elif plan.kind == "conv2d":
            prepared.weight = weight.contiguous(memory_format=torch.channels_last)  # as the kernel reads it
        else:
            prepared.weight = weight
        return prepared

    def prepare(self, device: torch.device) -> _Prepared:
        """The backend's form of the weight, made at the first call on a device and kept."""
        if self._prepared is None or self._prepared.device != device:
            self._prepared = self._prepare(device)
        return self._prepared

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) for a linear layer, (B, C, H, W) for a convolution; returns x's dtype."""
        kind = self.plan.kind
        if kind == "conv2d":
            return self._convolve(x)
        if kind == "pointwise":
            return self._rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        plan, ready = self.plan, self.prepare(x.device)
        if ready.engine is not None:
            return ready.engine.linear(x)
        rows = x.reshape(-1, plan.in_features)
        codes, scale, zero = dgq_kernels.quantize_rows(rows, plan.abits, self._inv_divisor(), ready.position)
        bias = self._bias()
        if ready.onednn is not None:
            y = dgq_kernels.linear_prepacked(
                codes, scale, zero, ready.onednn, plan.class_ends, ready.split,
                self.weight_scale, ready.column_sum, bias, x.dtype,
            )  # fmt: skip
        elif ready.weight is not None:
            y = dgq_kernels.linear_int8(
                codes, scale, zero, ready.weight, self.weight_scale, ready.column_sum, bias, x.dtype, plan.class_ends
            )
        else:
            y = dgq_kernels.linear_int4(
                codes, scale, zero, self.packed, self.subscales, self.weight_scale, ready.column_sum, bias, x.dtype,
                plan.weight_group,
            )  # fmt: skip
        return y.view(*x.shape[:-1], plan.out_features)

    def _convolve(self, x: Tensor) -> Tensor:
        plan, ready = self.plan, self.prepare(x.device)
        if ready.engine is not None:
            return ready.engine.conv2d(x)
        codes, scale, zero = dgq_kernels.quantize_samples(
            x, plan.abits, self._inv_divisor(), plan.padding, ready.position
        )
        bias = self._bias()
        if ready.onednn is not None:
            return dgq_kernels.conv2d_prepacked(
                codes, scale, zero, ready.onednn, plan.class_ends, ready.split, self.weight_scale, ready.column_sum,
                bias, plan.kernel_size, plan.stride, x.dtype,
            )  # fmt: skip
        if ready.weight is not None:
            return dgq_kernels.conv2d(
                codes, scale, zero, ready.weight, self.weight_scale, ready.column_sum, bias, plan.stride, x.dtype,
                plan.class_ends,
            )  # fmt: skip
        return dgq_kernels.conv2d_int4(
            codes, scale, zero, self.packed, self.subscales, self.weight_scale, ready.column_sum, bias,
            plan.kernel_size, plan.stride, x.dtype, plan.weight_group,
        )  # fmt: skip

    def _inv_divisor(self) -> Tensor | None:
        return self.inv_divisor if self.plan.channels != "none" else None

    def _bias(self) -> Tensor | None:
        return self.bias if self.plan.bias else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        """Move between devices, but never change a dtype: scales in half precision would be another model."""
        self._prepared = None

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # opaque tensors and addresses cannot be copied or pickled

    def extra_repr(self) -> str:
        p = self.plan
        return f"{p.kind} {p.in_features} -> {p.out_features}, W{p.wbits}A{p.abits}, channels {p.channels}"


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name` below `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def build_skeleton(unet: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Swap the planned layers of a float model for empty integer layers, in place."""
    for name, plan in plans.items():
        replace_module(unet, name, IntegerLayer(plan))
