"""Train the denoiser on cached latents, with the text encoder at a tenth of its learning rate at first.

v-prediction on a schedule with zero terminal SNR, min-SNR weights, caption dropout, AdamW, averaged weights. The
learning rate is constant after its warm-up, so training may go on for as long as one likes; ``--decay-steps N``
ends a run with a linear decay. Stops cleanly, with a checkpoint, on SIGTERM, SIGINT or after ``--minutes``, and
resumes bit-exactly.

    python -m embedded.train_unet --work DIR [--minutes M] [--decay-steps N]
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from embedded.cache_latents import Latents, load_latents
from embedded.captions import COMMON_WEIGHT, Sampler, read_concepts
from embedded.common import (
    Log,
    Stop,
    add_training_options,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    warm_constant,
)
from embedded.images import Masters
from embedded.parallel import AdamOptions, Batch, Parallel, Part
from embedded.text_model import token_ids

CHANNELS = (128, 160)
HEAD_DIM = 32
WARMUP = 300
GAMMA = 5.0
CAPTION_DROPOUT = 0.12
TEXT_LR_SCALE = 0.1
UNET, TEXT = 0, 1


def build_unet(
    channels: tuple[int, ...] = CHANNELS, text_width: int = 256, latent_channels: int = 8, head_dim: int = HEAD_DIM
) -> UNet2DConditionModel:
    """The denoiser: cross-attention in every block. Diffusers calls the number of heads ``attention_head_dim``."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=tuple(max(1, width // head_dim) for width in channels),
        cross_attention_dim=text_width,
        norm_num_groups=min(32, channels[0] // 4),
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def snr_weight(alpha_bar: Tensor, gamma: float = GAMMA) -> Tensor:
    """Min-SNR weights for v-prediction, one at and near zero SNR: min(SNR + 1, gamma) / (SNR + 1)."""
    inverse = 1 - alpha_bar  # 1 / (SNR + 1)
    return (gamma * inverse).clamp(max=1.0)


def diffusion_loss(unet: UNet2DConditionModel, alpha_bar: Tensor, batch: Batch, states: Tensor) -> Tensor:
    """Weighted v-prediction loss; latents and noise are (B, C, H, W), ``states`` (B, L, width)."""
    chosen = alpha_bar[batch["timesteps"]][:, None, None, None]
    signal, sigma = chosen.sqrt(), (1 - chosen).sqrt()
    noisy = signal * batch["latents"] + sigma * batch["noise"]
    velocity = signal * batch["noise"] - sigma * batch["latents"]
    output = unet(noisy, batch["timesteps"], states, return_dict=False)[0]
    error = (output - velocity).square().mean(dim=(1, 2, 3))
    return (error * snr_weight(chosen.flatten())).mean()


@dataclass
class Inputs:
    """What training examples are drawn from."""

    sampler: Sampler
    latents: Latents
    rows: dict[tuple[int, str], int]
    tokenizer: CLIPTokenizer

    def batch(self, size: int, steps: int, rng: random.Random, generator: torch.Generator) -> Batch:
        """A random batch: latents, noise, timesteps (spread evenly over the schedule) and token ids."""
        draws = [self.sampler.draw(rng) for _ in range(size)]
        latents = [self.latents.pick(self.rows[d.concept, d.style], d.background, rng) for d in draws]
        captions = ["" if rng.random() < CAPTION_DROPOUT else d.caption for d in draws]
        spread = (torch.arange(size) + torch.rand(size, generator=generator)) * (steps / size)
        order = torch.randperm(size, generator=generator)
        stacked = torch.stack(latents)
        return {
            "latents": stacked,
            "noise": torch.randn(stacked.shape, generator=generator),
            "timesteps": spread.long().clamp(max=steps - 1)[order],
            "ids": token_ids(self.tokenizer, captions),
        }


@dataclass
class Settings:
    """The options of a run that its result depends on."""

    batch: int = 24
    lr: float = 4e-4
    ema: float = 0.999
    text_steps: int = 3000
    decay_steps: int = 0
    workers: int = 2
    seed: int = 0


class Trainer:
    """The denoiser and the text encoder, their workers and their random state."""

    def __init__(
        self, unet: UNet2DConditionModel, encoder: CLIPTextModel, inputs: Inputs, settings: Settings, folder: Path
    ) -> None:
        self.unet, self.encoder, self.inputs, self.settings, self.folder = unet, encoder, inputs, settings, folder
        self.step, self.seconds = 0, 0.0
        self.decay_start: int | None = None
        self.alpha_bar = build_scheduler().alphas_cumprod
        self.rng, self.generator = random.Random(settings.seed), torch.Generator().manual_seed(settings.seed)
        example = inputs.batch(settings.batch, len(self.alpha_bar), random.Random(0), torch.Generator())
        parts = [Part(unet.train()), Part(encoder.train(), TEXT_LR_SCALE)]
        options = AdamOptions(ema=settings.ema, weight_decay=1e-2)
        self.parallel = Parallel(parts, self.loss, example, settings.workers, options)
        state = load_checkpoint(folder)
        if state is not None:
            self.load(state)
        if settings.decay_steps and self.decay_start is None:
            self.decay_start = self.step
        if not settings.decay_steps:
            self.decay_start = None

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a worker's share of a batch."""
        with torch.set_grad_enabled(bool(self.parallel.active[TEXT])):
            states = self.encoder(batch["ids"]).last_hidden_state
        return diffusion_loss(self.unet, self.alpha_bar, batch, states)

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        self.parallel.load(state["parallel"])
        set_rng_state(state["rng"], self.rng, self.generator)
        self.step, self.seconds, self.decay_start = state["step"], state["seconds"], state["decay_start"]

    def save(self) -> None:
        """Write a checkpoint."""
        state = {
            "parallel": self.parallel.state(),
            "rng": rng_state(self.rng, self.generator),
            "step": self.step,
            "seconds": self.seconds,
            "decay_start": self.decay_start,
        }
        save_checkpoint(self.folder, self.step, state)

    @property
    def done(self) -> bool:
        """Whether the final decay is over."""
        return self.decay_start is not None and self.step >= self.decay_start + self.settings.decay_steps

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        self.parallel.active[TEXT] = self.step < self.settings.text_steps
        batch = self.inputs.batch(self.settings.batch, len(self.alpha_bar), self.rng, self.generator)
        factor = warm_constant(self.step, WARMUP, self.decay_start, self.settings.decay_steps)
        loss = self.parallel.step(batch, self.settings.lr * factor)
        self.step += 1
        return loss

    def run(self, minutes: float, checkpoint_minutes: float) -> None:
        """Train until told to stop."""
        stop, log, started = Stop(), Log(60), time.monotonic()
        before, saved = self.seconds, started
        while not (self.done or stop.asked or time.monotonic() - started > minutes * 60):
            log.add(self.settings.batch, loss=self.train_step())
            self.seconds = before + time.monotonic() - started
            log.maybe(self.step, self.seconds)
            if time.monotonic() - saved > checkpoint_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()
        self.parallel.close()


def load_models(work: Path, init_from: Path | None) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """A fresh denoiser with the pretrained text encoder, or both from an exported folder."""
    if init_from is None:
        return build_unet(), CLIPTextModel.from_pretrained(work / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(init_from, subfolder="unet", torch_dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(init_from, subfolder="text_encoder", dtype=torch.float32)
    return unet, encoder


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training_options(parser)
    defaults = Settings()
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--text-steps", type=int, default=defaults.text_steps, help="steps that train the text encoder")
    parser.add_argument(
        "--common-weight", type=float, default=COMMON_WEIGHT, help="how much oftener common concepts are"
    )
    parser.add_argument("--decay-steps", type=int, default=0, help="end with a linear decay over so many steps")
    parser.add_argument("--init-from", type=Path, help="start from an exported folder where there is no checkpoint")
    return parser.parse_args()


def main() -> None:
    """Train the denoiser."""
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    concepts = read_concepts()
    masters = Masters(args.work, concepts)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    sampler = Sampler(concepts, masters.available(), common_weight=args.common_weight)
    inputs = Inputs(sampler, load_latents(args.work), masters.row, tokenizer)
    settings = Settings(
        batch=args.batch,
        lr=args.lr,
        text_steps=args.text_steps,
        decay_steps=args.decay_steps,
        workers=args.workers,
        seed=args.seed,
    )
    unet, encoder = load_models(args.work, args.init_from)
    Trainer(unet, encoder, inputs, settings, args.work / "unet-checkpoints").run(args.minutes, args.checkpoint_minutes)


if __name__ == "__main__":
    main()
