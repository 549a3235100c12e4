"""Which scales of a quantized UNet are tuned: their names, sizes and places in one vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..integer.layer import IntegerLayer
from ..integer.plan import input_owners


def integer_layers(unet: nn.Module) -> dict[str, IntegerLayer]:
    """The integer layers of a UNet by name, that of the checkpoint where an adapter holds the layer.

    Raises:
        DgqError: it has none.
    """
    named = ((name, module) for name, module in unet.named_modules() if isinstance(module, IntegerLayer))
    layers = {name.removesuffix(".base_layer"): module for name, module in named}
    if not layers:
        raise DgqError(
            "the model has no integer layer, so there are no scales to tune",
            "dgq tune works on checkpoints of dgq calibrate --recipe integer",
        )
    return layers


@dataclass(frozen=True)
class Layout:
    """The tuned scales of a UNet, as parts of one vector: their relative changes, 0 where nothing is tuned.

    Attributes:
        parts: {tensor name: values}; "LAYER.out" of (N,), and "LAYER.in" of (C,) where input scales are tuned.
        owners: as of `integer.plan.input_owners`.
    """

    parts: dict[str, int]
    owners: dict[str, str]

    @classmethod
    def of(cls, unet: nn.Module, input_scales: bool) -> Layout:
        """The layout of a quantized UNet. Raises DgqError as `integer_layers`."""
        owners = input_owners(unet, integer_layers(unet))
        parts = {}
        for name, layer in integer_layers(unet).items():
            parts[f"{name}.out"] = layer.out_features
            if input_scales and owners[name] == name:
                parts[f"{name}.in"] = layer.in_features
        return cls(parts, owners)

    @property
    def size(self) -> int:
        """Values of an expert."""
        return sum(self.parts.values())

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector (..., size) by name, (..., values)."""
        return dict(zip(self.parts, vector.split(list(self.parts.values()), dim=-1), strict=True))


def fixed_divisor(layer: IntegerLayer) -> Tensor | None:
    """float32 (C,), what the integers' inputs are multiplied by, in natural order: the reciprocal of the divisor times
    the shift that the accumulator adds; None where it is one everywhere."""
    plan = layer.plan
    if plan.channels == "none":
        return None
    factor: Tensor = layer.inv_divisor.detach()
    if len(plan.class_ends) > 1:
        place = torch.arange(plan.in_features, device=factor.device)
        ends = torch.tensor(plan.class_ends[:-1], device=factor.device)
        shift = torch.empty_like(factor)
        shift[layer.order.long()] = 2.0 ** torch.bucketize(place, ends, right=True)
        factor = factor * shift
    return None if bool((factor == 1).all()) else factor
