"""The layers of an integer checkpoint: packed weights, run-time activation codes, one int8 product."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dgq_kernels
from dgq_kernels import backend, native, packing
from dgq_kernels.conv2d import cpu as conv2d_cpu
from dgq_kernels.linear import cpu as linear_cpu

from .errors import DgqError
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


# Layers may be used from several threads, and packing takes the stored form away.
_preparing = threading.Lock()


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

    def _prepare(self, device: torch.device) -> _Prepared:
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
        prepared = _Prepared(device, sums, self.order.argsort().to(torch.int32) if gather else None)
        if kernel_unpacks:
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

    def _pack(self, device: torch.device) -> _Prepared:
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
        return _Prepared(device, engine.column_sum, None, engine)

    def prepare(self, device: torch.device) -> _Prepared:
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
        """Bytes a backend keeps beside the buffers. (A tensor in oneDNN's layout does not tell its size.)"""
        ready = self._prepared
        if ready is None or not ready.tensors:
            return 0
        return self.plan.reduction * self.plan.out_features if ready.engine is None else ready.engine.packed.nbytes

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        norm: nn.Module | None = None,
        silu: bool = False,
    ) -> Tensor:
        """x (..., C) for a linear layer, (B, C, H, W) for a convolution; returns x's dtype.

        Args:
            residual: added to the result, shaped like it.
            sample_bias: (B, N), added too; of a convolution larger than 1x1.
            norm: applied to x first, then SiLU if `silu`; the engine does both while it quantizes.
        """
        kind = self.plan.kind
        before = self._engine_norm(norm, silu, x)
        if norm is not None and before is None:
            x = norm(x)
            x = nn.functional.silu(x) if silu else x
        if kind == "conv2d":
            return self._convolve(x, residual, sample_bias, before)
        assert sample_bias is None
        if kind == "pointwise":
            moved = None if residual is None else residual.permute(0, 2, 3, 1)
            return self._rows(x.permute(0, 2, 3, 1), moved, None).permute(0, 3, 1, 2)
        return self._rows(x, residual, before)

    def _engine_norm(self, norm: nn.Module | None, silu: bool, x: Tensor) -> native.Norm | None:
        """The norm as the engine takes it; None where it does not."""
        kind, engine = self.plan.kind, None if norm is None else self.prepare(x.device).engine
        if engine is None:
            return None
        known: Any = norm
        if kind == "conv2d" and type(norm) is nn.GroupNorm and known.affine and not engine.divided:
            return native.Norm(known.weight.float(), known.bias.float(), known.eps, known.num_groups, silu)
        if kind == "linear" and type(norm) is nn.LayerNorm and known.bias is not None and not silu:
            return native.Norm(known.weight.float(), known.bias.float(), known.eps)
        return None

    def gated(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """value * gelu(gate) (..., N / 2) of the two halves (..., N) that `forward` gives for x (..., C)."""
        engine = self.prepare(x.device).engine
        if engine is not None and engine.can_gate:
            before = self._engine_norm(norm, False, x)
            x = x if norm is None or before is not None else norm(x)
            return engine.linear(x, gated=True, norm=before)
        value, gate = self(x, norm=norm).chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)

    def _rows(self, x: Tensor, residual: Tensor | None, norm: native.Norm | None) -> Tensor:
        plan, ready = self.plan, self.prepare(x.device)
        if ready.engine is not None:
            return ready.engine.linear(x, residual, norm=norm)
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
        y = y.view(*x.shape[:-1], plan.out_features)
        return y if residual is None else y + residual

    def _convolve(
        self, x: Tensor, residual: Tensor | None, sample_bias: Tensor | None, norm: native.Norm | None
    ) -> Tensor:
        plan, ready = self.plan, self.prepare(x.device)
        if ready.engine is not None:
            if sample_bias is not None and plan.bias:
                sample_bias = sample_bias.float() + self.bias
            return ready.engine.conv2d(x, residual, sample_bias, norm)
        codes, scale, zero = dgq_kernels.quantize_samples(
            x, plan.abits, self._inv_divisor(), plan.padding, ready.position
        )
        bias = self._bias()
        if ready.onednn is not None:
            y = dgq_kernels.conv2d_prepacked(
                codes, scale, zero, ready.onednn, plan.class_ends, ready.split, self.weight_scale, ready.column_sum,
                bias, plan.kernel_size, plan.stride, x.dtype,
            )  # fmt: skip
        elif ready.weight is not None:
            y = dgq_kernels.conv2d(
                codes, scale, zero, ready.weight, self.weight_scale, ready.column_sum, bias, plan.stride, x.dtype,
                plan.class_ends,
            )  # fmt: skip
        else:
            y = dgq_kernels.conv2d_int4(
                codes, scale, zero, self.packed, self.subscales, self.weight_scale, ready.column_sum, bias,
                plan.kernel_size, plan.stride, x.dtype, plan.weight_group,
            )  # fmt: skip
        if sample_bias is not None:
            y = y + sample_bias.to(y.dtype)[:, :, None, None]
        return y if residual is None else y + residual

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
        destination[prefix + self._stored_name] = self._stored()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return {**self.__dict__, "_prepared": None}  # opaque tensors and addresses cannot be copied or pickled

    def extra_repr(self) -> str:
        p = self.plan
        return f"{p.kind} {p.in_features} -> {p.out_features}, W{p.wbits}A{p.abits}, channels {p.channels}"


def project(layers: Sequence[nn.Module], x: Tensor, norm: nn.Module | None = None) -> list[Tensor]:
    """The results of several layers on one input (..., C), normalized first; normalized and quantized once where the
    engine can."""
    own = [layer for layer in layers if isinstance(layer, IntegerLayer) and layer.plan.kind == "linear"]
    if len(own) == len(layers):
        prepared = [layer.prepare(x.device).engine for layer in own]
        engines = [engine for engine in prepared if engine is not None]
        if len(engines) == len(own) and native.can_share(engines):
            before = own[0]._engine_norm(norm, False, x)
            x = x if norm is None or before is not None else norm(x)
            return native.linear(engines, x, norm=before)
    x = x if norm is None else norm(x)
    return [layer(x) for layer in layers]


def prepare_all(model: nn.Module, device: torch.device) -> None:
    """Pack every integer layer for a device now. Between a first call's activations, packing would leave the
    allocator's memory in pieces."""
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            module.prepare(device)


class SplitLayer(nn.ModuleList):
    """A 1x1 convolution over joined tensors, one integer layer for each: y is the sum of their results.

    A shortcut in the up path reads the hidden state and the skip side by side. Their sizes differ by an order of
    magnitude, and with one scale a row the smaller one would be rounded away (docs/method.md, item 4).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, N, H, W)."""
        y = residual
        for part in self.parts:
            y = part(x[:, slice(*part.plan.columns)], y)
        assert y is not None
        return y

    @property
    def parts(self) -> list[IntegerLayer]:
        """In the order of their channels."""
        return list(self)  # type: ignore[arg-type]


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name` below `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def place(unet: nn.Module, layers: dict[str, IntegerLayer]) -> None:
    """Swap layers of a float model for integer layers, in place; the parts of one layer come in their order.

    Raises:
        DgqError: the parts of a layer are not its input channels.
    """
    joined: dict[str, list[IntegerLayer]] = {}
    for name, layer in layers.items():
        if layer.plan.columns:
            joined.setdefault(layer.plan.owner(name), []).append(layer)
        else:
            replace_module(unet, name, layer)
    for owner, parts in joined.items():
        ends = [0, *(part.plan.columns[1] for part in parts)]
        starts = [part.plan.columns[0] for part in parts]
        channels = getattr(unet.get_submodule(owner), "in_channels", 0)
        if starts != ends[:-1] or ends[-1] != channels or any(part.plan.kind != "pointwise" for part in parts):
            raise DgqError(f"{owner}: parts that end at {ends[1:]} are not its {channels} input channels")
        replace_module(unet, owner, SplitLayer(parts))


def build_skeleton(unet: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Swap the planned layers of a float model for empty integer layers, in place.

    Raises:
        DgqError: as `place`.
    """
    place(unet, {name: IntegerLayer(plan) for name, plan in plans.items()})
