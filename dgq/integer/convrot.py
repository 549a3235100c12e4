"""ConvRot as published (arXiv 2512.03673), on the integer layers: every layer rotated, every row rounded by its largest
weight, nothing calibrated (docs/method.md, "the convrot recipe").

What the layers store and how they run is the integer recipe's. So are what becomes of joined inputs, and the
asymmetric ranges of activations, where the published ones are symmetric.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..method import Cost, LayerCost, Made, Work
from ..range_search import SMALLEST_SCALE
from ..recipe import Recipe
from .channels import rotate_channels, to_matrix
from .method import INTEGER
from .on_the_fly import packed, plan_without_data
from .plan import Layer, packed_bytes, plan_layers
from .rates import rates
from .skeleton import place_calibrated
from .weights import IntegerWeight

# Copies of a layer's float weight that are held while it is rotated and rounded.
COPIES = 6


def absmax(matrix: Tensor, bits: int, group: int) -> IntegerWeight:
    """A weight matrix, float32 (N, K), rounded to nearest; the largest weight of a row has the largest code, 127 or 7.

    Codes of 4 bits have sub-scales as the layers store them, `group` columns to each, all of them 1.
    """
    limit = 2 ** (bits - 1) - 1
    scale = (matrix.abs().amax(1) / limit).clamp(min=SMALLEST_SCALE)
    codes = (matrix / scale[:, None]).round_().to(torch.int8)
    subscales = torch.ones(len(matrix), -(-matrix.shape[1] // group), dtype=torch.uint8) if bits == 4 else None
    return IntegerWeight(codes, scale, subscales, group)


def _calibrate(work: Work) -> Made:
    layers, made = plan_without_data(work.network, work.recipe, ()), {}
    for layer in layers:
        plan, weight = layer.plan, layer.weight.cpu()
        if not torch.isfinite(weight).all():
            raise DgqError(f"{layer.name}: the weight is not finite")
        matrix = to_matrix(rotate_channels(weight, plan.rotation))
        made[layer.name] = packed(layer, absmax(matrix, plan.wbits, plan.weight_group), layer.module.bias)
        work.progress("quantize", len(made), len(layers), layer.name)
    place_calibrated(work.network, made)
    return Made({layer.name: layer.plan for layer in layers})


def _cost(network: nn.Module, recipe: Recipe, budget: int, call: dict[str, Any] | None) -> Cost:
    layers = {layer.name: _layer_cost(layer) for layer in plan_without_data(network, recipe, ())}
    most = max(cost.parameters for cost in layers.values())
    return Cost(layers, plan_layers(network, recipe)[1], 4 * COPIES * most)


def _layer_cost(layer: Layer) -> LayerCost:
    n, k = layer.plan.out_features, layer.plan.reduction
    seconds = n * k * (rates().rotated + COPIES * rates().copied)
    parameters = n * k + layer.plan.bias * n
    return LayerCost(layer.module, n * k, n, parameters, packed_bytes(layer.plan), seconds=lambda rows: seconds)


CONVROT = dataclasses.replace(
    INTEGER,
    name="convrot",
    help="rotated, without calibration",
    calibrate=_calibrate,
    cost=_cost,
    label=lambda recipe: "convrot",
    plans=lambda network, recipe: {layer.name: layer.plan for layer in plan_without_data(network, recipe, ())},
    choices={"rounding": ("nearest",), "channels": ("rotate",), "attention": ("float",)},
    reads_calls=False,
)
