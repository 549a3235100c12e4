"""UNets of well-known models, built from their configurations with random weights: for speed, never for quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import read_json
from .errors import DgqError

TOKENS = 77


@dataclass(frozen=True)
class Architecture:
    """A UNet and how it is called.

    Attributes:
        config: of diffusers' UNet2DConditionModel, where it differs from the defaults.
        batch: samples of a call (two with guidance).
    """

    config: dict[str, Any]
    batch: int


# at 512 pixels
ARCHITECTURES = {
    "sd-v1.4": Architecture({"cross_attention_dim": 768, "sample_size": 64}, 2),
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
    ),
}


def architecture(name: str) -> Architecture:
    """The architecture of this name, or of a UNet's config.json (called with two samples).

    Raises:
        DgqError: there is none, or the file is not a JSON object.
    """
    if name.endswith(".json"):
        config = read_json(Path(name))
        config.pop("quantization_config", None)
        return Architecture(config, 2)
    if name not in ARCHITECTURES:
        raise DgqError(
            f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}", "or give a UNet's config.json"
        )
    return ARCHITECTURES[name]


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The UNet of a configuration without weights, on the meta device.

    Raises:
        DgqError: diffusers refuses the configuration.
    """
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            unet: nn.Module = UNet2DConditionModel.from_config(config).eval()
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DgqError(f"the UNet's configuration cannot be used ({reason})") from None
    return unet


def random_weights(unet: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The float32 weights, one after the other, of a UNet on the meta device, such that activations stay in range:
    matrices of deviation 1 / sqrt(inputs), gains of 1, biases of 0. The same in every call."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            yield name, torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
        else:
            yield name, torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)


def call(
    unet: nn.Module, batch: int, device: torch.device, *, tokens: int = TOKENS, timestep: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of one UNet call at its default size, float32 noise.

    Returns:
        sample (batch, channels, height, width), timestep (scalar int64), encoder_hidden_states (batch, tokens, width),
        and added_cond_kwargs where the UNet takes a text embedding and sizes.

    Raises:
        DgqError: the UNet wants other conditions, or its configuration tells no size.
    """
    config: Any = unet.config
    if config.addition_embed_type not in (None, "text_time") or config.class_embed_type is not None:
        raise DgqError("the UNet takes conditions whose shapes are not in its configuration")
    if config.sample_size is None or not isinstance(config.cross_attention_dim, int):
        raise DgqError("the UNet's configuration lacks a sample_size or a single cross_attention_dim")
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=generator).to(device)

    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    arguments: dict[str, Any] = {
        "sample": noise(batch, config.in_channels, height, width),
        "timestep": torch.full((), timestep, device=device),
        "encoder_hidden_states": noise(batch, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width], device=device)
        pooled = config.projection_class_embeddings_input_dim - ids.numel() * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": ids.repeat(batch, 1)}
    return arguments
