"""Low-rank adapters (LoRA, of peft) around integer layers: seen through, so that what is fused with a layer stays so.

peft's layer around a quantized one computes from its own input, and casts and adds in passes of its own. Where nothing
is trained, the quantized layer keeps norm, residual and shared inputs here, and the low-rank products are added to its
result in place, in the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer import IntegerLayer, is_direct
from .prepared import Activation, apply, gate, is_hooked

# peft is not imported for it: where it never was, there is no adapter.
_LORA = ("Linear", "Conv2d")


class Adapted:
    """An integer layer with the low-rank products that are added to its result, y + s B A x; called as the layer is.

    Attributes:
        layer: the integer layer.
        down: float (R, C), or (R, C, kh, kw) of a convolution with taps: A of all active adapters.
        up: float (N, R): B times the adapters' scales.
    """

    def __init__(self, layer: IntegerLayer, parts: Sequence[tuple[Tensor, Tensor, Any]]) -> None:
        self.layer = layer
        flat = layer.plan.kind != "conv2d"
        self.down = _joined([a.flatten(1) if flat and a.dim() > 2 else a for a, _, _ in parts], 0)
        ups = [b if type(s) is float and s == 1 else b * s for _, b, s in parts]
        self.up = _joined([b if b.dim() == 2 else b.flatten(1) for b in ups], 1)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        norm: nn.Module | None = None,
        activation: Activation = "none",
        offset: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """As `IntegerLayer.forward`."""
        x = apply(x, norm, activation, offset)
        y = self.layer(x, residual, sample_bias, in_place=in_place and residual is not None)  # x is read once more
        plan = self.layer.plan
        if plan.kind == "linear":
            return add_product(y, self.reduced(x), self.up)
        taps = self.down.to(x.dtype).view(-1, plan.in_features, *(plan.float_shape[2:] or (1, 1)))
        h = nn.functional.conv2d(x, taps, stride=plan.stride, padding=plan.padding)
        return y.add_(nn.functional.conv2d(h, self.up.to(x.dtype)[:, :, None, None]))

    def over_pixels(self, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        """As `IntegerLayer.over_pixels`."""
        x = apply(x, norm, "none", None)
        y = self.layer.over_pixels(x, None, residual)
        return add_product(y, self.reduced(x.permute(0, 2, 3, 1)), self.up)

    def gated(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """As `IntegerLayer.gated`."""
        return gate(self(x, norm=norm))

    def fuses(self, device: torch.device) -> bool:
        """As `IntegerLayer.fuses`."""
        return self.layer.fuses(device)

    def reduced(self, x: Tensor) -> Tensor:
        """A x, (..., R)."""
        return nn.functional.linear(x, self.down.to(x.dtype))


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts], axis)


def add_product(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """y (..., N), which is changed, plus h (..., R) times up (N, R) transposed."""
    h = h.to(y.dtype)  # autocast made it its own dtype, and leaves products in place alone
    y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), up.to(y.dtype).t())
    return y


def direct(module: Any, kind: str | None = None) -> IntegerLayer | Adapted | None:
    """What a module is to code that hands its work to an integer layer (of this kind): the layer, or the layer within
    low-rank adapters of peft, or None where the module has to be called as it is (see `is_direct`)."""
    if is_direct(module, kind):
        known: IntegerLayer = module
        return known
    of = type(module)
    if of.__module__ != "peft.tuners.lora.layer" or of.__name__ not in _LORA:
        return None
    inner = module._modules  # past nn.Module.__getattr__: a step asks hundreds of times
    layer: Any = inner["base_layer"]
    if not is_direct(layer, kind) or is_hooked(module) or module.merged:
        return None
    if module.disable_adapters:
        return layer
    first, second, parts = inner["lora_A"]._modules, inner["lora_B"]._modules, []
    for name in module.active_adapters:
        if name not in first:
            continue
        scale, a, b = module.scaling[name], first[name], second[name]
        if type(scale) is float and scale == 0:
            continue
        dropping = module.training and type(inner["lora_dropout"]._modules[name]) is not nn.Identity
        if dropping or name in module.lora_variant or not (_plain(a) and _plain(b)):
            return None
        parts.append((a._parameters["weight"], b._parameters["weight"], scale))
    if not parts:
        return layer
    # Gradients of the adapters are peft's business.
    return None if torch.is_grad_enabled() else Adapted(layer, parts)


def _plain(half: Any) -> bool:
    """Whether half an adapter is a product with its weight and nothing else."""
    return type(half) in (nn.Linear, nn.Conv2d) and half._parameters["bias"] is None and not is_hooked(half)
