"""What tuning minimizes: the error of the UNet's prediction on noised pictures of the subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import DgqError
from .pictures import to_tensor


@dataclass(frozen=True)
class Item:
    """A picture as the UNet meets it.

    Attributes:
        mean, deviation: float32 (C, h, w), of its latents.
        text: index of its prompt.
    """

    mean: Tensor
    deviation: Tensor
    text: int


@dataclass(frozen=True)
class Texts:
    """The outputs of the text encoders, one row a prompt, and what else the UNet is told.

    Attributes:
        states: (prompts, tokens, width).
        pooled: SDXL's (prompts, width), or None.
        sizes: SDXL's time_ids (6,), or None.
    """

    states: Tensor
    pooled: Tensor | None
    sizes: Tensor | None

    def arguments(self, which: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of a call of the UNet for samples of these prompts."""
        index = torch.tensor(which, device=self.states.device)
        found: dict[str, Any] = {"encoder_hidden_states": self.states[index]}
        if self.pooled is not None and self.sizes is not None:
            sizes = self.sizes.expand(len(which), -1)
            found["added_cond_kwargs"] = {"text_embeds": self.pooled[index], "time_ids": sizes}
        return found


@torch.no_grad()
def encode_texts(pipe: Any, prompts: Sequence[str], width: int, height: int) -> Texts:
    """What the UNet reads of the prompts."""
    states, pooled = [], []
    device = pipe.unet.device
    for prompt in prompts:
        encoded = pipe.encode_prompt(prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        states.append(encoded[0])
        if len(encoded) == 4:  # SDXL: and the negative prompt's, which are not made
            pooled.append(encoded[2])
    if not pooled:
        return Texts(torch.cat(states), None, None)
    sizes = torch.tensor([height, width, 0, 0, height, width], device=device, dtype=states[0].dtype)
    return Texts(torch.cat(states), torch.cat(pooled), sizes)


@torch.no_grad()
def encode_pictures(pipe: Any, images: Sequence[Any], text: int, width: int, height: int) -> list[Item]:
    """The latents of pictures, one by one."""
    items = []
    for image in images:
        pixels = to_tensor([image], width, height).to(pipe.vae.device, pipe.vae.dtype)
        found = pipe.vae.encode(pixels).latent_dist
        mean, deviation = found.mean[0].float().cpu(), found.std[0].float().cpu()
        if not bool(torch.isfinite(mean).all()):
            raise DgqError("the VAE's latents of a picture are not finite", "load the pipeline in float32")
        items.append(Item(mean, deviation, text))
    return items


class Objective:
    """The loss of a batch.

    Args:
        pipe: gives the noise schedule and what the UNet predicts.
        texts: as encoded.
        snr_gamma: clamp of min-SNR weights, or None for equal ones.
        prior_weight: of class pictures.

    Attributes:
        timesteps: of the schedule.
    """

    def __init__(self, pipe: Any, texts: Texts, snr_gamma: float | None, prior_weight: float) -> None:
        self.unet, self.texts = pipe.unet, texts
        self.factor = float(pipe.vae.config.scaling_factor)
        self.schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self.predicts: str = self.schedule.config.prediction_type
        if self.predicts not in ("epsilon", "v_prediction", "sample"):
            raise DgqError(f"the scheduler's prediction_type {self.predicts!r} is none that dgq tunes")
        self.timesteps = int(self.schedule.config.num_train_timesteps)
        self.snr_gamma, self.prior_weight = snr_gamma, prior_weight

    def draw(self, items: Sequence[Item], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and timesteps of a batch, on the CPU in float32: the same on every device."""
        latents = torch.stack(
            [item.mean + item.deviation * torch.randn(item.mean.shape, generator=generator) for item in items]
        )
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(0, self.timesteps, (len(items),), generator=generator)
        return latents * self.factor, noise, times

    def loss(self, items: Sequence[Item], own: int, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The mean over the first `own` items, plus the weighted mean over the rest, the class pictures."""
        device, dtype = self.unet.device, self.texts.states.dtype
        noisy = self.schedule.add_noise(latents, noise, times)
        if self.predicts == "epsilon":
            target = noise
        else:
            target = latents if self.predicts == "sample" else self.schedule.get_velocity(latents, noise, times)
        arguments = self.texts.arguments([item.text for item in items])
        predicted = self.unet(noisy.to(device, dtype), times.to(device), **arguments).sample
        errors = (predicted.float() - target.to(device)).square().mean(dim=(1, 2, 3)) * self._weights(times).to(device)
        loss = errors[:own].mean()
        return loss + self.prior_weight * errors[own:].mean() if len(items) > own else loss

    def _weights(self, times: Tensor) -> Tensor:
        """Min-SNR weights (B,) (arXiv 2303.09556)."""
        if self.snr_gamma is None:
            return torch.ones(len(times))
        signal = self.schedule.alphas_cumprod[times].float()
        ratio = signal / (1 - signal)
        clamped = ratio.clamp(max=self.snr_gamma)
        if self.predicts == "sample":
            return clamped
        return clamped / (ratio + 1 if self.predicts == "v_prediction" else ratio.clamp(min=1e-8))
