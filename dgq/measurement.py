"""What quantization does to each layer, sampler step by step, measured beside the float model.

The float model makes pictures of a few prompts, its UNet calls are replayed, and every quantized layer runs on the
float layer's own input. Nothing but sums is kept from one call to the next.

**Output noise.** A layer's SQNR says how well it does by itself, not how much the picture suffers. That is told by the
noise it causes in the UNet's (guided) output: with d the layer's error and J the derivative of the output y by the
layer's output, |J d|^2 / |y|^2. It needs neither J nor a run per layer: for v drawn from N(0, 1) like y,
E[(v . J d)^2] = |J d|^2, and one backward pass of v . y gives v J for every layer at once. To first order, and as far
as their errors are unrelated, the layers' noise adds up to the UNet's, which is measured too.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import embedded
from .attention import LogAttnProcessor
from .calibration import Progress, record_inputs, silent
from .checkpoint import Header, read_header
from .errors import DgqError
from .generation import Settings, generate
from .layers import IntegerLayer
from .paper_layers import PaperAttnProcessor, image_to_pixels_last, pixels_last_to_image
from .pipelines import float_base, load, resolve
from .prompts import evaluation_prompts
from .quantizers.channels import fake_quantize_input
from .quantizers.paper import AxisRanges, axis_spread

SQNR_MAX = 99.0  # of outputs that are equal


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured.

    Attributes:
        prompts: how many; they are taken from those that calibration never draws.
        steps, guidance: of the sampler; None takes the checkpoint's defaults.
        seed: of the first picture.
        device: where; None for CUDA where there is one.
        against: the float model; None for the one the checkpoint was made of.
    """

    prompts: int = 4
    steps: int | None = None
    guidance: float | None = None
    seed: int = 50_000
    device: str | None = None
    against: str | None = None


@dataclass(frozen=True)
class LayerMeasurement:
    """One quantized layer on the float model's inputs. Lists have one entry a sampler step.

    Attributes:
        name: as in the checkpoint; of the parts of a joined input each has its own.
        sqnr_db: of the output without its bias, signal to quantization noise, over all steps; sqnr_db_by_step.
        input_sqnr_db: the same where only the input is rounded and the weight is float.
        noise: the noise it causes in the UNet's output, relative to the output's energy (see the module); the same of
            each step alone, noise_by_step.
        input_noise: what would be left of it with a float weight.
        kurtosis: of the input's values (3 for a normal distribution).
        channel_ratio: of a sample's channels, the largest absolute maximum over the median one; mean over samples.
        pixel_ratio: the same of its pixels or tokens.
        axis: that the published method groups, "channel" or "pixel" (the larger spread of ranges over the steps);
            "tensor" for inputs without pixels. axis_by_step: its choice at each step alone.
        exponents: exponent -> channels of a layer with shift groups; empty for others.
    """

    name: str
    sqnr_db: float
    sqnr_db_by_step: list[float]
    input_sqnr_db: float
    noise: float
    noise_by_step: list[float]
    input_noise: float
    kurtosis: list[float]
    channel_ratio: list[float]
    pixel_ratio: list[float]
    axis: str
    axis_by_step: list[str]
    exponents: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionMeasurement:
    """One attention layer with the float model's projections. Lists have one entry a sampler step.

    Attributes:
        name: its place in the UNet.
        cross: whether it reads the text.
        sqnr_db: of the output with quantized probabilities (and what else of q, k and v the recipe rounds) and float
            projections; None where the checkpoint's attention is float. sqnr_db_by_step, noise: as of a layer.
        start_mass: cross-attention: the mean probability of the start token; else empty.
    """

    name: str
    cross: bool
    sqnr_db: float | None
    sqnr_db_by_step: list[float]
    noise: float
    start_mass: list[float]


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        against: the float model; prompts, settings: of the pictures.
        timesteps: of the sampler's steps.
        output_sqnr_db: of the UNet's guided output on the float model's inputs; output_sqnr_db_by_step.
        layers, attention: in the order they run.
    """

    against: str
    prompts: list[str]
    settings: dict[str, Any]
    timesteps: list[float]
    output_sqnr_db: float
    output_sqnr_db_by_step: list[float]
    layers: list[LayerMeasurement]
    attention: list[AttentionMeasurement]

    @property
    def noise(self) -> float:
        """The layers' and attentions' noise together, relative to the output's energy."""
        return sum(one.noise for one in self.layers) + sum(one.noise for one in self.attention)


def decibels(signal: float, noise: float) -> float:
    """Signal to noise of two energies in dB, within +-SQNR_MAX."""
    if noise <= 0:
        return SQNR_MAX
    return max(-SQNR_MAX, min(SQNR_MAX, 10 * math.log10(max(signal, 1e-300) / noise)))


class _Energies:
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
        self.ranges = AxisRanges(name, steps)
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


class _Run:
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


class _LayerProbe:
    """One quantized layer (or part of one) beside its float layer."""

    def __init__(self, name: str, owner: nn.Module, layer: Any, steps: int) -> None:
        self.name, self.owner, self.layer = name, owner, layer
        self.columns: list[int] = layer.plan.columns if isinstance(layer, IntegerLayer) else []
        self.rounded, self.input_rounded = _Energies(steps), _Energies(steps)
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
            x, weight = x[:, slice(*self.columns)], weight[:, slice(*self.columns)]

        def product(value: Tensor) -> Tensor:
            if isinstance(owner, nn.Linear):
                return F.linear(value, weight)
            return F.conv2d(value, weight, None, owner.stride, owner.padding, owner.dilation, owner.groups)

        target = product(x) if self.columns else output - _bias(owner, output)
        result = self.layer(x)
        if not self.columns or self.layer.plan.bias:
            result = result - _bias(owner, output)
        error, input_error = result - target, product(self._rounded_input(x) - x)
        self.rounded.add(step, target, error)
        self.input_rounded.add(step, target, input_error)
        self.outliers.add(step, x)
        return [(error, self._add_noise), (input_error, self._add_input_noise)]

    def _rounded_input(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not isinstance(layer, IntegerLayer):
            if x.dim() != 4:
                rounded: Tensor = layer.input(x)
                return rounded
            return pixels_last_to_image(layer.input(image_to_pixels_last(x)), x.shape[-2:])
        plan = layer.plan
        ones = torch.ones(plan.in_features, device=x.device)
        divisor = ones if plan.channels == "none" else 1 / layer.inv_divisor
        if plan.kind == "conv2d":
            return fake_quantize_input(x, plan.abits, divisor)
        rows = x.permute(0, 2, 3, 1) if plan.kind == "pointwise" else x
        rows = fake_quantize_input(rows.reshape(-1, plan.in_features), plan.abits, divisor).view(rows.shape)
        return rows.permute(0, 3, 1, 2) if plan.kind == "pointwise" else rows

    def found(self, energy: list[float]) -> LayerMeasurement:
        """The result, given the energy of the UNet's outputs at each step."""
        outliers, steps = self.outliers, self.outliers.ranges.steps
        exponents: dict[int, int] = {}
        if isinstance(self.layer, IntegerLayer) and self.layer.plan.channels == "shift":
            values = self.layer.inv_divisor.log2().neg().round().int()
            exponents = {int(e): int((values == e).sum()) for e in values.unique()}
        return LayerMeasurement(
            self.name, self.rounded.db, self.rounded.db_by_step, self.input_rounded.db, sum(self.noise) / sum(energy),
            [noise / one for noise, one in zip(self.noise, energy, strict=True)], self.input_noise / sum(energy),
            outliers.kurtosis, outliers.ratios(1), outliers.ratios(2), outliers.axis(),
            [outliers.axis(slice(step, step + 1)) for step in range(steps)], exponents,
        )  # fmt: skip


def _bias(owner: Any, output: Tensor) -> Tensor | float:
    """The bias as it is added to an output (B, N, H, W) or (..., N)."""
    if owner.bias is None:
        return 0.0
    bias: Tensor = owner.bias
    return bias[:, None, None] if output.dim() == 4 else bias


class _AttentionProbe:
    """One attention layer: its start token's mass, and its output under the checkpoint's processor."""

    def __init__(self, name: str, processor: Any, steps: int) -> None:
        self.name = name
        self.processor = processor if isinstance(processor, LogAttnProcessor | PaperAttnProcessor) else None
        self.energies = _Energies(steps)
        self.noise = 0.0
        self.cross = False
        self._mass, self._calls = [0.0] * steps, [0] * steps

    def _add_noise(self, projection: float) -> None:
        self.noise += projection**2

    def measure(
        self, step: int, attention: Any, x: Tensor, context: Tensor | None, output: Tensor
    ) -> list[tuple[Tensor, Callable[[float], None]]]:
        self.cross = context is not None
        if context is not None:
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
        """The result, given the energy of the UNet's outputs at each step."""
        quantized = self.processor is not None
        mass = [mass / max(count, 1) for mass, count in zip(self._mass, self._calls, strict=True)]
        return AttentionMeasurement(
            self.name, self.cross, self.energies.db if quantized else None,
            self.energies.db_by_step if quantized else [], self.noise / sum(energy), mass if self.cross else [],
        )  # fmt: skip


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


def measure(
    checkpoint: str | os.PathLike[str] | None, options: MeasureOptions | None = None, progress: Progress = silent
) -> Measurement:
    """Measure a checkpoint layer by layer and step by step beside its float model, both in float32.

    A call costs about six of the float model: itself, its backward pass, and every layer twice more. In memory are both
    models, and of one call the float model's activations and two errors of every layer's output.

    Args:
        checkpoint: folder or hub id.
        options: how.
        progress: told of "record" (prompts) and "measure" (UNet calls).

    Raises:
        DgqError: a float model, a float model that lacks a layer or is not at hand, or an option out of range.
    """
    options = options or MeasureOptions()
    folder = resolve(checkpoint)
    header = read_header(folder)
    if header is None:
        raise DgqError(f"{folder}: is a float model, nothing in it is quantized", "name a checkpoint")
    if options.prompts < 1:
        raise DgqError(f"{options.prompts} prompts: at least one is needed")
    base = float_base(folder, options.against)
    assert base is not None
    if read_header(base) is not None:
        raise DgqError(f"{base}: is quantized", "compare with a float model")
    settings = Settings(options.steps, options.guidance, seed=options.seed).resolved(folder)
    prompts = evaluation_prompts(base, options.prompts)
    pipe = load(base, device=options.device, dtype=torch.float32)
    quantized: Any = load(folder, device=options.device, dtype=torch.float32).unet
    recorded = record_inputs(
        lambda prompt, i: generate(pipe, [prompt], dataclasses.replace(settings, seed=settings.seed + i)),
        pipe.unet, prompts, progress,
    )  # fmt: skip
    return _replay(
        pipe.unet, quantized, header, recorded, float(settings.guidance or 0), progress,
        {"against": embedded.NAME if base == embedded.FOLDER else str(base), "prompts": prompts,
         "settings": {"steps": settings.steps, "guidance": settings.guidance, "seed": settings.seed}},
    )  # fmt: skip


def _replay(
    unet: nn.Module, quantized: nn.Module, header: Header, recorded: Sequence[Sequence[dict[str, Any]]],
    guidance: float, progress: Progress, about: dict[str, Any],
) -> Measurement:  # fmt: skip
    """Replay the calls with every probe in place."""
    steps = len(recorded[0])
    layers, attention = _probes(unet, quantized, header, steps)
    run = _Run()
    output = _Energies(steps)
    generator = torch.Generator().manual_seed(0)
    calls = [(step, call) for group in recorded for step, call in enumerate(group)]
    wanted = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    handles = _hooks(unet, run, layers, attention)
    try:
        unet.requires_grad_(False)
        for done, (step, call) in enumerate(calls):
            run.step = step
            with torch.no_grad():  # this also tells the paper recipe's layers their step
                rounded = quantized(**call)[0]
            y = unet(**call)[0]
            probe = torch.randn(y.shape[1:], generator=generator).to(y.device)
            weights = _guidance_weights(len(y), guidance).to(y.device)
            guided = _combine(weights, y.detach())
            output.add(step, guided, _combine(weights, rounded) - guided)
            y.backward(weights[:, None, None, None] * probe)
            progress("measure", done + 1, len(calls), f"step {step + 1}")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    for name in (probe.name for probe in layers):
        if name not in run.order:
            raise DgqError(f"{name}: the float model never ran this layer", "check --against")
    place = list(run.order).index
    energy = [max(one, 1e-300) for one in output.signal]
    measured = [probe.found(energy) for probe in sorted(layers, key=lambda probe: place(probe.name))]
    attended = [probe.found(energy) for probe in attention if probe.name in run.order]
    attended.sort(key=lambda one: place(one.name))
    return Measurement(
        timesteps=[float(torch.as_tensor(call["timestep"]).flatten()[0]) for call in recorded[0]],
        output_sqnr_db=output.db, output_sqnr_db_by_step=output.db_by_step, layers=measured, attention=attended,
        **about,
    )  # fmt: skip


def _guidance_weights(batch: int, guidance: float) -> Tensor:
    """How the samples of a call, the unconditional one first, make up the guided output."""
    return torch.tensor([1 - guidance, guidance]) if batch == 2 else torch.ones(1)


def _combine(weights: Tensor, y: Tensor) -> Tensor:
    return (weights[:, None, None, None] * y).sum(0)


def _probes(
    unet: nn.Module, quantized: nn.Module, header: Header, steps: int
) -> tuple[list[_LayerProbe], list[_AttentionProbe]]:
    """A probe for every quantized layer, and for every attention layer."""
    names = {name: plan.owner(name) for name, plan in header.layers.items()}
    if header.paper is not None:
        names = {name: name for name, plan in header.paper["layers"].items() if plan["kind"] != "attention"}
    layers = []
    for name, owner in names.items():
        layer: Any = quantized.get_submodule(name)
        try:
            module: Any = unet.get_submodule(owner)
            outputs, inputs = module.weight.shape[:2]
        except (AttributeError, ValueError):
            outputs, inputs = 0, 0
        plan = header.layers.get(name)
        own = layer.weight_shape[:2] if plan is None else (plan.out_features, plan.in_features)
        if outputs != own[0] or (inputs < plan.columns[1] if plan and plan.columns else inputs != own[1]):
            raise DgqError(f"{owner}: the float model has no such layer of {tuple(own)}", "check --against")
        layers.append(_LayerProbe(name, module, layer, steps))
    attention = []
    for name, module in unet.named_modules():
        if hasattr(module, "processor") and hasattr(module, "to_out"):
            twin: Any = quantized.get_submodule(name)
            attention.append(_AttentionProbe(name, twin.processor, steps))
    return layers, attention


def _hooks(
    unet: nn.Module, run: _Run, layers: Sequence[_LayerProbe], attention: Sequence[_AttentionProbe]
) -> list[Any]:
    """Put the probes in place."""
    by_owner: dict[nn.Module, list[_LayerProbe]] = {}
    for probe in layers:
        by_owner.setdefault(probe.owner, []).append(probe)

    def on_layer(own: list[_LayerProbe]) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if run.busy:
                return None
            run.order.update(dict.fromkeys(probe.name for probe in own))
            with run.own_work():
                errors = [error for probe in own for error in probe.measure(run.step, args[0], output)]
            return run.follow(output, errors)

        return hook

    def on_attention(probe: _AttentionProbe) -> Callable[..., Tensor | None]:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if run.busy:
                return None
            run.order[probe.name] = None
            x = args[0] if args else kwargs["hidden_states"]
            with run.own_work():
                errors = probe.measure(run.step, module, x, kwargs.get("encoder_hidden_states"), output)
            return run.follow(output, errors)

        return hook

    handles: list[Any] = [module.register_forward_hook(on_layer(own)) for module, own in by_owner.items()]
    for one in attention:
        handles.append(unet.get_submodule(one.name).register_forward_hook(on_attention(one), with_kwargs=True))
    return handles
