"""Calibration: record what the UNet sees, gather second moments, quantize layer by layer.

Everything is computed from the float model: one run of the pipeline records the UNet's inputs, the recorded inputs
are replayed through the UNet to gather per-layer statistics, and each layer is quantized from its own statistics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DgqError
from .layers import IntegerLayer, place
from .quantizers.channels import WORTH, ChannelGroups, apply_layer, candidates, fake_quantize_input
from .quantizers.weights import IntegerWeight, gptq, nearest, quantize_weight
from .recipe import LayerPlan, Recipe

# A layer's samples for choosing its channel handling: rows of a linear layer, pictures of a convolution.
SAMPLE_ROWS = 512
SAMPLE_PICTURES = 8
# Second moments of longer sums would not fit (K^2 floats) and barely help: such layers round to nearest.
GPTQ_MAX_REDUCTION = 12288
DEFAULT_BUDGET_BYTES = 4 * 2**30

Progress = Callable[[str, int, int, str], None]
"""progress(stage, done, total, detail)"""


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback that says nothing."""


@dataclass
class Layer:
    """A layer of the float model that will be quantized, or the part of one that reads one of two joined inputs."""

    name: str
    module: nn.Linear | nn.Conv2d
    plan: LayerPlan

    @property
    def weight(self) -> Tensor:
        """float32 (N, C), or (N, C, kh, kw) for a convolution with taps."""
        weight = self.own(self.module.weight.detach().float())
        return weight if self.plan.kind == "conv2d" else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The module's; of several parts only the first has it."""
        return self.module.bias if self.plan.bias else None

    def own(self, x: Tensor) -> Tensor:
        """The part of an input, or of the weight, that is this layer's: x (B, C, ...), along dimension 1."""
        return x[:, slice(*self.plan.columns)] if self.plan.columns else x

    @property
    def moment_bytes(self) -> int:
        """Memory of its statistics."""
        k = self.plan.reduction
        return 4 * ((k * k if k <= GPTQ_MAX_REDUCTION else k) + SAMPLE_ROWS * self.plan.in_features)


def quantizable(unet: nn.Module) -> tuple[dict[str, nn.Linear | nn.Conv2d], dict[str, str]]:
    """Layers the method quantizes, and those it cannot with the reason: ({name: module}, {name: reason}).

    Every Linear and Conv2d except conv_in and conv_out (DGQ paper, section 5.1).
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    skipped: dict[str, str] = {}
    for name, module in unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if name in ("conv_in", "conv_out"):
            skipped[name] = "first and last convolution stay float"
        elif isinstance(module, nn.Conv2d) and (reason := _unsupported(module)):
            skipped[name] = reason
        else:
            layers[name] = module
    return layers, skipped


def _unsupported(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return f"groups={conv.groups}"
    square = all(len({*pair}) == 1 for pair in (conv.kernel_size, conv.stride, conv.dilation))
    if not square or conv.dilation[0] != 1 or conv.padding_mode != "zeros":
        return "kernel, stride, dilation or padding mode without an integer kernel"
    if isinstance(conv.padding, str) or len({*conv.padding}) != 1:
        return f"padding {conv.padding!r}"
    return None


def joined_inputs(unet: nn.Module) -> dict[str, int]:
    """The 1x1 shortcuts of a UNet's up path, which read hidden state and skip joined along the channels.

    Returns:
        {name: channels of the hidden state}, the skip's follow.
    """
    found: dict[str, int] = {}
    blocks: Any = getattr(unet, "up_blocks", ())
    before: Any = getattr(unet, "mid_block", None) or (unet.down_blocks[-1] if blocks else None)  # type: ignore[index]
    if before is None or not hasattr(before, "resnets"):
        return found
    hidden = before.resnets[-1].out_channels
    for i, block in enumerate(blocks):
        for j, resnet in enumerate(getattr(block, "resnets", ())):
            shortcut = getattr(resnet, "conv_shortcut", None)
            if isinstance(shortcut, nn.Conv2d) and shortcut.kernel_size == (1, 1) and hidden < shortcut.in_channels:
                found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = hidden
            hidden = resnet.out_channels
    return found


def plan_layers(unet: nn.Module, recipe: Recipe) -> tuple[list[Layer], dict[str, str]]:
    """The plan of every layer before its channel handling is chosen, and the layers that stay float.

    Raises:
        DgqError: an override's pattern matches no layer, or nothing is left to quantize.
    """
    modules, skipped = quantizable(unet)
    if lost := recipe.unmatched_overrides(list(modules)):
        raise DgqError(
            f"override pattern {lost[0]!r} matches no layer", f"layers look like {next(iter(modules), 'none')!r}"
        )
    layers = []
    joined = joined_inputs(unet)
    for name, module in modules.items():
        bits = recipe.weight_bits(name)
        if bits == 0:
            skipped[name] = "kept float by an override"
            continue
        plan = _plan(module, bits, recipe)
        first = joined.get(name)
        if first is None:
            layers.append(Layer(name, module, plan))
            continue
        for i, (start, end) in enumerate(((0, first), (first, plan.in_features))):
            part = dataclasses.replace(
                plan, in_features=end - start, class_ends=[end - start], columns=[start, end], bias=plan.bias and i == 0
            )
            layers.append(Layer(f"{name}.{i}", module, part))
    if not layers:
        raise DgqError("the model has no layer that could be quantized")
    return layers, skipped


def _plan(module: nn.Linear | nn.Conv2d, wbits: int, recipe: Recipe) -> LayerPlan:
    sizes = geometry(module)
    return LayerPlan(
        **sizes, wbits=wbits, abits=recipe.abits, weight_group=recipe.weight_group, class_ends=[sizes["in_features"]]
    )


def geometry(module: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """The fields of a layer's plan that the float layer fixes: kind, sizes, and whether it has a bias."""
    fields = {
        "kind": "linear", "in_features": module.weight.shape[1], "out_features": module.weight.shape[0],
        "kernel_size": 1, "stride": 1, "padding": 0, "bias": module.bias is not None,
    }  # fmt: skip
    if isinstance(module, nn.Linear):
        return fields
    taps = {"kernel_size": module.kernel_size[0], "stride": module.stride[0], "padding": int(module.padding[0])}
    return {**fields, **taps, "kind": "pointwise" if taps.items() <= fields.items() else "conv2d"}


def record_inputs(
    run: Callable[[str, int], Any], unet: nn.Module, prompts: Sequence[str], progress: Progress = silent
) -> list[list[dict[str, Any]]]:
    """Every call the float pipeline makes to its UNet, per prompt.

    Args:
        run: run(prompt, i) makes picture i (steps, guidance and seed are the caller's).
        unet: the module whose calls are recorded.
        prompts: calibration prompts.

    Returns:
        For each prompt the list of its calls, one per sampler step, as keyword arguments (tensors detached).
    """
    calls: list[dict[str, Any]] = []

    def keep(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        named = dict(zip(names, args, strict=False)) | kwargs
        calls.append({name: keep(value) for name, value in named.items()})

    recorded = []
    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for i, prompt in enumerate(prompts):
            calls = []
            run(prompt, i)
            recorded.append(calls)
            progress("record", i + 1, len(prompts), prompt)
    finally:
        handle.remove()
    return recorded


def spread(recorded: list[list[dict[str, Any]]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` calls, spread evenly over prompts and steps (a different set of steps for each prompt)."""
    total = sum(map(len, recorded))
    if total <= limit:
        return [call for calls in recorded for call in calls]
    flat = [(step / len(calls) + 0.618 * i) % 1 for i, calls in enumerate(recorded) for step in range(len(calls))]
    order = sorted(range(total), key=lambda index: (round(flat[index], 9), index))
    calls = [call for group in recorded for call in group]
    picked = [order[round(i * (total - 1) / (limit - 1))] for i in range(limit)] if limit > 1 else order[:1]
    return [calls[index] for index in sorted(picked)]


def to_device(value: Any, device: torch.device) -> Any:
    """value with its tensors moved; they may be nested in dicts (added_cond_kwargs)."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


class Statistics:
    """Streamed statistics of one layer's input.

    Attributes:
        moment: float32 (K, K), sum of x x^T in the order of `to_matrix`, or None where K is too long.
        mean_square: float32 (C,), of the input channels.
        samples: (M, C) or (B, C, H, W), evenly drawn from the calls.
    """

    def __init__(self, plan: LayerPlan, calls: int) -> None:
        self.plan = plan
        k = plan.reduction
        self.moment = torch.zeros(k, k) if k <= GPTQ_MAX_REDUCTION else None
        self._squares = torch.zeros(plan.in_features)
        self._channel_count = 0
        self.count = 0
        per_call = (SAMPLE_PICTURES if plan.kind == "conv2d" else SAMPLE_ROWS) / calls
        self._quota, self._per_call = 0.0, per_call
        self._samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Add one call's input: (..., C) for a linear layer, (B, C, H, W) otherwise."""
        plan = self.plan
        if plan.kind == "pointwise":
            x = x.permute(0, 2, 3, 1)
        x = x.detach().float()
        if plan.kind != "conv2d":
            x = x.reshape(-1, plan.in_features)
        self._draw(x)
        channels = x if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(0, 2)
        self._squares = self._squares.to(x.device) + channels.square().sum(0)
        self._channel_count += channels.shape[0]
        columns = x if x.dim() == 2 else self._columns(x)
        self.count += columns.shape[0]
        if self.moment is not None:
            self.moment = self.moment.to(x.device).addmm_(columns.t(), columns)

    def _columns(self, x: Tensor) -> Tensor:
        """im2col rows (B * Ho * Wo, K) in the order (kh, kw, C) of `to_matrix`."""
        plan = self.plan
        unfolded = nn.functional.unfold(x, plan.kernel_size, padding=plan.padding, stride=plan.stride)
        batch, _, pixels = unfolded.shape
        taps = unfolded.view(batch, plan.in_features, -1, pixels).permute(0, 3, 2, 1)
        return taps.reshape(batch * pixels, -1)

    def _draw(self, x: Tensor) -> None:
        self._quota += self._per_call
        take = min(int(self._quota), x.shape[0])
        if take:
            self._quota -= take
            index = torch.randperm(x.shape[0], generator=self._generator)[:take]
            self._samples.append(x[index.to(x.device)].clone())

    @property
    def samples(self) -> Tensor:
        return torch.cat(self._samples)

    @property
    def mean_square(self) -> Tensor:
        return self._squares / self._channel_count


def gather(
    unet: nn.Module, layers: Iterable[Layer], calls: Sequence[dict[str, Any]], progress: Progress = silent
) -> dict[str, Statistics]:
    """Replay recorded calls, on any device, through the float UNet and gather the statistics of some layers."""
    device = next(unet.parameters()).device
    gathered = {layer.name: Statistics(layer.plan, len(calls)) for layer in layers}
    handles = []
    try:
        for layer in layers:

            def hook(_: nn.Module, args: Any, one: Layer = layer) -> None:
                gathered[one.name].add(one.own(args[0]))

            handles.append(layer.module.register_forward_pre_hook(hook))
        with torch.no_grad():
            for i, call in enumerate(calls):
                unet(**to_device(call, device))
                progress("statistics", i + 1, len(calls), f"call {i + 1}")
    finally:
        for handle in handles:
            handle.remove()
    return gathered


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
        module.prepare(torch.device("cpu"))
    except DgqError as error:
        raise DgqError(f"{layer.name}: {error.message}", error.hint) from None
    return QuantizedLayer(module, -20 * math.log10(max(rounded.error, 1e-20)))


def _round_weight(
    weight: Tensor, groups: ChannelGroups, statistics: Statistics, plan: LayerPlan, recipe: Recipe
) -> IntegerWeight:
    """Fold the divisor into the weight, sort the channels, and round on the second moments of what x becomes."""
    order, matrix = groups.stored_order, groups.fold(weight)
    taps = torch.arange(plan.kernel_size**2)[:, None] * plan.in_features
    index = (taps + order).flatten()
    inverse = (1 / groups.folded)[order].repeat(plan.kernel_size**2)
    if statistics.moment is None or recipe.rounding == "nearest":
        channel = statistics.mean_square.cpu()[order].repeat(plan.kernel_size**2)
        importance = (channel * inverse.square()).clamp(min=1e-12)
        return quantize_weight(matrix, plan.wbits, plan.weight_group, importance, nearest(importance))
    moment = statistics.moment.cpu()[index][:, index] / statistics.count * torch.outer(inverse, inverse)
    importance = moment.diagonal().clamp(min=1e-12)
    return quantize_weight(matrix, plan.wbits, plan.weight_group, importance, gptq(moment))


def passes(layers: Sequence[Layer], budget: int) -> list[list[Layer]]:
    """Split the layers into runs whose statistics fit the memory budget (bytes) together."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        if not groups or layer.moment_bytes > room:
            groups.append([])
            room = budget
        groups[-1].append(layer)
        room -= layer.moment_bytes
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
        budget: bytes for second moments and samples; more layers than fit are gathered in further passes.

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
