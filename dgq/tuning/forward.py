"""A quantized UNet whose scales take gradients: float activations, integer weights read in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from dgq_kernels import scaled_conv2d, scaled_linear
from dgq_kernels.scaled_product.reference import along

from ..integer.channels import rotate_channels
from ..integer.folding import cut, interleaved
from ..integer.fused_unet import FusedGEGLU
from ..integer.gradient import input_factor, integers_of
from ..integer.layer import IntegerLayer
from ..recipe import LayerPlan
from .layout import Layout, integer_layers
from .recompute import lean, replaced


def expert_of(timestep: float, experts: int, timesteps: int) -> int:
    """Which of the experts has a timestep of 0 .. timesteps - 1: each an equal part of them, the first the last steps
    of a picture."""
    return min(max(int(timestep * experts // timesteps), 0), experts - 1)


class Experts:
    """The tuned scales, one parameter an expert, so that an expert that a step did not use has no gradient at all.

    Args:
        layout: of the UNet.
        count: of experts.
        timesteps: of the noise schedule.
        device: of the parameters, float32 (layout.size,), zero at first.

    Attributes:
        vectors: the parameters.
    """

    def __init__(self, layout: Layout, count: int, timesteps: int, device: torch.device) -> None:
        self.layout, self.timesteps = layout, timesteps
        self.vectors = [nn.Parameter(torch.zeros(layout.size, device=device)) for _ in range(count)]
        self.chosen: dict[str, Tensor] = {}

    def choose(self, timesteps: Sequence[int]) -> None:
        """Take the scales for the samples of the next forward pass: `chosen` is {part: (values,)}, or (B, values) where
        their experts differ."""
        numbers = [expert_of(t, len(self.vectors), self.timesteps) for t in timesteps]
        used = sorted(set(numbers))
        if len(used) == 1:
            self.chosen = self.layout.split(self.vectors[used[0]])
            return
        places = torch.tensor([used.index(number) for number in numbers], device=self.vectors[0].device)
        stacked = self.layout.split(torch.stack([self.vectors[number] for number in used]))
        self.chosen = {name: part[places] for name, part in stacked.items()}


class _Layer:
    """What an integer layer does while its scales are tuned."""

    def __init__(self, name: str, layer: IntegerLayer, experts: Experts) -> None:
        self.layer, self.experts, self.out = layer, experts, f"{name}.out"
        owner = f"{experts.layout.owners[name]}.in"
        self.input = owner if owner in experts.layout.parts else None
        self.divisor = input_factor(layer)
        self.weight = integers_of(layer)

    def __call__(self, x: Tensor, residual: Tensor | None = None, gated: bool = False) -> Tensor:
        layer, plan = self.layer, self.layer.plan
        if plan.upsampled:
            return cut(self._product, x[:, :, ::2, ::2], x.shape[2:], layer.bias)
        y = self._product(x, gated)
        return y if residual is None else y + residual

    def _product(self, x: Tensor, gated: bool = False) -> Tensor:
        layer, plan = self.layer, self.layer.plan
        d_in = self.divisor
        if self.input is not None:
            change = 1 + self.experts.chosen[self.input]
            d_in = change if d_in is None else change * d_in
        if plan.rotation:
            x, d_in = _rotated(x, d_in, plan), None
        d_out = layer.weight_scale.detach() * (1 + self.experts.chosen[self.out])
        bias = None if layer.bias is None else layer.bias.detach()
        if plan.kind == "linear":
            return scaled_linear(x, self.weight, d_in, d_out, bias, gated)
        y = scaled_conv2d(x, self.weight, d_in, d_out, bias, plan.kernel_size, plan.stride, plan.padding)
        return interleaved(y) if plan.upsampled else y


def _rotated(x: Tensor, d_in: Tensor | None, plan: LayerPlan) -> Tensor:
    """x times its scales, rotated as the weight is: what the integers are multiplied by. Differentiable."""
    axis = 1 if plan.kind != "linear" else -1
    scaled = x if d_in is None else x * along(d_in, x, axis).to(x.dtype)
    return rotate_channels(scaled, plan.rotation, axis).to(x.dtype)


@contextmanager
def differentiable(unet: Any, experts: Experts, checkpointing: bool = False) -> Iterator[None]:
    """Within the block every integer layer multiplies float activations by the `chosen` scales, and attention is float.
    The layers keep their packed weights; afterwards they are what they were. Checkpointing is that of `lean`."""
    processors = unet.attn_processors
    forwards: dict[nn.Module, Callable[..., Any]] = {
        layer: _Layer(name, layer, experts) for name, layer in integer_layers(unet).items()
    }
    for module in unet.modules():
        if isinstance(module, FusedGEGLU) and module.proj in forwards:
            forwards[module] = partial(_gated, forwards[module.proj])
    unet.set_attn_processor(AttnProcessor2_0())
    try:
        with replaced(forwards), lean(unet, checkpointing):
            yield
    finally:
        unet.set_attn_processor(processors)
        experts.chosen = {}


def _gated(projection: Callable[..., Tensor], x: Tensor, *_: Any) -> Tensor:
    """`GEGLU.forward`."""
    return projection(x, gated=True)
