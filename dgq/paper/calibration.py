"""Calibration of the ``paper`` recipe: stream the activations' ranges, then quantize a network in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dgq.errors import DgqError
from dgq.family import family_of
from dgq.paper.layers import (
    ATTENTION_PARTS,
    LAYER_TYPES,
    PROBABILITIES,
    PaperAttnProcessor,
    PlainAttnProcessor,
    Plan,
    StepState,
    activation_plan,
    image_to_pixels_last,
    layer_geometry,
    split_heads,
)
from dgq.paper.quantizers import AxisRanges, QuantizedWeight, group_activation
from dgq.recipe import shortened
from dgq.replay import replay

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@torch.no_grad()
def calibrate_paper(
    network: nn.Module,
    recorded_inputs: Sequence[Sequence[dict[str, Any]]],
    *,
    wbits: int,
    abits: int,
    groups: int,
    weights: Mapping[str, QuantizedWeight] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a network in place by the ``paper`` recipe: rounded weights, grouped activations, log2 attention.

    Every Linear and Conv2d becomes a PaperLinear or PaperConv2d, but for its family's `float_layers`; every
    attention layer gets a PaperAttnProcessor; a forward pre-hook keeps their shared step. With one group, the
    published baseline, attention probabilities are an activation like others: rounded in equal steps over one
    calibrated range, the start token with them.

    Args:
        network: of diffusers, in eval mode.
        recorded_inputs: per prompt, per sampler step, the keyword arguments of one ``network(**kwargs)`` call:
            sample (B, C, H, W), timestep, encoder_hidden_states (B, S, D), ... All of one image size, on any
            device.
        wbits: weight code width, 4 or 8.
        abits: activation code width, 4 to 8 (the paper's are 8 and 6).
        groups: activation groups a layer, 1 to 256 (the paper's are 1, 8 and 16).
        weights: quantized weights of layers, by name; others are rounded to nearest.
        progress: called with ("calibrate" or "quantize", done, total).

    Returns:
        the JSON-able table from which ``build_paper_skeleton`` rebuilds the model:
        {"timesteps": [...], "layers": {name: plan}} (plans: see ``dgq.paper_layers``).

    Raises:
        DgqError: an argument out of range, no inputs, inputs of several sizes, a layer that never ran, whose
            input or weight was not finite, or of an unsupported kind.
    """
    if wbits not in (4, 8) or not 4 <= abits <= 8 or not 1 <= groups <= 256:
        raise DgqError(
            f"the paper recipe has no W{wbits}A{abits} with {groups} groups",
            hint="weight bits 4 or 8, activation bits 4 to 8, groups 1 to 256",
        )
    calls = [kwargs for prompt in recorded_inputs for kwargs in prompt]
    if not calls:
        raise DgqError("no recorded inputs to calibrate with")
    state = StepState(sorted({_timestep(kwargs) for kwargs in calls}, reverse=True))
    layers = quantizable_layers(network)
    attentions = _attention_layers(network)
    geometries = {name: layer_geometry(module, name) for name, module in (layers | attentions).items()}
    parts = (*ATTENTION_PARTS, PROBABILITIES) if groups == 1 else ATTENTION_PARTS
    ranges = _record_ranges(network, calls, state, layers, attentions, parts, progress)
    groupings = {name: group_activation(recorded, abits, groups) for name, recorded in ranges.items()}

    plans: dict[str, Plan] = {}
    for name, geometry in geometries.items():
        if name in layers:
            inputs = activation_plan(groupings[name])
            plan = {**geometry, "wbits": wbits, "abits": abits, "input": inputs}
            layer_type = LAYER_TYPES[plan["kind"]]
            # Popped: each float weight is freed as soon as its codes exist.
            weight = None if weights is None else weights.get(name)
            quantized = layer_type.from_float(layers.pop(name), plan, groupings[name], name, state, weight)
            network.set_submodule(name, quantized)
        else:
            own = {part: groupings[f"{name}.{part}"] for part in parts}
            plan = {**geometry, "abits": abits}
            plan |= {part: activation_plan(grouping) for part, grouping in own.items()}
            processor = PaperAttnProcessor.from_float(attentions[name], plan, own, name, state)
            attentions[name].set_processor(processor)  # type: ignore[arg-type]  # too narrow a hint
        plans[name] = plan
        if progress is not None:
            progress("quantize", len(plans), len(geometries))
    network.register_forward_pre_hook(state.before_network, with_kwargs=True)
    return {"timesteps": list(state.timesteps), "layers": plans}


def build_paper_skeleton(network: nn.Module, table: dict[str, Any]) -> StepState:
    """Turn a float network into the empty quantized model of a table, in place, ready for a strict load.

    Args:
        network: of the same architecture as the calibrated one, on any device, meta included; new buffers lie
            where the weights they replace did.
        table: what ``calibrate_paper`` returned.

    Returns:
        the model's step state (a hook on the network keeps it up to date).

    Raises:
        DgqError: the table's layers are not the network's, by name or by geometry; or the table is damaged.
    """
    try:
        timesteps = table["timesteps"]
        if not timesteps or not all(type(t) in (int, float) and math.isfinite(t) for t in timesteps):
            raise DgqError("table of the paper recipe: damaged (timesteps)")
        return _build_skeleton(network, StepState(timesteps), table["layers"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise DgqError(f"table of the paper recipe: damaged ({type(error).__name__}: {error})") from error


def _build_skeleton(network: nn.Module, state: StepState, plans: dict[str, Plan]) -> StepState:
    layers, attentions = quantizable_layers(network), _attention_layers(network)
    strays = plans.keys() ^ (layers.keys() | attentions.keys())
    if strays:
        name = min(strays)
        raise DgqError(f"{name}: only the {'table' if name in plans else 'model'} has this layer")
    for name, module in (layers | attentions).items():
        _check_plan(name, plans[name], module)
    for name, module in layers.items():
        plan = {**plans[name], **layer_geometry(module, name)}
        quantized = LAYER_TYPES[plan["kind"]](plan, name, state, module.weight.device)
        if quantized.bias is not None:
            quantized.bias = quantized.bias.to(module.weight.dtype)
        network.set_submodule(name, quantized)
    for name, attn in attentions.items():
        processor = PaperAttnProcessor(plans[name], name, state, attn.to_q.weight.device)
        attn.set_processor(processor)  # type: ignore[arg-type]  # too narrow a hint
    network.register_forward_pre_hook(state.before_network, with_kwargs=True)
    return state


def _check_plan(name: str, plan: Plan, module: nn.Linear | nn.Conv2d | Attention) -> None:
    """Hold a plan against its float layer: the geometry, and the bits and groups that there can be."""
    geometry = layer_geometry(module, name)
    inputs: tuple[str, ...]
    if isinstance(module, Attention):
        # probabilities have a range of their own at G = 1 only
        own = ("probabilities",) if "probabilities" in plan else ()
        inputs, channels = (*ATTENTION_PARTS, *own), module.to_q.out_features // module.heads
        bits = {"abits": range(4, 9)}
    else:
        inputs, channels = ("input",), module.in_features if isinstance(module, nn.Linear) else module.in_channels
        bits = {"abits": range(4, 9), "wbits": range(4, 9, 4)}
    known = [*geometry, *bits, *inputs]
    if unknown := sorted(plan.keys() - set(known)):
        raise DgqError(f"{name}: the table has an unknown field {shortened(unknown[0])}")
    if missing := [field for field in known if field not in plan]:
        raise DgqError(f"{name}: the table is damaged, {missing[0]} is missing")
    for field, value in geometry.items():
        if plan[field] != value:
            raise DgqError(f"{name}: {field} is {plan[field]} in the table, {value} in the model")
    for field, allowed in bits.items():
        if type(plan[field]) is not int or plan[field] not in allowed:
            raise DgqError(f"{name}: {field} {plan[field]!r} is not one of {', '.join(map(str, allowed))}")
    for field in inputs:
        axis, groups, size = (plan[field][key] for key in ("axis", "groups", "size"))
        sizes = {"tensor": range(1, 2), "channel": range(channels, channels + 1), "pixel": range(1, 2**24)}
        whole = type(size) is int and type(groups) is int
        if not whole or size not in sizes.get(axis, ()) or not 1 <= groups <= min(size, 256):
            raise DgqError(f"{name}: {field} has no groups of {plan[field]}")


def quantizable_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    family = family_of(network)
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not family.kept(name)
    }


def _attention_layers(network: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in network.named_modules() if isinstance(module, Attention)}


def _timestep(kwargs: dict[str, Any]) -> float:
    return float(torch.as_tensor(kwargs["timestep"]).flatten()[0])


class _ProbabilityWatcher(PlainAttnProcessor):
    """Tells of the probabilities of one attention layer, (rows, keys), and leaves them as they are."""

    def __init__(self, name: str, cross: bool, update: Callable[[Tensor], None]) -> None:
        super().__init__(name, cross)
        self.update = update

    def round_probabilities(self, probabilities: Tensor) -> Tensor:
        self.update(probabilities.flatten(0, -2))
        return probabilities


def _record_ranges(
    network: nn.Module,
    calls: Sequence[dict[str, Any]],
    state: StepState,
    layers: dict[str, nn.Linear | nn.Conv2d],
    attentions: dict[str, Attention],
    parts: Sequence[str],
    progress: Progress | None,
) -> dict[str, AxisRanges]:
    """Run the calls through the float network: ranges of each layer's input and of each attention's parts."""
    ranges: dict[str, AxisRanges] = {}
    handles = []
    processors = {name: attn.processor for name, attn in attentions.items()}

    def watch(name: str) -> Callable[[Tensor], None]:
        ranges[name] = AxisRanges(name, len(state.timesteps))

        def update(x: Tensor) -> None:
            assert state.index is not None
            ranges[name].update(state.index, x)

        return update

    def watch_input(name: str, module: nn.Module) -> None:
        update = watch(name)
        is_conv = isinstance(module, nn.Conv2d)

        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            update(image_to_pixels_last(args[0]) if is_conv else args[0])

        handles.append(module.register_forward_pre_hook(hook))

    def watch_output(name: str, module: nn.Module, heads: int, first: int) -> None:
        update = watch(name)

        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            update(split_heads(output, heads)[:, :, first:])

        handles.append(module.register_forward_hook(hook))

    for name, module in layers.items():
        watch_input(name, module)
    for name, attn in attentions.items():
        watch_output(f"{name}.query", attn.to_q, attn.heads, 0)
        # Where the start token's key stays float it has no part in the ranges.
        apart = attn.is_cross_attention and PROBABILITIES not in parts
        watch_output(f"{name}.key", attn.to_k, attn.heads, int(apart))
        watch_output(f"{name}.value", attn.to_v, attn.heads, 0)
        if PROBABILITIES in parts:
            watcher = _ProbabilityWatcher(name, attn.is_cross_attention, watch(f"{name}.{PROBABILITIES}"))
            attn.set_processor(watcher)  # type: ignore[arg-type]  # too narrow a hint
    handles.append(network.register_forward_pre_hook(state.before_network, with_kwargs=True))
    try:
        told = progress or (lambda stage, done, total: None)
        replay(network, calls, handles, lambda done, total: told("calibrate", done, total))
    finally:
        for name, attn in attentions.items():
            attn.set_processor(processors[name])
    return ranges
