"""The transformer of FLUX.2, as FLUX.2-klein draws with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..family import Architecture, Family, chat_tokens, check_fit, no_negative, noise

NETWORK = "Flux2Transformer2DModel"
TEXT_TOKENS = 512  # that the pipeline lets the text encoder read, its template among them
TEXT_LAYERS = 3  # of the text encoder, whose states are joined
SIDE = 128  # of the VAE's latents of a picture of the default size


class Flux2(Family):
    """`Flux2Transformer2DModel`: one modulation for all blocks; in single blocks queries, keys, values and MLP are one
    layer, and attention and MLP are joined before the last."""

    network = NETWORK
    title = "FLUX.2 transformer"
    component = "transformer"
    pipelines = ("Flux2KleinPipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
    tokens = TEXT_TOKENS
    separate_guidance = True
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("x_embedder", "proj_out", "norm_out.linear"), "first and last layer stay float"),
        "context_embedder": "reads the text encoder's outliers, once a call",
        "time_guidance_embed.*": "one row a sample, which every block reads",
    }
    wide_layers = {"*_modulation*.linear": "scales and gates of all blocks"}  # noqa: RUF012 (read only)
    block = re.compile(r"(?:single_)?transformer_blocks\.\d+")
    shortened = (("single_transformer_blocks", "single"), ("transformer_blocks", "block"))
    architectures = {  # noqa: RUF012 (read only)
        "flux.2-klein-4b": Architecture(
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
            1,
            NETWORK,
        ),
        "flux.2-klein-9b": Architecture(
            {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
            1,
            NETWORK,
        ),
    }

    def joined_inputs(self, network: Any) -> dict[str, int]:
        """The last layers of single blocks, which read the attention's result and the MLP's, gated."""
        return {
            f"single_transformer_blocks.{i}.attn.to_out": network.inner_dim
            for i in range(len(network.single_transformer_blocks))
        }

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": 4, "guidance": 1.0} if index.get("is_distilled") else {"steps": 50, "guidance": 4.0}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        config = parts["transformer"].config
        width = TEXT_LAYERS * parts["text_encoder"].config.hidden_size
        latents = (4 * parts["vae"].config.latent_channels, config.in_channels)
        check_fit(folder, self.component, latents, (width, config.joint_attention_dim))

    def default_size(self, pipe: Any) -> tuple[int, int]:
        return SIDE * pipe.vae_scale_factor, SIDE * pipe.vae_scale_factor

    def size_factor(self, pipe: Any) -> int:
        return int(2 * pipe.vae_scale_factor)

    def latent_shape(self, pipe: Any, width: int, height: int) -> tuple[int, int, int]:
        """Of patches: the pipeline takes them so, and returns what its VAE decodes."""
        factor = self.size_factor(pipe)
        return pipe.transformer.config.in_channels, height // factor, width // factor

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        return chat_tokens(pipe.tokenizer, prompt, enable_thinking=False), TEXT_TOKENS

    def pipeline_arguments(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        no_negative(self.title, negative)
        return {"prompt": list(prompts), "guidance_scale": guidance}

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """The pipeline has undone the batch norm of the patches already."""
        pixels: Tensor = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
        return pixels

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
        side = (SIDE if pixels is None else pixels // 8) // 2
        one, sides = torch.arange(1), torch.arange(side)
        places = torch.cartesian_prod(one, sides, sides, one)
        words = torch.cartesian_prod(one, one, one, torch.arange(tokens))
        return {
            "hidden_states": noise((batch, side * side, config.in_channels), device, generator),
            "encoder_hidden_states": noise((batch, tokens, config.joint_attention_dim), device, generator),
            "timestep": torch.full((batch,), timestep / 1000, device=device),
            "img_ids": places.expand(batch, -1, -1).to(device),
            "txt_ids": words.expand(batch, -1, -1).to(device),
            "guidance": torch.full((batch,), 4.0, device=device) if config.guidance_embeds else None,
        }
