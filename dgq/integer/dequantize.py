"""Plain layers with the float weights that integers stand for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ..family import family_of
from .attention import LogAttnProcessor
from .channels import from_matrix, rotate_channels
from .layer import IntegerLayer
from .skeleton import SplitLayer


def float_weight(layer: IntegerLayer) -> Tensor:
    """What multiplies a layer's own input: float32 (N, C), or (N, C, kh, kw) for a convolution with taps.

    Scales as the layer runs with them; divisor, shift classes, rotation and stored order are undone.
    """
    plan = layer.plan
    weight = from_matrix(layer.natural_weight.float() * layer._scale()[:, None], plan)
    weight = rotate_channels(weight, plan.rotation)
    factor = layer._inv_divisor()
    if factor is None:
        return weight
    if len(plan.class_ends) > 1:  # the sums of a class are shifted by its exponent
        stored = torch.arange(plan.in_features, device=factor.device)
        ends = torch.tensor(plan.class_ends[:-1], device=factor.device)
        shift = torch.empty_like(factor)
        shift[layer.order.long()] = 2.0 ** torch.bucketize(stored, ends, right=True)
        factor = factor * shift
    return weight * factor.view(1, -1, *[1] * (weight.dim() - 2))


def float_layer(module: IntegerLayer | SplitLayer, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
    """The layer that an integer one, or the parts of one, stands for."""
    parts = module.parts if isinstance(module, SplitLayer) else [module]
    first = parts[0]
    weight = torch.cat([float_weight(part) for part in parts], 1)
    plan, (outputs, inputs) = first.plan, weight.shape[:2]
    plain: nn.Linear | nn.Conv2d
    with torch.device("meta"):
        if plan.kind == "linear":
            plain = nn.Linear(inputs, outputs, plan.bias)
        else:
            weight = weight.view(outputs, inputs, plan.kernel_size, plan.kernel_size)
            plain = nn.Conv2d(inputs, outputs, plan.kernel_size, plan.stride, plan.padding, bias=plan.bias)
    plain.weight = nn.Parameter(weight.to(dtype).contiguous())
    if first.bias is not None:
        plain.bias = nn.Parameter(first.bias.detach().to(dtype))
    return plain.train(module.training)


def dequantize(network: Any, dtype: torch.dtype) -> None:
    """Put plain layers of a dtype in the place of integer ones, one by one; fused blocks are diffusers' own again, and
    so is attention."""
    plain = {fused: kind for kind, (_, fused) in family_of(network).fused.items()}
    modules = dict(network.named_modules())
    for name, module in modules.items():
        if isinstance(module, SplitLayer | IntegerLayer):
            if not isinstance(modules[name.rpartition(".")[0]], SplitLayer):
                network.set_submodule(name, float_layer(module, dtype))
        elif type(module) in plain:
            module.__class__ = plain[type(module)]
        if isinstance(getattr(module, "processor", None), LogAttnProcessor):
            attention: Any = module
            attention.set_processor(AttnProcessor2_0())
