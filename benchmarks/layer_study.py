"""How each way to quantize does on real activations, layer by layer: SQNR of the layers' outputs (docs/studies.md).

    python benchmarks/layer_study.py [--model MODEL] [--out PREFIX]

The tables of docs/method.md's source measurements, on a UNet: activations alone (float weights), weights alone (float
activations), and both. Inputs are those of the float model; calibration and evaluation prompts are apart. Linear layers
(1x1 convolutions among them) have a scale a row, larger convolutions a scale a sample.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from captures import KINDS, Captured, capture, publish, record, table
from fidelity import say
from torch import Tensor

from dgq.integer.channels import (
    ChannelGroups,
    apply_layer,
    fake_quantize_input,
    form_groups,
    no_groups,
    to_matrix,
    worth,
)
from dgq.integer.rounding import Roundings, round_layer
from dgq.integer.weights import GPTQ, IntegerWeight, TwoLevelGrid, nearest
from dgq.integer.weights import quantize_weight as quantize_integer
from dgq.paper.layers import image_to_pixels_last, pixels_last_to_image
from dgq.paper.quantizers import (
    AXIS_DIMS,
    AxisRanges,
    dequantize_weight,
    fake_quantize,
    group_activation,
    quantize_weight,
)
from dgq.range_search import affine_parameters, search_symmetric
from dgq.recipe import Recipe

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
Format = Callable[[Captured, Tensor, Tensor, int], Tensor]
"""(layer, x in natural layout, its steps, bits) -> x after quantization"""


def rows_last(one: Captured, x: Tensor) -> Tensor:
    """(S, P, C) or (S, C): a layer's input with its channels last."""
    return image_to_pixels_last(x) if x.dim() == 4 else x


def as_given(like: Tensor, x: Tensor) -> Tensor:
    """Inverse of `rows_last`."""
    return pixels_last_to_image(x, like.shape[-2:]) if like.dim() == 4 else x


def as_applied(one: Captured, x: Tensor) -> Tensor:
    """What `apply_layer` takes: rows (M, C), or (S, C, H, W) for a convolution with taps."""
    return x if one.kind == "conv2d" else rows_last(one, x).flatten(0, -2)


def static(groups: int | None, per_step: bool) -> Format:
    """Calibrated asymmetric ranges: K-means groups (published), or one range a pixel (None)."""

    def run(one: Captured, x: Tensor, steps: Tensor, bits: int) -> Tensor:
        ranges, at = one.ranges, steps
        if not per_step:
            ranges, at = AxisRanges(one.layer.name, 1), torch.zeros_like(steps)
            for axis, low in one.ranges.low.items():
                ranges.low[axis] = low.amin(0, keepdim=True)
                ranges.high[axis] = one.ranges.high[axis].amax(0, keepdim=True)
        flat = rows_last(one, x)
        if groups is None and "pixel" in ranges.low:
            scale, zero = affine_parameters(ranges.low["pixel"], ranges.high["pixel"], bits)
            axis, index = "pixel", torch.arange(scale.shape[1])
        else:
            grouping = group_activation(ranges, bits, groups or 1)
            axis, index, scale, zero = grouping.axis, grouping.index, grouping.scale, grouping.zero_point
        out = torch.empty_like(flat)
        for step in at.unique().tolist():
            picked = at == step
            dim = AXIS_DIMS.get(axis, -1)
            out[picked] = fake_quantize(flat[picked], scale[step][index], zero[step][index], bits, dim)
        return as_given(x, out)

    return run


def run_time(
    mode: str = "none", *, symmetric: bool = False, clip: bool = False, largest: int = 2, pixels: bool = False
) -> Format:
    """Ranges of the row (of the sample for convolutions) at run time, with a way to handle channels."""

    def run(one: Captured, x: Tensor, steps: Tensor, bits: int) -> Tensor:
        divisor = groups_of(one, mode, largest).divisor
        return quantized_rows(one, x, bits, divisor, symmetric, chosen_clip(one, bits, divisor) if clip else 1, pixels)

    return run


def groups_of(one: Captured, mode: str, largest: int = 2) -> ChannelGroups:
    """The channel groups of a mode; "full" divides by the whole ratio to the median, where smooth takes its root."""
    rms = one.statistics.mean_square.sqrt()
    if mode != "full":
        return form_groups(mode, rms, one.layer.plan.wbits, largest)
    smooth = form_groups("smooth", rms, one.layer.plan.wbits)
    return dataclasses.replace(smooth, divisor=smooth.divisor.square())


def quantized_rows(
    one: Captured, x: Tensor, bits: int, divisor: Tensor, symmetric: bool = False, clip: float = 1, pixels: bool = False
) -> Tensor:
    """x (natural layout) by run-time codes; ranges shrunk by `clip`; `pixels` gives convolutions a scale a pixel."""
    if not symmetric and clip == 1 and not pixels:
        if one.kind == "conv2d":
            return fake_quantize_input(x, bits, divisor)
        flat = rows_last(one, x)
        return as_given(x, fake_quantize_input(flat.flatten(0, -2), bits, divisor).view_as(flat))
    flat = rows_last(one, x) / divisor
    dims = (1, 2) if one.kind == "conv2d" and not pixels else (-1,)
    low, high = flat.amin(dims, keepdim=True).clamp(max=0) * clip, flat.amax(dims, keepdim=True).clamp(min=0) * clip
    if symmetric:
        high = torch.maximum(high, -low).clamp(min=1e-30)
        scale = high / (2 ** (bits - 1) - 1)
        codes = (flat / scale).round().clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
        return as_given(x, codes * scale * divisor)
    scale, zero = affine_parameters(low, high, bits)
    codes = ((flat / scale).round() + zero).clamp(0, 2**bits - 1)
    return as_given(x, (codes - zero) * scale * divisor)


def calibration_inputs(one: Captured) -> Tensor:
    """The statistics' samples in natural layout: rows as (M, C), pictures as (S, C, H, W)."""
    return one.statistics.samples


def chosen_clip(one: Captured, bits: int, divisor: Tensor) -> float:
    """The factor on run-time ranges with the least output error on the calibration samples."""
    x, weight = calibration_inputs(one), one.layer.weight
    rows = one.layer.plan.kind == "conv2d"
    target = apply_layer(x, weight, one.layer.plan)

    def error(clip: float) -> float:
        rounded = quantized_rows(one, x if rows else x[:, None], bits, divisor, clip=clip)
        return float((apply_layer(rounded if rows else rounded[:, 0], weight, one.layer.plan) - target).norm())

    return min(CLIPS, key=error)


ACTIVATIONS: dict[str, Format] = {
    "per tensor, static": static(1, False),
    "per tensor, static per step (paper G=1)": static(1, True),
    "paper G=8, per step": static(8, True),
    "paper G=16, per step": static(16, True),
    "paper G=16, one range for all steps": static(16, False),
    "static per pixel and step": static(None, True),
    "row-wise symmetric": run_time(symmetric=True),
    "row-wise symmetric + shift": run_time("shift", symmetric=True),
    "row-wise asymmetric": run_time(),
    "row-wise asymmetric, clipped": run_time(clip=True),
    "row-wise asymmetric + smooth": run_time("smooth"),
    "row-wise asymmetric + smooth, full": run_time("full"),
    "row-wise asymmetric + shift": run_time("shift"),
    "row-wise asymmetric + shift up to 4": run_time("shift", largest=4),
    "row-wise asymmetric + shift, clipped": run_time("shift", clip=True),
    "convolutions a scale a pixel (no integer product)": run_time(pixels=True),
}


class ChannelGrid:
    """Plain int4, one step per output channel: absmax, or found by the range search."""

    low, high = -8, 7

    def __init__(self, weight: Tensor, importance: Tensor, search: bool) -> None:
        self.group = weight.shape[1]
        self.scale = search_symmetric(weight, 7, -8, importance) if search else weight.abs().amax(1) / 7.5

    def start_group(self, columns: Tensor, importance: Tensor) -> Tensor:
        return self.scale

    def result(self, codes: Tensor) -> IntegerWeight:
        return IntegerWeight(codes.to(torch.int8), self.scale)


class ContainerGrid(TwoLevelGrid):
    """Two-level int4 whose sub-scales leave room for a group's shift: m * 2^e <= 15, the weight's grid untouched."""

    def __init__(self, weight: Tensor, group: int, importance: Tensor, exponent: Tensor) -> None:
        pad = torch.nn.functional.pad(exponent.float(), (0, -len(exponent) % group)).view(-1, group).amax(1)
        self.factors = 2.0**pad
        stretched = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).view(len(weight), -1, group)
        super().__init__(weight, group, importance)
        widest = (stretched.abs().amax(2) * self.factors).amax(1).clamp(min=1e-12)
        self.scale = torch.maximum(self.scale, 0.79 * widest / (7.5 * 15))
        self.started = 0

    def start_group(self, columns: Tensor, importance: Tensor) -> Tensor:
        step = super().start_group(columns, importance)
        most = 15 // self.factors[self.started]
        m = (step / self.scale).clamp(max=float(most))
        self._subscales[-1] = m.to(torch.uint8)
        self.started += 1
        return self.scale * m


def weights_alone(one: Captured, two_level: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and float weights after int4 rounding; `two_level` is GPTQ's, in groups of 32."""
    weight = to_matrix(one.layer.weight)
    plan, seen = one.layer.plan, one.statistics
    assert seen.moment is not None
    moment = seen.moment / seen.count
    importance = moment.diagonal().clamp(min=1e-12)
    codes, scale, zero = quantize_weight(weight, 4)
    ones = torch.ones_like(importance)

    def back(matrix: Tensor) -> Tensor:
        return no_groups(plan.in_features).unfold(matrix, plan)

    yield "absmax per channel", back(nearest(ones)(weight, ChannelGrid(weight, ones, False)).dequantize())
    yield "range search per channel, asymmetric (published)", back(dequantize_weight(codes, scale, zero))
    yield (
        "range search per channel",
        back(nearest(importance)(weight, ChannelGrid(weight, importance, True)).dequantize()),
    )
    yield "two-level, 64", back(quantize_integer(weight, 4, 64, importance, nearest(importance)).dequantize())
    yield "two-level, 32", back(quantize_integer(weight, 4, 32, importance, nearest(importance)).dequantize())
    yield "GPTQ per channel", back(GPTQ(moment)(weight, ChannelGrid(weight, importance, True)).dequantize())
    yield "GPTQ two-level, 64", back(quantize_integer(weight, 4, 64, importance, GPTQ(moment)).dequantize())
    yield "GPTQ two-level, 32", two_level


SHIPPED = {
    4: ("none", "smooth, folded before", "shift, folded before, sorted"),
    8: ("none", "smooth, folded before", "shift, after (Horner)"),
}
"""What calibration chooses from, by weight bits"""


def rounded_ways(one: Captured, wbits: int) -> dict[str, tuple[ChannelGroups, Tensor]]:
    """{way to handle channels: (groups, float weight after GPTQ)}; equal groups are rounded once."""
    layer = dataclasses.replace(one.layer, plan=dataclasses.replace(one.layer.plan, wbits=wbits))
    recipe, done = Recipe(wbits=wbits), {}

    def rounded(groups: ChannelGroups) -> tuple[ChannelGroups, Tensor]:
        key = (tuple(groups.divisor.tolist()), tuple(groups.stored_order.tolist()), groups.shifts_accumulator)
        if key not in done:
            result = round_layer(layer, Roundings(one.statistics, recipe), groups)
            done[key] = groups.unfold(result.weight.dequantize(), result.plan)
        return groups, done[key]

    rms, ends = one.statistics.mean_square.sqrt(), [layer.plan.in_features]
    sorted_ = dataclasses.replace(groups_of(one, "shift"), class_ends=ends)
    found = {
        "none": rounded(no_groups(layer.plan.in_features)),
        "smooth, folded before": rounded(groups_of(one, "smooth")),
        "shift, folded before, sorted": rounded(sorted_),
    }
    if wbits == 8:
        return found | {"shift, after (Horner)": rounded(form_groups("shift", rms, 8))}
    largest = dataclasses.replace(groups_of(one, "shift", 4), class_ends=ends)
    return found | {
        "smooth in full, folded before": rounded(groups_of(one, "full")),
        "shift up to 4, folded before, sorted": rounded(largest),
        "shift, folded before, unsorted": rounded(dataclasses.replace(sorted_, order=None)),
        "shift, in the container, sorted": (sorted_, in_container(one, sorted_)),
    }


def chosen_way(one: Captured, ways: dict[str, tuple[ChannelGroups, Tensor]], wbits: int, abits: int) -> str:
    """The way that calibration would choose: by the output's error on its samples (`choose_rounded`)."""
    x = calibration_inputs(one)
    target = apply_layer(x, one.layer.weight, one.layer.plan)

    def error(way: str) -> float:
        groups, weight = ways[way]
        noise = apply_layer(fake_quantize_input(x, abits, groups.divisor), weight, one.layer.plan) - target
        return float(noise.norm())

    best, least = "none", error("none")
    for way in SHIPPED[wbits][1:]:
        if (tried := error(way)) < least * (1 - worth(ways[way][0])):
            best, least = way, tried
    return best


def in_container(one: Captured, groups: ChannelGroups) -> Tensor:
    """Int4 weights whose own grid is kept and whose integer carries the shift: float weight after GPTQ."""
    plan, seen = one.layer.plan, one.statistics
    assert seen.moment is not None
    order = groups.stored_order
    index = (torch.arange(plan.kernel_size**2)[:, None] * plan.in_features + order).flatten()
    moment = seen.moment[index][:, index] / seen.count
    importance = moment.diagonal().clamp(min=1e-12)
    matrix = to_matrix(one.layer.weight[:, order])
    exponent = groups.divisor.log2()[order].repeat(plan.kernel_size**2)
    grid = ContainerGrid(matrix, 32, importance, exponent)
    plain = dataclasses.replace(groups, divisor=torch.ones_like(groups.divisor))
    return plain.unfold(GPTQ(moment)(matrix, grid).dequantize(), plan)


def sqnr_db(target: Tensor, y: Tensor) -> float:
    """Output signal to quantization noise in dB; 99 where there is no noise."""
    noise = float((y - target).square().sum())
    return min(99.0, float(10 * torch.log10(target.square().sum() / max(noise, 1e-30))))


@torch.no_grad()
def study(found: dict[str, Captured]) -> list[dict[str, Any]]:
    """One row a layer and a way: layer, kind, table, way, sqnr_db."""
    rows: list[dict[str, Any]] = []
    for i, (name, one) in enumerate(found.items()):
        if i % 20 == 0:
            say(f"layer {i} of {len(found)}")
        weight, plan, x = one.layer.weight, one.layer.plan, one.inputs
        target = apply_layer(as_applied(one, x), weight, plan)

        def measure(
            table: str, way: str, x: Tensor, weight: Tensor, one: Captured = one, target: Tensor = target
        ) -> None:
            y = apply_layer(as_applied(one, x), weight, one.layer.plan)
            rows.append(
                {
                    "layer": one.layer.name,
                    "kind": one.kind,
                    "table": table,
                    "way": way,
                    "sqnr_db": round(sqnr_db(target, y), 2),
                }
            )

        for way, format_ in ACTIVATIONS.items():
            for bits in (8, 6, 4):
                measure(f"A{bits}", way, format_(one, x, one.steps, bits), weight)
        ways = {wbits: rounded_ways(one, wbits) for wbits in (4, 8)}
        for way, rounded in weights_alone(one, ways[4]["none"][1]):
            measure("W4", way, x, rounded)
        for wbits, abits in ((4, 8), (4, 6), (4, 4), (8, 8)):
            choice = chosen_way(one, ways[wbits], wbits, abits)
            for way, (groups, rounded) in ways[wbits].items():
                measure(f"W{wbits}A{abits}", way, quantized_rows(one, x, abits, groups.divisor), rounded)
            rows.append(
                {
                    **next(row for row in reversed(rows) if row["way"] == choice),
                    "way": "chosen by calibration",
                    "choice": choice,
                }
            )
        found[name] = dataclasses.replace(one, inputs=torch.empty(0))  # measured: its memory can go
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="float model; the embedded model if left out")
    parser.add_argument("--calibration-prompts", type=int, default=64, help="as published (default 64)")
    parser.add_argument("--prompts", type=int, default=8, help="evaluation prompts (default 8)")
    parser.add_argument("--every", type=int, default=1, help="every n-th layer of each kind (default 1)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of layers")
    parser.add_argument("--out", type=Path, help="write PREFIX.md and PREFIX.json")
    args = parser.parse_args()
    say("making pictures")
    recorded = record(args.model, args.calibration_prompts, args.prompts)
    say("capturing")
    found = capture(recorded, Recipe(wbits=4), args.every, args.kinds)
    rows = study(found)
    groups = (["A8", "A6", "A4"], ["W4"], ["W4A8", "W4A6", "W4A4"], ["W8A8"])
    text = "\n\n".join(table(rows, names) for names in groups) + "\n"
    publish(text, rows, args.out)


if __name__ == "__main__":
    main()
