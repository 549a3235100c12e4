"""UNets of well-known models, built from their configurations with random weights: for speed, never for quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DgqError


@dataclass(frozen=True)
class Architecture:
    """A UNet and how it is called at 512 pixels.

    Attributes:
        config: of diffusers' UNet2DConditionModel, where it differs from the defaults.
        batch: samples of a call (two with guidance).
        parameters: of the UNet.
    """

    config: dict[str, Any]
    batch: int
    parameters: int


ARCHITECTURES = {
    "sd-v1.4": Architecture({"cross_attention_dim": 768, "sample_size": 64}, 2, 859_520_964),
    "sdxl-turbo": Architecture(
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        1,
        2_567_463_684,
    ),
}


def architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        DgqError: there is none.
    """
    if name not in ARCHITECTURES:
        raise DgqError(f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def skeleton(name: str) -> nn.Module:
    """The UNet without weights, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**architecture(name).config)
    result: nn.Module = unet.eval()
    return result


def fill(unet: nn.Module, device: torch.device) -> nn.Module:
    """Give a UNet on the meta device float32 weights that keep its activations in range: matrices of deviation
    1 / sqrt(inputs), gains of 1, biases of 0."""
    generator = torch.Generator().manual_seed(0)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return unet.to(device)


def call(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of one UNet call at 512 pixels, random, the sample channels-last."""
    which, generator = architecture(name), torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, size = which.batch, which.config["sample_size"]
    arguments: dict[str, Any] = {
        "sample": noise(batch, 4, size, size).contiguous(memory_format=torch.channels_last),
        "timestep": torch.full((), 500, device=device),
        "encoder_hidden_states": noise(batch, 77, which.config["cross_attention_dim"]),
    }
    if "addition_embed_type" in which.config:
        sizes = torch.tensor([8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size], device=device, dtype=dtype)
        arguments["added_cond_kwargs"] = {"text_embeds": noise(batch, 1280), "time_ids": sizes.repeat(batch, 1)}
    return arguments
