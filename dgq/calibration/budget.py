"""Average bits of a weight that a calibration may spend: which layers of four bits get eight."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..checkpoint.header import Header
from ..errors import DgqError
from ..inspection.measure import measured
from ..inspection.overrides import growth_of, suggest_measured
from ..integer.plan import packed_bytes, plan_layers
from ..method import METHODS
from ..progress import Progress
from ..recipe import LayerPlan, Recipe

MEASURED_PICTURES = 6  # of the recorded ones


def room(plans: Iterable[LayerPlan], bits: float) -> int:
    """Bytes that layers may grow by until all they store, scales and biases included, comes to this many bits for each
    of the float layers' weights; negative where they take more."""
    plans = list(plans)
    return int(bits * _weights(plans) / 8) - sum(packed_bytes(plan) for plan in plans)


def _weights(plans: Iterable[LayerPlan]) -> int:
    return sum(math.prod(plan.float_shape) for plan in plans)


def check_budget(network: nn.Module, recipe: Recipe, bits: float) -> int:
    """`room` before channels are handled, which costs a few bytes more.

    Raises:
        DgqError: the recipe has no layers of four bits, or they take more than the budget.
    """
    method = METHODS[recipe.name]
    plans = method.plans(network, recipe)
    if not method.reads_calls or not any(isinstance(plan, LayerPlan) and plan.wbits == 4 for plan in plans.values()):
        raise DgqError("a budget chooses among layers of 4 bits, and there are none", "take the integer recipe at W4")
    left = room(plans.values(), bits)
    if left < 0:
        least = bits - 8 * left / _weights(plans.values())
        raise DgqError(
            f"a budget of {bits:g} bits a weight is too small: the layers take {least:.2f}, scales and biases included",
            "give more bits, or leave the budget out",
        )
    return left


def twin_of(network: nn.Module) -> nn.Module:
    """A copy whose modules can be replaced while its tensors are the network's own."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def spend(
    network: nn.Module,
    quantized: nn.Module,
    header: Header,
    recorded: Sequence[Sequence[dict[str, Any]]],
    bits: float,
    progress: Progress,
) -> Recipe:
    """The recipe of a network's first quantization, and overrides that take most of the noise in its output away.

    Layers that the recipe's own overrides name stay as they are.

    Args:
        network: the float model.
        quantized: what came of it by `header.recipe`.
        header: its.
        recorded: the network's calls, by prompt and step.
        bits: of a weight, on average over the quantized layers, with all that is stored beside the weights.
        progress: told of "measure" (calls).
    """
    about = {"against": header.base_model, "prompts": [], "settings": {}}
    guidance = float(header.generation["guidance"] or 0)
    found = measured(network, quantized, header, recorded[:MEASURED_PICTURES], guidance, progress, about)
    chosen = suggest_measured(found, header, room(header.layers.values(), bits), _growth(network, header))
    added = [] if chosen is None else [(item.removesuffix("=8"), 8) for item in chosen.overrides]
    return dataclasses.replace(header.recipe, overrides=(*header.recipe.overrides, *added))


def _growth(network: nn.Module, header: Header) -> dict[str, dict[int, int]]:
    """{layer: {8: the most that it grows by at 8 bits}}: the channels of its input are then handled anew, and all
    layers that read it may come to store a divisor."""
    layers, _ = plan_layers(network, header.recipe)
    divisors: Counter[str] = Counter()
    for layer in layers:
        if header.layers[layer.name].channels == "none":
            divisors[layer.input] += 4 * layer.plan.in_features
    told = [pattern for pattern, _ in header.recipe.overrides]
    growth = growth_of(header)
    found: dict[str, dict[int, int]] = {}
    for layer in layers:
        owner = layer.plan.owner(layer.name)
        if 8 in growth[owner] and not any(fnmatch.fnmatchcase(owner, pattern) for pattern in told):
            found.setdefault(owner, {8: growth[owner][8]})[8] += divisors[layer.input]
    return found
