"""The transformer of Z-Image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..family import Architecture, Family, chat_tokens, check_fit, check_scale, noise

NETWORK = "ZImageTransformer2DModel"
TEXT_TOKENS = 512  # that the pipeline lets the text encoder read, its template among them
PIXELS = 1024


class ZImage(Family):
    """`ZImageTransformer2DModel`: one stream of picture and text, given and returned as lists of samples."""

    network = NETWORK
    title = "Z-Image transformer"
    component = "transformer"
    pipelines = ("ZImagePipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("x", "t", "cap_feats")
    timestep = "t"
    tokens = 128
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("all_x_embedder.*", "all_final_layer.*"), "first and last layer stay float"),
        "cap_embedder.*": "reads the text encoder's outliers, once a call",
        "t_embedder.*": "one row a sample, which every block reads",
    }
    wide_layers = {"*.adaLN_modulation.*": "scales and gates of a whole block"}  # noqa: RUF012 (read only)
    shared_inputs = (("w1", "w3"),)
    block = re.compile(r"(?:layers|noise_refiner|context_refiner)\.\d+")
    shortened = (("layers", "block"), ("noise_refiner", "noise"), ("context_refiner", "context"))
    architectures = {"z-image": Architecture({}, 1, NETWORK)}  # noqa: RUF012 (read only)

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        """Z-Image-Turbo's, whose files do not differ from the base model's."""
        return {"steps": 9, "guidance": 0.0}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        check_scale(folder, parts["vae"])
        config = parts["transformer"].config
        text = (parts["text_encoder"].config.hidden_size, config.cap_feat_dim)
        check_fit(folder, self.component, (parts["vae"].config.latent_channels, config.in_channels), text)

    def default_size(self, pipe: Any) -> tuple[int, int]:
        return PIXELS, PIXELS

    def size_factor(self, pipe: Any) -> int:
        return int(2 * pipe.vae_scale_factor)

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        return chat_tokens(pipe.tokenizer, prompt, enable_thinking=True), TEXT_TOKENS

    def doubled(self, config: Any, guidance: float) -> bool:
        return guidance > 0

    def guidance_weights(self, batch: int, guidance: float) -> Tensor:
        """The text's sample comes first, and a guidance of 0 is none."""
        return torch.tensor([1 + guidance, -guidance]) if batch == 2 else torch.ones(1)

    def call(
        self,
        config: Any,
        batch: int,
        device: torch.device,
        *,
        tokens: int,
        timestep: int = 500,
        seed: int = 0,
        pixels: int | None = None,
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        size = (pixels or PIXELS) // 8
        return {
            "x": [noise((config.in_channels, 1, size, size), device, generator) for _ in range(batch)],
            "t": torch.full((batch,), 1 - timestep / 1000, device=device),
            "cap_feats": [noise((tokens, config.cap_feat_dim), device, generator) for _ in range(batch)],
        }
