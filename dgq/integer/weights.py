"""Integer weights: per-channel int8 and two-level int4, rounded to nearest or by GPTQ (docs/method.md).

A weight is always a matrix (N, K) here: a convolution's is flattened in the order (kh, kw, C), so that a run of K is a
run of input channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgq_kernels.weight_rounding import round_columns, search_subscales
from dgq_kernels.weight_rounding.reference import SUBSCALE_MAX

from ..errors import DgqError
from ..range_search import search_symmetric

# Columns that GPTQ rounds before it tells all others.
BLOCK = 64


# Columns of GPTQ's factor that are computed together.
FACTOR_BLOCK = 512


# Rows of a (K, K) matrix, from its diagonal on: rows(start, end) -> (end - start, K - start).
Rows = Callable[[int, int], Tensor]


@dataclass
class IntegerWeight:
    """An integer weight W ~ scale[n] * W'[n, k].

    Attributes:
        codes: int8 (N, K): W' for int8 weights, w4 in -8..7 for int4.
        scale: float32 (N,).
        subscales: uint8 (N, ceil(K / group)) in 1..15 for int4 (W' = w4 * m), None for int8.
        group: values of K per sub-scale.
    """

    codes: Tensor
    scale: Tensor
    subscales: Tensor | None = None
    group: int = 32

    def integer(self) -> Tensor:
        """W' as int8 (N, K)."""
        if self.subscales is None:
            return self.codes
        m = self.subscales.to(torch.int8).repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]
        return self.codes * m

    def dequantize(self) -> Tensor:
        """float32 (N, K)."""
        return self.integer().float() * self.scale[:, None]


class Rounding(Protocol):
    """Rounds a weight onto the grid of `Grid`."""

    def __call__(self, weight: Tensor, grid: Grid) -> IntegerWeight: ...


class Grid(Protocol):
    """The values a weight may take, fixed group by group along K: multiples of a step by the integers low..high."""

    group: int
    low: int
    high: int

    def start_group(self, columns: Tensor, importance: Tensor) -> Tensor:
        """Fix the grid of the next `group` columns (N, g) and return its step, float32 (N,)."""

    def result(self, codes: Tensor) -> IntegerWeight:
        """The finished weight from all codes (N, K)."""


class Int8Grid:
    """Symmetric int8, one step per output channel, found by the range search.

    Args:
        weight: float32 (N, K).
        importance: float32 (K,), mean square of the inputs, or ones.
    """

    low, high = -127, 127

    def __init__(self, weight: Tensor, importance: Tensor) -> None:
        self.group = weight.shape[1]
        self.scale = search_symmetric(weight, 127, -127, importance)

    def start_group(self, columns: Tensor, importance: Tensor) -> Tensor:
        return self.scale

    def result(self, codes: Tensor) -> IntegerWeight:
        return IntegerWeight(codes.to(torch.int8), self.scale)


class TwoLevelGrid:
    """Two-level int4: W' = w4 * m with w4 in -8..7 and m in 1..15 per group and output channel.

    The float scale of a channel is set so that its widest group gets about the largest sub-scale; the sub-scale of a
    group is found by trying all fifteen.

    Args:
        weight: float32 (N, K).
        group: 32 or 64.
        importance: float32 (K,), weights of the squared error.
    """

    low, high = -8, 7

    def __init__(self, weight: Tensor, group: int, importance: Tensor) -> None:
        self.group = group
        n, k = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -k % group)).view(n, -1, group)
        importance = torch.nn.functional.pad(importance, (0, -k % group)).view(-1, group)
        widest = padded.abs().amax((1, 2)).clamp(min=1e-12)
        best = torch.full_like(widest, float("inf"))
        self.scale = widest / (8 * SUBSCALE_MAX)
        for factor in (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58):
            scale = factor * widest / (7.5 * SUBSCALE_MAX)
            error = search_subscales(padded, importance, scale)[1].sum(1)
            better = error < best
            best = torch.where(better, error, best)
            self.scale = torch.where(better, scale, self.scale)
        self._subscales: list[Tensor] = []

    def start_group(self, columns: Tensor, importance: Tensor) -> Tensor:
        m = search_subscales(columns[:, None], importance[None], self.scale)[0][:, 0]
        self._subscales.append(m)
        return self.scale * m

    def result(self, codes: Tensor) -> IntegerWeight:
        return IntegerWeight(codes.to(torch.int8), self.scale, torch.stack(self._subscales, 1), self.group)


def nearest(importance: Tensor) -> Rounding:
    """Round every weight to the nearest grid point; `importance` (K,) steers the choice of the grid."""

    def run(weight: Tensor, grid: Grid) -> IntegerWeight:
        return _result(*_to_nearest(weight, grid, importance), grid)

    return run


def _to_nearest(weight: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A weight (N, K) rounded to nearest, and the step (N,) of each group of columns."""
    rounded, steps = torch.empty_like(weight), []
    for start in range(0, weight.shape[1], grid.group):
        part = slice(start, start + grid.group)
        steps.append(grid.start_group(weight[:, part], importance[part]))
        step = steps[-1][:, None]
        rounded[:, part] = (weight[:, part] / step).round_().clamp_(grid.low, grid.high).mul_(step)
    return rounded, steps


def _result(rounded: Tensor, steps: list[Tensor], grid: Grid) -> IntegerWeight:
    """The finished weight from points (N, K) of the grid, used up, and the step (N,) of each group."""
    for i, step in enumerate(steps):
        rounded[:, i * grid.group : (i + 1) * grid.group] /= step[:, None]
    return grid.result(rounded.round_())


class GPTQ:
    """GPTQ: round column by column and spread each column's error over those not yet rounded (arXiv 2210.17323).

    Then coordinate descent on the codes: GPTQ looks only ahead, and each code is set to the best one given all others.

    With H = R R^T and R upper triangular, an error E of the weight costs |E R|^2, and no column of E R depends on a
    later column of E: GPTQ is the descent on R. It needs no inverse, and beside the moments holds one (K, K) factor.

    Args:
        second_moment: float32 (K, K), sum or mean of x x^T over the layer's inputs; only its ratios count.
        damping: share of the mean diagonal added to the diagonal. Calibration inputs are few and alike: ten times the
            usual 0.01 does better in convolutions and on unseen prompts (docs/studies.md).
        sweeps: passes of the descent over the columns.
        order: int64 (K,), which row and column of the moments is each weight column's, where they are sorted otherwise.
        scale: float32 (K,), by which the inputs of each weight column are larger than those of the moments.

    Raises:
        DgqError: the damped matrix cannot be factored (inputs that are not finite).
    """

    def __init__(
        self,
        second_moment: Tensor,
        damping: float = 0.1,
        sweeps: int = 2,
        *,
        order: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self._moment, self._order, self._scale, self._sweeps = second_moment, order, scale, sweeps
        diagonal = second_moment.diagonal() if order is None else second_moment.diagonal()[order]
        self._importance = diagonal if scale is None else diagonal * scale.square()
        if not torch.isfinite(self._importance).all():
            raise DgqError("the layer's calibration inputs are not finite", "check the model in float first")
        self._damp = damping * float(self._importance.double().mean().clamp(min=1e-12))

    def __call__(self, weight: Tensor, grid: Grid) -> IntegerWeight:
        steps: list[Tensor] = []
        rounded, slope = weight.clone(), torch.zeros_like(weight)
        factor, diagonal = self.factor

        def next_step(start: int) -> Tensor:
            if start % grid.group == 0:
                end = min(start + grid.group, weight.shape[1])
                columns = weight[:, start:end]
                if start:
                    # where the errors made so far would have these columns
                    local, pull = factor(start, end)[:, : end - start], slope[:, start:end]
                    columns = columns - torch.linalg.solve_triangular(local, pull, upper=True, left=False)
                steps.append(grid.start_group(columns, self._importance[start:end]))
            return steps[-1]

        _sweep(rounded, slope, factor, diagonal, next_step, grid)
        return self._descend(weight, rounded, steps, grid)

    def descent(self, weight: Tensor, grid: Grid) -> IntegerWeight:
        """The descent alone, from the nearest points: no factor is needed, which for few rows takes longer than all
        else."""
        return self._descend(weight, *_to_nearest(weight, grid, self._importance), grid)

    def _descend(self, weight: Tensor, rounded: Tensor, steps: list[Tensor], grid: Grid) -> IntegerWeight:
        for _ in range(self._sweeps):
            slope = self._pulled(rounded - weight)
            diagonal = self._importance + self._damp
            _sweep(rounded, slope, self._rows, diagonal, lambda start: steps[start // grid.group], grid)
        return _result(rounded, steps, grid)

    @functools.cached_property
    def factor(self) -> tuple[Rows, Tensor]:
        """R: its rows, and its diagonal (K,). Made when it is first needed."""
        return _upper_factor(self._rows, len(self._moment), self._damp)

    def _rows(self, start: int, end: int) -> Tensor:
        """Of H, in the order and at the scale of the weight's columns, not damped."""
        moment, order, scale = self._moment, self._order, self._scale
        part = moment[start:end, start:] if order is None else moment[order[start:end]][:, order[start:]]
        return part if scale is None else (part * scale[start:]).mul_(scale[start:end, None])

    def _pulled(self, error: Tensor) -> Tensor:
        """E H, damped, for errors E (N, K) of the weight: H stays as the moments have it."""
        moment, order, scale = self._moment, self._order, self._scale
        scaled = error if scale is None else error * scale
        if order is None:
            result = scaled @ moment
        else:
            result = (torch.empty_like(scaled).index_copy_(1, order, scaled) @ moment)[:, order]
        return (result if scale is None else result.mul_(scale)).add_(error, alpha=self._damp)


def _upper_factor(rows: Rows, k: int, damp: float) -> tuple[Rows, Tensor]:
    """R, upper triangular, with R R^T = H + damp * I: its rows, and its diagonal (K,).

    From the last columns to the first, a block at a time: what the later columns account for is taken off, and the rest
    is factored. Cholesky's factor of a matrix read from its last row and column to its first is R read so.
    """
    factor = torch.empty(k, k)
    for start in range(0, k, 2 * BLOCK):
        end = min(start + 2 * BLOCK, k)
        factor[start:end, start:] = rows(start, end)
    factor.diagonal().add_(damp)
    for end in range(k, 0, -FACTOR_BLOCK):
        start = max(end - FACTOR_BLOCK, 0)
        panel = factor[:end, start:end]
        panel.addmm_(factor[:end, end:], factor[start:end, end:].t(), alpha=-1)
        lower, info = torch.linalg.cholesky_ex(panel[start:].flip(0, 1))
        if int(info):
            raise DgqError("the layer's second moments are not positive definite", "use more calibration prompts")
        own = lower.flip(0, 1)
        panel[start:] = own
        panel[:start] = torch.linalg.solve_triangular(own.t(), panel[:start], upper=False, left=False)
    return lambda start, end: factor[start:end, start:], factor.diagonal()


def _sweep(
    rounded: Tensor, slope: Tensor, rows: Rows, diagonal: Tensor, step_at: Callable[[int], Tensor], grid: Grid
) -> None:
    """Set each column in turn to the point of the grid nearest to its least error, in place.

    Args:
        rounded: float32 (N, K), the weight or what it was rounded to; then what it is rounded to.
        slope: float32 (N, K), how far the columns' errors pull at each other; only what lies ahead is kept up to date.
        rows: rows of a matrix (K, K) by which a change of one column pulls at the columns after it.
        diagonal: float32 (K,), of that matrix.
        step_at: the grid's step (N,) for the block of columns that starts here; asked once a block, in order.
        grid: whose codes are used.
    """
    k = rounded.shape[1]
    block = min(grid.group, BLOCK)
    for start in range(0, k, block):
        end = min(start + block, k)
        step, ahead = step_at(start), rows(start, end)
        part = slice(start, end)
        change = round_columns(rounded[:, part], slope[:, part], ahead, diagonal[part], step, grid.low, grid.high)
        slope[:, end:].addmm_(change, ahead[:, end - start :])


def quantize_weight(weight: Tensor, bits: int, group: int, importance: Tensor, rounding: Rounding) -> IntegerWeight:
    """Quantize a weight matrix.

    Args:
        weight: float (N, K).
        bits: 8 (per-channel int8) or 4 (two-level int4).
        group: values per int4 sub-scale, 32 or 64.
        importance: float32 (K,), mean square of the inputs, or ones.
        rounding: `nearest`, or a `GPTQ`.
    """
    weight = weight.float()
    importance = importance.float()
    grid: Grid = Int8Grid(weight, importance) if bits == 8 else TwoLevelGrid(weight, group, importance)
    return rounding(weight, grid)


def column_sum(integer: Tensor, class_of: Tensor | None = None) -> Tensor:
    """C[n] = sum_k 2^class(k) W'[n, k], int32 (N,), from int8 (N, K) and the shift class int64 (K,) of each column.

    Raises:
        DgqError: some output's int32 accumulator could overflow (255 * sum_k 2^class |W'| >= 2^31).
    """
    wide = integer.to(torch.int16)
    size = wide.abs()
    if class_of is not None:
        wide, size = wide.to(torch.int64) << class_of, size.to(torch.int64) << class_of
    if integer.numel() and int(size.sum(1, dtype=torch.int64).max()) * 255 >= 2**31:
        raise DgqError(f"a sum over {integer.shape[1]} products could overflow int32", "quantize this layer to 4 bits")
    return wide.sum(1, dtype=torch.int64).to(torch.int32)
