"""Quantization without calibration data, while a float model's weights arrive tensor by tensor.

What needs data is left out: activations have dynamic scales in any case, the range of a weight is searched for its own
error, and channels are left as they are or rotated. No more than one layer's float weight is held at a time.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgq_kernels import native
from dgq_kernels.weight_rounding.reference import SUBSCALE_MAX

from ..errors import DgqError
from ..range_search import SMALLEST_SCALE
from ..recipe import Recipe
from .channels import no_groups, rotate_channels, rotation_block, to_matrix
from .layer import IntegerLayer
from .plan import Layer, plan_layers
from .skeleton import SplitLayer
from .weights import IntegerWeight

# Weights of a block that is searched in the cache; elsewhere a launch costs more than a pass over memory.
BLOCK_ELEMENTS = 2**17
DEVICE_BLOCK_ELEMENTS = 2**24

# Ranges of an int8 row that are tried, as shares of its largest weight.
INT8_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6)

# Ranges of an int4 group that are tried, as shares of the step at which its largest weight has code 7.5.
INT4_SHARES = (1.05, 0.95, 0.85, 0.75)

# The share that the widest group of a row has at the largest sub-scale.
INT4_WIDEST = 0.93


def plan_without_data(network: nn.Module, recipe: Recipe, excluded: Sequence[str]) -> list[Layer]:
    """The layers of a float network on any device that are quantized without data.

    Args:
        network: stays as it is.
        recipe: of the integer method; "rotate" turns every layer whose channels a block divides.
        excluded: modules that stay float: names, or parts of names between dots, or shell patterns of whole names.

    Raises:
        DgqError: an excluded name is none of the network's, or nothing is left to quantize.
    """
    layers, _ = plan_layers(network, recipe)
    names = [name for name, _ in network.named_modules() if name]
    for pattern in excluded:
        if not any(_matches(pattern, name) for name in names):
            raise DgqError(f"modules_to_not_convert: {pattern!r} matches no module", f"modules look like {names[-1]!r}")
    left = [
        layer for layer in layers if not any(_matches(pattern, layer.plan.owner(layer.name)) for pattern in excluded)
    ]
    if not left:
        raise DgqError("modules_to_not_convert leaves no layer to quantize")
    if recipe.channels == "rotate":
        for layer in left:
            if not layer.plan.wide:
                layer.plan = dataclasses.replace(layer.plan, rotation=rotation_block(layer.plan.in_features))
    return left


def _matches(pattern: str, name: str) -> bool:
    return f".{pattern}." in f".{name}." or fnmatch.fnmatchcase(name, pattern)


def round_to_nearest(matrix: Tensor, bits: int, group: int) -> IntegerWeight:
    """A weight matrix rounded to nearest, its ranges searched for the least squared error, in a pass over the cache.

    `weights.nearest` looks closer (every sub-scale, 80 ranges in another norm) and takes fifty times as long for an
    error that is one or two hundredths smaller.

    Args:
        matrix: float32 (N, K).
        bits: 8 (per-channel int8) or 4 (two-level int4).
        group: values per int4 sub-scale.
    """
    block = BLOCK_ELEMENTS if matrix.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    parts = matrix.split(max(1, block // matrix.shape[1]))
    if bits == 8:
        codes, scale = zip(*map(_round_int8, parts), strict=True)
        return IntegerWeight(torch.cat(codes), torch.cat(scale), None, group)
    codes, scale, subscales = zip(*(_round_int4(part, group) for part in parts), strict=True)
    return IntegerWeight(torch.cat(codes), torch.cat(scale), torch.cat(subscales), group)


def _round_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (n, K) and scales (n,): rounding errors are even within a step, clipping errors what is cut off."""
    size = rows.abs()
    widest = size.amax(1)
    least, limit = torch.full_like(widest, torch.inf), widest
    for share in INT8_SHARES:
        end = widest * share
        error = (size - end[:, None]).clamp_(min=0).square_().sum(1) + rows.shape[1] * (end / 127).square() / 12
        better = error < least
        least, limit = torch.where(better, error, least), torch.where(better, end, limit)
    scale = _positive(limit / 127)
    return (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _round_int4(rows: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (n, K), scales (n,) and sub-scales uint8 (n, G)."""
    n, k = rows.shape
    groups = nn.functional.pad(rows, (0, -k % group)).view(n, -1, group)
    size = groups.abs().amax(2)
    scale = _positive(size.amax(1) * (INT4_WIDEST / (7.5 * SUBSCALE_MAX)))
    wanted = size / (7.5 * scale[:, None])
    least, subscales = torch.full_like(size, torch.inf), torch.ones_like(size)
    for share in INT4_SHARES:
        candidate = (wanted * share).round_().clamp_(1, SUBSCALE_MAX)
        step = (candidate * scale[:, None])[:, :, None]
        error = (groups / step).round_().clamp_(-8, 7).mul_(step).sub_(groups).square_().sum(2)
        better = error < least
        least, subscales = torch.where(better, error, least), torch.where(better, candidate, subscales)
    step = (subscales * scale[:, None])[:, :, None]
    codes = (groups / step).round_().clamp_(-8, 7).to(torch.int8).view(n, -1)[:, :k]
    return codes, scale, subscales.to(torch.uint8)


def _positive(scale: Tensor) -> Tensor:
    """The scales, and 1 for rows of nothing but zeros or of numbers too small for one."""
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)


# Weights after which freed memory is given back: layers of all sizes leave the heap in fragments.
GIVE_BACK_WEIGHTS = 2**24


class Arrivals:
    """The layers of a float network on the meta device, quantized as their tensors arrive.

    A layer takes the float one's place when its last tensor is there; its weight is rounded at once.

    Args:
        network: the float network, which becomes the quantized one.
        layers: all that are to be quantized, the parts of a split one in their order.
    """

    def __init__(self, network: nn.Module, layers: list[Layer]) -> None:
        self._network = network
        self._layers: dict[str, list[Layer]] = {}
        for layer in layers:
            self._layers.setdefault(layer.plan.owner(layer.name), []).append(layer)
        self._weights: dict[str, list[IntegerWeight]] = {}  # of layers that are not finished
        self._biases: dict[str, Tensor] = {}
        self._since = 0  # weights since memory was given back

    def expects(self, name: str) -> bool:
        """Whether a tensor of this name belongs to a layer that is quantized."""
        return name.rpartition(".")[0] in self._layers

    def take(self, name: str, tensor: Tensor, device: torch.device) -> None:
        """Take a weight or a bias, of any float dtype and shaped as the float layer's, to a device.

        Args:
            name: of the tensor in the network.
            tensor: as the file has it.
            device: where the layer goes.
        """
        owner, _, leaf = name.rpartition(".")
        layers, value = self._layers[owner], tensor.detach().to(device, torch.float32)
        if leaf == "bias":
            self._biases[owner] = value
        else:
            self._weights[owner] = [rounded(layer, value) for layer in layers]
        if owner not in self._weights or (layers[0].plan.bias and owner not in self._biases):
            return
        weights, bias = self._weights.pop(owner), self._biases.pop(owner, None)
        made = [packed(layer, weight, bias) for layer, weight in zip(layers, weights, strict=True)]
        self._network.set_submodule(owner, SplitLayer.of(made) if layers[0].plan.columns else made[0])
        self._since += sum(layer.plan.out_features * layer.plan.reduction for layer in layers)
        if self._since > GIVE_BACK_WEIGHTS:
            native.give_back()
            self._since = 0


def rounded(layer: Layer, weight: Tensor) -> IntegerWeight:
    """A layer's part of its module's float32 weight, rotated as the plan says and rounded to nearest."""
    own, plan = layer.own_weight(weight), layer.plan
    matrix = to_matrix(rotate_channels(own if plan.kind == "conv2d" else own.flatten(1), plan.rotation))
    return round_to_nearest(matrix.contiguous(), plan.wbits, plan.weight_group)


def packed(layer: Layer, weight: IntegerWeight, bias: Tensor | None) -> IntegerLayer:
    """The quantized layer of what `rounded` made, with the module's bias where it is this layer's."""
    groups = dataclasses.replace(no_groups(layer.plan.in_features), rotation=layer.plan.rotation)
    return IntegerLayer.from_quantized(layer.plan, weight, groups, layer.own_bias(bias) if layer.plan.bias else None)
