"""The transformer of Qwen-Image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..family import Architecture, Patched, check_fit, noise

NETWORK = "QwenImageTransformer2DModel"
TEXT_TOKENS = 512  # that the pipeline lets the network read, its template not among them


class QwenImage(Patched):
    """`QwenImageTransformer2DModel`: latents packed by patches, video-shaped for the VAE, guidance in two calls."""

    network = NETWORK
    title = "Qwen-Image transformer"
    component = "transformer"
    pipelines = ("QwenImagePipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes")
    tokens = 128
    separate_guidance = True
    guidance_argument = "true_cfg_scale"
    float_layers = {  # noqa: RUF012 (read only)
        **dict.fromkeys(("img_in", "proj_out", "norm_out.linear"), "first and last layer stay float"),
        "txt_in": "reads the text encoder's outliers, once a call",
        "time_text_embed.*": "one row a sample, which every block reads",
    }
    # a third of all weights: in float they would be larger than everything else
    wide_layers = dict.fromkeys(("*.img_mod.1", "*.txt_mod.1"), "scales and gates of a whole block")
    block = re.compile(r"transformer_blocks\.\d+")
    shortened = (("transformer_blocks", "block"),)
    architectures = {"qwen-image": Architecture({}, 1, NETWORK)}  # noqa: RUF012 (read only)

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": 50, "guidance": 4.0}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        config = parts["transformer"].config
        width = parts["text_encoder"].get_input_embeddings().embedding_dim
        latents = (4 * parts["vae"].config.z_dim, config.in_channels)
        check_fit(folder, self.component, latents, (width, config.joint_attention_dim))

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        text = pipe.prompt_template_encode.format(prompt)
        count = len(pipe.tokenizer(text, truncation=False, verbose=False).input_ids)
        return count - pipe.prompt_template_encode_start_idx, TEXT_TOKENS

    def pipeline_arguments(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        """Without guidance the pipeline warns of a negative prompt."""
        plain = super().pipeline_arguments(prompts, negative, guidance)
        return plain if guidance > 1 else {**plain, "negative_prompt": None}

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Each channel has a mean and a deviation; the picture is a video of one frame."""
        config, shape = pipe.vae.config, (1, -1, 1, 1)
        plain = latents.to(pipe.vae.dtype)
        mean, deviation = (plain.new_tensor(values).view(shape) for values in (config.latents_mean, config.latents_std))
        pixels: Tensor = pipe.vae.decode((plain * deviation + mean)[:, :, None]).sample[:, :, 0]
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
        side = (self.side if pixels is None else pixels // 8) // 2
        return {
            "hidden_states": noise((batch, side * side, config.in_channels), device, generator),
            "encoder_hidden_states": noise((batch, tokens, config.joint_attention_dim), device, generator),
            "timestep": torch.full((batch,), timestep / 1000, device=device),
            "img_shapes": [[(1, side, side)]] * batch,
            "guidance": torch.full((batch,), 4.0, device=device) if config.guidance_embeds else None,
        }
