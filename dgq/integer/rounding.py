"""A layer's statistics to its integers: the channel handling of least error, rounded weights, a whole network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgq_kernels import native
from dgq_kernels.rotation import rotate

from ..errors import DgqError
from ..progress import silent
from ..recipe import LayerPlan, Recipe
from .channels import ChannelGroups, apply_layer, candidates, fake_quantize_input, no_groups, worth
from .layer import IntegerLayer
from .plan import GPTQ_MAX_REDUCTION, SAMPLE_ROWS, plan_layers
from .skeleton import place_calibrated
from .statistics import MOMENT_ROWS, gather, reading_order
from .weights import GPTQ, IntegerWeight, column_sum, nearest, quantize_weight

if TYPE_CHECKING:
    from ..progress import Progress
    from .plan import Layer
    from .statistics import Statistics
    from .weights import Rounding


DEFAULT_BUDGET_BYTES = 4 * 2**30


# Output channels of a layer that judge how its input channels are handled, where it has more than twice as many.
JUDGED_ROWS = 128


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


class Roundings:
    """Prepares the rounding of layers that read one input: what it takes of the input's second moments is computed once
    for the layers that handle their channels alike."""

    def __init__(self, statistics: Statistics, recipe: Recipe) -> None:
        self.statistics, self.recipe = statistics, recipe
        self._last: tuple[ChannelGroups, Tensor, GPTQ | Rounding] | None = None

    def under(self, groups: ChannelGroups) -> tuple[Tensor, GPTQ | Rounding]:
        """The mean square, float32 (K,), of what each column of the folded weight reads, and how it is rounded."""
        if self._last is None or not _reads_alike(self._last[0], groups):
            self._last = None  # before another factor takes as much memory
            self._last = (groups, *self._prepare(groups))
        return self._last[1:]

    def _prepare(self, groups: ChannelGroups) -> tuple[Tensor, GPTQ | Rounding]:
        statistics, plan = self.statistics, self.statistics.plan
        taps = plan.kernel_size**2
        inverse = (1 / groups.folded)[groups.stored_order].repeat(taps)
        moment = None if self.recipe.rounding == "nearest" else statistics.moment
        if moment is None:
            square = statistics.mean_square.cpu()[groups.stored_order] * inverse[: plan.in_features].square()
            if groups.rotation:  # each gets its block's mean, as far as channels do not depend on each other
                square = square.unflatten(0, (-1, groups.rotation)).mean(1).repeat_interleave(groups.rotation)
            importance = square.repeat(taps).clamp(min=1e-12)
            return importance, nearest(importance)
        order: Tensor | None = None
        scale: Tensor | None = inverse
        if groups.rotation:
            moment, scale = rotated_moment(moment, inverse, groups.rotation), None
        elif groups.order is not None:
            order = (torch.arange(taps)[:, None] * plan.in_features + groups.order).flatten()
        square = moment.diagonal() / statistics.count
        square = square if order is None else square[order]
        importance = (square if scale is None else square * scale.square()).clamp(min=1e-12)
        return importance, GPTQ(moment, order=order, scale=scale)


def _reads_alike(one: ChannelGroups, other: ChannelGroups) -> bool:
    """Whether the columns of weights folded by two groups read the same values."""
    return (
        one.rotation == other.rotation
        and torch.equal(one.folded, other.folded)
        and torch.equal(one.stored_order, other.stored_order)
    )


def round_layer(layer: Layer, roundings: Roundings, groups: ChannelGroups, *, judged: bool = False) -> RoundedLayer:
    """Fold the groups' divisor into the weight, round it by the recipe, and measure the output's error.

    Args:
        layer: to round.
        roundings: of its input.
        groups: how its channels are handled.
        judged: only to tell the groups from others, sooner: some output channels, and GPTQ's descent alone.

    Raises:
        DgqError: the calibration inputs are not finite.
    """
    rows = _judged_rows(layer) if judged else slice(None)
    weight, x = layer.weight[rows].cpu(), roundings.statistics.samples.cpu()
    plan = dataclasses.replace(
        layer.plan,
        out_features=len(weight),
        channels=groups.mode,
        class_ends=groups.class_ends,
        reordered=groups.order is not None,
        rotation=groups.rotation,
    )
    importance, rounding = roundings.under(groups)
    if judged and isinstance(rounding, GPTQ):
        rounding = rounding.descent
    rounded = quantize_weight(groups.fold(weight), plan.wbits, plan.weight_group, importance, rounding)
    target = apply_layer(x, weight, plan)
    natural = groups.unfold(rounded.dequantize(), plan)
    noise = apply_layer(fake_quantize_input(x, plan.abits, groups.divisor, groups.rotation), natural, plan) - target
    return RoundedLayer(groups, plan, rounded, float(noise.norm() / target.norm().clamp(min=1e-20)))


def choose_rounded(layers: Sequence[Layer], statistics: Statistics, recipe: Recipe) -> list[RoundedLayer]:
    """Layers that read one input, under the channel handling of least output error in all; another than "none" has to
    be worth what it costs (`channels.worth`).

    Candidates are rounded by descent on the second moments: like GPTQ it takes most of a rounding's error away, and an
    estimate by nearest rounding would choose for errors that are not there. Of a wide layer some output channels tell
    enough.
    """
    roundings = Roundings(statistics, recipe)
    rms = statistics.mean_square.cpu().sqrt()
    # the last, a rotation, is chosen most often: its second moments are at hand then
    options = list(zip(*(_candidates(layer, recipe, rms) for layer in layers), strict=True))

    def error(groups: Sequence[ChannelGroups]) -> float:
        tried = (round_layer(layer, roundings, own, judged=True) for layer, own in zip(layers, groups, strict=True))
        return sum(one.error for one in tried) / (1 - worth(groups[0]))

    best = min(options, key=error) if len(options) > 1 else options[0]
    return [round_layer(layer, roundings, own) for layer, own in zip(layers, best, strict=True)]


def _candidates(layer: Layer, recipe: Recipe, rms: Tensor) -> list[ChannelGroups]:
    """How the channels of a layer may be handled: 16 bits need nothing, and an upsampling has no shift classes."""
    plan = layer.plan
    if plan.wide or (plan.upsampled and recipe.channels == "shift"):
        return [no_groups(plan.in_features)]
    return candidates(recipe.channels, rms, plan.wbits)


def _judged_rows(layer: Layer) -> Tensor | slice:
    """Output channels by which the handling of a layer's input channels is chosen: all, or of many an even choice."""
    n = layer.plan.out_features
    return slice(None) if n <= 2 * JUDGED_ROWS else torch.linspace(0, n - 1, JUDGED_ROWS).long()


def quantize_layers(layers: Sequence[Layer], statistics: Statistics, recipe: Recipe) -> list[QuantizedLayer]:
    """Quantize layers that read one input: choose their channel handling, round the weights, pack, and measure the
    outputs' SQNR.

    Args:
        layers: of one input.
        statistics: its.
        recipe: an "integer" recipe.

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
            at, bias = layer.name, None if layer.bias is None else layer.bias.detach().cpu().clone()
            module = IntegerLayer.from_quantized(one.plan, one.weight, one.groups, bias)
            classes = one.groups.class_of().repeat(one.plan.kernel_size**2) if one.groups.shifts_accumulator else None
            column_sum(one.weight.integer(), classes)
            results.append(QuantizedLayer(module, -20 * math.log10(max(one.error, 1e-20))))
    except DgqError as error:
        raise DgqError(f"{at}: {error.message}", error.hint) from None
    return results


def rotated_moment(moment: Tensor, scale: Tensor, block: int) -> Tensor:
    """The second moments, float32 (K, K), of what scaling by float32 (K,) and rotation in blocks make of an input."""
    result = torch.empty_like(moment)
    for start in range(0, len(moment), block):
        part = slice(start, start + block)
        one_side = rotate(moment[part] * scale, block) * scale[part, None]
        result[part] = rotate(one_side.t(), block).t()
    return result


def pass_bytes(layers: Sequence[Layer], recipe: Recipe) -> int:
    """Memory of layers whose statistics are gathered together, while the one that takes most is rounded."""
    return gathered_bytes(layers, recipe) + max(rounding_bytes(layer, recipe) for layer in layers)


def gathered_bytes(layers: Sequence[Layer], recipe: Recipe) -> int:
    """Memory of the statistics of what layers read."""
    return sum(input_bytes(together[0], recipe) for together in by_input(layers))


def input_bytes(layer: Layer, recipe: Recipe) -> int:
    """Memory of the statistics of what a layer reads."""
    plan = layer.plan
    moments = plan.reduction * (plan.reduction + MOMENT_ROWS) // 2 if _has_moments(plan, recipe) else 0
    return 4 * (moments + SAMPLE_ROWS * plan.in_features)


def rounding_bytes(layer: Layer, recipe: Recipe) -> int:
    """Memory that rounding a layer takes beside the statistics of its input: second moments as a square, rotated ones
    where they are tried, GPTQ's factor, and a few copies of the weight."""
    plan = layer.plan
    rotated = any(groups.rotation for groups in _candidates(layer, recipe, torch.ones(plan.in_features)))
    squares = 2 + rotated if _has_moments(plan, recipe) else 0
    return 4 * (squares * plan.reduction**2 + 8 * plan.reduction * plan.out_features)


def _has_moments(plan: LayerPlan, recipe: Recipe) -> bool:
    return recipe.rounding == "gptq" and plan.reduction <= GPTQ_MAX_REDUCTION


def passes(layers: Sequence[Layer], recipe: Recipe, budget: int, order: Sequence[str]) -> list[list[Layer]]:
    """Split the layers into runs whose statistics and rounding fit the memory budget (bytes), or of one input; in the
    order in which a call reads their inputs (`reading_order`), so that the calls of early runs can end early."""
    first = {name: i for i, name in reversed(list(enumerate(order)))}
    groups: list[list[Layer]] = []
    gathered, largest = 0, 0  # of the last one, as `pass_bytes` has them
    for together in sorted(by_input(layers), key=lambda together: first.get(together[0].input, len(order))):
        own, rounding = input_bytes(together[0], recipe), max(rounding_bytes(layer, recipe) for layer in together)
        if groups and gathered + own + max(largest, rounding) <= budget:
            groups[-1].extend(together)
            gathered, largest = gathered + own, max(largest, rounding)
        else:
            groups.append(together)
            gathered, largest = own, rounding
    return groups


def by_input(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in lists of those that read the same input."""
    owned: dict[str, list[Layer]] = {}
    for layer in layers:
        owned.setdefault(layer.input, []).append(layer)
    return list(owned.values())


def quantize_network(
    network: nn.Module,
    calls: Sequence[dict[str, Any]],
    recipe: Recipe,
    *,
    progress: Progress = silent,
    store: Callable[[str, QuantizedLayer], None] | None = None,
    done: dict[str, QuantizedLayer] | None = None,
    budget: int = DEFAULT_BUDGET_BYTES,
) -> tuple[dict[str, LayerPlan], dict[str, float]]:
    """Quantize a float network in place by the integer recipe.

    Args:
        network: float model; its quantizable layers are replaced by `IntegerLayer`.
        calls: recorded calls (keyword arguments), from `record_inputs` and `spread`.
        recipe: an "integer" recipe.
        progress: told of stage "statistics" (calls) and "quantize" (layers, with the layer's SQNR).
        store: called with each finished layer (for resuming).
        done: layers finished earlier, kept as they are.
        budget: bytes for statistics and rounding; more layers than fit are gathered in further passes.

    Returns:
        The plan of every quantized layer, and its output SQNR in dB on the calibration samples.
    """
    layers, _ = plan_layers(network, recipe)
    finished = dict(done or {})
    todo = [
        layer
        for together in by_input(layers)
        if any(one.name not in finished for one in together)
        for layer in together
    ]
    order = reading_order(network, todo, calls[0]) if todo else []
    for group in passes(todo, recipe, budget, order):
        native.give_back()  # what the rounding before left in pieces
        gathered = gather(network, group, calls, order, progress, recipe.rounding == "gptq")
        native.give_back()
        native.let_go(network.parameters())  # of a pass's weights only its own layers' are read until the next pass
        for together in by_input(group):
            results = quantize_layers(together, gathered.pop(together[0].input), recipe)
            for layer, result in zip(together, results, strict=True):
                finished[layer.name] = result
                if store is not None:
                    store(layer.name, result)
                progress("quantize", len(finished), len(layers), f"{layer.name}  {result.sqnr_db:.1f} dB")
    place_calibrated(network, {layer.name: finished[layer.name].layer for layer in layers})
    _leave_files(network)
    return (
        {layer.name: finished[layer.name].layer.plan for layer in layers},
        {layer.name: finished[layer.name].sqnr_db for layer in layers},
    )


def _leave_files(network: nn.Module) -> None:
    """Copy what stays float out of the model's files, which else stay mapped, whole, as long as anything reads them."""
    for module in network.modules():
        if not isinstance(module, IntegerLayer):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.clone()
