"""Train the autoencoder: 64 px pictures to 8x8 latents of 8 channels and back.

L1 + MSE + edges at three scales + a small KL term; AdamW with warm-up and cosine; averaged weights. Resumes from
its newest checkpoint. When the last step is done, ``vae/`` (a diffusers folder) is written with the scale that
brings the latents to unit deviation. ``--decoder-only`` continues from ``vae/`` with the encoder frozen, so that
cached latents stay valid.

    python -m embedded.train_vae --work DIR [--steps N] [--decoder-only] [--init-from FOLDER]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dgq.pictures.fidelity import psnr
from embedded import images
from embedded.captions import BACKGROUNDS, COMMON_WEIGHT, Concept, read_concepts, style_held_out
from embedded.common import (
    Log,
    Stop,
    add_training_options,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    warm_cosine,
)
from embedded.parallel import AdamOptions, Batch, Parallel, Part

LATENT_CHANNELS = 8
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5
COLOUR_WEIGHT = 0.7
EMA = 0.995
WARMUP = 200
EVAL_EVERY = 500
P_WHITE = 0.4


def build_vae(channels: tuple[int, ...] = (16, 32, 64, 128), latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """A light f=8 autoencoder without attention; starts with nearly noiseless latents."""
    levels = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=images.IMAGE_PX,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[latent_channels:] = -5.0
    return vae


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a work folder's ``vae/`` or of an exported pipeline, in single precision."""
    subfolder = "vae" if (folder / "vae").is_dir() else None
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder, subfolder=subfolder, torch_dtype=torch.float32)
    return vae


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 between horizontal and vertical differences of (B, 3, H, W) pictures at three scales."""
    error = output - target
    total = error.new_zeros(())
    for _ in range(3):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total


def colour_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 between red-green and blue-yellow differences of (B, 3, H, W) pictures, and MSE of their 8x8 thumbnails.

    Without it the second colour axis takes thousands of steps to appear.
    """
    red, green, blue = (output - target).unbind(dim=1)
    axes = (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()
    return axes + 2 * F.mse_loss(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))


def vae_loss(vae: AutoencoderKL, target: Tensor, noise: Tensor, frozen_encoder: bool) -> Tensor:
    """Training loss for pictures (B, 3, 64, 64); ``noise`` has the latents' shape (B, 8, 8, 8)."""
    with torch.set_grad_enabled(not frozen_encoder):
        posterior = vae.encode(target).latent_dist
        latents = posterior.mean + posterior.std * noise
    output = vae.decode(latents).sample
    loss = F.l1_loss(output, target) + F.mse_loss(output, target)
    loss = loss + EDGE_WEIGHT * edge_loss(output, target) + COLOUR_WEIGHT * colour_loss(output, target)
    return loss + KL_WEIGHT * posterior.kl().mean()


class Data:
    """Random training pictures, and a fixed held-out set."""

    def __init__(self, masters: images.Masters, concepts: list[Concept]) -> None:
        self.masters = masters
        held = [style_held_out(concepts[index], style) for index, style in masters.keys]
        self.train_rows = [row for row, out in enumerate(held) if not out]
        self.test_rows = [row for row, out in enumerate(held) if out]
        self.weights = [COMMON_WEIGHT if concepts[masters.keys[row][0]].common else 1 for row in self.train_rows]
        self.colours = [name for name in BACKGROUNDS if name != "white"]

    def batch(self, size: int, rng: random.Random, generator: torch.Generator) -> Tensor:
        """Random pictures (size, 3, 64, 64)."""
        rows = rng.choices(self.train_rows, self.weights, k=size)
        names = ["white" if rng.random() < P_WHITE else rng.choice(self.colours) for _ in rows]
        flip = torch.tensor([rng.random() < 0.5 for _ in rows])
        background = images.background_rgb(names)
        return images.render(self.masters.rgba[rows], background, flip, images.WIDE, generator)

    def held_out(self) -> Tensor:
        """Every held-out picture, half on white and half on colours."""
        rows = self.test_rows
        names = ["white" if i % 2 == 0 else self.colours[i // 2 % len(self.colours)] for i in range(len(rows))]
        flip = torch.zeros(len(rows), dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        return images.render(self.masters.rgba[rows], images.background_rgb(names), flip, images.CENTRED, generator)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor, batch: int = 16) -> Tensor:
    """Decode the mean latents of pictures."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(batch)]
    return torch.cat(parts)


def evaluate(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR over pictures, in dB."""
    sides = (images.to_uint8(part) for part in (reconstruct(vae, pictures), pictures))
    return float(np.mean([psnr(*map(Image.fromarray, pair)) for pair in zip(*sides, strict=True)]))


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, data: Data) -> float:
    """One over the standard deviation of training latents."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    parts = [vae.encode(data.batch(32, rng, generator)).latent_dist.mean for _ in range(16)]
    return 1.0 / float(torch.cat(parts).std())


class Trainer:
    """The autoencoder, its workers and its random state."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        self.args, self.data, self.step, self.seconds = args, data, 0, 0.0
        self.folder: Path = args.work / ("vae-decoder-checkpoints" if args.decoder_only else "vae-checkpoints")
        self.out: Path = args.work / "vae"
        torch.manual_seed(args.seed)
        start = self.out if args.decoder_only else args.init_from
        self.vae = build_vae(args.channels) if start is None else load_vae(start)
        if args.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.rng, self.generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
        example = {
            "target": torch.zeros(args.batch, 3, images.IMAGE_PX, images.IMAGE_PX),
            "noise": torch.zeros(args.batch, LATENT_CHANNELS, 8, 8),
        }
        self.parallel = Parallel([Part(self.vae)], self.loss, example, args.workers, AdamOptions(ema=EMA))
        state = load_checkpoint(self.folder)
        if state is not None:
            self.load(state)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a worker's share of a batch."""
        target = batch["target"].contiguous(memory_format=torch.channels_last)
        return vae_loss(self.vae, target, batch["noise"], self.args.decoder_only)

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        self.parallel.load(state["parallel"])
        set_rng_state(state["rng"], self.rng, self.generator)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write a checkpoint."""
        state = {
            "parallel": self.parallel.state(),
            "rng": rng_state(self.rng, self.generator),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_checkpoint(self.folder, self.step, state)

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        target = self.data.batch(self.args.batch, self.rng, self.generator)
        noise = torch.randn(len(target), LATENT_CHANNELS, 8, 8, generator=self.generator)
        lr = self.args.lr * warm_cosine(self.step, WARMUP, self.args.steps)
        loss = self.parallel.step({"target": target, "noise": noise}, lr)
        self.step += 1
        return loss

    def averaged(self) -> AutoencoderKL:
        """The autoencoder with averaged weights."""
        vae = AutoencoderKL.from_config(self.vae.config)
        vae.load_state_dict(self.parallel.averaged(0))
        return vae.eval()

    def report(self) -> AutoencoderKL:
        """Print the held-out PSNR, draw a sheet (targets above reconstructions), return the averaged model."""
        vae, pictures = self.averaged(), self.data.held_out()
        print(f"step {self.step}: held-out PSNR {evaluate(vae, pictures):.2f} dB", flush=True)
        rows = [sheet for part in pictures[:48].split(16) for sheet in (part, reconstruct(vae, part))]
        Image.fromarray(images.grid_of(images.to_uint8(torch.cat(rows)), 16)).save(self.args.work / "vae.png")
        return vae

    def finish(self) -> None:
        """Write the diffusers folder."""
        vae = self.report()
        if not self.args.decoder_only:
            vae.register_to_config(scaling_factor=latent_scale(vae, self.data))
        vae.save_pretrained(self.out)
        print(f"wrote {self.out.name}/, scaling factor {vae.config.scaling_factor:.4f}", flush=True)

    def run(self) -> None:
        """Train to the last step, or until stopped."""
        stop, log, started = Stop(), Log(), time.monotonic()
        before, saved = self.seconds, started
        while self.step < self.args.steps and not stop.asked and time.monotonic() - started < self.args.minutes * 60:
            log.add(self.args.batch, loss=self.train_step())
            self.seconds = before + time.monotonic() - started
            log.maybe(self.step, self.seconds)
            if self.step % EVAL_EVERY == 0:
                self.report()
            if time.monotonic() - saved > self.args.checkpoint_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()
        self.parallel.close()
        if self.step >= self.args.steps:
            self.finish()


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training_options(parser)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=(16, 32, 64, 128))
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--init-from", type=Path, help="start from an exported folder where there is no checkpoint")
    return parser.parse_args()


def main() -> None:
    """Train the autoencoder."""
    args = parse_args()
    torch.set_num_threads(1)
    concepts = read_concepts()
    Trainer(args, Data(images.Masters(args.work, concepts), concepts)).run()


if __name__ == "__main__":
    main()
