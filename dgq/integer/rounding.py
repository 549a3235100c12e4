"""A layer's statistics to its integers: the channel handling of least error, rounded weights, a whole network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..progress import silent
from ..recipe import LayerPlan, Recipe
from .channels import WORTH, ChannelGroups, apply_layer, candidates, fake_quantize_input
from .layer import IntegerLayer
from .plan import plan_layers
from .skeleton import place
from .statistics import gather
from .weights import IntegerWeight, column_sum, gptq, nearest, quantize_weight

if TYPE_CHECKING:
    from ..progress import Progress
    from .plan import Layer
    from .statistics import Statistics


DEFAULT_BUDGET_BYTES = 4 * 2**30


@dataclass
class QuantizedLayer:
    """One finished layer and how well it does on its calibration samples."""

    layer: IntegerLayer
    sqnr_db: float


@dataclass(frozen=True)
class RoundedLayer:
    """A layer's weight, rounded under one way to handle its channels.

    Attributes:
        groups, plan: of the channels, and of the layer under them.
        weight: the integer matrix (N, K), channels in stored order.
        error: norm of the output's error on the calibration samples, relative to the output's.
    """

    groups: ChannelGroups
    plan: LayerPlan
    weight: IntegerWeight
    error: float


def round_layer(layer: Layer, statistics: Statistics, recipe: Recipe, groups: ChannelGroups) -> RoundedLayer:
    """Fold the groups' divisor into the weight, round it by the recipe, and measure the output's error.

    Raises:
        DgqError: the calibration inputs are not finite.
    """
    plan = dataclasses.replace(
        layer.plan, channels=groups.mode, class_ends=groups.class_ends, reordered=groups.order is not None
    )
    weight, x = layer.weight.cpu(), statistics.samples.cpu()
    rounded = _round_weight(weight, groups, statistics, plan, recipe)
    target = apply_layer(x, weight, plan)
    natural = groups.unfold(rounded.dequantize(), plan)
    noise = apply_layer(fake_quantize_input(x, plan.abits, groups.divisor), natural, plan) - target
    return RoundedLayer(groups, plan, rounded, float(noise.norm() / target.norm().clamp(min=1e-20)))


def choose_rounded(layer: Layer, statistics: Statistics, recipe: Recipe) -> RoundedLayer:
    """The layer under the channel handling of least output error; another than "none" has to be `WORTH` it.

    Every candidate is rounded as the layer will be: GPTQ takes most of a rounding's error away, and an estimate by
    nearest rounding would choose for errors that are not there.
    """
    best: RoundedLayer | None = None
    rms = statistics.mean_square.cpu().sqrt()
    for groups in candidates(recipe.channels, rms, layer.plan.wbits):
        rounded = round_layer(layer, statistics, recipe, groups)
        if best is None or rounded.error < best.error * (1 - WORTH):
            best = rounded
    assert best is not None
    return best


def quantize_layer(layer: Layer, statistics: Statistics, recipe: Recipe) -> QuantizedLayer:
    """Choose the channel handling, round the weights, pack, and measure the output's SQNR.

    Raises:
        DgqError: the calibration inputs or the weight are not finite, or int32 sums could overflow.
    """
    if not torch.isfinite(layer.weight).all():
        raise DgqError(f"{layer.name}: the weight is not finite")
    try:
        rounded = choose_rounded(layer, statistics, recipe)
        bias = None if layer.bias is None else layer.bias.cpu()
        module = IntegerLayer.from_quantized(rounded.plan, rounded.weight, rounded.groups, bias)
        classes = rounded.groups.class_of() if rounded.groups.shifts_accumulator else None
        column_sum(rounded.weight.integer(), None if classes is None else classes.repeat(rounded.plan.kernel_size**2))
    except DgqError as error:
        raise DgqError(f"{layer.name}: {error.message}", error.hint) from None
    return QuantizedLayer(module, -20 * math.log10(max(rounded.error, 1e-20)))


def _round_weight(
    weight: Tensor, groups: ChannelGroups, statistics: Statistics, plan: LayerPlan, recipe: Recipe
) -> IntegerWeight:
    """Fold the divisor into the weight, sort the channels, and round on the second moments of what x becomes."""
    taps, matrix = plan.kernel_size**2, groups.fold(weight)
    inverse = (1 / groups.folded)[groups.stored_order].repeat(taps)
    if statistics.moment is None or recipe.rounding == "nearest":
        square = statistics.mean_square.cpu()[groups.stored_order].repeat(taps)
        importance = (square * inverse.square()).clamp(min=1e-12)
        return quantize_weight(matrix, plan.wbits, plan.weight_group, importance, nearest(importance))
    moment, order = statistics.moment.cpu(), None
    square = moment.diagonal() / statistics.count
    if groups.order is not None:
        order = (torch.arange(taps)[:, None] * plan.in_features + groups.order).flatten()
        square = square[order]
    importance = (square * inverse.square()).clamp(min=1e-12)
    rounding = gptq(moment, order=order, scale=inverse)
    return quantize_weight(matrix, plan.wbits, plan.weight_group, importance, rounding)


def pass_bytes(layers: Sequence[Layer]) -> int:
    """Memory of layers whose statistics are gathered together, while the one that takes most is rounded."""
    return sum(layer.moment_bytes for layer in layers) + max(layer.rounding_bytes for layer in layers)


def passes(layers: Sequence[Layer], budget: int) -> list[list[Layer]]:
    """Split the layers into runs whose statistics and rounding fit the memory budget (bytes), or of one layer."""
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and pass_bytes([*groups[-1], layer]) <= budget:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def quantize_unet(
    unet: nn.Module,
    calls: Sequence[dict[str, Any]],
    recipe: Recipe,
    *,
    progress: Progress = silent,
    store: Callable[[str, QuantizedLayer], None] | None = None,
    done: dict[str, QuantizedLayer] | None = None,
    budget: int = DEFAULT_BUDGET_BYTES,
) -> tuple[dict[str, LayerPlan], dict[str, float]]:
    """Quantize a float UNet in place by the integer recipe.

    Args:
        unet: float model; its quantizable layers are replaced by `IntegerLayer`.
        calls: recorded UNet calls (keyword arguments), from `record_inputs` and `spread`.
        recipe: an "integer" recipe.
        progress: told of stage "statistics" (calls) and "quantize" (layers, with the layer's SQNR).
        store: called with each finished layer (for resuming).
        done: layers finished earlier, kept as they are.
        budget: bytes for statistics and rounding; more layers than fit are gathered in further passes.

    Returns:
        The plan of every quantized layer, and its output SQNR in dB on the calibration samples.
    """
    layers, _ = plan_layers(unet, recipe)
    finished = dict(done or {})
    todo = [layer for layer in layers if layer.name not in finished]
    for group in passes(todo, budget):
        gathered = gather(unet, group, calls, progress)
        for layer in group:
            result = quantize_layer(layer, gathered.pop(layer.name), recipe)
            finished[layer.name] = result
            if store is not None:
                store(layer.name, result)
            progress("quantize", len(finished), len(layers), f"{layer.name}  {result.sqnr_db:.1f} dB")
    place(unet, {layer.name: finished[layer.name].layer for layer in layers})
    return (
        {layer.name: finished[layer.name].layer.plan for layer in layers},
        {layer.name: finished[layer.name].sqnr_db for layer in layers},
    )
