"""Integer layers that read the same input: quantized once, or joined into one product."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dgq_kernels import native

from ..family import family_of
from .adapters import Adapted, add_product, direct
from .layer import IntegerLayer, is_direct
from .plan import shared_inputs
from .prepared import Activation, ByOps, Dense, Engine, Joined, Packed, same
from .stored import StoredWeight


def _share_codes(layers: Sequence[IntegerLayer], ready: Sequence[ByOps]) -> bool:
    """Whether one quantized input serves all these layers. Looks at values: at preparation only."""
    sizes = {(layer.plan.in_features, layer.plan.abits, layer.plan.rotation) for layer in layers}
    divisors = [layer._inv_divisor() for layer in layers]
    return len(sizes) == 1 and same(divisors) and same([one.position for one in ready])


def _join(own: list[IntegerLayer], device: torch.device) -> None:
    """Let linear layers that handle an input alike (`_alike`) run as one product where this device's ops can; their
    weights, scales and biases are then slices of one tensor each."""
    forms = [layer.prepare(device) for layer in own]
    ready: list[ByOps] = [one for one in forms if isinstance(one, Dense | Packed)]
    if len(ready) < len(own):
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
    scales, bias = torch.cat([layer.weight_scale.detach() for layer in own]), None
    for layer, part in zip(own, scales.split(sizes), strict=True):
        layer.weight_scale.data = part
    if any(layer.plan.bias for layer in own):
        biases = [torch.zeros_like(layer.weight_scale) if layer.bias is None else layer.bias for layer in own]
        bias = torch.cat([one.detach() for one in biases])
        for layer, part in zip(own, bias.split(sizes), strict=True):
            if layer.bias is not None:
                layer.bias.data = part
    sums = torch.cat([one.column_sum for one in ready])
    owners, parts = [weakref.ref(layer) for layer in own], [weakref.ref(one) for one in ready]
    ready[0].joined = Joined(owners, parts, sizes, weight, subscales, scales, sums, bias)


class Shared:
    """Linear layers that read one tensor, in whose calls the first computes for all: those of a network's own forward,
    wherever they lie.

    A result is given out once, to a call with the very tensor that it was made of: layers that read others, or are
    called in another order or again, compute as they would alone. Where others are left twice running, as by an
    attention that calls but some of its layers, all do from then on.

    The layers hold this, and it holds none of them.
    """

    def __init__(self, layers: list[IntegerLayer]) -> None:
        self._owners = [weakref.ref(layer) for layer in layers]
        # the tensor, its version, what was done to it first; what has not been given out
        self._last: tuple[Tensor, int, Activation, dict[IntegerLayer, Tensor]] | None = None
        self._left = 0  # times running that a result was not asked for

    @property
    def layers(self) -> list[IntegerLayer]:
        """The layers, whose handling of the input is alike; those that are still there."""
        return [layer for owner in self._owners if (layer := owner()) is not None]

    def take(self, layer: IntegerLayer, x: Tensor, activation: Activation) -> Tensor | None:
        """layer(x, activation=activation), the same bit for bit; None where it is to be computed alone."""
        if torch.compiler.is_compiling() or x.is_inference():  # such a tensor does not tell whether it was changed
            return None
        last = self._last
        if last is None or last[0] is not x or last[1:3] != (x._version, activation) or layer not in last[3]:
            self._last = None
            self._left += last is not None
            if self._left > 1:
                return None
            layers = self.layers
            ready = [form for one in layers if (form := one.prepared(x.device)) is not None]
            if len(ready) < len(self._owners):  # some are gone, or their weights are away
                return None
            results = ready[0].together(layers, ready, x, None, activation)
            if results is None:
                return None
            last = self._last = x, x._version, activation, dict(zip(layers, results, strict=True))
        result = last[3].pop(layer, None)
        if not last[3]:
            self._last, self._left = None, 0
        return result


def share(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Let those of these linear layers that handle an input alike compute together where they are called with the same
    tensor, as one product where ops and formats allow."""
    groups: list[list[IntegerLayer]] = []
    for layer in layers:
        if not (isinstance(layer, IntegerLayer) and is_direct(layer, "linear")):
            continue
        group = next((group for group in groups if _alike(group[0], layer, device)), None)
        if group is None:
            groups.append([layer])
        else:
            group.append(layer)
    for group in groups:
        if len(group) > 1:
            _join(group, device)
            shared = Shared(group)
            for layer in group:
                layer.prepare(device).shared = shared


def _alike(one: IntegerLayer, other: IntegerLayer, device: torch.device) -> bool:
    """Whether the codes of one input serve both layers, and one call multiplies them by both. Looks at values."""
    first, second = one.prepare(device), other.prepare(device)
    if isinstance(first, Engine) and isinstance(second, Engine):
        return native.can_share([first.engine, second.engine])
    if not (isinstance(first, ByOps) and isinstance(second, ByOps) and first.fuses and second.fuses):
        return False
    formats = {(layer.plan.wbits, layer.plan.weight_group, tuple(layer.plan.class_ends)) for layer in (one, other)}
    return len(formats) == 1 and _share_codes([one, other], [first, second])


def rescale_joined(layers: Iterable[IntegerLayer]) -> None:
    """Take the scales of joined layers anew, after `IntegerLayer.set_scales` or `clear_scales` of any of them."""
    for layer in layers:
        ready = layer._prepared
        if isinstance(ready, ByOps) and ready.joined is not None:
            ready.joined.rescale()


def project(layers: Sequence[nn.Module], x: Tensor, norm: nn.Module | None = None) -> list[Tensor]:
    """The results of several layers on one input (..., C), normalized first; normalized and quantized once where the
    engine can, or in one product where they were joined (`share`)."""
    found = [direct(layer, "linear") for layer in layers]
    own = [one.layer if isinstance(one, Adapted) else one for one in found if one is not None]
    adapted = {i: one for i, one in enumerate(found) if isinstance(one, Adapted)}
    if adapted and norm is not None:
        x, norm = norm(x), None
    results = None
    if len(own) == len(layers):
        if not any(layer.learns(x, norm) for layer in own):
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
        elif type(module) is nn.Conv2d and module.weight.is_contiguous():
            # quantized layers then read its result without a copy
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for names in shared_inputs(model):
        share([model.get_submodule(name) for name in names], device)
    ends = family_of(model).time_layers
    share([module for name, module in model.named_modules() if name.rpartition(".")[2] in ends], device)


def leave_files(models: Iterable[nn.Module]) -> None:
    """Take the files that packed layers' stored weights are mapped from out of this process's memory: hardly anything
    of them is read again. Of all models at one time, since the system takes long to tell what is mapped."""
    layers = [module for model in models for module in model.modules() if isinstance(module, IntegerLayer)]
    stored = [tensor for layer in layers for tensor in layer.parameters(recurse=False)]
    native.let_go(tensor for tensor in stored if not isinstance(tensor, StoredWeight))
