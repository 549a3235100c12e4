"""Making pictures: checked settings, one seed a picture, PNG metadata."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checkpoint.reading import components, read_json
from ..errors import DgqError
from ..family import family_of, network_of
from ..outputs import atomic_file, claim
from .pipelines import Model, described
from .samplers import chosen, config_of, drawing_with, own_name

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """How pictures are made; None leaves a choice to the model's defaults.

    Attributes:
        steps: sampler steps.
        guidance: classifier-free guidance scale; 1 or less turns it off.
        negative: negative prompt.
        width, height: pixels.
        seed: seed of the first picture; picture i of a call takes seed + i.
        batch: pictures per call of the network.
        sampler: a name of `samplers.available`.
    """

    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int = 0
    batch: int = 1
    sampler: str | None = None

    def resolved(self, model: Model | Path, pictures: int = 1) -> Settings:
        """With steps and guidance filled in from the own defaults of a model, or of that in a folder; for so many
        pictures, each of which needs a seed.

        Raises:
            DgqError: a value out of range, or a sampler that the model does not have.
        """
        found = model if isinstance(model, Model) else described(model)
        defaults = found.generation
        steps = int(defaults["steps"]) if self.steps is None else self.steps
        guidance = float(defaults["guidance"]) if self.guidance is None else self.guidance
        checks = {
            "steps": (steps, 1, 1000),
            "guidance": (guidance, 0, 100),
            "batch": (self.batch, 1, 256),
            "seed": (self.seed, 0, MAX_SEED + 1 - pictures),
        }
        for name, (value, low, high) in checks.items():
            if not low <= value <= high:
                many = f" for {pictures} pictures" if name == "seed" and pictures > 1 else ""
                raise DgqError(f"{name} {value} is out of range ({low} to {high}{many})")
        check_text("the negative prompt", self.negative)
        sampler = self.sampler
        if sampler is not None:
            config = read_json(found.folder / "scheduler" / "scheduler_config.json")
            _, own = components(found.folder)["scheduler"]  # which diffusers goes by, whatever the other file says
            sampler = chosen({**config, "_class_name": own}, sampler)
        return replace(self, steps=steps, guidance=guidance, sampler=sampler)


@dataclass
class Picture:
    """One picture and how it was made."""

    image: Image.Image
    prompt: str
    seed: int
    parameters: str
    latents: Tensor = field(repr=False)

    def png(self) -> bytes:
        """The file that `save` writes."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", pnginfo=self._info(True))
        return buffer.getvalue()

    def _info(self, metadata: bool) -> PngInfo:
        info = PngInfo()
        if metadata:
            info.add_text("parameters", self.parameters)
        return info

    def save(self, path: Path, metadata: bool = True, keep: bool = False) -> Path:
        """Write a PNG; `metadata` adds the `parameters` text that web UIs read.

        Args:
            path: where, as `write_png` takes it.
            metadata: whether the settings go into the file.
            keep: as of `write_png`.

        Returns:
            The file that was written.

        Raises:
            DgqError: the file cannot be written.
        """
        return write_png(self.image, path, self._info(metadata), keep)


def write_png(image: Image.Image, path: Path, info: PngInfo | None = None, keep: bool = False) -> Path:
    """Write a PNG, whole or not at all.

    Args:
        image: the picture.
        path: where.
        info: texts for the file.
        keep: leave a file that is there, and number the new one: x.png, x-2.png, x-3.png.

    Returns:
        The file that was written.

    Raises:
        DgqError: the file cannot be written.
    """
    place = claim(path) if keep else path
    try:
        with atomic_file(place) as file:
            image.save(file, format="PNG", pnginfo=info)
    except BaseException:
        if keep:
            place.unlink(missing_ok=True)
        raise
    return place


def file_name(prompt: str, seed: int) -> str:
    """What a picture's file is called."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    return f"{slug}-{seed}.png"


def read_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels of a text N or WIDTHxHEIGHT.

    Raises:
        DgqError: it is neither.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text)
    if not match:
        raise DgqError(f"size {text!r} is neither N nor WIDTHxHEIGHT in pixels")
    return int(match[1]), int(match[2] or match[1])


def check_text(what: str, text: str) -> None:
    """Refuse what is no text: a NUL, or bytes that are not UTF-8.

    Raises:
        DgqError: naming the first such character.
    """
    if found := re.search("[\0\ud800-\udfff]", text):
        raise DgqError(f"{what} holds {found[0]!r} at character {found.start() + 1}", "it has to be text in UTF-8")


def check_prompts(pipe: Any, prompts: Sequence[str], negative: str = "") -> None:
    """Refuse prompts, and a negative one, that the text encoder cannot take.

    Raises:
        DgqError: an empty prompt, or one with more tokens than the model reads.
    """
    family = family_of(network_of(pipe))
    for prompt in prompts:
        if not prompt.strip():
            raise DgqError("the prompt is empty", "say what to draw")
    read = [("the prompt", prompt) for prompt in prompts] + [("the negative prompt", negative)] * bool(negative)
    for what, text in read:
        check_text(what, text)
        count, limit = family.prompt_tokens(pipe, text)
        if count > limit:
            raise DgqError(f"{what} has {count} tokens, the model reads {limit}: {text[:40]!r}...", f"shorten {what}")


def check_size(pipe: Any, settings: Settings) -> tuple[int, int]:
    """(width, height) in pixels.

    Raises:
        DgqError: a side is not divisible by what the model asks for, or out of range.
    """
    family = family_of(network_of(pipe))
    factor, (columns, rows) = family.size_factor(pipe), family.default_size(pipe)
    width = columns if settings.width is None else settings.width
    height = rows if settings.height is None else settings.height
    for name, value in (("width", width), ("height", height)):
        if value % factor or not factor <= value <= 4096:
            raise DgqError(f"{name} {value} must be a multiple of {factor}, from {factor} to 4096")
    return width, height


def generate(
    pipe: Any,
    prompts: Sequence[str],
    settings: Settings,
    *,
    label: str = "float",
    name: str = "",
    fields: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    made: Callable[[Picture], None] | None = None,
) -> list[Picture]:
    """Make one picture a prompt.

    Picture i comes from a fresh CPU generator seeded with seed + i, which draws in float32, so it does not depend (but
    for rounding) on the batch it is made in, on the device or on the pipeline's dtype.

    Args:
        pipe: a text-to-image pipeline.
        prompts: what to draw.
        settings: resolved settings (`Settings.resolved`).
        label: the recipe, for the metadata.
        name: the model's name, for the metadata.
        fields: of the metadata, beside its own.
        progress: called after every sampler step with (done, total) steps over all batches.
        made: called with each picture once its batch is done, whatever becomes of later ones.

    Raises:
        DgqError: a bad prompt or size, a pipeline that draws from more than a prompt, or a picture with values that are
            not finite.
    """
    network = network_of(pipe)
    family_of(network).check_configs(network.config, pipe.vae.config)
    check_prompts(pipe, prompts, settings.negative)
    width, height = check_size(pipe, settings)
    assert settings.steps is not None
    assert settings.guidance is not None
    drawn_by = {"Model": name, "Quantization": label, **(fields or {})}
    batches = [range(i, min(i + settings.batch, len(prompts))) for i in range(0, len(prompts), settings.batch)]
    total = settings.steps * len(batches)
    pictures: list[Picture] = []
    for number, batch in enumerate(batches):
        seeds = [settings.seed + i for i in batch]

        def on_step(step: int, first: int = number * settings.steps, steps: int = settings.steps) -> None:
            if progress:  # some samplers call the network more often than they have steps
                progress(first + -(-step * steps // len(pipe.scheduler.timesteps)), total)

        latents = _sample(pipe, [prompts[i] for i in batch], seeds, settings, width, height, on_step)
        for i, seed, latent, image in zip(batch, seeds, latents, decode(pipe, latents, width, height), strict=True):
            text = _parameters(pipe, prompts[i], settings, seed, width, height, drawn_by)
            pictures.append(Picture(image, prompts[i], seed, text, latent))
        if made:
            for picture in pictures[batch.start :]:
                made(picture)
    return pictures


def draw_latents(pipe: Any, prompt: str, settings: Settings) -> Tensor:
    """The final latents of the picture that `generate` makes of one prompt, which is not decoded.

    Raises:
        DgqError: a bad size, or latents that are not finite.
    """
    width, height = check_size(pipe, settings)
    return _sample(pipe, [prompt], [settings.seed % (MAX_SEED + 1)], settings, width, height, lambda step: None)


class _Float32Noise(TorchFunctionMode):
    """Draws in float32 and rounds what is asked for in half precision: there torch makes other numbers of a generator,
    and other ones in each of its versions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if func is torch.randn and dtype in (torch.float16, torch.bfloat16):
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(dtype)
        return func(*args, **kwargs)


@contextmanager
def _noise_in_float32(scheduler: Any) -> Iterator[None]:
    """Let a scheduler draw the noise of its steps (an ancestral one, DDPM, LCM) by `_Float32Noise`."""
    plain = scheduler.step

    @functools.wraps(plain)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        with _Float32Noise():
            return plain(*args, **kwargs)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def start_noise(pipe: Any, generators: Sequence[torch.Generator], width: int, height: int) -> Tensor:
    """What sampling starts from in the network's dtype on the CPU, as the pipeline takes it: sample i drawn from
    generator i.

    In float32 these are the numbers that diffusers' own pipelines draw from the generators.
    """
    network = network_of(pipe)
    family = family_of(network)
    shape = (1, *family.latent_shape(pipe, width, height))
    samples = [torch.randn(shape, generator=one, dtype=torch.float32, device="cpu") for one in generators]
    return family.packed(pipe, torch.cat(samples)).to(network.dtype)


@torch.no_grad()
def _sample(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    width: int,
    height: int,
    on_step: Callable[[int], None],
) -> Tensor:
    """Final latents of one batch, as the pipeline returns them."""
    family = family_of(network_of(pipe))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with drawing_with(pipe, settings.sampler), _noise_in_float32(pipe.scheduler):
        latents = pipe(
            **family.pipeline_arguments(prompts, settings.negative, settings.guidance or 0.0),
            num_inference_steps=settings.steps,
            width=width,
            height=height,
            generator=generators,
            latents=start_noise(pipe, generators, width, height),
            output_type="latent",
            **family.step_callback(pipe, on_step),
        ).images
    if not bool(torch.isfinite(latents).all()):
        raise DgqError("the picture is not finite", "calibrate again, or use the float model")
    return latents


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, width: int, height: int) -> list[Image.Image]:
    """Pictures, of this size, of latents as the pipeline returns them."""
    family = family_of(network_of(pipe))
    pixels = family.decode(pipe, family.unpacked(pipe, latents, width, height))
    if not bool(torch.isfinite(pixels).all()):
        raise DgqError("the decoder's picture is not finite", "load the pipeline in float32")
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def _parameters(
    pipe: Any, prompt: str, settings: Settings, seed: int, width: int, height: int, drawn_by: Mapping[str, str]
) -> str:
    """The A1111 form of the `parameters` text, with the model, its quantization and what is on it at the end."""
    fields = {
        "Steps": settings.steps,
        "Sampler": settings.sampler or own_name(config_of(pipe)),
        "CFG scale": settings.guidance,
        "Seed": seed,
        "Size": f"{width}x{height}",
        **drawn_by,
    }
    negative = f"Negative prompt: {settings.negative}\n" if settings.negative else ""
    written = {key: _field(str(value)) for key, value in fields.items() if value != ""}
    return f"{prompt}\n{negative}" + ", ".join(f"{key}: {value}" for key, value in written.items())


def _field(value: str) -> str:
    """In quotation marks where its own commas and colons would be taken for those between fields, as A1111 does."""
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def grid(images: Sequence[Image.Image], columns: int | None = None, scale: int = 1, gap: int = 4) -> Image.Image:
    """Pictures of one size side by side on white, `columns` a row (default: about square)."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        place = (gap + column * (width + gap), gap + row * (height + gap))
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), place)
    return sheet
