"""Plain layers with the float weights that integers stand for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from ..family import family_of
from .attention import LogAttnProcessor
from .layer import IntegerLayer
from .skeleton import SplitLayer


def float_layer(module: IntegerLayer | SplitLayer, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
    """The layer that an integer one, or the parts of one, stands for."""
    first = module.parts[0] if isinstance(module, SplitLayer) else module
    weight = module.dequantize()
    plan, (outputs, inputs) = first.plan, weight.shape[:2]
    plain: nn.Linear | nn.Conv2d
    with torch.device("meta"):
        if plan.kind == "linear":
            plain = nn.Linear(inputs, outputs, plan.bias)
        else:
            plain = nn.Conv2d(inputs, outputs, weight.shape[-1], plan.stride, plan.padding, bias=plan.bias)
    # strides too as a float model has them: a convolution's kernel is chosen by them
    plain.weight = nn.Parameter(weight.to(dtype).clone(memory_format=torch.contiguous_format))
    if first.bias is not None:
        plain.bias = nn.Parameter(first.bias.detach()[:outputs].to(dtype))
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
