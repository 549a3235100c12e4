"""The transformer of PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..family import Architecture, Family, check_fit, check_scale, noise

NETWORK = "PixArtTransformer2DModel"
CONFIG: dict[str, Any] = {"caption_channels": 4096, "use_additional_conditions": False}


class PixArt(Family):
    """`PixArtTransformer2DModel`: cross-attention to T5's text, under a mask and without a start token, so float."""

    network = NETWORK
    title = "PixArt transformer"
    component = "transformer"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs")
    tokens = 120
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("pos_embed.proj", "proj_out"), "first and last layer stay float"),
        "adaln_single.*": "one row a sample, the scales and gates of all blocks",
        "caption_projection.*": "reads the text encoder's outliers, once a call",
    }
    block = re.compile(r"transformer_blocks\.\d+")
    shortened = (("transformer_blocks", "block"),)
    architectures = {  # noqa: RUF012 (read only)
        "pixart-alpha": Architecture({**CONFIG, "sample_size": 64}, 2, NETWORK),  # PixArt-XL-2-512x512
        "pixart-sigma": Architecture({**CONFIG, "sample_size": 128}, 2, NETWORK, 300),  # PixArt-Sigma-XL-2-1024-MS
    }

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": 20, "guidance": 4.5}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        check_scale(folder, parts["vae"])
        config = parts["transformer"].config
        text = (parts["text_encoder"].config.d_model, config.caption_channels or config.cross_attention_dim)
        check_fit(folder, self.component, (parts["vae"].config.latent_channels, config.in_channels), text)

    def size_factor(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor * pipe.transformer.config.patch_size)

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """As the pipeline cuts them: its class says where."""
        limit = 120 if type(pipe).__name__ == "PixArtAlphaPipeline" else 300
        return len(pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids), limit

    def pipeline_arguments(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        """The size is the one asked for, and the text does not depend on packages that happen to be installed."""
        plain = super().pipeline_arguments(prompts, negative, guidance)
        return {**plain, "use_resolution_binning": False, "clean_caption": False}

    def step_callback(self, pipe: Any, on_step: Callable[[int], None]) -> dict[str, Any]:
        # it counts steps of a scheduler, some of which take two timesteps
        return {"callback": lambda step, timestep, latents: on_step(step * getattr(pipe.scheduler, "order", 1) + 1)}

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
        size = config.sample_size if pixels is None else pixels // 8
        width = config.caption_channels or config.cross_attention_dim
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        told = config.use_additional_conditions
        if told or (told is None and config.sample_size == 128):
            sizes = {
                "resolution": torch.full((batch, 2), 8.0 * size, device=device),
                "aspect_ratio": torch.ones(batch, 1, device=device),
            }
        return {
            "hidden_states": noise((batch, config.in_channels, size, size), device, generator),
            "timestep": torch.full((batch,), timestep, device=device),
            "encoder_hidden_states": noise((batch, tokens, width), device, generator),
            "added_cond_kwargs": sizes,
        }
