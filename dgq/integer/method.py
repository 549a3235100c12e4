"""The integer recipe as the rest of dgq asks for it (`dgq.method`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..family import family_of
from ..method import Cost, LayerCost, LayerFacts, Made, Method, Work
from ..recipe import LayerPlan, Recipe
from ..replay import rows_per_call
from .attention import AttentionPlan, use_log_attention
from .channels import fake_quantize_input
from .layer import IntegerLayer
from .plan import Layer, geometry, packed_bytes, plan_layers, quantizable
from .rates import rounding_seconds
from .rounding import QuantizedLayer, gathered_bytes, pass_bytes, passes, quantize_network
from .skeleton import build_skeleton, fuse
from .statistics import readers


def _calibrate(work: Work) -> Made:
    layers, sqnr = quantize_network(
        work.network,
        work.calls,
        work.recipe,
        progress=work.progress,
        store=work.store,
        done=dict(work.done),
        budget=work.budget,
    )
    attention = None
    if work.recipe.attention == "log" and family_of(work.network).start_token:
        attention = AttentionPlan.for_activations(work.recipe.abits)
        use_log_attention(work.network, attention)
    facts = {"calls": len(work.calls), "sqnr_db": {name: round(value, 2) for name, value in sqnr.items()}}
    return Made(layers, attention, facts=facts)


def _skeleton(network: nn.Module, header: Any) -> None:
    check_plans(network, header.layers)
    build_skeleton(network, header.layers)
    fuse(network)
    if header.attention is not None:
        use_log_attention(network, header.attention)


def check_plans(network: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Hold plans against the float model: layers, their kinds, sizes and biases, and the parts of split ones.

    Raises:
        DgqError: the first plan that is not of this model.
    """
    modules, skipped = quantizable(network)
    upsampled = family_of(network).upsampled(network)
    parts: dict[str, list[int]] = {}  # of split layers: where the parts so far end
    for name, plan in plans.items():
        owner = plan.owner(name)
        if owner not in modules:
            why = f"cannot be quantized ({skipped[owner]})" if owner in skipped else "is none of the model's"
            raise DgqError(f"layer {name!r} {why}")
        expected = geometry(modules[owner], plan.upsampled and owner in upsampled)
        if plan.columns:
            ends = parts.setdefault(owner, [])
            start = ends[-1] if ends else 0
            if name != f"{owner}.{len(ends)}" or plan.columns[0] != start or owner in plans:
                raise DgqError(f"layer {name!r}: columns {plan.columns} do not follow {start}")
            ends.append(plan.columns[1])
            expected |= {"in_features": plan.in_features, "bias": expected["bias"] and not start}
        for key, value in expected.items():
            if getattr(plan, key) != value:
                found = f"{key} is {getattr(plan, key)}, {value} in the model"
                raise DgqError(f"layer {name!r}: {found}")
    for owner, ends in parts.items():
        whole = geometry(modules[owner])
        if whole["kind"] == "conv2d" or ends[-1] != whole["in_features"]:
            what = f"the {whole['in_features']} input channels of a {whole['kind']} layer"
            raise DgqError(f"layer {owner!r}: parts that end at {ends} are not {what}")


def _layers(header: Any) -> dict[str, LayerFacts]:
    found = {}
    for name, plan in header.layers.items():
        channels = plan.channels
        if plan.rotation:
            channels = "rotate" if channels == "none" else f"{channels}, rotate"
        found[name] = LayerFacts(plan.kind, plan.float_shape, plan.wbits, plan.abits, channels, plan.owner(name), name)
    return found


def _rounded_input(layer: IntegerLayer, x: Tensor) -> Tensor:
    plan = layer.plan
    ones = torch.ones(plan.in_features, device=x.device)
    divisor = ones if plan.channels == "none" else 1 / layer.inv_divisor
    if plan.kind == "conv2d":
        return fake_quantize_input(x, plan.abits, divisor, plan.rotation)
    rows = x.permute(0, 2, 3, 1) if plan.kind == "pointwise" else x
    rows = fake_quantize_input(rows.reshape(-1, plan.in_features), plan.abits, divisor, plan.rotation).view(rows.shape)
    return rows.permute(0, 3, 1, 2) if plan.kind == "pointwise" else rows


def _cost(network: nn.Module, recipe: Recipe, budget: int, call: dict[str, Any] | None) -> Cost:
    layers, kept = plan_layers(network, recipe)
    inputs, rows = {layer.name: layer.input for layer in readers(layers)}, dict[str, int]()
    if call is not None:
        outputs = {layer.name: (layer.module, layer.plan.float_shape[0]) for layer in layers}
        with next(network.parameters()).device:  # on the meta device nothing may come from another one
            rows = rows_per_call(network, outputs, call)
    order = [inputs[name] for name in rows or inputs if name in inputs]  # of a call, its `reading_order`
    groups = passes(layers, recipe, budget, order)
    peak, gathered = (max(count(group, recipe) for group in groups) for count in (pass_bytes, gathered_bytes))
    replayed = [[layer.name for layer in group] for group in groups]
    return Cost({layer.name: _layer_cost(layer, recipe) for layer in layers}, kept, peak, gathered, replayed, rows=rows)


def _layer_cost(layer: Layer, recipe: Recipe) -> LayerCost:
    plan = layer.plan
    return LayerCost(
        layer.module,
        math.prod(plan.float_shape),
        plan.float_shape[0],
        plan.float_parameters,
        packed_bytes(plan),
        seconds=lambda rows: rounding_seconds(plan, recipe, layer.input == layer.name, rows),
    )


def _label(recipe: Recipe) -> str:
    """The name, and what was asked for other than the defaults."""
    asked = (recipe.channels != "auto" and recipe.channels, recipe.rounding != "gptq" and recipe.rounding)
    return " ".join(["integer", *(word for word in asked if word)])


def _words(recipe: Recipe, attention: Any) -> dict[str, str]:
    steps = attention and f"log2, {attention['bits']} bits, {2 ** attention['fraction_bits']} steps per octave"
    return {"rounding": recipe.rounding, "attention": steps or "float"}


def _pack(result: QuantizedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return dict(result.layer.state_dict()), {"plan": result.layer.plan.to_dict(), "sqnr_db": result.sqnr_db}


def _unpack(plan: LayerPlan, tensors: dict[str, Tensor], rest: dict[str, Any]) -> QuantizedLayer:
    made = LayerPlan.from_dict(rest["plan"])
    chosen = {key: getattr(made, key) for key in ("channels", "class_ends", "reordered", "rotation")}
    if dataclasses.replace(plan, **chosen) != made:
        raise DgqError("its layer is another one")
    layer = IntegerLayer(made)
    layer.load_state_dict(tensors)
    return QuantizedLayer(layer, float(rest["sqnr_db"]))


INTEGER = Method(
    "integer",
    "int8 products",
    _calibrate,
    _skeleton,
    _layers,
    _rounded_input,
    _cost,
    _label,
    plans=lambda network, recipe: {layer.name: layer.plan for layer in plan_layers(network, recipe)[0]},
    pack=_pack,
    unpack=_unpack,
    words=_words,
    choices={"rounding": ("gptq", "nearest")},
    unread=("groups", "iterations"),
)
