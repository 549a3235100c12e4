"""From pictures of a subject to a file of tuned scales: the work behind `dgq tune`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..checkpoint.reading import read_header
from ..devices import check_device
from ..errors import DgqError
from ..family import family_of, network_of
from ..outputs import check_output, workplace
from ..pictures import embedded
from ..pictures.generation import (
    MAX_SEED,
    Settings,
    check_prompts,
    check_size,
    generate,
    write_png,
)
from ..pictures.pipelines import load, resolve
from ..progress import Progress, silent
from ..version import __version__
from .apply import attach, unload_tuned
from .file import MAX_EXPERTS, Base, Description, Subject, Tuned, content_hash, write
from .forward import Experts, differentiable
from .layout import Layout
from .objective import Item, Objective, Texts, encode_pictures, encode_texts
from .pictures import read_subject
from .state import State

LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
LR_SCHEDULERS: tuple[str, ...] = LrScheduler.__args__  # type: ignore[attr-defined]
# What `mixed_precision` asks for; float16 has no room for small gradients.
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


# options that change nothing of the result
_INCIDENTAL = ("validation_prompts", "validate_every", "checkpoint_every", "device", "resume", "overwrite")


@dataclass(frozen=True)
class Options:
    """How scales are tuned. The learning rate is of their relative changes: 0.001 moves a scale by a thousandth of
    itself a step, at first.

    Attributes:
        steps: optimizer steps.
        learning_rate, lr_scheduler, lr_warmup_steps: of AdamW without weight decay; a schedule of diffusers.
        batch: pictures a forward pass, as many class pictures beside them where there is a class prompt.
        gradient_accumulation: forward passes a step.
        gradient_checkpointing: make activations anew in the backward pass: up to twice the time, much less memory.
        mixed_precision: of activations, "bf16" or "no" (float32); None: "bf16" on CUDA. Scales are float32 either way.
        max_grad_norm: gradients are scaled down to this norm.
        resolution: pixels of a side; None: the model's own.
        experts: sets of scales, each for an equal part of the timesteps.
        high_noise_strength: of the last expert's changes in the file, which has the most noise; the first's is 1, and
            those between lie evenly between. Layout and background are decided there: at 1 those of the pictures
            prevail over the prompt's.
        input_scales: tune input scales too; without them and with one expert it is PEQA.
        class_prompts: of prior preservation: none, one for all subjects, or one each.
        class_images: pictures that are drawn for each class prompt.
        prior_weight: of their loss.
        snr_gamma: of min-SNR weights; None: equal ones.
        validation_prompts, validate_every: pictures drawn on the way, beside the file; 0: only at the end.
        checkpoint_every: steps after which an interrupted run can go on; 0: never.
        seed: of everything random.
        device: default CUDA where there is one, else CPU.
        resume: go on from an interrupted run of the same settings.
        overwrite: replace a file that is there.
    """

    steps: int = 400
    learning_rate: float = 0.01
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    batch: int = 4
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str | None = None
    max_grad_norm: float = 1.0
    resolution: int | None = None
    experts: int = 2
    high_noise_strength: float = 0.5
    input_scales: bool = True
    class_prompts: Sequence[str] = ()
    class_images: int = 20
    prior_weight: float = 1.0
    snr_gamma: float | None = None
    validation_prompts: Sequence[str] = ()
    validate_every: int = 0
    checkpoint_every: int = 50
    seed: int = 0
    device: str | None = None
    resume: bool = False
    overwrite: bool = False

    def check(self, subjects: int) -> None:
        """Raises DgqError: a value out of range, or class prompts for another number of subjects."""
        ranges = {
            "steps": (1, 10**6),
            "learning_rate": (0, 10),
            "lr_warmup_steps": (0, 10**6),
            "batch": (1, 256),
            "gradient_accumulation": (1, 1024),
            "max_grad_norm": (1e-9, 1e9),
            "experts": (1, MAX_EXPERTS),
            "high_noise_strength": (0, 1),
            "class_images": (1, 10**4),
            "prior_weight": (0, 1000),
            "validate_every": (0, 10**6),
            "checkpoint_every": (0, 10**6),
            "seed": (0, MAX_SEED),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise DgqError(f"{name} {value} is out of range ({low} to {high})")
        if self.snr_gamma is not None and not 0 < self.snr_gamma <= 1000:
            raise DgqError(f"snr_gamma {self.snr_gamma} is out of range (above 0, to 1000)")
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise DgqError(f"lr_scheduler {self.lr_scheduler!r} is not one of {', '.join(LR_SCHEDULERS)}")
        if self.mixed_precision is not None and self.mixed_precision not in DTYPES:
            raise DgqError(
                f"mixed_precision {self.mixed_precision!r} is not one of {', '.join(DTYPES)}",
                "float16 has no room for small gradients" if self.mixed_precision == "fp16" else None,
            )
        if len(self.class_prompts) not in (0, 1, subjects):
            raise DgqError(f"{len(self.class_prompts)} class prompts for {subjects} subjects", "give one, or one each")

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on."""
        data = {**dataclasses.asdict(self), "class_prompts": list(self.class_prompts)}
        return {name: value for name, value in data.items() if name not in _INCIDENTAL}


def tune(
    checkpoint: str | os.PathLike[str],
    subjects: Sequence[tuple[Path, str]],
    out: Path,
    options: Options | None = None,
    progress: Progress = silent,
) -> Description:
    """Tune the scales of an integer checkpoint on pictures of subjects, and write them to a file.

    Args:
        checkpoint: folder or hub id.
        subjects: (folder of pictures, prompt), at least one.
        out: the file.
        options: how.
        progress: told of the stages "class", "encode", "tune" (with the loss), "validate" and "save"; and of "resume"
            where a file of an interrupted run cannot be used.

    Returns:
        What the file says of itself.

    Raises:
        DgqError: bad input; a place where nothing can be written; a loss that is not finite: the file then holds the
            last state before it. An interrupted run leaves a hidden `.partial` folder beside `out` that `resume`
            goes on from.
    """
    options = options or Options()
    options.check(len(subjects))
    if not subjects:
        raise DgqError("nothing to tune on", "give a folder of pictures and a prompt")
    pictures = [read_subject(folder) for folder, _ in subjects]
    folder = resolve(checkpoint)
    header = read_header(folder)
    if header is None or not header.layers:
        raise DgqError(
            f"{folder}: is no integer checkpoint, so it has no scales to tune",
            "make one: dgq calibrate MODEL --out DIR",
        )
    device = check_device(options.device)
    check_output(out, options.overwrite)
    with workplace(out) as work:
        precision = options.mixed_precision or ("bf16" if device.type == "cuda" else "no")
        pipe = load(folder, device=device, dtype=DTYPES[precision], graph=False)
        name = embedded.NAME if header.base_model in ("", embedded.NAME) else header.base_model
        base = Base(name, header.recipe.label, content_hash(pipe.unet))
        run = _Run(pipe, folder, base, subjects, pictures, out, options, State(work, progress), progress)
        about = run.go()
        run.state.remove()
    progress("save", 1, 1, str(out))
    return about


class _Run:
    """One run of `tune`, in the place that it works in."""

    def __init__(
        self,
        pipe: Any,
        folder: Path,
        base: Base,
        subjects: Sequence[tuple[Path, str]],
        pictures: Sequence[Sequence[Image.Image]],
        out: Path,
        options: Options,
        state: State,
        progress: Progress,
    ) -> None:
        self.pipe, self.folder, self.base, self.out, self.options = pipe, folder, base, out, options
        self.subjects, self.pictures, self.state, self.progress = subjects, pictures, state, progress
        family = family_of(network_of(pipe))
        if not family.tuned:
            raise DgqError(f"a {family.title} cannot be tuned yet", "dgq tune works on UNet2DConditionModel")
        family.check_configs(pipe.unet.config, pipe.vae.config)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise DgqError(
                "the UNet is distilled to few steps (LCM), which tuning would undo", "tune the model it was made of"
            )
        side = options.resolution
        self.width, self.height = check_size(pipe, Settings(width=side, height=side))
        prompts = [prompt for _, prompt in subjects]
        check_prompts(pipe, [*prompts, *options.class_prompts, *options.validation_prompts])
        self.layout = Layout.of(pipe.unet, options.input_scales)
        each = options.class_prompts or [""]
        self.class_prompts = list(each) * len(subjects) if len(each) == 1 else list(each)
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """Of everything that the result depends on."""
        digest = hashlib.sha256()
        parts = [
            __version__,
            self.base.content,
            [prompt for _, prompt in self.subjects],
            self.options.to_dict(),
            self.width,
        ]
        digest.update(json.dumps(parts, sort_keys=True).encode())
        for images in self.pictures:
            for image in images:
                digest.update(f"{image.size}".encode())
                digest.update(image.tobytes())
        return digest.hexdigest()

    def go(self) -> Description:
        self.state.start(self.fingerprint, self.options.resume)
        classes = self._class_pictures()
        instances, priors, texts = self._encode(classes)
        objective = Objective(self.pipe, texts, self.options.snr_gamma, self.options.prior_weight)
        if not self.options.validation_prompts:  # nothing is drawn or encoded any more
            for name, part in self.pipe.components.items():
                if isinstance(part, torch.nn.Module) and part is not self.pipe.unet:
                    setattr(self.pipe, name, None)
        device = self.pipe.unet.device
        self.experts = Experts(self.layout, self.options.experts, objective.timesteps, device)
        self.optimizer = torch.optim.AdamW(self.experts.vectors, lr=self.options.learning_rate, weight_decay=0.0)
        self.objective, self.instances, self.priors = objective, instances, priors
        self.classes = {prompt: len(images) for prompt, images in classes.items()}
        done = self.state.load(self.experts.vectors, self.optimizer) if self.options.resume else 0
        with _frozen(self.pipe):
            self._steps(done)
        about = self._write(self.options.steps)
        if self.options.validation_prompts and not self._validates(self.options.steps):
            self._validate(self.options.steps)
        return about

    def _settings(self, seed: int) -> Settings:
        return Settings(width=self.width, height=self.height, seed=seed).resolved(self.folder)

    def _class_pictures(self) -> dict[str, list[Image.Image]]:
        """Prior preservation's pictures of each class prompt, drawn by the checkpoint as it is."""
        prompts = list(dict.fromkeys(filter(None, self.class_prompts)))
        found: dict[str, list[Image.Image]] = {prompt: [] for prompt in prompts}
        count = self.options.class_images
        for i, prompt in enumerate(prompts):
            for j in range(count):
                number = i * count + j
                image = self.state.class_picture(number)
                if image is None:
                    settings = self._settings((self.options.seed + number) % MAX_SEED)
                    image = generate(self.pipe, [prompt], settings)[0].image
                    self.state.store_class_picture(number, image)
                found[prompt].append(image)
                self.progress("class", number + 1, count * len(prompts), prompt)
        return found

    def _encode(self, classes: dict[str, list[Image.Image]]) -> tuple[list[Item], list[Item], Texts]:
        """What VAE and text encoders make of pictures and prompts, once."""
        prompts = [prompt for _, prompt in self.subjects]
        texts = encode_texts(self.pipe, [*prompts, *classes], self.width, self.height)
        groups = [*self.pictures, *classes.values()]
        total, items = sum(map(len, groups)), []
        for number, images in enumerate(groups):
            items.append(encode_pictures(self.pipe, images, number, self.width, self.height))
            self.progress("encode", sum(map(len, items)), total, "")
        split = len(self.subjects)
        return [i for group in items[:split] for i in group], [i for group in items[split:] for i in group], texts

    def _steps(self, done: int) -> None:
        """Optimizer steps done + 1 to the last; validation and checkpoints between them."""
        options = self.options
        if done and self._validates(done):  # the run that got so far may have ended before it had drawn
            self._validate(done)
        while done < options.steps:
            boundaries = [options.steps]
            for every in (options.checkpoint_every, options.validate_every if options.validation_prompts else 0):
                if every:
                    boundaries.append((done // every + 1) * every)
            stop = min(boundaries)
            with differentiable(self.pipe.unet, self.experts, options.gradient_checkpointing):
                for step in range(done, stop):
                    self._step(step)
            done = stop
            if options.checkpoint_every and (done % options.checkpoint_every == 0 or done == options.steps):
                self.state.store(done, self.experts.vectors, self.optimizer)
            if self._validates(done):
                self._validate(done)

    def _step(self, step: int) -> None:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(options, step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in range(options.gradient_accumulation):
            number = step * options.gradient_accumulation + part
            items = batch_of(self.instances, number, options.batch, options.seed, 0)
            items += batch_of(self.priors, number, options.batch, options.seed, 1)
            latents, noise, times = self.objective.draw(items, generator(options.seed, 2, number))
            self.experts.choose(times.tolist())
            loss = self.objective.loss(items, options.batch, latents, noise, times) / options.gradient_accumulation
            self._check(step, float(loss.detach()), "loss")
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.experts.vectors, options.max_grad_norm)
        self._check(step, float(norm), "gradient")
        self.optimizer.step()
        self.progress("tune", step + 1, options.steps, f"loss {total:.4f}")

    def _check(self, step: int, value: float, what: str) -> None:
        """Refuse to go on from a value that is not finite; nothing of it is in the scales yet."""
        if value - value == 0:
            return
        hint = "lower --learning-rate"
        if step:
            self._write(step)
            hint = f"{self.out} holds the state after step {step}; {hint}"
        raise DgqError(f"the {what} of step {step + 1} is not finite ({value})", hint)

    def _tuned(self, steps: int) -> Tuned:
        subjects = [
            Subject(prompt, len(images), of, self.classes.get(of, 0))
            for (_, prompt), images, of in zip(self.subjects, self.pictures, self.class_prompts, strict=True)
        ]
        about = Description(
            self.base,
            self.options.experts,
            self.objective.timesteps,
            self.options.input_scales,
            subjects,
            steps,
            {**self.options.to_dict(), "resolution": [self.width, self.height]},
        )
        changes = torch.stack([vector.detach() for vector in self.experts.vectors]).float().cpu()
        return Tuned(about, changes * torch.linspace(1, self.options.high_noise_strength, len(changes))[:, None])

    def _write(self, steps: int) -> Description:
        tuned = self._tuned(steps)
        write(self.out, tuned, self.layout)
        return tuned.about

    def _validates(self, step: int) -> bool:
        every = self.options.validate_every
        return bool(self.options.validation_prompts and every and step % every == 0)

    def _validate(self, step: int) -> None:
        """Draw the validation prompts as the tuned checkpoint would now, beside the file."""
        attach(self.pipe, "validation", self._tuned(step))
        try:
            prompts = self.options.validation_prompts
            for i, prompt in enumerate(prompts):
                picture = generate(self.pipe, [prompt], self._settings((self.options.seed + i) % MAX_SEED))[0]
                file = self.out.with_name(f"{self.out.stem}-step{step}-{i + 1}.png")
                write_png(picture.image, file)
                self.progress("validate", i + 1, len(prompts), str(file))
        finally:
            unload_tuned(self.pipe, "validation")


def batch_of(items: Sequence[Item], number: int, size: int, seed: int, stream: int) -> list[Item]:
    """The items of a forward pass, none where there are none: each once, in an order of its own, before any comes
    again."""
    chosen = []
    for place in range(number * size, (number + 1) * size) if items else ():
        epoch, index = divmod(place, len(items))
        order = torch.randperm(len(items), generator=generator(seed, stream, epoch))
        chosen.append(items[int(order[index])])
    return chosen


def generator(seed: int, stream: int, number: int) -> torch.Generator:
    """Random numbers of one purpose and place alone: a run that is resumed draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % MAX_SEED)


def _rate(options: Options, step: int) -> float:
    """The schedule's factor of the learning rate."""
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        options.lr_scheduler, dummy, num_warmup_steps=options.lr_warmup_steps, num_training_steps=options.steps
    )
    return float(schedule.lr_lambdas[0](step))


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    """The pipeline's networks without gradients of their own, for the block."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    trainable = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
