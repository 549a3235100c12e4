"""Which layers of a float model are quantized, and how: before anything is measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..family import UNKNOWN, family_of
from ..recipe import UPSAMPLED_BITS, LayerPlan, Recipe
from .folding import fold
from .stored import stored_shapes

# A layer's samples for choosing its channel handling: rows of a linear layer, pictures of a convolution.
SAMPLE_ROWS = 512


SAMPLE_PICTURES = 8


# Second moments of longer sums would not fit (K^2 floats) and barely help: such layers round to nearest.
GPTQ_MAX_REDUCTION = 12288


@dataclass
class Layer:
    """A layer of the float model that will be quantized, or the part of one that reads one of two joined inputs.

    Attributes:
        name, module, plan: where it is, what it is, and what will be stored; bits are settled, channels not yet.
        owner: name of the first of the layers that read the same input (`input_owners`); empty: its own.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    plan: LayerPlan
    owner: str = ""

    @property
    def weight(self) -> Tensor:
        """float32 (N, C), or (N, C, kh, kw) for a convolution with taps."""
        weight = self.own_weight(self.module.weight.detach().float())
        return weight if self.plan.kind == "conv2d" else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The module's; of several parts only the first has it."""
        return self.own_bias(self.module.bias) if self.plan.bias else None

    def own(self, x: Tensor) -> Tensor:
        """The part of the module's input that this layer reads: of an upsampled picture the small one."""
        return x[:, :, ::2, ::2] if self.plan.upsampled else own_columns(x, self.plan)

    def own_weight(self, weight: Tensor) -> Tensor:
        """What this layer has of the module's weight."""
        return fold(weight) if self.plan.upsampled else own_columns(weight, self.plan)

    def own_bias(self, bias: Tensor | None) -> Tensor | None:
        """What it has of the module's bias, where it has one."""
        return bias if bias is None or not self.plan.upsampled else bias.repeat(4)

    @property
    def input(self) -> str:
        """Name of what it reads: of the first layer that does."""
        return self.owner or self.name


def quantizable(network: nn.Module) -> tuple[dict[str, nn.Linear | nn.Conv2d], dict[str, str]]:
    """Layers the method quantizes, and those it cannot with the reason: ({name: module}, {name: reason}).

    Every Linear and Conv2d except its family's `float_layers`, the first and the last one among them (DGQ paper,
    section 5.1), and what diffusers says to keep in float32. Of a network that nothing is known of, so are the modules
    that diffusers keeps out of casting layer by layer, and the first and the last convolution by their order.
    """
    family = family_of(network)
    stay = _kept_by_diffusers(network, family is UNKNOWN)
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    skipped: dict[str, str] = {}
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if reason := family.kept(name) or stay.get(name) or (isinstance(module, nn.Conv2d) and _unsupported(module)):
            skipped[name] = reason
        else:
            layers[name] = module
    return layers, skipped


def _kept_by_diffusers(network: nn.Module, unknown: bool) -> dict[str, str]:
    """{name: reason} of layers whose precision diffusers' class of the network cares for."""
    names = [name for name, _ in network.named_modules()]
    in_float32, patterns = (
        getattr(network, attribute, None) or ()
        for attribute in ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns")
    )
    found = {name: "diffusers keeps it in float32" for name in names if not set(in_float32).isdisjoint(name.split("."))}
    if unknown:
        casts = "diffusers keeps it out of casting"
        found |= {name: casts for name in names if any(re.search(pattern, name) for pattern in patterns)}
        convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        found |= dict.fromkeys(convolutions[:1] + convolutions[-1:], "first and last convolution stay float")
    return found


def _unsupported(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return f"groups={conv.groups}"
    square = all(len({*pair}) == 1 for pair in (conv.kernel_size, conv.stride, conv.dilation))
    if not square or conv.dilation[0] != 1 or conv.padding_mode != "zeros":
        return "kernel, stride, dilation or padding mode without an integer kernel"
    if isinstance(conv.padding, str) or len({*conv.padding}) != 1:
        return f"padding {conv.padding!r}"
    return None


def own_columns(x: Tensor, plan: LayerPlan) -> Tensor:
    """The channels of x that the layer of a plan reads: of a linear layer's input or weight (..., C), or of a
    convolution's (B, C, ...)."""
    if not plan.columns:
        return x
    return x[..., slice(*plan.columns)] if plan.kind == "linear" else x[:, slice(*plan.columns)]


def shared_inputs(network: nn.Module) -> Iterator[list[str]]:
    """Names of modules that read one tensor: keys and values of an attention, in self-attention the queries too, and
    what the network's family knows of."""
    known, modules = family_of(network).shared_inputs, dict(network.named_modules())
    told: set[str] = set()
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        cross = getattr(module, "is_cross_attention", False)
        for parts in (("to_q", "to_k", "to_v")[cross:], *known):
            found = [prefix + part for part in parts if prefix + part in modules]
            if f"{prefix}{parts[-1]}" in modules and not told.issuperset(found):  # a block's go before its attention's
                told.update(found)
                yield found


def input_owners(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{layer: the first of the layers that read its input} for these layers of a network, float or quantized.

    What is alike in them, the channel handling, lets one quantized form of it serve them all.
    """
    owners = {name: name for name in names}
    for parts in shared_inputs(network):
        shared = [part for part in parts if part in owners]
        owners.update(dict.fromkeys(shared, *shared[:1]))
    return owners


def plan_layers(network: nn.Module, recipe: Recipe) -> tuple[list[Layer], dict[str, str]]:
    """The plan of every layer before its channel handling is chosen, and the layers that stay float.

    Raises:
        DgqError: an override's pattern matches no layer, or nothing is left to quantize.
    """
    modules, skipped = quantizable(network)
    if lost := recipe.unmatched_overrides(list(modules)):
        raise DgqError(
            f"override pattern {lost[0]!r} matches no layer", f"layers look like {next(iter(modules), 'none')!r}"
        )
    layers = []
    family = family_of(network)
    joined, owners = family.joined_inputs(network), input_owners(network, modules)
    upsampled = family.upsampled(network)
    for name, module in modules.items():
        bits = recipe.weight_bits(name, family.weight_bits(name, recipe.wbits))
        if bits == 0:
            skipped[name] = "kept float by an override"
            continue
        plan = plan_layer(module, bits, recipe, name in upsampled)
        if plan.upsampled and family.wide_upsampling:
            plan = dataclasses.replace(plan, wbits=8, abits=UPSAMPLED_BITS)
        first = joined.get(name)
        if first is None:
            layers.append(Layer(name, module, plan, owners[name]))
            continue
        for i, (start, end) in enumerate(((0, first), (first, plan.in_features))):
            part = dataclasses.replace(
                plan, in_features=end - start, class_ends=[end - start], columns=[start, end], bias=plan.bias and i == 0
            )
            layers.append(Layer(f"{name}.{i}", module, part))
    if not layers:
        raise DgqError("the model has no layer that could be quantized")
    return layers, skipped


def plan_layer(module: nn.Linear | nn.Conv2d, wbits: int, recipe: Recipe, upsampled: bool = False) -> LayerPlan:
    sizes = geometry(module, upsampled)
    return LayerPlan(
        **sizes, wbits=wbits, abits=recipe.abits, weight_group=recipe.weight_group, class_ends=[sizes["in_features"]]
    )


def geometry(module: nn.Linear | nn.Conv2d, upsampled: bool = False) -> dict[str, Any]:
    """The fields of a layer's plan that the float layer fixes: kind, sizes, whether it has a bias, and whether it is
    one of `Family.upsampled`."""
    fields = {
        "kind": "linear",
        "in_features": module.weight.shape[1],
        "out_features": module.weight.shape[0],
        "kernel_size": 1,
        "stride": 1,
        "padding": 0,
        "bias": module.bias is not None,
        "upsampled": upsampled,
    }
    if isinstance(module, nn.Linear):
        return fields
    if upsampled:
        return {**fields, "kind": "conv2d", "out_features": 4 * len(module.weight), "kernel_size": 2, "padding": 1}
    taps = {"kernel_size": module.kernel_size[0], "stride": module.stride[0], "padding": int(module.padding[0])}
    return {**fields, **taps, "kind": "pointwise" if taps.items() <= fields.items() else "conv2d"}


def packed_bytes(plan: LayerPlan) -> int:
    """Stored bytes of one quantized layer."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored_shapes(plan).values())
