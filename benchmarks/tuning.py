"""Personalisation by scales: subjects that no model here ever saw, tuned and judged.

    python benchmarks/tuning.py --checkpoint DIR --out build/tuning

tunes, draws and judges dgq's scales (two experts), PEQA, and on the float model DreamBooth and a LoRA of rank 4, which
share objective, batches and noise. A line of JSON for each in rows.jsonl, a strip of pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from dgq.evaluation.features import efficientnet_available, efficientnet_features
from dgq.evaluation.scorer import Scorer
from dgq.pictures import embedded
from dgq.pictures.generation import Settings, check_size, generate, grid
from dgq.pictures.pipelines import load
from dgq.tuning.apply import load_tuned
from dgq.tuning.objective import Objective, encode_pictures, encode_texts
from dgq.tuning.pictures import read_subject
from dgq.tuning.train import Options, batch_of, generator, tune

BACKGROUNDS = {
    "white": (255, 255, 255), "red": (222, 60, 56), "orange": (246, 150, 52), "yellow": (250, 216, 82),
    "green": (88, 178, 92), "blue": (76, 138, 230), "purple": (148, 98, 206), "pink": (250, 170, 202),
    "brown": (140, 96, 64), "grey": (150, 150, 150), "black": (22, 22, 22),
}  # fmt: skip
SIDE, SCALE = 64, 8  # pixels of a picture, and how much larger it is drawn


def _canvas(background: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), BACKGROUNDS[background])
    return image, ImageDraw.Draw(image)


def _box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
    return ((x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE)


def blob(background: str, dx: float, dy: float, size: float) -> Image.Image:
    """A teal creature with one eye, two orange horns and a striped belly."""
    image, draw = _canvas(background)

    def oval(x: float, y: float, rx: float, ry: float, colour: str) -> None:
        draw.ellipse(_box(32 + dx + (x - 32) * size, 32 + dy + (y - 32) * size, rx * size, ry * size), colour)

    def polygon(points: list[tuple[float, float]], colour: str) -> None:
        moved = [(32 + dx + (x - 32) * size, 32 + dy + (y - 32) * size) for x, y in points]
        draw.polygon([(x * SCALE, y * SCALE) for x, y in moved], colour)

    for side in (-1, 1):
        polygon([(32 + side * 8, 18), (32 + side * 20, 4), (32 + side * 16, 22)], "#f28c1e")
        oval(32 + side * 9, 56, 6, 4, "#0f6f6a")
    oval(32, 36, 20, 21, "#18a89f")
    oval(32, 45, 12, 10, "#d7f3e3")
    for y in (41, 46, 51):
        oval(32, y, 9 - abs(y - 46) / 2, 1.2, "#e0489a")
    oval(32, 27, 9, 9, "#ffffff")
    oval(32, 28, 5, 5, "#3b2a7a")
    oval(34, 26, 1.6, 1.6, "#ffffff")
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def kite(background: str, dx: float, dy: float, size: float) -> Image.Image:
    """A kite of four coloured quarters with a face and a tail of bows."""
    image, draw = _canvas(background)

    def at(x: float, y: float) -> tuple[float, float]:
        return ((32 + dx + (x - 32) * size) * SCALE, (32 + dy + (y - 32) * size) * SCALE)

    top, bottom, left, right, middle = at(32, 4), at(32, 48), at(13, 22), at(51, 22), at(32, 22)
    for points, colour in (
        ((top, left, middle), "#ff4f6d"), ((top, right, middle), "#ffc93c"),
        ((bottom, left, middle), "#3fc1c9"), ((bottom, right, middle), "#7a4fd0"),
    ):  # fmt: skip
        draw.polygon(points, colour)
    for x in (26, 38):
        draw.ellipse((*at(x - 2.5, 17), *at(x + 2.5, 23)), "#202030")
    draw.arc((*at(25, 18), *at(39, 32)), 20, 160, "#202030", round(2 * SCALE * size))
    for i, colour in enumerate(("#ff4f6d", "#ffc93c", "#3fc1c9")):
        x, y = 32 + 5 * math.sin(1.8 * i + 1), 51 + 4.2 * i
        draw.polygon([at(x - 4, y - 2), at(x, y), at(x - 4, y + 2)], colour)
        draw.polygon([at(x + 4, y - 2), at(x, y), at(x + 4, y + 2)], colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


SUBJECTS = {"blob": (blob, "sks creature"), "kite": (kite, "zwx kite")}
TRAINING = (
    ("white", 0, 0, 1.0), ("yellow", 2, 1, 0.95), ("grey", -2, 1, 1.0), ("red", 1, -1, 0.9), ("black", 0, 2, 0.95),
)  # fmt: skip
HELD_OUT = tuple((name, 0, 0, 0.97) for name in ("white", "blue", "green", "purple", "pink", "orange"))


def pictures(name: str, which: tuple[tuple[str, float, float, float], ...]) -> list[Image.Image]:
    """A subject on backgrounds, moved and scaled."""
    return [SUBJECTS[name][0](*one) for one in which]


# The float baselines run the same objective, batches and noise as `dgq tune`: other parameters are trained.
FLOAT_RATES = {"dreambooth": 2e-4, "lora": 2e-3}


def tune_float(kind: str, pairs: list[tuple[Path, str]], steps: int, rate: float, seed: int) -> tuple[Any, int]:
    """The embedded float pipeline with its UNet trained whole ("dreambooth") or by a LoRA of rank 4 on its attention
    layers ("lora"), and the bytes in float16 of what was trained."""
    pipe = load(None, device="cpu", dtype=torch.float32)
    unet = pipe.unet
    if kind == "lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    width, height = check_size(pipe, Settings())
    texts = encode_texts(pipe, [prompt for _, prompt in pairs], width, height)
    items = [
        item
        for number, (folder, _) in enumerate(pairs)
        for item in encode_pictures(pipe, read_subject(folder), number, width, height)
    ]
    objective = Objective(pipe, texts, None, 1.0)
    batch = Options().batch
    for step in range(steps):
        chosen = batch_of(items, step, batch, seed, 0)
        latents, noise, times = objective.draw(chosen, generator(seed, 2, step))
        optimizer.zero_grad(set_to_none=True)
        objective.loss(chosen, batch, latents, noise, times).backward()
        torch.nn.utils.clip_grad_norm_(parameters, Options().max_grad_norm)
        optimizer.step()
    return pipe, 2 * sum(parameter.numel() for parameter in parameters)


class Judge:
    """How much pictures look like a subject, and whether they have the background that was asked for."""

    def __init__(self, name: str) -> None:
        self.scorer = Scorer()
        real = pictures(name, HELD_OUT)
        self.networks = ["scorer", *(["efficientnet"] if efficientnet_available() else [])]
        self.real = {network: self.features(real, network) for network in self.networks}

    def features(self, images: list[Image.Image], network: str) -> torch.Tensor:
        """Unit features (N, d)."""
        found = self.scorer(images)[3] if network == "scorer" else efficientnet_features(images)
        return torch.nn.functional.normalize(found, dim=1)

    def __call__(self, images: list[Image.Image], asked: list[str]) -> dict[str, float]:
        found = {
            network: float((self.features(images, network) @ real.t()).mean()) for network, real in self.real.items()
        }
        names = [self.scorer.backgrounds[int(row.argmax())] for row in self.scorer(images)[2]]
        hits = [name == wanted for name, wanted in zip(names, asked, strict=True)]
        return {**found, "background": sum(hits) / len(hits)}

    def ceiling(self) -> dict[str, float]:
        """Of real pictures to each other, without each to itself."""
        found = {}
        for key, real in self.real.items():
            table = real @ real.t()
            found[key] = float((table.sum() - table.trace()) / (len(real) * (len(real) - 1)))
        return found


ASKED = ("white", "blue", "green", "purple", "pink", "orange")


def draw_and_judge(pipe: Any, judge: Judge, noun: str, seeds: int) -> tuple[dict[str, float], list[Image.Image]]:
    """Pictures of the subject on backgrounds that training did not show, but for white."""
    prompts = [
        f"a picture of a {noun}" + ("" if background == "white" else f" on a {background} background")
        for background in ASKED
    ]
    images, asked = [], []
    for seed in range(seeds):
        settings = Settings(seed=1000 * seed, batch=len(prompts)).resolved(embedded.FOLDER)
        images += [picture.image for picture in generate(pipe, prompts, settings)]
        asked += ASKED
    return judge(images, asked), images[: len(ASKED)]


def memory() -> int:
    """The process's peak of resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(system: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one system on one subject, draw and judge: in a process of its own, so that memory is its own."""
    folder, noun = arguments.out / "subjects" / name, SUBJECTS[name][1]
    judge, pairs = Judge(name), [(folder, f"a picture of a {noun}")]
    file = arguments.out / f"{name}-{system}.safetensors"
    begin, size = time.process_time(), 0
    before = memory()
    if system in ("untuned", "tuneqdm", "peqa"):
        kinds = {"tuneqdm": {}, "peqa": {"experts": 1, "input_scales": False}}
        if system in kinds:
            options = Options(steps=arguments.steps, seed=arguments.seed, overwrite=True, **kinds[system])
            tune(arguments.checkpoint, pairs, file, options)
            size = file.stat().st_size
        spent, peak = time.process_time() - begin, memory() - before
        pipe = load(arguments.checkpoint, device="cpu")
        if system in kinds:
            load_tuned(pipe, file)
    else:
        pipe, size = tune_float(system, pairs, arguments.steps, FLOAT_RATES[system], arguments.seed)
        spent, peak = time.process_time() - begin, memory() - before
    found, images = draw_and_judge(pipe, judge, noun, arguments.seeds)
    grid(images, len(images), 1).save(arguments.out / f"{name}-{system}.png")
    row = {"system": system, "subject": name, **found, "cpu_seconds": round(spent), "bytes": size, "peak_bytes": peak}
    return {**row, **{f"real_{key}": value for key, value in judge.ceiling().items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", default="untuned,tuneqdm,peqa,dreambooth,lora")
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--steps", type=int, default=Options().steps)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = arguments.out / "rows.jsonl"
    for name in arguments.subjects.split(","):
        folder = arguments.out / "subjects" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(pictures(name, TRAINING)):
            image.save(folder / f"{number}.png")
        for system in arguments.systems.split(","):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(one, (system, name, arguments))
            print(json.dumps(row), flush=True)
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
