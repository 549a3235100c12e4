"""Whole pictures, from prompt to PNG, of a model folder or of a well-known architecture: which systems draw them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import architectures
from ..checkpoint.reading import decoder_header, encoder_headers
from ..errors import DgqError
from ..family import DECODERS, ENCODERS, FAMILIES, Architecture, family_of
from ..pictures.generation import Settings, check_size
from ..pictures.pipelines import Model, resolve
from ..pictures.prompts import evaluation_prompts
from ..progress import Progress, silent
from ..version import __version__
from .drawing import Subject, hollow, skeletons
from .files import pipeline_parts
from .rows import Row, dtype_name, half_dtype, verdicts
from .steps import Options, Plan, cpu_notes, peer_notes, work_folder
from .systems import Size, System, measure

# Peak bytes of a quantized weight while it is loaded, and of a pixel while it is decoded.
PACKED, DECODED = 1.25, 4400


@dataclass(frozen=True)
class PictureOptions:
    """What is drawn, and how dgq quantizes what is float.

    Attributes:
        steps, guidance: of the sampler; None for the model's own.
        pixels: width and height; None for the model's own.
        bits: of the network's weights, 4 or 8; None for 4. The VAE's decoder is int8.
        text_encoder: whether the text encoders are int8 too.
    """

    steps: int | None = None
    guidance: float | None = None
    pixels: int | None = None
    bits: int | None = None
    text_encoder: bool = False

    @property
    def settings(self) -> Settings:
        """Of the pictures, not resolved."""
        return Settings(self.steps, self.guidance, width=self.pixels, height=self.pixels)


def bench_picture(
    model: Model | str, wanted: PictureOptions, options: Options, progress: Progress = silent
) -> tuple[list[Row], list[str]]:
    """Time whole pictures, from prompt to PNG, and their parts.

    Args:
        model: checkpoint or float model, which is quantized on the fly; or the name of an architecture, of random
            weights: of `architectures.ARCHITECTURES`, or a config.json that holds a "pipeline" (`Architecture`).
        wanted: the picture; for a checkpoint without bits and text encoder.
        options: how; only an architecture's files are kept in its `work`.
        progress: told of "files", "load" and "picture".

    Returns:
        The rows, of the whole and of its parts, and what to know about them.

    Raises:
        DgqError: no such architecture, or what stands around its network is not known; a checkpoint whose float model
            is not at hand; settings out of range; too little memory or disk; or float32 or the files of a dgq system
            failed.
    """
    half = dtype_name(half_dtype(options.device))
    if isinstance(model, str):
        rows, notes = _of_architecture(model, wanted, options, half, progress)
    else:
        rows, notes = _of_model(model, wanted, options, half, progress)
    notes = [
        *notes,
        "loading is timed once, from files in the page cache, imports not counted",
        "peak memory counts the pages of weight files that were read, also those no longer needed",
        *peer_notes(options.peers),
    ]
    return rows, [*notes, *cpu_notes(options.device), *verdicts(rows, options.device)]


def _of_architecture(
    name: str, wanted: PictureOptions, options: Options, half: str, progress: Progress
) -> tuple[list[Row], list[str]]:
    which = architectures.architecture(name)
    recipe = {"steps": 25, "guidance": 7.5, **architectures.pipeline(which, name)}
    around = {key: value for key, value in recipe.items() if key not in ("steps", "guidance")}
    config = {**which.config, "_class_name": which.network}
    parts = pipeline_parts(config, around)
    settings = wanted.settings.resolved(Model(Path(name), name, None, recipe))
    side = _side(which, parts, wanted.pixels)
    settings = replace(settings, width=side, height=side)
    content = json.dumps([__version__, config, around], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    with work_folder(options.work, f"{Path(name).stem}-picture-{digest}") as root:
        plan = Plan(root, options.device)
        base = plan.file(half, getattr(torch, half).itemsize, "pipeline", config=config, pipeline=around, dtype=half)
        plan.subject = Subject(evaluation_prompts(root, 1)[0], asdict(settings), str(base))
        plan.floats(base, base, options)
        _add_quantized(plan, parts, base, wanted, half)
        rows, notes = _measured(plan, parts, name, Path(name).name, options, progress)
    return rows, [
        f"{Path(name).name} has random weights: speed and memory are the model's, pictures and errors are not",
        f"its files are in {half}, of which float32 is made; the dgq systems take and return {half} activations",
        *notes,
    ]


def _of_model(
    model: Model, wanted: PictureOptions, options: Options, half: str, progress: Progress
) -> tuple[list[Row], list[str]]:
    base = model.folder
    if model.header is not None:
        try:
            base = resolve(model.header.base_model or "")
        except DgqError:
            raise DgqError(
                f"{model.folder}: the float model it was made of ({model.header.base_model}) is not at hand",
                "its pictures are timed beside the float model's: put that where it was, or name a float model",
            ) from None
    parts, settings = skeletons(base), wanted.settings.resolved(model)
    width, height = check_size(hollow(base), settings)
    subject = Subject(evaluation_prompts(base, 1)[0], asdict(replace(settings, width=width, height=height)), str(base))
    # what `dgq.load` takes by default
    dtype = half if options.device.type == "cuda" else "float32"
    notes = []
    with work_folder(None, "") as root:
        plan = Plan(root, options.device, subject)
        plan.floats(base, base, options)
        if model.header is None:
            label = _add_quantized(plan, parts, base, wanted, dtype)
            notes.append(f"{label} was quantized on the fly, to nearest and without calibration")
        else:
            own = {*encoder_headers(model.folder), *({"vae"} if decoder_header(model.folder) else ())}
            label = f"dgq {model.header.recipe.label.removeprefix('integer ')}"
            simulated = 10.0 if model.header.method.simulated else PACKED
            _add(plan, parts, label, model.folder, dtype, own, simulated)
        rows, more = _measured(plan, parts, str(model.folder), Path(model.name).name, options, progress)
    return rows, [*notes, *more]


def _side(which: Architecture, parts: dict[str, Any], pixels: int | None) -> int:
    """Width and height of an architecture's pictures.

    Raises:
        DgqError: the pixels are not those of whole latents.
    """
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    side = pixels or which.pixels or factor * which.config.get("sample_size", 64)
    if side % factor or not 8 * factor <= side <= 4096:
        raise DgqError(
            f"pictures of {pixels} pixels cannot be drawn", f"give a multiple of {factor}, from {8 * factor} to 4096"
        )
    return int(side)


def _count(part: Any) -> int:
    return sum(value.numel() for value in part.parameters())


def _add_quantized(plan: Plan, parts: dict[str, Any], base: Path, wanted: PictureOptions, dtype: str) -> str:
    """Add the system that is quantized on the fly; returns its name."""
    wbits = wanted.bits or 4
    own = {
        name
        for name, part in parts.items()
        if family_of(part) in DECODERS or (wanted.text_encoder and family_of(part) in ENCODERS)
    }
    network = next(_count(part) for part in parts.values() if family_of(part) in FAMILIES)
    everything = sum(map(_count, parts.values()))
    stored = ((wbits / 8 + 0.1) * network + 2 * (everything - network)) / everything
    label = f"dgq W{wbits}A8" + (", text encoder int8" if wanted.text_encoder else "")
    folder = plan.file(
        f"dgq-w{wbits}a8" + ("-text" if wanted.text_encoder else ""),
        stored,
        "dgq pipeline",
        source=base,
        wbits=wbits,
        text_encoder=wanted.text_encoder,
    )
    _add(plan, parts, label, folder, dtype, own, PACKED)
    return label


def _add(
    plan: Plan, parts: dict[str, Any], label: str, folder: Path, dtype: str, int8: set[str], network: float
) -> None:
    """Add a dgq system whose activations are of a dtype.

    Args:
        int8: components that are quantized beside the network.
        network: bytes that a weight of the network takes.
    """
    itemsize = getattr(torch, dtype).itemsize
    taken = sum(
        _count(part) * (network if family_of(part) in FAMILIES else PACKED if name in int8 else itemsize)
        for name, part in parts.items()
    )
    each = taken / sum(map(_count, parts.values()))
    plan.systems.append(System(label, (plan.spec(plan.loaded, folder, dtype),), bytes_per_parameter=each))


def _measured(
    plan: Plan, parts: dict[str, Any], where: str, name: str, options: Options, progress: Progress
) -> tuple[list[Row], list[str]]:
    """The rows of a plan, whose files are written first."""
    assert plan.subject is not None
    settings = plan.subject.settings
    width, height, steps, guidance = (settings[key] for key in ("width", "height", "steps", "guidance"))
    size = replace(Size.of(*parts.values()), computed=DECODED * width * height)
    free = plan.check(size, where)
    notes = plan.write(progress)
    guided = f", guidance {guidance:g}" if guidance > 1 else ""
    case = f"{name} picture, {width} x {height}, {steps} step{'s' if steps > 1 else ''}{guided}"
    rows, more = measure(plan.systems, case, size, options.repeats, free, progress, "picture")
    return rows, [*notes, *more]
