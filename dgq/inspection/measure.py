"""What quantization does to each layer, sampler step by step, measured beside the float model.

The float model makes pictures of a few prompts, its network's calls are replayed, and every quantized layer runs on the
float layer's own input. Nothing but sums is kept from one call to the next.

**Output noise.** A layer's SQNR says how well it does by itself, not how much the picture suffers. That is told by the
noise it causes in the network's (guided) output: with d the layer's error and J the derivative of the output y by the
layer's output, |J d|^2 / |y|^2. It needs neither J nor a run per layer: for v drawn from N(0, 1) like y,
E[(v . J d)^2] = |J d|^2, and one backward pass of v . y gives v J for every layer at once. To first order, and as far
as their errors are unrelated, the layers' noise adds up to the network's, which is measured too.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.header import Header
from ..errors import DgqError
from ..family import family_of, network_of
from ..pictures.generation import Settings, generate
from ..pictures.pipelines import described, find_model, float_base, load
from ..pictures.prompts import evaluation_prompts
from ..progress import Progress, silent
from ..replay import hooked, predicted, record_inputs
from .measurement import Measurement
from .probes import AttentionProbe, Energies, LayerProbe, Run, combine, over_samples


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


def measure_checkpoint(
    checkpoint: str | os.PathLike[str] | None, options: MeasureOptions | None = None, progress: Progress = silent
) -> Measurement:
    """Measure a checkpoint layer by layer and step by step beside its float model, both in float32.

    A call costs about six of the float model: itself, its backward pass, and every layer twice more. In memory are both
    models, and of one call the float model's activations and two errors of every layer's output.

    Args:
        checkpoint: folder or hub id.
        options: how.
        progress: told of "record" (prompts) and "measure" (calls).

    Raises:
        DgqError: a float model, a float model that lacks a layer or is not at hand, or an option out of range.
    """
    options = options or MeasureOptions()
    model = find_model(checkpoint)
    folder, header = model.folder, model.header
    if header is None:
        raise DgqError(f"{folder}: is a float model, nothing in it is quantized", "name a checkpoint")
    if options.prompts < 1:
        raise DgqError(f"{options.prompts} prompts: at least one is needed")
    base = float_base(folder, options.against)
    assert base is not None
    against = described(base)
    if against.header is not None:
        raise DgqError(f"{base}: is quantized", "compare with a float model")
    settings = Settings(options.steps, options.guidance, seed=options.seed).resolved(model)
    prompts = evaluation_prompts(base, options.prompts)
    pipe = load(against, device=options.device, dtype=torch.float32, graph=False)
    quantized = network_of(load(model, device=options.device, dtype=torch.float32, graph=False))
    recorded = record_inputs(
        lambda prompt, i: generate(pipe, [prompt], dataclasses.replace(settings, seed=settings.seed + i)),
        network_of(pipe),
        prompts,
        progress,
    )
    return measured(
        network_of(pipe),
        quantized,
        header,
        recorded,
        float(settings.guidance or 0),
        progress,
        {
            "against": against.name,
            "prompts": prompts,
            "settings": {"steps": settings.steps, "guidance": settings.guidance, "seed": settings.seed},
        },
    )


def measured(
    network: nn.Module,
    quantized: nn.Module,
    header: Header,
    recorded: Sequence[Sequence[dict[str, Any]]],
    guidance: float,
    progress: Progress,
    about: dict[str, Any],
) -> Measurement:
    """Measure a quantized network beside the float one it was made of, on recorded calls.

    Args:
        network, quantized: in memory, on one device.
        header: of the quantized one.
        recorded: whole pictures' calls, by prompt and step.
        guidance: of the sampler.
        progress: told of "measure" (calls).
        about: the `Measurement`'s "against", "prompts" and "settings".

    Raises:
        DgqError: the float network lacks a layer, or never runs it.
    """
    family = family_of(network)
    step_of = [_steps(calls, family.timestep) for calls in recorded]
    steps = step_of[0][-1] + 1
    layers, attention = _probes(network, quantized, header, steps)
    run = Run()
    output = Energies(steps)
    generator = torch.Generator().manual_seed(0)
    calls = [pair for own, group in zip(step_of, recorded, strict=True) for pair in zip(own, group, strict=True)]
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.requires_grad_(False)
        with hooked(_hooks(network, run, layers, attention)):
            for done, (step, call) in enumerate(calls):
                run.step = step
                with torch.no_grad():  # this also tells the paper recipe's layers their step
                    rounded = predicted(quantized, call)
                y = predicted(network, call)
                probe = torch.randn(y.shape[1:], generator=generator).to(y.device)
                weights = family.guidance_weights(len(y), guidance).to(y.device)
                guided = combine(weights, y.detach())
                output.add(step, guided, combine(weights, rounded) - guided)
                y.backward(over_samples(weights, y) * probe)
                progress("measure", done + 1, len(calls), f"step {step + 1}")
    finally:
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
        timesteps=[_timestep(recorded[0][step_of[0].index(step)], family.timestep) for step in range(steps)],
        output_sqnr_db=output.db,
        output_sqnr_db_by_step=output.db_by_step,
        layers=measured,
        attention=attended,
        **about,
    )


def _timestep(call: dict[str, Any], name: str) -> float:
    """A call's timestep, which is an argument of this name."""
    return float(torch.as_tensor(call[name]).flatten()[0])


def _steps(calls: Sequence[dict[str, Any]], name: str) -> list[int]:
    """The step of each of a picture's calls: those that follow each other at one timestep are of one step."""
    times = [_timestep(call, name) for call in calls]
    changed = [int(after != before) for before, after in itertools.pairwise(times)]
    return list(itertools.accumulate(changed, initial=0))


def _probes(
    network: nn.Module, quantized: nn.Module, header: Header, steps: int
) -> tuple[list[LayerProbe], list[AttentionProbe]]:
    """A probe for every quantized layer, and for every attention layer that has a start token or is quantized."""
    layers = []
    for name, facts in header.method.layers(header).items():
        if facts.kind == "attention":
            continue
        layer: Any = quantized.get_submodule(name)
        try:
            module: Any = network.get_submodule(facts.owner)
            outputs, inputs = module.weight.shape[:2]
        except (AttributeError, ValueError):
            outputs, inputs = 0, 0
        plan, own = header.layers.get(name), facts.shape[:2]
        if outputs != own[0] or (inputs < plan.columns[1] if plan and plan.columns else inputs != own[1]):
            raise DgqError(f"{facts.owner}: the float model has no such layer of {own}", "check --against")
        layers.append(LayerProbe(name, module, layer, header.method.rounded_input, steps))
    attention, start_token = [], family_of(network).start_token
    for name, module in network.named_modules():
        if hasattr(module, "processor") and hasattr(module, "to_out"):
            twin: Any = quantized.get_submodule(name)
            probe = AttentionProbe(name, twin.processor, steps, start_token)
            if start_token or probe.processor is not None:  # else there is nothing to tell of it
                attention.append(probe)
    return layers, attention


def _hooks(
    network: nn.Module, run: Run, layers: Sequence[LayerProbe], attention: Sequence[AttentionProbe]
) -> list[Any]:
    """Put the probes in place."""
    by_owner: dict[nn.Module, list[LayerProbe]] = {}
    for probe in layers:
        by_owner.setdefault(probe.owner, []).append(probe)

    def on_layer(own: list[LayerProbe]) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if run.busy:
                return None
            run.order.update(dict.fromkeys(probe.name for probe in own))
            with run.own_work():
                errors = [error for probe in own for error in probe.measure(run.step, args[0], output)]
            return run.follow(output, errors)

        return hook

    def on_attention(probe: AttentionProbe) -> Callable[..., Tensor | None]:
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
        handles.append(network.get_submodule(one.name).register_forward_hook(on_attention(one), with_kwargs=True))
    return handles
