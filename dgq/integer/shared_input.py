"""Integer layers that read the same input: quantized once, or joined into one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dgq_kernels
from dgq_kernels import native

from .layer import IntegerLayer, is_direct
from .prepared import Joined

if TYPE_CHECKING:
    from .prepared import Prepared


def _same(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are None, or all equal."""
    first, *others = tensors
    if first is None or any(other is None for other in others):
        return all(tensor is None for tensor in tensors)
    return all(other is not None and torch.equal(first, other) for other in others)


def _share_codes(layers: Sequence[IntegerLayer], ready: Sequence[Prepared]) -> bool:
    """Whether one quantized input serves all these layers. Looks at values: at preparation only."""
    sizes = {(layer.plan.in_features, layer.plan.abits) for layer in layers}
    divisors = [layer._inv_divisor() for layer in layers]
    return len(sizes) == 1 and _same(divisors) and _same([one.position for one in ready])


def join(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Let linear layers that read the same input run as one product on this device, where its ops and the layers'
    formats allow; their weights are then slices of one tensor."""
    own = [layer for layer in layers if isinstance(layer, IntegerLayer) and layer.plan.kind == "linear"]
    if len(own) < len(layers) or len(own) < 2:
        return
    ready = [layer.prepare(device) for layer in own]
    formats = {(layer.plan.wbits, layer.plan.weight_group, tuple(layer.plan.class_ends)) for layer in own}
    if not all(one.fuses for one in ready) or len(formats) > 1 or not _share_codes(own, ready):
        return
    sizes = [layer.out_features for layer in own]
    subscales = None
    dense = [weight for layer in own if (weight := layer.operand()) is not None]
    if dense:
        weight = torch.cat(dense)
        for layer, one, part in zip(own, ready, weight.split(sizes), strict=True):
            if one.weight is None:
                layer.stored.data = part
            else:
                one.weight = part
    else:
        weight, subscales = (torch.cat([getattr(layer, name) for layer in own]) for name in ("packed", "subscales"))
        for layer, packed, subs in zip(own, weight.split(sizes), subscales.split(sizes), strict=True):
            layer.packed.data, layer.subscales.data = packed, subs
    bias = None
    if any(layer.plan.bias for layer in own):
        bias = torch.cat([
            torch.zeros_like(layer.weight_scale) if layer.bias is None else layer.bias for layer in own
        ])  # fmt: skip
    scales = torch.cat([layer._scale() for layer in own])
    sums = torch.cat([one.column_sum for one in ready])
    ready[0].joined = Joined(own, ready, sizes, weight, subscales, scales, sums, bias)


def project(layers: Sequence[nn.Module], x: Tensor, norm: nn.Module | None = None) -> list[Tensor]:
    """The results of several layers on one input (..., C), normalized first; normalized and quantized once where the
    engine can, or in one product where they were joined (`join`)."""
    own: list[Any] = [layer for layer in layers if is_direct(layer, "linear")]
    if len(own) == len(layers):
        prepared = [layer.prepare(x.device) for layer in own]
        engines = [one.engine for one in prepared if one.engine is not None]
        if len(engines) == len(own) and native.can_share(engines):
            before = own[0]._engine_norm(norm, "none", x)
            x = x if norm is None or before is not None else norm(x)
            return native.linear(engines, x, norm=before)
        joined = prepared[0].joined
        if joined is not None and joined.fits(own):
            return _multiply_joined(joined, own[0], x, norm)
        if all(one.fuses for one in prepared):
            return [layer(x, norm=norm) for layer in own]
    x = x if norm is None else norm(x)
    return [layer(x) for layer in layers]


def _multiply_joined(joined: Joined, one: IntegerLayer, x: Tensor, norm: nn.Module | None) -> list[Tensor]:
    codes = one._codes_of(x, norm)
    after = (joined.weight_scale, joined.column_sum, joined.bias, x.dtype)
    if joined.subscales is None:
        y = dgq_kernels.linear_int8(*codes, joined.weight, *after, one.plan.class_ends)
    else:
        y = dgq_kernels.linear_int4(*codes, joined.weight, joined.subscales, *after, one.plan.weight_group)
    return list(y.view(*x.shape[:-1], -1).split(joined.sizes, dim=-1))


def prepare_all(model: nn.Module, device: torch.device) -> None:
    """Pack every integer layer for a device now, and join what reads the same input. Between a first call's
    activations, packing would leave the allocator's memory in pieces, and torch.compile cannot trace it."""
    device = torch.empty(0, device=device).device  # "cuda" by its index, as the tensors of a call name it
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            module.prepare(device)
    for module in model.modules():
        if hasattr(module, "to_q") and hasattr(module, "to_k") and hasattr(module, "to_v"):
            known: Any = module
            shared = [known.to_k, known.to_v]
            join(shared if known.is_cross_attention else [known.to_q, *shared], device)
