"""What rotating channels is worth, layer by layer: SQNR of the layers' outputs on held-out inputs (docs/studies.md).

    python benchmarks/rotation_study.py [--model MODEL] [--every 5]

Every way to handle channels is rounded as `dgq calibrate` would, by GPTQ on the inputs of six prompts, and judged on
two others. Linear layers (1x1 convolutions among them) have a scale a row, larger convolutions a scale a sample.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import statistics

import torch
from captures import Captured, capture, record
from fidelity import say

from dgq.integer.channels import (
    ChannelGroups,
    apply_layer,
    fake_quantize_input,
    form_groups,
    no_groups,
    rotation_block,
)
from dgq.integer.rounding import Roundings, round_layer
from dgq.recipe import Recipe

BITS = ((8, 8), (4, 4))
ROWS, PICTURES = 512, 12  # of the held-out inputs, drawn at random


def ways(one: Captured, wbits: int) -> dict[str, ChannelGroups]:
    """The handlings by name."""
    rms = one.statistics.mean_square.sqrt()
    found = {mode: form_groups(mode, rms, wbits) for mode in ("none", "smooth", "shift")}
    if block := rotation_block(len(rms)):
        found["rotate"] = dataclasses.replace(no_groups(len(rms)), rotation=block)
        found["smooth, rotate"] = dataclasses.replace(found["smooth"], rotation=block)
    return found


def held_out(one: Captured) -> torch.Tensor:
    """Inputs that calibration did not see, as `apply_layer` takes them."""
    x = one.inputs
    if one.kind != "conv2d":
        x = (x.movedim(1, -1) if x.dim() == 4 else x).flatten(0, -2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[: PICTURES if one.kind == "conv2d" else ROWS]]


def sqnr(one: Captured, wbits: int, abits: int, groups: ChannelGroups) -> float:
    """Of the layer's output on held-out inputs, in dB."""
    plan = dataclasses.replace(one.layer.plan, wbits=wbits, abits=abits)
    layer = dataclasses.replace(one.layer, plan=plan)
    rounded = round_layer(layer, Roundings(one.statistics, Recipe(wbits=wbits, abits=abits)), groups)
    x, weight = held_out(one), groups.unfold(rounded.weight.dequantize(), rounded.plan)
    target = apply_layer(x, layer.weight, plan)
    got = apply_layer(fake_quantize_input(x, abits, groups.divisor, groups.rotation), weight, rounded.plan)
    return -20 * math.log10(float((got - target).norm() / target.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a float pipeline; default: the embedded one")
    parser.add_argument("--every", type=int, default=5, help="take every n-th layer of each kind")
    arguments = parser.parse_args()
    captured = capture(record(arguments.model, 6, 2), Recipe(), arguments.every, calls=60, evaluation_steps=6)
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for number, (name, one) in enumerate(captured.items()):
        for wbits, abits in BITS:
            for way, groups in ways(one, wbits).items():
                found[f"W{wbits}A{abits}, {one.kind}"][way].append(sqnr(one, wbits, abits, groups))
        say(f"{number + 1}/{len(captured)} {name}")
    names = list(next(iter(found.values())))
    print("| dB |", " | ".join(names), "|")
    print("|" + "---|" * (len(names) + 1))
    for row, by_way in found.items():
        print(f"| {row} |", " | ".join(f"{statistics.mean(by_way[way]):.1f}" for way in names), "|")


if __name__ == "__main__":
    main()
