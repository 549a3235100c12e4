"""Networks of well-known models, built from their configurations with random weights: for speed, never for quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.reading import read_json
from .errors import DgqError

TOKENS = 77


@dataclass(frozen=True)
class Architecture:
    """A network and how it is called.

    Attributes:
        config: of diffusers' class, where it differs from the defaults.
        batch: samples of a call (two with guidance).
        network: diffusers' class.
        tokens: of the text.
    """

    config: dict[str, Any]
    batch: int
    network: str = "UNet2DConditionModel"
    tokens: int = TOKENS


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


# What `dgq bench --predict` draws and nothing runs: dgq quantizes UNets. PixArt-XL-2-512x512.
PREDICTED = {
    "pixart-alpha": Architecture(
        {
            "sample_size": 64, "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
            "out_channels": 8, "patch_size": 2, "cross_attention_dim": 1152, "caption_channels": 4096,
            "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "use_additional_conditions": False,
        },
        2, "PixArtTransformer2DModel", 120,
    ),
}  # fmt: skip


def drawn(name: str, pixels: int | None = None) -> Architecture:
    """As `architecture`, and the networks in PREDICTED too; for pictures of this height and width.

    Raises:
        DgqError: as `architecture`; pixels is not a positive multiple of 64.
    """
    known = PREDICTED[name] if name in PREDICTED else architecture(name, (*ARCHITECTURES, *PREDICTED))
    if pixels is None:
        return known
    if pixels < 64 or pixels % 64:
        raise DgqError(f"pictures of {pixels} pixels cannot be drawn", "give a multiple of 64")
    return replace(known, config={**known.config, "sample_size": pixels // 8})


def architecture(name: str, names: tuple[str, ...] = ()) -> Architecture:
    """The architecture of this name, or of a UNet's config.json (called with two samples).

    Args:
        name: of ARCHITECTURES, or a path.
        names: to tell of where there is none; those of ARCHITECTURES where empty.

    Raises:
        DgqError: there is none, or the file is not a JSON object.
    """
    if name.endswith(".json"):
        config = read_json(Path(name))
        config.pop("quantization_config", None)
        return Architecture(config, 2)
    if name not in ARCHITECTURES:
        raise DgqError(
            f"architecture {name!r} is not one of {', '.join(names or ARCHITECTURES)}", "or give a UNet's config.json"
        )
    return ARCHITECTURES[name]


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The UNet of a configuration without weights, on the meta device.

    Raises:
        DgqError: diffusers refuses the configuration.
    """
    return network(Architecture(config, 1))


def network(which: Architecture) -> nn.Module:
    """The network of an architecture without weights, on the meta device.

    Raises:
        DgqError: diffusers refuses the configuration.
    """
    import diffusers

    kind = getattr(diffusers, which.network)
    try:
        with torch.device("meta"):
            net: nn.Module = kind.from_config(which.config).eval()
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "UNet" if which.network.startswith("UNet") else which.network
        raise DgqError(f"the {what}'s configuration cannot be used ({reason})") from None
    return net


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
    """Keyword arguments of one call of a UNet, or of PixArt's transformer, at its default size, float32 noise.

    Returns:
        sample (batch, channels, height, width), timestep (scalar int64), encoder_hidden_states (batch, tokens, width),
        added_cond_kwargs where the UNet takes a text embedding and sizes, and timestep_cond (batch, width) where it
        takes the guidance scale (LCM); what PixArt calls them.

    Raises:
        DgqError: the UNet wants other conditions, or its configuration tells no size.
    """
    config: Any = unet.config
    if "caption_channels" in config:
        size = (batch, config.in_channels, config.sample_size, config.sample_size)
        return {
            "hidden_states": torch.empty(size, device=device),
            "timestep": torch.full((batch,), timestep, device=device),
            "encoder_hidden_states": torch.empty((batch, tokens, config.caption_channels), device=device),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }  # fmt: skip
    if config.addition_embed_type not in (None, "text_time") or config.class_embed_type is not None:
        raise DgqError("the UNet takes conditions whose shapes are not in its configuration")
    width = config.cross_attention_dim
    widths = {width} if isinstance(width, int) else {*(width or ())}  # or one for each level
    if config.sample_size is None or len(widths) != 1 or config.encoder_hid_dim_type is not None:
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
        "encoder_hidden_states": noise(batch, tokens, *widths),
    }
    if config.addition_embed_type == "text_time":
        ids = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width], device=device)
        pooled = config.projection_class_embeddings_input_dim - ids.numel() * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": ids.repeat(batch, 1)}
    if config.time_cond_proj_dim is not None:
        arguments["timestep_cond"] = noise(batch, config.time_cond_proj_dim)
    return arguments
