"""What a backend makes of an integer layer's stored tensors, once, to run it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dgq_kernels import native

if TYPE_CHECKING:
    from .layer import IntegerLayer


class Codes(NamedTuple):
    """A quantized input: codes, and the scale and zero point of each row or sample, as the product ops take them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass
class Prepared:
    """What a backend needs at run time, made once from the stored tensors.

    It lives no longer than the parameter `source` that it was made from, whoever takes that away, and serves while
    that is the layer's.
    """

    device: torch.device
    column_sum: Tensor
    position: Tensor | None  # int32, where each channel's code is stored for the product; None: in order
    engine: native.Layer | None = None  # int8 in the CPU engine's blocks
    weight: Tensor | None = None  # int8, dense; None where the stored one serves
    onednn: list[Tensor] | None = None  # int8 in oneDNN's blocked layout
    split: bool = False
    fuses: bool = False  # the backend's ops quantize together with what comes before, and add residuals
    joined: Joined | None = None  # with the layers that read the same input
    source: weakref.ref[Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The forms of the weight kept beside the stored tensors."""
        dense = [] if self.weight is None else [self.weight]
        return [*dense, *(self.onednn or []), *([] if self.engine is None else [self.engine.packed])]


@dataclass
class Joined:
    """Layers on one input whose weights lie behind each other: their outputs are slices of one product."""

    layers: list[IntegerLayer]
    parts: list[Prepared]
    sizes: list[int]
    weight: Tensor  # int8 (N, K), or packed
    subscales: Tensor | None
    weight_scale: Tensor
    column_sum: Tensor
    bias: Tensor | None

    def rescale(self) -> None:
        """Take the layers' scales anew, after `IntegerLayer.set_scales` or `clear_scales` of any of them."""
        self.weight_scale = torch.cat([layer._scale() for layer in self.layers])

    def fits(self, layers: Sequence[IntegerLayer]) -> bool:
        """Whether these are the layers, and none was loaded or moved since."""
        return len(layers) == len(self.layers) and all(
            layer is mine and layer._prepared is part
            for layer, mine, part in zip(layers, self.layers, self.parts, strict=True)
        )
