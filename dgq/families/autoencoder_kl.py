"""The VAE of most pipelines, of which the decoder is quantized: all that dgq knows of it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D

from ..family import FIRST_AND_LAST, Family, noise
from ..integer.fused_unet import FUSED


class AutoencoderKL(Family):
    """`AutoencoderKL`, called to decode latents."""

    network = "AutoencoderKL"
    title = "VAE"
    component = "vae"
    arguments = ("z",)
    float_layers = {  # noqa: RUF012 (read only)
        "encoder.*": "pictures are drawn by the decoder alone",
        "*quant_conv": "a few channels, from which pipelines tell the dtype",
        **{f"decoder.{name}": why for name, why in FIRST_AND_LAST.items()},
    }
    fused = {ResnetBlock2D: FUSED[ResnetBlock2D]}  # noqa: RUF012 (read only)
    cast = True

    def run(self, network: Any, call: dict[str, Any]) -> Any:
        return network.decode(**call)

    def call(
        self, config: Any, batch: int, device: torch.device, *, tokens: int = 0, timestep: int = 0, seed: int = 0,
        pixels: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """z (batch, channels, height, width)."""
        side = (pixels or config.sample_size) // 2 ** (len(config.block_out_channels) - 1)
        generator = torch.Generator().manual_seed(seed)
        return {"z": noise((batch, config.latent_channels, side, side), device, generator)}
