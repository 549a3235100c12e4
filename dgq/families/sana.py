"""The transformer of Sana."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..family import Architecture, Family, check_fit, check_scale, noise

NETWORK = "SanaTransformer2DModel"
TEXT_TOKENS = 300  # that the pipeline lets the network read


class Sana(Family):
    """`SanaTransformer2DModel`: linear attention, cross-attention to Gemma's text under a mask, and an MLP of 1x1 and
    depthwise convolutions, of which the latter stay float."""

    network = NETWORK
    title = "Sana transformer"
    component = "transformer"
    pipelines = ("SanaPipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "timestep")
    tokens = TEXT_TOKENS
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("patch_embed.proj", "proj_out"), "first and last layer stay float"),
        "time_embed.*": "one row a sample, the scales and gates of all blocks",
        "caption_projection.*": "reads the text encoder's outliers, once a call",
    }
    block = re.compile(r"transformer_blocks\.\d+")
    shortened = (("transformer_blocks", "block"),)
    architectures = {"sana-1.6b": Architecture({}, 2, NETWORK)}  # noqa: RUF012 (read only); Sana_1600M_1024px

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": 20, "guidance": 4.5}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        check_scale(folder, parts["vae"])
        config = parts["transformer"].config
        text = (parts["text_encoder"].config.hidden_size, config.caption_channels)
        check_fit(folder, self.component, (parts["vae"].config.latent_channels, config.in_channels), text)

    def size_factor(self, pipe: Any) -> int:
        """As the pipeline checks it."""
        return 32

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        return len(pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids), TEXT_TOKENS

    def pipeline_arguments(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        """The size is the one asked for, and the text does not depend on packages that happen to be installed."""
        plain = super().pipeline_arguments(prompts, negative, guidance)
        return {**plain, "use_resolution_binning": False, "clean_caption": False}

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
        size = config.sample_size if pixels is None else pixels // 32
        return {
            "hidden_states": noise((batch, config.in_channels, size, size), device, generator),
            "encoder_hidden_states": noise((batch, tokens, config.caption_channels), device, generator),
            "timestep": torch.full((batch,), timestep, device=device),
            "guidance": torch.full((batch,), 4.5, device=device) if config.guidance_embeds else None,
        }
