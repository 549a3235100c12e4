"""The transformer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..family import Architecture, Family, check_fit, check_scale, noise

NETWORK = "SD3Transformer2DModel"
T5_TOKENS = 256  # that the pipeline lets T5 read; CLIP reads the first 77


class StableDiffusion3(Family):
    """`SD3Transformer2DModel`: joint attention over text and picture, which has no start token and stays float."""

    network = NETWORK
    title = "SD3 transformer"
    component = "transformer"
    pipelines = ("StableDiffusion3Pipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    tokens = 77 + T5_TOKENS
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("pos_embed.proj", "proj_out", "norm_out.linear"), "first and last layer stay float"),
        "context_embedder": "reads the text encoders' outliers, once a call",
        "time_text_embed.*": "one row a sample, which every block reads",
    }
    wide_layers = dict.fromkeys(("*.norm1.linear", "*.norm1_context.linear"), "scales and gates of a whole block")
    block = re.compile(r"transformer_blocks\.\d+")
    shortened = (("transformer_blocks", "block"),)
    architectures = {  # noqa: RUF012 (read only)
        "sd3.5-medium": Architecture(
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            2,
            NETWORK,
        ),
        "sd3.5-large": Architecture(
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            2,
            NETWORK,
        ),
    }

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": 28, "guidance": 4.5}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        check_scale(folder, parts["vae"])
        config, t5 = parts["transformer"].config, parts.get("text_encoder_3")
        text = (0, 0) if t5 is None else (t5.config.d_model, config.joint_attention_dim)
        check_fit(folder, self.component, (parts["vae"].config.latent_channels, config.in_channels), text)
        pooled = sum(parts[name].config.projection_dim for name in ("text_encoder", "text_encoder_2"))
        check_fit(folder, self.component, (0, 0), (pooled, config.pooled_projection_dim))

    def size_factor(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor * pipe.transformer.config.patch_size)

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        if pipe.tokenizer_3 is None or pipe.text_encoder_3 is None:
            return super().prompt_tokens(pipe, prompt)
        return len(pipe.tokenizer_3(prompt, truncation=False, verbose=False).input_ids), T5_TOKENS

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
        return {
            "hidden_states": noise((batch, config.in_channels, size, size), device, generator),
            "encoder_hidden_states": noise((batch, tokens, config.joint_attention_dim), device, generator),
            "pooled_projections": noise((batch, config.pooled_projection_dim), device, generator),
            "timestep": torch.full((batch,), timestep, device=device),
        }
