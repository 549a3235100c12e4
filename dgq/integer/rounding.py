"""A layer's statistics to its integers: the channel handling of least error, rounded weights, a whole network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgq_kernels.rotation import rotate

from ..errors import DgqError
from ..progress import silent
from ..recipe import LayerPlan, Recipe
from .channels import ChannelGroups, apply_layer, candidates, fake_quantize_input, worth
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
        layer.plan,
        channels=groups.mode,
        class_ends=groups.class_ends,
        reordered=groups.order is not None,
        rotation=groups.rotation,
    )
    weight, x = layer.weight.cpu(), statistics.samples.cpu()
    rounded = _round_weight(weight, groups, statistics, plan, recipe)
    target = apply_layer(x, weight, plan)
    natural = groups.unfold(rounded.dequantize(), plan)
    noise = apply_layer(fake_quantize_input(x, plan.abits, groups.divisor, groups.rotation), natural, plan) - target
    return RoundedLayer(groups, plan, rounded, float(noise.norm() / target.norm().clamp(min=1e-20)))


def choose_rounded(layers: Sequence[Layer], statistics: Sequence[Statistics], recipe: Recipe) -> list[RoundedLayer]:
    """Layers that read one input, under the channel handling of least output error in all; another than "none" has to
    be worth what it costs (`channels.worth`).

    Every candidate is rounded as the layer will be: GPTQ takes most of a rounding's error away, and an estimate by
    nearest rounding would choose for errors that are not there.
    """
    best: list[RoundedLayer] = []
    least = math.inf
    rms = statistics[0].mean_square.cpu().sqrt()
    choices = [candidates(recipe.channels, rms, layer.plan.wbits) for layer in layers]
    for groups in zip(*choices, strict=True):
        rounded = [
            round_layer(layer, seen, recipe, own) for layer, seen, own in zip(layers, statistics, groups, strict=True)
        ]
        error = sum(one.error for one in rounded) / (1 - worth(groups[0]))
        if error < least:
            best, least = rounded, error
    return best


def quantize_layers(layers: Sequence[Layer], statistics: Sequence[Statistics], recipe: Recipe) -> list[QuantizedLayer]:
    """Quantize layers that read one input: choose their channel handling, round the weights, pack, and measure the
    outputs' SQNR.

    Raises:
        DgqError: the calibration inputs or a weight are not finite, or int32 sums could overflow.
    """
    for layer in layers:
        if not torch.isfinite(layer.weight).all():
            raise DgqError(f"{layer.name}: the weight is not finite")
    at = layers[0].name
    results = []
    try:
        rounded = choose_rounded(layers, statistics, recipe)
        for layer, one in zip(layers, rounded, strict=True):
            at, bias = layer.name, None if layer.bias is None else layer.bias.cpu()
            module = IntegerLayer.from_quantized(one.plan, one.weight, one.groups, bias)
            classes = one.groups.class_of().repeat(one.plan.kernel_size**2) if one.groups.shifts_accumulator else None
            column_sum(one.weight.integer(), classes)
            results.append(QuantizedLayer(module, -20 * math.log10(max(one.error, 1e-20))))
    except DgqError as error:
        raise DgqError(f"{at}: {error.message}", error.hint) from None
    return results


def _round_weight(
    weight: Tensor, groups: ChannelGroups, statistics: Statistics, plan: LayerPlan, recipe: Recipe
) -> IntegerWeight:
    """Fold the divisor into the weight, sort the channels, and round on the second moments of what x becomes."""
    taps, matrix = plan.kernel_size**2, groups.fold(weight)
    inverse = (1 / groups.folded)[groups.stored_order].repeat(taps)
    if statistics.moment is None or recipe.rounding == "nearest":
        square = statistics.mean_square.cpu()[groups.stored_order] * inverse[: plan.in_features].square()
        if groups.rotation:  # each gets its block's mean, as far as channels do not depend on each other
            square = square.unflatten(0, (-1, groups.rotation)).mean(1).repeat_interleave(groups.rotation)
        importance = square.repeat(taps).clamp(min=1e-12)
        return quantize_weight(matrix, plan.wbits, plan.weight_group, importance, nearest(importance))
    moment, order = statistics.moment.cpu(), None
    scale: Tensor | None = inverse
    if groups.rotation:
        moment, scale = rotated_moment(moment, inverse, groups.rotation), None
    elif groups.order is not None:
        order = (torch.arange(taps)[:, None] * plan.in_features + groups.order).flatten()
    square = moment.diagonal() / statistics.count
    square = square if order is None else square[order]
    importance = (square if scale is None else square * scale.square()).clamp(min=1e-12)
    rounding = gptq(moment, order=order, scale=scale)
    return quantize_weight(matrix, plan.wbits, plan.weight_group, importance, rounding)


def rotated_moment(moment: Tensor, scale: Tensor, block: int) -> Tensor:
    """The second moments, float32 (K, K), of what scaling by float32 (K,) and rotation in blocks make of an input."""
    result = torch.empty_like(moment)
    for start in range(0, len(moment), block):
        part = slice(start, start + block)
        one_side = rotate(moment[part] * scale, block) * scale[part, None]
        result[part] = rotate(one_side.t(), block).t()
    return result


def pass_bytes(layers: Sequence[Layer]) -> int:
    """Memory of layers whose statistics are gathered together, while the one that takes most is rounded."""
    return sum(layer.moment_bytes for layer in layers) + max(layer.rounding_bytes for layer in layers)


def passes(layers: Sequence[Layer], budget: int) -> list[list[Layer]]:
    """Split the layers into runs whose statistics and rounding fit the memory budget (bytes), or of one input."""
    groups: list[list[Layer]] = []
    for together in by_input(layers):
        if groups and pass_bytes([*groups[-1], *together]) <= budget:
            groups[-1].extend(together)
        else:
            groups.append(together)
    return groups


def by_input(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in lists of those that read the same input."""
    owned: dict[str, list[Layer]] = {}
    for layer in layers:
        owned.setdefault(layer.owner or layer.name, []).append(layer)
    return list(owned.values())


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
    todo = [
        layer
        for together in by_input(layers)
        if any(one.name not in finished for one in together)
        for layer in together
    ]
    for group in passes(todo, budget):
        gathered = gather(unet, group, calls, progress)
        for together in by_input(group):
            results = quantize_layers(together, [gathered.pop(layer.name) for layer in together], recipe)
            for layer, result in zip(together, results, strict=True):
                finished[layer.name] = result
                if store is not None:
                    store(layer.name, result)
                progress("quantize", len(finished), len(layers), f"{layer.name}  {result.sqnr_db:.1f} dB")
    place(unet, {layer.name: finished[layer.name].layer for layer in layers})
    return (
        {layer.name: finished[layer.name].layer.plan for layer in layers},
        {layer.name: finished[layer.name].sqnr_db for layer in layers},
    )
