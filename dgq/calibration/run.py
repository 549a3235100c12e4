"""From a float pipeline to a dgq checkpoint: the work behind `dgq calibrate`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.header import Header
from ..checkpoint.reading import check_folder, family_at, network_config, read_json
from ..checkpoint.writing import check_target, write_checkpoint
from ..errors import DgqError
from ..family import network_of
from ..integer.rounding import DEFAULT_BUDGET_BYTES
from ..method import METHODS, Work
from ..outputs import workplace
from ..pictures.fidelity import compare
from ..pictures.generation import Picture, Settings, check_prompts, draw_latents, generate
from ..pictures.pipelines import Model, find_model, load
from ..pictures.prompts import calibration_prompts, evaluation_prompts
from ..progress import Progress, silent
from ..recipe import Recipe
from ..replay import record_inputs, spread
from ..version import __version__
from .resume import Partial, fingerprint_of


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    Attributes:
        prompts: calibration prompts, or how many to take from the built-in ones.
        steps, guidance: of the float pipeline; None takes the model's defaults.
        size: height and width of its pictures in pixels; None takes the model's.
        seed: seed of the first calibration picture and of the choice of prompts.
        calls: the network's calls replayed for the statistics, spread over prompts and steps.
        evaluate: prompts, apart from calibration, on which the result is compared with the float model.
        budget: bytes for statistics held at one time.
        overwrite: replace a checkpoint that is there, never anything else.
        resume: go on from an interrupted calibration of the same settings.
    """

    prompts: Sequence[str] | int = 32
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    seed: int = 0
    calls: int = 160
    evaluate: int = 4
    budget: int = DEFAULT_BUDGET_BYTES
    overwrite: bool = False
    resume: bool = False


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


def wanted_settings(options: Options, model: Model) -> Settings:
    """How the float pipeline of a model draws.

    Raises:
        DgqError: a value out of range.
    """
    if options.size is not None and (options.size < 64 or options.size % 8):
        raise DgqError(f"pictures of {options.size} pixels cannot be drawn", "give a multiple of 8, at least 64")
    settings = Settings(options.steps, options.guidance, width=options.size, height=options.size, seed=options.seed)
    return settings.resolved(model)


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
        progress: told of the stages "record", "statistics", "quantize" (or "calibrate"), "compare" and "save"; and of
            "resume" for each file of an interrupted run that cannot be used.

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
    if isinstance(options.prompts, int):
        prompts = calibration_prompts(folder, options.prompts, options.seed)
    else:
        prompts = list(options.prompts)
    if not prompts:
        raise DgqError("no calibration prompts", "give at least one")
    with workplace(out) as work:
        check_target(out, folder, options.overwrite)  # a replacement that was killed may just have been undone
        fingerprint = fingerprint_of(folder, recipe, prompts, settings, options.calls)
        partial = Partial(work, fingerprint, options.resume, progress)
        header = _calibrated(found, out, recipe, options, prompts, settings, partial, progress)
        partial.remove()
    progress("save", 1, 1, str(out))
    return header


def _calibrated(
    model: Model, out: Path, recipe: Recipe, options: Options,
    prompts: Sequence[str], settings: Settings, partial: Partial, progress: Progress,
) -> Header:  # fmt: skip
    """`calibrate`, in the place that it works in."""
    folder = model.folder
    pipe = load(model, dtype=torch.float32, graph=False)
    check_prompts(pipe, prompts)
    network = network_of(pipe)
    # an override that matches no layer is told before the work
    done = partial.layers(METHODS[recipe.name].plans(network, recipe))
    reference = _evaluate(pipe, folder, settings, options, prompts, "float", progress, 0)
    recorded = partial.calls()
    if recorded is None:
        recorded = record_inputs(
            lambda prompt, i: draw_latents(pipe, prompt, dataclasses.replace(settings, seed=settings.seed + i)),
            network, prompts, progress,
        )  # fmt: skip
        partial.store_calls(recorded)
    header = Header(
        recipe,
        base_model=model.name,
        generation={"steps": settings.steps, "guidance": settings.guidance},
        calibration={"prompts": len(prompts), "steps": settings.steps, "seed": settings.seed},
        dgq_version=__version__,
    )
    if options.size:
        header.calibration["size"] = options.size
    del pipe  # text encoders and VAE would lie beside the statistics
    work = Work(
        network, recorded, spread(recorded, options.calls), recipe, options.budget, progress, partial.store, done
    )
    made = METHODS[recipe.name].calibrate(work)
    header.layers, header.attention, header.table = made.layers, made.attention, made.table
    header.calibration |= made.facts
    if reference:
        pipe = load(model, dtype=torch.float32, network=network, graph=False)
        pictures = _evaluate(pipe, folder, settings, options, prompts, recipe.label, progress, len(reference))
        header.calibration["fidelity"] = compare(reference, pictures)
    progress("save", 0, 1, str(out))
    write_checkpoint(folder, network, header, out, options.overwrite, partial.folder)
    check_folder(out)
    return header


def _evaluate(
    pipe: Any, folder: Path, settings: Settings, options: Options, prompts: Sequence[str], label: str,
    progress: Progress, before: int,
) -> list[Picture]:  # fmt: skip
    """Pictures of the evaluation prompts (none of them a calibration prompt)."""
    pool = evaluation_prompts(folder, options.evaluate + len(prompts))
    chosen = [prompt for prompt in pool if prompt not in prompts][: options.evaluate]
    pictures = []
    for i, prompt in enumerate(chosen):
        pictures += generate(pipe, [prompt], dataclasses.replace(settings, seed=10_000 + i))
        progress("compare", before + i + 1, 2 * len(chosen), f"{label}: {prompt}")
    return pictures
