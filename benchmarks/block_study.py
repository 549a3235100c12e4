"""What the published method's learned rounding gives, block by block and in a whole call (docs/studies.md).

    python benchmarks/block_study.py --nearest CHECKPOINT --learned CHECKPOINT [--calibration-prompts 16] [--prompts 8]

Two checkpoints of the embedded model's `paper` recipe, apart in their rounding alone, such as benchmarks/fidelity.py
leaves in its folder. Blocks and "weights alone" have float activations. SQNR in dB on the calls that the rounding was
learned from, and on those of other prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from captures import record
from torch import Tensor, nn
from torch.func import functional_call

from dgq.family import network_of
from dgq.paper.adaround import EXPECTED_CALLS, BlockPlan, Samples, block_costs, block_plans, record_blocks
from dgq.paper.layers import PaperActivation
from dgq.pictures.pipelines import load
from dgq.replay import predicted, spread

Calls = list[dict[str, Any]]


def sqnr_db(target: Tensor, y: Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(target.square().sum() / (y - target).square().sum()))


def block_sqnr(network: nn.Module, quantized: nn.Module, name: str, plan: BlockPlan, samples: Samples) -> float:
    """Of a block's output with quantized weights on the float network's inputs, in dB."""
    args, kwargs, target = samples.batch(range(len(samples)))
    weights = {
        f"{layer}.weight".removeprefix(f"{name}."): quantized.get_submodule(layer).float_weight()  # type: ignore
        for layer in plan.shapes
    }
    return sqnr_db(target, functional_call(network.get_submodule(name), weights, tuple(args), kwargs))


def call_sqnr(targets: Sequence[Tensor], quantized: nn.Module, calls: Calls, guidance: float) -> float:
    """Of the guided output, in the mean of calls, in dB."""

    def guided(output: Tensor) -> Tensor:
        return (1 - guidance) * output[0] + guidance * output[1]

    pairs = zip(targets, calls, strict=True)
    return fmean(sqnr_db(guided(target), guided(predicted(quantized, call))) for target, call in pairs)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nearest", type=Path, required=True, help="checkpoint rounded to nearest")
    parser.add_argument("--learned", type=Path, required=True, help="checkpoint of a learned rounding")
    parser.add_argument("--calibration-prompts", type=int, default=16, help="that they were made with (default 16)")
    parser.add_argument("--prompts", type=int, default=8, help="evaluation prompts (default 8)")
    args = parser.parse_args()
    recorded = record(None, args.calibration_prompts, args.prompts)
    network = network_of(recorded.pipe)
    sets = {"own": spread(recorded.calibration, EXPECTED_CALLS), "others": spread(recorded.evaluation, EXPECTED_CALLS)}
    made = {way: network_of(load(getattr(args, way), dtype=torch.float32)) for way in ("nearest", "learned")}
    plans = block_plans(network, 4)
    costs = block_costs(network, sets["own"][0], plans)
    kinds: dict[str, dict[str, list[float]]] = {}
    for calls in sets:
        found = record_blocks(network, sets[calls], costs, lambda done, total: None)
        for name, plan in plans.items():
            kind = type(network.get_submodule(name)).__name__ if len(plan.shapes) > 1 else "layer"
            for way, quantized in made.items():
                value = block_sqnr(network, quantized, name, plan, found[name])
                kinds.setdefault(kind, {}).setdefault(f"{way}, {calls}", []).append(value)
    print("| | blocks |", " | ".join(next(iter(kinds.values()))), "|")
    for kind, values in kinds.items():
        print(
            "|", kind, "|", len(next(iter(values.values()))), "|", *(f"{fmean(one):.1f} |" for one in values.values())
        )
    targets = [predicted(network, call) for call in sets["others"]]
    guidance = recorded.settings.guidance
    assert guidance is not None
    for what in ("whole call", "weights alone"):
        values = {way: call_sqnr(targets, one, sets["others"], guidance) for way, one in made.items()}
        print(f"{what}, others:", ", ".join(f"{way} {value:.1f}" for way, value in values.items()))
        PaperActivation.forward = lambda self, x: x  # type: ignore


if __name__ == "__main__":
    main()
