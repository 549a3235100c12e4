"""From a float pipeline to a dgq checkpoint: the work behind `dgq calibrate`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint.header import Header
from ..checkpoint.reading import check_folder, components, family_at, network_config, read_json, text_encoders
from ..checkpoint.writing import check_target, write_checkpoint
from ..devices import to_device
from ..errors import DgqError
from ..family import DECODERS, ENCODERS, family_of, named, network_of
from ..integer.rounding import DEFAULT_BUDGET_BYTES
from ..method import METHODS, Method, Work
from ..outputs import workplace
from ..pictures.components import component
from ..pictures.fidelity import compare
from ..pictures.generation import Picture, Settings, check_prompts, check_size, decode, draw_latents, generate
from ..pictures.pipelines import Model, find_model, load
from ..pictures.prompts import calibration_prompts, evaluation_prompts
from ..progress import Progress, silent
from ..recipe import Recipe
from ..replay import record_all, spread
from ..version import __version__
from .budget import check_budget, spend, twin_of
from .resume import Partial, fingerprint_of

# Prompts on which the error of a text encoder's embeddings is measured.
JUDGED_PROMPTS = 16


# Sampler steps of a recorded picture. Of a network's layers more prompts tell more than more steps of each, which are
# alike: six steps of 96 prompts take less time than twenty of 32, and give better pictures (docs/studies.md).
RECORDED_STEPS = 6


# Recorded pictures that tell of a VAE's layers: a decode of 512 pixels takes as long as a step.
DECODED_PICTURES = 32


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    Attributes:
        prompts: calibration prompts, or how many to take from the built-in ones; None takes as many as the method has.
        steps, guidance: that pictures will have; None takes the model's defaults.
        record_steps: sampler steps of the pictures whose calls are recorded; None takes `RECORDED_STEPS`, or `steps`
            where those are fewer or what the method learns belongs to single ones.
        size: height and width of its pictures in pixels; None takes the model's.
        seed: seed of the first calibration picture and of the choice of prompts.
        calls: the network's calls replayed for the statistics, spread over prompts and steps.
        evaluate: prompts, apart from calibration, on which the result is compared with the float model.
        bits: of a weight, on average over the network's quantized layers, everything that they store counted: layers of
            four bits whose noise harms its output most get eight. None: the recipe's alone.
        budget: bytes for statistics held at one time.
        overwrite: replace a checkpoint that is there, never anything else.
        resume: go on from an interrupted calibration of the same settings.
        vae: "int8" quantizes the VAE too, "float" does not; None does where the method is faster than float
            and the VAE's class is known.
        text_encoder: "int8" quantizes the text encoders too.
    """

    prompts: Sequence[str] | int | None = None
    steps: int | None = None
    record_steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    seed: int = 0
    calls: int = 160
    evaluate: int = 4
    bits: float | None = None
    budget: int = DEFAULT_BUDGET_BYTES
    overwrite: bool = False
    resume: bool = False
    vae: Literal["int8", "float"] | None = None
    text_encoder: Literal["int8", "float"] = "float"


def float_model(model: str | os.PathLike[str] | None) -> Model:
    """A float model that can be calibrated.

    Raises:
        DgqError: there is none, or it is quantized.
    """
    found = find_model(model)
    if found.header is not None:
        raise DgqError(f"{found.folder}: is quantized already", "calibrate the float model it was made from")
    vae = read_json(found.folder / "vae" / "config.json")
    family_at(found.folder).check_configs(network_config(found.folder), vae)
    return found


def decoder_recipe(model: Model, recipe: Recipe, options: Options) -> Recipe | None:
    """How the VAE of a float model is quantized; None where it stays float.

    Raises:
        DgqError: it is asked for, and the VAE is of a class that dgq does not know.
    """
    file = model.folder / "vae" / "config.json"
    kind = read_json(file).get("_class_name", "component of no class")
    known = named(kind) in DECODERS
    if options.vae == "float" or (options.vae is None and (not known or METHODS[recipe.name].simulated)):
        return None
    if not known:
        raise DgqError(f"{file}: a {kind} cannot be quantized", "leave it in float")
    return _beside(recipe)


def encoder_recipes(model: Model, recipe: Recipe, options: Options) -> dict[str, Recipe]:
    """How the text encoders of a float model are quantized, by component; none where they stay float.

    Raises:
        DgqError: they are quantized already.
    """
    if options.text_encoder == "float":
        return {}
    found = text_encoders(model.folder)
    for name in found:
        file = model.folder / name / "config.json"
        if "quantization_config" in read_json(file):
            raise DgqError(f"{file}: the text encoder is quantized already", "leave it as it is: --text-encoder float")
    return dict.fromkeys(found, _beside(recipe))


def _beside(recipe: Recipe) -> Recipe:
    """Of what is quantized beside a network."""
    name = "integer" if METHODS[recipe.name].reads_calls else recipe.name
    own = {} if name != recipe.name else {"rounding": recipe.rounding, "channels": recipe.channels}
    return Recipe(name, wbits=8, abits=8, attention="float", **own)  # type: ignore[arg-type]


def wanted_settings(options: Options, model: Model) -> Settings:
    """How the float pipeline of a model draws.

    Raises:
        DgqError: a value out of range.
    """
    if options.size is not None and (not 64 <= options.size <= 4096 or options.size % 8):
        raise DgqError(f"pictures of {options.size} pixels cannot be drawn", "give a multiple of 8, from 64 to 4096")
    settings = Settings(options.steps, options.guidance, width=options.size, height=options.size, seed=options.seed)
    return settings.resolved(model)


def count_prompts(options: Options, recipe: Recipe) -> int:
    """How many prompts a calibration takes."""
    wanted = METHODS[recipe.name].prompts if options.prompts is None else options.prompts
    return wanted if isinstance(wanted, int) else len(wanted)


def recording_settings(options: Options, model: Model, recipe: Recipe) -> Settings:
    """How the pictures whose calls are recorded are drawn: but for their steps by `wanted_settings`.

    Raises:
        DgqError: a value out of range, or steps that are asked for where the recipe's method learns those that pictures
            will have.
    """
    settings = wanted_settings(options, model)
    by_step, steps = METHODS[recipe.name].by_step, options.record_steps
    if by_step and steps is not None:
        raise DgqError(f"the {recipe.name} recipe records the steps that pictures will have", "give --steps alone")
    assert settings.steps is not None
    if steps is None:
        steps = settings.steps if by_step else min(settings.steps, RECORDED_STEPS)
    return dataclasses.replace(settings, steps=steps).resolved(model)


def calibrate(
    model: str | os.PathLike[str] | None,
    out: Path,
    recipe: Recipe,
    options: Options | None = None,
    progress: Progress = silent,
) -> Header:
    """Quantize a float pipeline and write the checkpoint.

    Args:
        model: a local diffusers folder, a hub id, or None for the embedded model.
        out: folder of the checkpoint.
        recipe: what to quantize and how.
        options: prompts, seeds, limits.
        progress: told of the stages "record", "statistics", "quantize" (or "calibrate"), "measure" where there is a
            budget of bits, "compare" and "save"; of "prompts" where the built-in ones are fewer than were asked for;
            and of "resume" for each file of an interrupted run that cannot be used.

    Returns:
        The header of the written checkpoint.

    Raises:
        DgqError: bad input, a place that no checkpoint of this model may go to, one that another process is writing,
            or the checkpoint cannot be written. An interrupted run leaves a hidden `.partial` folder beside `out` that
            `resume` continues from, never a folder that looks like a checkpoint; a checkpoint that was to be replaced
            is still there.
    """
    options = options or Options()
    found = float_model(model)
    folder = found.folder
    check_target(out, folder, options.overwrite)
    settings = wanted_settings(options, found)
    recording = recording_settings(options, found, recipe)
    if options.prompts is None or isinstance(options.prompts, int):
        wanted = count_prompts(options, recipe)
        prompts = calibration_prompts(folder, wanted, options.seed)
        if options.prompts is not None and len(prompts) < wanted:
            progress("prompts", len(prompts), len(prompts), f"{wanted} asked for: there are no more built-in ones")
    else:
        prompts = list(options.prompts)
    if not prompts:
        raise DgqError("no calibration prompts", "give at least one")
    with workplace(out) as work:
        check_target(out, folder, options.overwrite)  # a replacement that was killed may just have been undone
        decoder = decoder_recipe(found, recipe, options)
        beside = {**encoder_recipes(found, recipe, options), **({} if decoder is None else {"vae": decoder})}
        fingerprint = fingerprint_of(folder, recipe, prompts, recording, options.calls, beside)
        partial = Partial(work, fingerprint, options.resume, progress)
        header = _calibrated(found, out, recipe, beside, options, prompts, settings, recording, partial, progress)
        partial.remove()
    progress("save", 1, 1, str(out))
    return header


def _calibrated(
    model: Model,
    out: Path,
    recipe: Recipe,
    beside: Mapping[str, Recipe],
    options: Options,
    prompts: Sequence[str],
    settings: Settings,
    recording: Settings,
    partial: Partial,
    progress: Progress,
) -> Header:
    """`calibrate`, in the place that it works in; `beside` has the recipes of what is quantized with the network, and
    the pictures of `recording` are those whose calls are recorded."""
    folder = model.folder
    pipe = load(model, dtype=torch.float32, graph=False)
    if METHODS[recipe.name].reads_calls:
        check_prompts(pipe, prompts)
    network = network_of(pipe)
    # an override that matches no layer is told before the work
    plans = _plans("", network, recipe)
    if options.bits is not None:
        check_budget(network, recipe, options.bits)
    for name, wanted in beside.items():
        plans |= _plans(name, getattr(pipe, name), wanted)
    done = {name: (plans[name], result) for name, result in partial.layers(plans).items()}
    reference = _evaluate(pipe, folder, settings, options, prompts, "float", progress, 0)
    files = {"": "calls"} | {name: f"calls-{name}" for name in beside} if METHODS[recipe.name].reads_calls else {}
    stored = {name: partial.calls(file) for name, file in files.items()}
    recorded = {name: calls for name, calls in stored.items() if calls is not None}
    if len(recorded) < len(files):
        recorded = _record(pipe, recording, prompts, beside, progress)
        for name, file in files.items():
            partial.store_calls(recorded[name], file)
    del pipe  # text encoders and VAE would lie beside the statistics

    def quantized(name: str, part: Any, wanted: Recipe, keep: bool = True) -> Header:
        method, calls = METHODS[wanted.name], recorded.get(name, [])
        planned, prefix = _plans(name, part, wanted), _prefix(name)
        own = {
            of.removeprefix(prefix): done[of][1] for of, plan in planned.items() if of in done and done[of][0] == plan
        }

        def kept(of: str, result: Any) -> None:
            if keep:
                done[prefix + of] = planned[prefix + of], result
                partial.store(prefix + of, method, result)

        replayed = spread(calls, min(options.calls, DECODED_PICTURES) if name == "vae" else options.calls)
        made = method.calibrate(Work(part, calls, replayed, wanted, options.budget, progress, kept, own))
        facts: dict[str, Any] = {}
        if calls:
            facts = {"prompts": len(prompts), "steps": recording.steps, "seed": settings.seed}
            if options.size:
                facts["size"] = options.size
        return Header(
            wanted,
            made.layers,
            made.attention,
            made.table,
            model.name,
            {"steps": settings.steps, "guidance": settings.guidance},
            {**facts, **made.facts},
            __version__,
        )

    if options.bits is None:
        header = quantized("", network, recipe)
    else:
        twin = twin_of(network)
        mixed = spend(network, twin, quantized("", twin, recipe), recorded[""], options.bits, progress)
        del twin
        header = quantized("", network, mixed, keep=False)  # a later run chooses again
    parts: dict[str, tuple[Any, Header]] = {}
    for name, wanted in beside.items():
        part = component(folder, name, *components(folder)[name], torch.float32)
        part = part.to(next(network.parameters()).device)
        read = [calls[0] for calls in recorded.get(name, [])[:JUDGED_PROMPTS]] if family_of(part) in ENCODERS else []
        before = _embeddings(part, read)
        parts[name] = part, quantized(name, part, wanted)
        if read:
            parts[name][1].calibration["embeddings_error"] = _distance(before, _embeddings(part, read))
    if reference:
        given = {name: part for name, (part, _) in parts.items()}
        pipe = load(model, dtype=torch.float32, network=network, parts=given, graph=False)
        pictures = _evaluate(pipe, folder, settings, options, prompts, recipe.label, progress, len(reference))
        header.calibration["fidelity"] = compare(reference, pictures)
        if "vae" in parts:
            parts["vae"][1].calibration["fidelity"] = _decoding(pipe, reference)
    progress("save", 0, 1, str(out))
    write_checkpoint(folder, network, header, out, options.overwrite, partial.folder, parts)
    check_folder(out)
    return header


def _prefix(component: str) -> str:
    """What the names of a component's layers begin with, so that they are no other component's; the network is ""."""
    return f"{component}." if component else ""


def _plans(component: str, part: Any, recipe: Recipe) -> dict[str, tuple[Method, Any]]:
    """How what is finished at one time is quantized, by its prefixed name."""
    method = METHODS[recipe.name]
    return {_prefix(component) + name: (method, plan) for name, plan in method.plans(part, recipe).items()}


def _record(
    pipe: Any, settings: Settings, prompts: Sequence[str], beside: Iterable[str], progress: Progress
) -> dict[str, list[list[dict[str, Any]]]]:
    """The calls that make each prompt's picture, which is not decoded: of the network, named "", and of these
    components."""
    network = network_of(pipe)
    family, (width, height) = family_of(network), check_size(pipe, settings)
    decoding, decoded = "vae" in beside, []

    def draw(prompt: str, i: int) -> None:
        latents = draw_latents(pipe, prompt, dataclasses.replace(settings, seed=settings.seed + i))
        if decoding:
            decoded.append([{"z": family.plain_latents(pipe, family.unpacked(pipe, latents, width, height))}])

    modules = {"": network} | {name: getattr(pipe, name) for name in beside if name != "vae"}
    recorded = record_all(draw, modules, prompts, progress)
    return {**recorded, "vae": decoded} if decoding else recorded


@torch.no_grad()
def _embeddings(encoder: Any, calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    """What the last block makes of each call."""
    device, found = next(encoder.parameters()).device, []
    for call in calls:
        output = encoder(**to_device(call, device))
        states = output.hidden_states
        found.append((output.last_hidden_state if states is None else states[-1]).float().cpu())
    return found


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Norm of the difference, relative to the first one's."""
    error = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return math.sqrt(error / sum(float(a.square().sum()) for a in one))


def _decoding(pipe: Any, reference: Sequence[Picture]) -> dict[str, float]:
    """Fidelity of the decoder alone: of the float model's latents, decoded by a pipeline."""
    drawn = []
    for picture in reference:
        (image,) = decode(pipe, picture.latents[None], *picture.image.size)
        drawn.append(dataclasses.replace(picture, image=image))
    return {name: value for name, value in compare(reference, drawn).items() if not name.startswith("latent")}


def _evaluate(
    pipe: Any,
    folder: Path,
    settings: Settings,
    options: Options,
    prompts: Sequence[str],
    label: str,
    progress: Progress,
    before: int,
) -> list[Picture]:
    """Pictures of the evaluation prompts (none of them a calibration prompt)."""
    pool = evaluation_prompts(folder, options.evaluate + len(prompts))
    chosen = [prompt for prompt in pool if prompt not in prompts][: options.evaluate]
    pictures = []
    for i, prompt in enumerate(chosen):
        pictures += generate(pipe, [prompt], dataclasses.replace(settings, seed=10_000 + i))
        progress("compare", before + i + 1, 2 * len(chosen), f"{label}: {prompt}")
    return pictures
