"""What the layers of a float UNet see while it makes pictures: the data of the layer-wise studies."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fidelity import FIRST_SEED
from torch import Tensor, nn

from dgq.integer.plan import Layer, plan_layers
from dgq.integer.statistics import Statistics
from dgq.paper.layers import image_to_pixels_last
from dgq.paper.quantizers import AxisRanges
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import load, resolve
from dgq.pictures.prompts import calibration_prompts, evaluation_prompts
from dgq.recipe import Recipe
from dgq.replay import record_inputs, spread

KINDS = ("linear", "conv2d")
Calls = list[list[dict[str, Any]]]


@dataclass
class Recorded:
    """A float pipeline and the UNet calls it made.

    Attributes:
        pipe: float32.
        settings: steps and guidance of the calls.
        calibration, evaluation: per prompt, per step, the keyword arguments of a call; prompts apart.
    """

    pipe: Any
    settings: Settings
    calibration: Calls
    evaluation: Calls


def record(model: str | None, calibration: int, evaluation: int) -> Recorded:
    """Make pictures with the float model and keep the UNet's calls."""
    folder = resolve(model)
    pipe = load(folder, dtype=torch.float32)
    settings = Settings(seed=0).resolved(folder)

    def run(prompts: Sequence[str], seed: int) -> Calls:
        return record_inputs(
            lambda prompt, i: generate(pipe, [prompt], dataclasses.replace(settings, seed=seed + i)), pipe.unet, prompts
        )

    return Recorded(
        pipe,
        settings,
        run(calibration_prompts(folder, calibration), 0),
        run(evaluation_prompts(folder, evaluation), FIRST_SEED),
    )


@dataclass
class Captured:
    """One layer's data.

    Attributes:
        layer: of the float model, with its plan.
        statistics: what `dgq calibrate` gathers, on as many calls as it takes by default.
        ranges: per step, along the paper's two axes, over every calibration call.
        inputs: evaluation inputs, a sample an entry along dimension 0: (S, C), (S, T, C) or (S, C, H, W).
        steps: int64 (S,), the sampler step of each.
    """

    layer: Layer
    statistics: Statistics
    ranges: AxisRanges
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def kind(self) -> str:
        """ "conv2d" where a sample has one scale, else "linear" (1x1 convolutions are linear layers over pixels)."""
        return "conv2d" if self.layer.plan.kind == "conv2d" else "linear"


@torch.no_grad()
def capture(
    recorded: Recorded,
    recipe: Recipe,
    every: int = 1,
    kinds: Collection[str] = KINDS,
    calls: int = 160,
    evaluation_steps: int = 10,
) -> dict[str, Captured]:
    """Replay the calls and keep each quantizable layer's data.

    Args:
        recorded: from `record`.
        recipe: bits of the plans.
        every: take every n-th layer of each kind.
        kinds: of the layers (`Captured.kind`).
        calls: for the statistics, spread as `dgq calibrate` does.
        evaluation_steps: sampler steps, evenly spread, whose inputs are kept.
    """
    unet: nn.Module = recorded.pipe.unet
    every_layer, _ = plan_layers(unet, recipe)
    layers = [
        layer
        for kind in kinds
        for layer in [layer for layer in every_layer if (layer.plan.kind == "conv2d") == (kind == "conv2d")][::every]
    ]
    steps = len(recorded.calibration[0])
    chosen = {id(call) for call in spread(recorded.calibration, calls)}
    found = {
        layer.name: Captured(layer, Statistics(layer.plan, len(chosen)), AxisRanges(layer.name, steps))
        for layer in layers
    }
    kept = {round(i * (steps - 1) / max(evaluation_steps - 1, 1)) for i in range(evaluation_steps)}

    def replay(groups: Calls, see: Callable[[Captured, int, Tensor, bool], None], wanted: set[int]) -> None:
        now = {"step": 0, "counted": False}

        def hook(one: Captured) -> Any:
            return lambda _, args: see(
                one, int(now["step"]), one.layer.own(args[0]).detach().float(), bool(now["counted"])
            )

        handles = [one.layer.module.register_forward_pre_hook(hook(one)) for one in found.values()]
        for group in groups:
            for step, call in enumerate(group):
                if step in wanted:
                    now["step"], now["counted"] = step, id(call) in chosen
                    unet(**call)
        for handle in handles:
            handle.remove()

    def calibrate(one: Captured, step: int, x: Tensor, counted: bool) -> None:
        one.ranges.update(step, image_to_pixels_last(x) if x.dim() == 4 else x)
        if counted:
            one.statistics.add(x)

    inputs: dict[str, list[Tensor]] = {name: [] for name in found}
    indices: dict[str, list[int]] = {name: [] for name in found}

    def evaluate(one: Captured, step: int, x: Tensor, _: bool) -> None:
        inputs[one.layer.name].append(x.clone())
        indices[one.layer.name] += [step] * len(x)

    replay(recorded.calibration, calibrate, set(range(steps)))
    replay(recorded.evaluation, evaluate, kept)
    for name, one in found.items():
        one.inputs, one.steps = torch.cat(inputs.pop(name)), torch.tensor(indices[name])
    return found


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Mean / worst SQNR of linear layers and of convolutions in the named tables, and the seconds of all layers where
    rows have them, a way a line."""
    rows = [row for row in rows if row["table"] in names]
    columns = [(name, kind) for kind in KINDS for name in names]
    heads = [f"{name}, {kind}" for name, kind in columns]
    timed = any("seconds" in row for row in rows)
    heads += ["CPU s"] if timed else []
    lines = ["| mean / worst layer, dB | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        cells = []
        for column in columns:
            values = [row["sqnr_db"] for row in mine if (row["table"], row["kind"]) == column]
            cells.append(f"{statistics.mean(values):.1f} / {min(values):.1f}" if values else "-")
        if timed:
            spent = sum(row.get("seconds", 0) for row in mine)
            cells.append(f"{spent:.1f}" if spent else "-")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def publish(text: str, report: Any, out: Path | None) -> None:
    """Print a study's tables, and write them to OUT.md and its figures to OUT.json where `out` is given."""
    if out:
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(report, indent=0) + "\n", encoding="utf-8")
    print(text)
