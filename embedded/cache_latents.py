"""Encode the training pictures once: several jittered copies of every picture on every background.

Writes ``latents.pt``: float16 latents, already scaled to unit deviation, in one tensor (N, copies, 8, 8, 8) where
``copies`` counts the white copies first and then those on each colour.

    python -m embedded.cache_latents --work DIR [--white 4] [--colour 1]
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from embedded import images
from embedded.captions import BACKGROUNDS, Concept, read_concepts
from embedded.common import add_work_option, save_atomic

COLOURS = tuple(name for name in BACKGROUNDS if name != "white")


@dataclass
class Latents:
    """Cached latents: ``values`` is float16 (N, white + 10 * colour, C, H, W)."""

    values: Tensor
    white: int
    colour: int

    def pick(self, row: int, background: str, rng: random.Random) -> Tensor:
        """One copy of picture ``row`` on a background, (C, H, W) in float32."""
        if background == "white":
            copy = rng.randrange(self.white)
        else:
            copy = self.white + COLOURS.index(background) * self.colour + rng.randrange(self.colour)
        return self.values[row, copy].float()


def load_latents(work: Path) -> Latents:
    """Read what this script wrote."""
    return Latents(**torch.load(work / "latents.pt"))


def copy_backgrounds(white: int, colour: int) -> list[str]:
    """The background of each copy."""
    return ["white"] * white + [name for name in COLOURS for _ in range(colour)]


@torch.no_grad()
def encode_picture(
    vae: AutoencoderKL, rgba: Tensor, names: list[str], flips: bool, generator: torch.Generator
) -> Tensor:
    """Encode one master (4, 128, 128) once for each background name; returns scaled float16 (len(names), 8, 8, 8)."""
    count = len(names)
    flip = torch.rand(count, generator=generator) < (0.5 if flips else 0.0)
    master = rgba.expand(count, *rgba.shape)
    picture = images.render(master, images.background_rgb(names), flip, images.NARROW, generator)
    picture = picture.contiguous(memory_format=torch.channels_last)
    return (vae.encode(picture).latent_dist.mean * vae.config.scaling_factor).half()


def main() -> None:
    """Cache the latents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    parser.add_argument("--white", type=int, default=4)
    parser.add_argument("--colour", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    concepts: list[Concept] = read_concepts()
    masters = images.Masters(args.work, concepts)
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(memory_format=torch.channels_last).eval()
    generator, started = torch.Generator().manual_seed(0), time.monotonic()
    names = copy_backgrounds(args.white, args.colour)
    values = torch.stack(
        [
            encode_picture(vae, masters.rgba[row], names, concepts[index].flip, generator)
            for row, (index, _) in enumerate(masters.keys)
        ]
    )
    save_atomic({"values": values, "white": args.white, "colour": args.colour}, args.work / "latents.pt")
    rate = values.shape[0] * values.shape[1] / (time.monotonic() - started)
    print(f"wrote latents.pt {tuple(values.shape)}, {rate:.0f} images/s, deviation {float(values.float().std()):.3f}")


if __name__ == "__main__":
    main()
