"""What weight rounding, rotations and low-rank branches give, layer by layer, and their time (docs/studies.md).

    python benchmarks/rounding_study.py [--model MODEL] [--every 4] [--iterations 300] [--out PREFIX]

Two tables: roundings of int4 weights, with float and with 8-bit activations, beside the seconds of CPU they take; and
ways to W4A4 and W3A8, simulated. Calibration and evaluation prompts are apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from captures import Captured, capture, publish, record, table
from fidelity import say
from layer_study import as_applied, sqnr_db
from torch import Tensor

from dgq.integer.channels import apply_layer, fake_quantize_input, from_matrix, to_matrix
from dgq.integer.weights import GPTQ, Grid, IntegerWeight, TwoLevelGrid, nearest
from dgq.paper.quantizers import dequantize_weight, quantize_weight
from dgq.range_search import search_symmetric
from dgq.recipe import Recipe

# Longer sums would take AdaRound on second moments (N K^2 an iteration) minutes a layer on a CPU.
LONGEST = 1500
BLOCK = 32


class Seen:
    """A layer's matrices.

    Attributes:
        weight: float32 (N, K); moment: float32 (K, K); importance: float32 (K,); damped: moment as `GPTQ` damps it.
    """

    def __init__(self, one: Captured, rotate: bool = False) -> None:
        assert one.statistics.moment is not None
        self.weight = to_matrix(one.layer.weight)
        self.moment = one.statistics.moment / one.statistics.count
        if rotate:
            self.weight = rotated(self.weight)
            self.moment = rotated(rotated(self.moment).t().contiguous()).contiguous()
        self.importance = self.moment.diagonal().clamp(min=1e-12)
        self.damped = self.moment.clone()
        self.damped.diagonal().add_(0.1 * self.importance.mean())


def rotated(x: Tensor) -> Tensor:
    """x (..., K) after an orthonormal Hadamard rotation of every `BLOCK` entries; its own inverse."""
    h = torch.ones(1, 1)
    while len(h) < BLOCK:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (x.reshape(*x.shape[:-1], -1, BLOCK) @ (h / BLOCK**0.5)).reshape(x.shape)


def adaround(
    seen: Seen, base: Tensor, start: Tensor, step: Tensor, low: Tensor, high: Tensor, iterations: int
) -> Tensor:
    """AdaRound by layer on second moments: the float weight step * clamp(base + h) after learning h in {0, 1}.

    The published schedule: 20% of the iterations without the regulariser, then beta falls from 20 to 2; weight 0.01;
    Adam. The learning rate is higher than the published 1e-3 as the iterations are fewer than the published 20,000.

    Args:
        seen: weight and moments.
        base: float32 (N, K), the lower of the two codes.
        start: float32 (N, K), h to start from.
        step: of a code, broadcast over (N, K); low, high: of the codes.
        iterations: gradient steps.
    """
    alpha = -torch.log(1.2 / (start.clamp(0.01, 0.99) + 0.1) - 1)
    alpha.requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=20 / iterations)
    warm = iterations // 5

    def gate() -> Tensor:
        return (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)

    with torch.enable_grad():
        for i in range(iterations):
            h = gate()
            error = torch.minimum(torch.maximum(base + h, low), high) * step - seen.weight
            loss = ((error @ seen.damped) * error).sum()
            if i >= warm:
                beta = 20 - 18 * (i - warm) / (iterations - warm)
                loss = loss + 0.01 * (1 - (2 * h - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    final = base + (alpha.detach() >= 0)
    return torch.minimum(torch.maximum(final, low), high) * step


def steps_of(rounded: IntegerWeight) -> Tensor:
    """The step of each code of a two-level weight, float32 (N, K)."""
    assert rounded.subscales is not None
    wide = rounded.subscales.float().repeat_interleave(rounded.group, 1)[:, : rounded.codes.shape[1]]
    return wide * rounded.scale[:, None]


def two_level(seen: Seen, rounding: Any) -> IntegerWeight:
    return rounding(seen.weight, TwoLevelGrid(seen.weight, 32, seen.importance))  # type: ignore[no-any-return]


def roundings(seen: Seen, iterations: int) -> Iterator[tuple[str, Tensor, float]]:
    """(name, float matrix, CPU seconds) of each way to round to int4."""
    made: dict[str, IntegerWeight] = {}

    def timed(name: str, run: Callable[[], Tensor | IntegerWeight]) -> tuple[str, Tensor, float]:
        began = time.process_time()
        result = run()
        spent = time.process_time() - began
        if isinstance(result, IntegerWeight):
            made[name] = result
            return name, result.dequantize(), spent
        return name, result, spent

    low, high = torch.tensor(-8.0), torch.tensor(7.0)

    def published() -> Tensor:
        codes, scale, zero = quantize_weight(seen.weight, 4)
        del codes
        step, zero = scale.view(-1, 1), zero.view(-1, 1)
        base = (seen.weight / step).floor()
        return adaround(seen, base, seen.weight / step - base, step, -zero, 15 - zero, iterations)

    def from_nearest() -> Tensor:
        step = steps_of(made["nearest"])
        base = (seen.weight / step).floor()
        return adaround(seen, base, seen.weight / step - base, step, low, high, iterations)

    def from_gptq() -> Tensor:
        done = made["GPTQ, damping 0.1, descent"]
        step, codes = steps_of(done), done.codes.float()
        above = codes * step > seen.weight
        return adaround(seen, codes - above.float(), torch.where(above, 0.8, 0.2), step, low, high, iterations)

    yield timed("published grid, nearest", lambda: dequantize_weight(*quantize_weight(seen.weight, 4)))
    yield timed("published grid, AdaRound", published)
    yield timed("nearest", lambda: two_level(seen, nearest(seen.importance)))
    yield timed("AdaRound", from_nearest)
    yield timed("GPTQ, damping 0.01", lambda: two_level(seen, GPTQ(seen.moment, 0.01, 0)))
    yield timed("GPTQ, damping 0.1", lambda: two_level(seen, GPTQ(seen.moment, 0.1, 0)))
    yield timed("GPTQ, damping 0.01, descent", lambda: two_level(seen, GPTQ(seen.moment, 0.01, 2)))
    yield timed("GPTQ, damping 0.1, descent", lambda: two_level(seen, GPTQ(seen.moment, 0.1, 2)))
    yield timed("GPTQ, damping 0.1, descent, then AdaRound", from_gptq)


class GroupGrid:
    """Weights of few bits with a float step per 32 columns and output channel (two levels lose 0.1 dB against it)."""

    group = 32

    def __init__(self, bits: int) -> None:
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.steps: list[Tensor] = []

    def start_group(self, columns: Tensor, importance: Tensor) -> Tensor:
        self.steps.append(search_symmetric(columns, self.high, self.low, importance))
        return self.steps[-1]

    def result(self, codes: Tensor) -> IntegerWeight:
        return IntegerWeight(codes.to(torch.int8), torch.ones(len(codes)))

    def dequantize(self, codes: Tensor) -> Tensor:
        """The float matrix (N, K)."""
        wide = torch.stack(self.steps, 1).repeat_interleave(self.group, 1)[:, : codes.shape[1]]
        return codes.float() * wide


def low_rank(seen: Seen, rank: int) -> Tensor:
    """The matrix (N, K) of this rank that keeps most of the outputs' energy."""
    factor = torch.linalg.cholesky(seen.damped.double())
    u, s, v = torch.linalg.svd(seen.weight.double() @ factor, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.linalg.solve_triangular(factor, kept, upper=False, left=False).float()


def ways_down(one: Captured, x: Tensor, wbits: int, abits: int) -> Iterator[tuple[str, Tensor]]:
    """(way, output) with few bits: as it is, with a float branch of low rank, rotated, and both."""
    plan = one.layer.plan

    def run(rotate: bool, rank: int) -> Tensor:
        seen = Seen(one, rotate)
        branch = low_rank(seen, rank) if rank else torch.zeros_like(seen.weight)
        rest = seen.weight - branch
        grid: Grid = GroupGrid(wbits)
        rounded = GPTQ(seen.moment)(rest, grid)
        assert isinstance(grid, GroupGrid)
        given = turned(x) if rotate else x
        codes = fake_quantize_input(given, abits, torch.ones(plan.in_features))
        y = apply_layer(codes, from_matrix(grid.dequantize(rounded.codes), plan), plan)
        return y + apply_layer(given, from_matrix(branch, plan), plan) if rank else y

    yield "as it is", run(False, 0)
    yield "low-rank branch, 16", run(False, 16)
    yield "low-rank branch, 32", run(False, 32)
    yield "rotation of 32 channels", run(True, 0)
    yield "rotation and branch, 32", run(True, 32)


def turned(x: Tensor) -> Tensor:
    """Rows (M, C) or pictures (S, C, H, W) with their channels rotated."""
    return rotated(x) if x.dim() == 2 else rotated(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def study(found: dict[str, Captured], iterations: int) -> list[dict[str, Any]]:
    """One row a layer and a way: table, layer, kind, way, sqnr_db and, for roundings, seconds."""
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        if one.layer.plan.reduction > LONGEST:
            continue
        say(name)
        seen, x, plan = Seen(one), as_applied(one, one.inputs), one.layer.plan
        target = apply_layer(x, one.layer.weight, plan)
        coarse = fake_quantize_input(x, 8, torch.ones(plan.in_features))

        def note(table: str, way: str, y: Tensor, one: Captured = one, target: Tensor = target, **more: Any) -> None:
            rows.append(
                {
                    "table": table,
                    "layer": one.layer.name,
                    "kind": one.kind,
                    "way": way,
                    "sqnr_db": round(sqnr_db(target, y), 2),
                    **more,
                }
            )

        for way, matrix, seconds in roundings(seen, iterations):
            weight = from_matrix(matrix, plan)
            note("W4", way, apply_layer(x, weight, plan), seconds=round(seconds, 3))
            note("W4A8", way, apply_layer(coarse, weight, plan))
        if plan.in_features % BLOCK == 0:
            for wbits, abits in ((4, 4), (3, 8)):
                for way, y in ways_down(one, x, wbits, abits):
                    note(f"W{wbits}A{abits}", way, y)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="float model; the embedded model if left out")
    parser.add_argument("--calibration-prompts", type=int, default=32, help="as dgq calibrate (default 32)")
    parser.add_argument("--prompts", type=int, default=4, help="evaluation prompts (default 4)")
    parser.add_argument("--every", type=int, default=4, help="every n-th layer of each kind (default 4)")
    parser.add_argument("--iterations", type=int, default=300, help="of AdaRound; published are 20,000 (default 300)")
    parser.add_argument("--out", type=Path, help="write PREFIX.md and PREFIX.json")
    args = parser.parse_args()
    recorded = record(args.model, args.calibration_prompts, args.prompts)
    found = capture(recorded, Recipe(wbits=4), args.every)
    rows = study(found, args.iterations)
    text = "\n\n".join(table(rows, names) for names in (["W4", "W4A8"], ["W4A4", "W3A8"])) + "\n"
    publish(text, rows, args.out)


if __name__ == "__main__":
    main()
