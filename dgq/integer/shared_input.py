"""Integer layers that read the same input: quantized once, or joined into one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .adapters import Adapted, add_product, direct
from .gradient import needed
from .layer import IntegerLayer
from .plan import shared_inputs
from .prepared import ByOps, Dense, Joined, Packed


def _same(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are None, or all equal."""
    first, *others = tensors
    if first is None or any(other is None for other in others):
        return all(tensor is None for tensor in tensors)
    return all(other is not None and torch.equal(first, other) for other in others)


def _share_codes(layers: Sequence[IntegerLayer], ready: Sequence[ByOps]) -> bool:
    """Whether one quantized input serves all these layers. Looks at values: at preparation only."""
    sizes = {(layer.plan.in_features, layer.plan.abits, layer.plan.rotation) for layer in layers}
    divisors = [layer._inv_divisor() for layer in layers]
    return len(sizes) == 1 and _same(divisors) and _same([one.position for one in ready])


def join(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Let linear layers that read the same input run as one product on this device, where its ops and the layers'
    formats allow; their weights are then slices of one tensor."""
    own = [layer for layer in layers if isinstance(layer, IntegerLayer) and layer.plan.kind == "linear"]
    if len(own) < len(layers) or len(own) < 2:
        return
    forms = [layer.prepare(device) for layer in own]
    ready: list[ByOps] = [one for one in forms if isinstance(one, Dense | Packed) and one.fuses]
    formats = {(layer.plan.wbits, layer.plan.weight_group, tuple(layer.plan.class_ends)) for layer in own}
    if len(ready) < len(own) or len(formats) > 1 or not _share_codes(own, ready):
        return
    sizes = [layer.out_features for layer in own]
    subscales = None
    dense = [one.operand(layer) for layer, one in zip(own, ready, strict=True) if isinstance(one, Dense)]
    if dense:
        weight = torch.cat(dense)
        for layer, one, part in zip(own, ready, weight.split(sizes), strict=True):
            if one.tensors:
                one.tensors = [part]
            else:
                layer.stored.data = part
    else:
        weight, subscales = (torch.cat([getattr(layer, name) for layer in own]) for name in ("packed", "subscales"))
        for layer, packed, subs in zip(own, weight.split(sizes), subscales.split(sizes), strict=True):
            layer.packed.data, layer.subscales.data = packed, subs
    bias = None
    if any(layer.plan.bias for layer in own):
        bias = torch.cat([torch.zeros_like(layer.weight_scale) if layer.bias is None else layer.bias for layer in own])
    scales = torch.cat([layer._scale() for layer in own])
    sums = torch.cat([one.column_sum for one in ready])
    ready[0].joined = Joined(own, ready, sizes, weight, subscales, scales, sums, bias)


def rescale_joined(layers: Iterable[IntegerLayer]) -> None:
    """Take the scales of joined layers anew, after `IntegerLayer.set_scales` or `clear_scales` of any of them."""
    for layer in layers:
        ready = layer._prepared
        if isinstance(ready, ByOps) and ready.joined is not None:
            ready.joined.rescale()


def project(layers: Sequence[nn.Module], x: Tensor, norm: nn.Module | None = None) -> list[Tensor]:
    """The results of several layers on one input (..., C), normalized first; normalized and quantized once where the
    engine can, or in one product where they were joined (`join`)."""
    found = [direct(layer, "linear") for layer in layers]
    own = [one.layer if isinstance(one, Adapted) else one for one in found if one is not None]
    adapted = {i: one for i, one in enumerate(found) if isinstance(one, Adapted)}
    if adapted and norm is not None:
        x, norm = norm(x), None
    results = None
    if len(own) == len(layers):
        if not needed(x, norm):
            ready = [layer.prepare(x.device) for layer in own]
            results = ready[0].together(own, ready, x, norm)
        if results is None:
            x = x if norm is None else norm(x)
            results = [layer(x) for layer in own]
        return _with_adapters(results, x, adapted)
    x = x if norm is None else norm(x)
    return [layer(x) for layer in layers]


def _with_adapters(results: list[Tensor], x: Tensor, adapted: dict[int, Adapted]) -> list[Tensor]:
    """Add the low-rank products of one input, whose first halves are one product."""
    if adapted:
        down = torch.cat([one.down.to(x.dtype) for one in adapted.values()])
        parts = nn.functional.linear(x, down).split([len(one.down) for one in adapted.values()], -1)
        for (i, one), h in zip(adapted.items(), parts, strict=True):
            add_product(results[i], h, one.up)
    return results


def prepare_all(model: nn.Module, device: torch.device) -> None:
    """Pack every integer layer for a device now, and join what reads the same input. Between a first call's
    activations, packing would leave the allocator's memory in pieces, and torch.compile cannot trace it."""
    device = torch.empty(0, device=device).device  # "cuda" by its index, as the tensors of a call name it
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            module.prepare(device)
    for names in shared_inputs(model):
        join([model.get_submodule(name) for name in names], device)
