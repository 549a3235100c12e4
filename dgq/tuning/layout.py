"""Which scales of a quantized UNet are tuned: their names, sizes and places in one vector."""

from __future__ import annotations

from dataclasses import dataclass

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
    layers = {name.replace(".base_layer", ""): module for name, module in named}
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
