"""What is measured at one layer or attention while calls are replayed through the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..integer.layer import IntegerLayer
from ..integer.plan import own_columns
from ..paper.layers import image_to_pixels_last
from ..paper.quantizers import AxisRanges, axis_spread
from .measurement import AttentionMeasurement, LayerMeasurement, decibels


class Energies:
    """Sums of signal and noise per step."""

    def __init__(self, steps: int) -> None:
        self.signal, self.noise = [0.0] * steps, [0.0] * steps

    def add(self, step: int, signal: Tensor, noise: Tensor) -> None:
        self.signal[step] += float(signal.square().sum())
        self.noise[step] += float(noise.square().sum())

    @property
    def db(self) -> float:
        return decibels(sum(self.signal), sum(self.noise))

    @property
    def db_by_step(self) -> list[float]:
        return [decibels(signal, noise) for signal, noise in zip(self.signal, self.noise, strict=True)]


class _Outliers:
    """Moments, ranges and ratios of one layer's input per step."""

    def __init__(self, name: str, steps: int) -> None:
        self.ranges = AxisRanges(name, steps, ragged=True)
        self._moments = torch.zeros(steps, 5, dtype=torch.float64)  # count and the sums of x to x^4
        self._ratios = torch.zeros(steps, 3, dtype=torch.float64)  # samples, sums of the channel and the pixel ratio
        self._flat = False

    def add(self, step: int, x: Tensor) -> None:
        """Add x (B, C), (B, T, C) or (B, C, H, W)."""
        self._flat = x.dim() == 2
        rows = image_to_pixels_last(x) if x.dim() == 4 else x[:, None] if self._flat else x
        self.ranges.update(step, rows)
        values = rows.flatten().double()
        square = values.square()
        sums = (values.sum(), square.sum(), (square * values).sum(), square.square().sum())
        self._moments[step] += torch.tensor([float(values.numel()), *(float(one) for one in sums)])
        size = rows.abs()
        for column, maxima in ((1, size.amax(1)), (2, size.amax(2))):
            ratio = maxima.amax(1) / maxima.median(1).values.clamp(min=1e-12)
            self._ratios[step, column] += float(ratio.sum())
        self._ratios[step, 0] += len(rows)

    @property
    def kurtosis(self) -> list[float]:
        found = []
        for count, *sums in self._moments.tolist():
            mean, second, third, fourth = (one / max(count, 1) for one in sums)
            variance = second - mean**2
            moment = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
            found.append(moment / variance**2 if variance > 0 else 0.0)
        return found

    def ratios(self, column: int) -> list[float]:
        return (self._ratios[:, column] / self._ratios[:, 0].clamp(min=1)).tolist()

    def axis(self, steps: slice = slice(None)) -> str:
        """The axis of larger spread at some steps."""
        low, high = self.ranges.low, self.ranges.high
        return "tensor" if self._flat else max(low, key=lambda name: axis_spread(low[name][steps], high[name][steps]))


class Run:
    """What all hooks share: the step, whether a hook's own work is going on, and the modules in the order they ran."""

    def __init__(self) -> None:
        self.step = 0
        self.busy = False
        self.order: dict[str, None] = {}

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Hooks that run within are not the model's calls."""
        self.busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = False

    def follow(self, output: Tensor, errors: Sequence[tuple[Tensor, Callable[[float], None]]]) -> Tensor:
        """The output such that the backward pass tells each error's v . J d."""
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def tell(gradient: Tensor) -> None:
            for error, add in errors:
                add(float((gradient * error).sum()))

        output.register_hook(tell)
        return output


class LayerProbe:
    """One quantized layer (or part of one) beside its float layer."""

    def __init__(
        self, name: str, owner: nn.Module, layer: Any, rounded_input: Callable[[Any, Tensor], Tensor], steps: int
    ) -> None:
        self.name, self.owner, self.layer, self.rounded_input = name, owner, layer, rounded_input
        self.columns: list[int] = layer.plan.columns if isinstance(layer, IntegerLayer) else []
        self.rounded, self.input_rounded = Energies(steps), Energies(steps)
        self.outliers = _Outliers(name, steps)
        self.noise, self.input_noise = [0.0] * steps, 0.0
        self._step = 0

    def _add_noise(self, projection: float) -> None:
        self.noise[self._step] += projection**2

    def _add_input_noise(self, projection: float) -> None:
        self.input_noise += projection**2

    def measure(self, step: int, x: Tensor, output: Tensor) -> list[tuple[Tensor, Callable[[float], None]]]:
        """Run the layer on the float layer's input x, whose float output is given; returns its errors."""
        self._step = step
        owner: Any = self.owner
        weight = owner.weight
        if self.columns:
            x, weight = own_columns(x, self.layer.plan), own_columns(weight, self.layer.plan)

        def product(value: Tensor) -> Tensor:
            if isinstance(owner, nn.Linear):
                return F.linear(value, weight)
            return F.conv2d(value, weight, None, owner.stride, owner.padding, owner.dilation, owner.groups)

        target = product(x) if self.columns else output - _bias(owner, output)
        result = self.layer(x)
        if not self.columns or self.layer.plan.bias:
            result = result - _bias(owner, output)
        error, input_error = result - target, product(self.rounded_input(self.layer, x) - x)
        self.rounded.add(step, target, error)
        self.input_rounded.add(step, target, input_error)
        self.outliers.add(step, x)
        return [(error, self._add_noise), (input_error, self._add_input_noise)]

    def found(self, energy: list[float]) -> LayerMeasurement:
        """The result, given the energy of the network's outputs at each step."""
        outliers, steps = self.outliers, self.outliers.ranges.steps
        exponents: dict[int, int] = {}
        if isinstance(self.layer, IntegerLayer) and self.layer.plan.channels == "shift":
            values = self.layer.inv_divisor.log2().neg().round().int()
            exponents = {int(e): int((values == e).sum()) for e in values.unique()}
        return LayerMeasurement(
            self.name,
            self.rounded.db,
            self.rounded.db_by_step,
            self.input_rounded.db,
            sum(self.noise) / sum(energy),
            [noise / one for noise, one in zip(self.noise, energy, strict=True)],
            self.input_noise / sum(energy),
            outliers.kurtosis,
            outliers.ratios(1),
            outliers.ratios(2),
            outliers.axis(),
            [outliers.axis(slice(step, step + 1)) for step in range(steps)],
            exponents,
        )


def _bias(owner: Any, output: Tensor) -> Tensor | float:
    """The bias as it is added to an output (B, N, H, W) or (..., N)."""
    if owner.bias is None:
        return 0.0
    bias: Tensor = owner.bias
    return bias[:, None, None] if output.dim() == 4 else bias


class AttentionProbe:
    """One attention layer: its start token's mass, and its output under the checkpoint's processor."""

    def __init__(self, name: str, processor: Any, steps: int, start_token: bool = True) -> None:
        self.name, self.start_token = name, start_token
        self.processor = processor if getattr(processor, "quantizes", False) else None
        self.energies = Energies(steps)
        self.noise = 0.0
        self.cross = False
        self._mass, self._calls = [0.0] * steps, [0] * steps

    def _add_noise(self, projection: float) -> None:
        self.noise += projection**2

    def measure(
        self, step: int, attention: Any, x: Tensor, context: Tensor | None, output: Tensor
    ) -> list[tuple[Tensor, Callable[[float], None]]]:
        self.cross = context is not None
        if context is not None and self.start_token:
            self._mass[step] += _start_mass(attention, x, context)
            self._calls[step] += 1
        if self.processor is None:
            return []
        error = self.processor(attention, x, context) - output
        signal = output
        if not attention.residual_connection and output.dim() == 3:
            signal = output - _bias(attention.to_out[0], output) / attention.rescale_output_factor
        self.energies.add(step, signal, error)
        return [(error, self._add_noise)]

    def found(self, energy: list[float]) -> AttentionMeasurement:
        """The result, given the energy of the network's outputs at each step."""
        quantized = self.processor is not None
        mass = [mass / max(count, 1) for mass, count in zip(self._mass, self._calls, strict=True)]
        return AttentionMeasurement(
            self.name,
            self.cross,
            self.energies.db if quantized else None,
            self.energies.db_by_step if quantized else [],
            self.noise / sum(energy),
            mass if any(self._calls) else [],
        )


def _start_mass(attention: Any, x: Tensor, context: Tensor) -> float:
    """Mean over samples, heads and queries of the probability of key 0."""
    if x.dim() == 4:
        x = image_to_pixels_last(x)
    if attention.group_norm is not None:
        x = attention.group_norm(x.transpose(1, 2)).transpose(1, 2)
    if attention.norm_cross:
        context = attention.norm_encoder_hidden_states(context)
    q, k = attention.to_q(x), attention.to_k(context)
    q, k = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, k))
    q = q if attention.norm_q is None else attention.norm_q(q)
    k = k if attention.norm_k is None else attention.norm_k(k)
    logits = (q @ k.mT).float() * attention.scale
    return float((logits[..., 0] - logits.logsumexp(-1)).exp().mean())


def combine(weights: Tensor, y: Tensor) -> Tensor:
    """The guided output of a call's samples."""
    return (over_samples(weights, y) * y).sum(0)


def over_samples(weights: Tensor, y: Tensor) -> Tensor:
    """Weights (B,) as factors of y (B, ...)."""
    return weights.view(-1, *(1,) * (y.dim() - 1))
