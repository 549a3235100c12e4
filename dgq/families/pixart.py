"""PixArt's transformer, whose step `dgq bench --predict` draws; it is not quantized yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..family import TOKENS, Architecture, Family


class PixArt(Family):
    """`PixArtTransformer2DModel`."""

    network = "PixArtTransformer2DModel"
    title = "PixArtTransformer2DModel"
    component = "transformer"
    float_layers = dict.fromkeys(("pos_embed.proj", "proj_out"), "first and last layer stay float")
    predicted = {  # noqa: RUF012 (read only)
        "pixart-alpha": Architecture(  # PixArt-XL-2-512x512
            {
                "sample_size": 64, "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28,
                "in_channels": 4, "out_channels": 8, "patch_size": 2, "cross_attention_dim": 1152,
                "caption_channels": 4096, "attention_bias": True, "activation_fn": "gelu-approximate",
                "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
                "use_additional_conditions": False,
            },
            2, network, 120,
        ),
    }  # fmt: skip

    def after_norm(self, network: nn.Module) -> set[str]:
        """No norm comes before cross-attention."""
        ends = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj", "ff.net.2", "linear_2")
        return {name for name, _ in network.named_modules() if name.endswith(ends)}

    def call(
        self, config: Any, batch: int, device: torch.device, *, tokens: int = TOKENS, timestep: int = 500, seed: int = 0
    ) -> dict[str, Any]:
        size = (batch, config.in_channels, config.sample_size, config.sample_size)
        return {
            "hidden_states": torch.empty(size, device=device),
            "timestep": torch.full((batch,), timestep, device=device),
            "encoder_hidden_states": torch.empty((batch, tokens, config.caption_channels), device=device),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
