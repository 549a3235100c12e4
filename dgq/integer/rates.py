"""What rounding a layer takes on this machine, from short measurements."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..recipe import LayerPlan, Recipe
from .channels import candidates
from .plan import GPTQ_MAX_REDUCTION, SAMPLE_ROWS
from .rounding import JUDGED_ROWS, rotated_moment
from .statistics import MOMENT_ROWS, moment_rows
from .weights import BLOCK, GPTQ, Int8Grid, TwoLevelGrid

DESCENTS = 2  # of GPTQ over the columns; it rounds them in one sweep more

# Of a matmul's speed that fits the caches, what products and convolutions of real sizes reach.
SHARE_OF_MATMUL = 0.6


@dataclass(frozen=True)
class Rates:
    """Seconds of the steps of a rounding, at best.

    Attributes:
        product: one multiply-accumulate of a network's products and convolutions, or of a rounding's large ones.
        update: one value that a block of columns' errors is multiplied for and added to.
        factor: one value of a (K, K) matrix that is factored, beside the products of it.
        rotated: one value of a (K, K) matrix, rotated from both sides.
        search: the grid of one weight, by the weight's bits.
        column: a column in one sweep of GPTQ; row: one of its rows more.
        copied: one value of a (K, K) matrix, read, scaled and written.
    """

    product: float
    update: float
    factor: float
    rotated: float
    search: dict[int, float]
    column: float
    row: float
    copied: float


def alone(run: Callable[[], object]) -> float:
    """Seconds that a short run takes of one thread: its own time, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        taken = []
        for _ in range(5):
            start = time.thread_time()
            run()
            taken.append(time.thread_time() - start)
        return min(taken)
    finally:
        torch.set_num_threads(threads)


@functools.cache
def rates() -> Rates:
    """Of this process's threads, among which all but a column's small steps are divided."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 512, generator=generator)
    ones = torch.ones(512)
    grids: dict[int, Callable[[], object]] = {
        4: lambda: TwoLevelGrid(a[:64], 32, ones),
        8: lambda: Int8Grid(a[:64], ones),
    }
    search = {bits: alone(make) / a[:64].numel() / threads for bits, make in grids.items()}
    product = alone(lambda: a @ a) / len(a) ** 3 / SHARE_OF_MATMUL
    wide = torch.randn(1024, 1024, generator=generator)
    slope = torch.zeros_like(wide)
    update = alone(lambda: slope.addmm_(wide[:, :32], wide[:32])) / slope.numel() / threads
    moment = wide.t() @ wide
    factored = alone(lambda: GPTQ(moment).factor) - len(moment) ** 3 / 6 * product
    factor = max(factored, 0.0) / moment.numel() / threads
    rotated = alone(lambda: rotated_moment(moment, moment[0], 256)) / moment.numel() / threads
    product /= threads
    k, few, many = 64, 16, 512
    rounding = GPTQ(moment[:k, :k].contiguous())

    def swept(rows: int) -> float:
        weight = a[:rows, :k].contiguous()
        grid = Int8Grid(weight, ones[:k])
        return alone(lambda: rounding(weight, grid)) / ((1 + DESCENTS) * k)

    column, all_rows = swept(few), swept(many)
    copied = alone(lambda: (a * ones).mul_(ones[:, None])) / a.numel() / threads
    row = max(all_rows - column, 0.0) / (many - few) / threads
    return Rates(product, update, factor, rotated, search, column, row, copied)


def rounding_seconds(plan: LayerPlan, recipe: Recipe, first: bool, rows: int) -> float:
    """What gathering the statistics of a layer's input and rounding the layer takes, in seconds.

    Args:
        plan: before its handling is chosen.
        recipe: an "integer" recipe.
        first: whether it is the first of the layers that read its input: what is made once for them is its.
        rows: of its output (tokens or pixels), of all replayed calls; second moments are made of some.
    """
    n, k, rate = plan.out_features, plan.reduction, rates()
    handlings = candidates(recipe.channels, torch.arange(1.0, plan.in_features + 1), plan.wbits)
    tried = len(handlings) if len(handlings) > 1 else 0
    judged = tried * (min(n, JUDGED_ROWS) if n > 2 * JUDGED_ROWS else n)  # rows, under all handlings
    seconds = (n + judged) * k * (rate.search[plan.wbits] + SAMPLE_ROWS * 2 * rate.product)
    if recipe.rounding == "gptq" and k <= GPTQ_MAX_REDUCTION:
        descents = DESCENTS * (n + judged)  # of rows
        products: float = descents * k * k  # E H
        if first:
            products += moment_rows(k, rows) * k * (k + MOMENT_ROWS) / 2 + k**3 / 6
            seconds += k * k * (rate.factor + any(one.rotation for one in handlings) * rate.rotated)
        seconds += products * rate.product
        block = min(BLOCK, plan.weight_group if plan.wbits == 4 else k)
        seconds += (descents + n) * k * k / (2 * block) * rate.update  # what columns pull at later ones
        seconds += k * ((DESCENTS * (1 + tried) + 1) * rate.column + (descents + n) * rate.row)
        seconds += (DESCENTS * (1 + tried) + 1) / 2 * k * k * rate.copied
    return seconds
