"""The transformer of FLUX.1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..family import Architecture, Patched, check_fit, check_scale, no_negative, noise

NETWORK = "FluxTransformer2DModel"
T5_TOKENS = 512  # that the pipeline lets T5 read


class Flux(Patched):
    """`FluxTransformer2DModel`: latents packed by patches, guidance an input (dev) or none (schnell)."""

    network = NETWORK
    title = "FLUX.1 transformer"
    component = "transformer"
    pipelines = ("FluxPipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    tokens = T5_TOKENS
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("x_embedder", "proj_out", "norm_out.linear"), "first and last layer stay float"),
        "context_embedder": "reads the text encoder's outliers, once a call",
        "time_text_embed.*": "one row a sample, which every block reads",
    }
    # a quarter of all weights: in float they would be larger than everything else
    wide_layers = dict.fromkeys(
        ("*.norm1.linear", "*.norm1_context.linear", "*.norm.linear"), "scales and gates of a whole block"
    )
    shared_inputs = (*Patched.shared_inputs, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    block = re.compile(r"(?:single_)?transformer_blocks\.\d+")
    shortened = (("single_transformer_blocks", "single"), ("transformer_blocks", "block"))
    architectures = {  # noqa: RUF012 (read only)
        "flux.1-dev": Architecture({"guidance_embeds": True}, 1, NETWORK),
        "flux.1-schnell": Architecture({}, 1, NETWORK, 256),
    }

    def joined_inputs(self, network: Any) -> dict[str, int]:
        """The last layers of single blocks, which read the attention's result and the MLP's, after its GELU."""
        return {
            f"single_transformer_blocks.{i}.proj_out": network.inner_dim
            for i in range(len(network.single_transformer_blocks))
        }

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        """FLUX.1-schnell is not told a guidance scale."""
        return {"steps": 28, "guidance": 3.5} if network.get("guidance_embeds") else {"steps": 4, "guidance": 0.0}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        check_scale(folder, parts["vae"])
        config, clip, t5 = parts["transformer"].config, parts["text_encoder"].config, parts["text_encoder_2"].config
        latents = (4 * parts["vae"].config.latent_channels, config.in_channels)
        check_fit(folder, self.component, latents, (t5.d_model, config.joint_attention_dim))
        check_fit(folder, self.component, (0, 0), (clip.hidden_size, config.pooled_projection_dim))

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        return len(pipe.tokenizer_2(prompt, truncation=False, verbose=False).input_ids), T5_TOKENS

    def pipeline_arguments(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        no_negative(self.title, negative)
        return {"prompt": list(prompts), "guidance_scale": guidance}

    def doubled(self, config: Any, guidance: float) -> bool:
        return False

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
        side = (self.side if pixels is None else pixels // 8) // 2
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        return {
            "hidden_states": noise((batch, side * side, config.in_channels), device, generator),
            "encoder_hidden_states": noise((batch, tokens, config.joint_attention_dim), device, generator),
            "pooled_projections": noise((batch, config.pooled_projection_dim), device, generator),
            "timestep": torch.full((batch,), timestep / 1000, device=device),
            "img_ids": places.float().to(device),
            "txt_ids": torch.zeros(tokens, 3, device=device),
            # 1000 times this is a number that bfloat16 has
            "guidance": torch.full((batch,), 4.0, device=device) if config.guidance_embeds else None,
        }
