"""The UNet of Stable Diffusion 1 and 2, SDXL and their kin: all that dgq knows of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DgqError
from ..family import DISTILLED, FIRST_AND_LAST, Architecture, Family, check_fit, check_scale, noise
from ..integer.fused_unet import FUSED, upsampled

NETWORK = "UNet2DConditionModel"

TURBO = re.compile(r"(?<![a-z])turbo(?![a-z])")
LIGHTNING = re.compile(r"(?<![a-z])lightning(?![a-z])")
STEPS = re.compile(r"(?<![0-9])([1248])[-_ ]?steps?(?![a-z])")  # the ones that there are

# What stands around well-known UNets.
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_CLIP_L = {
    "_class_name": "CLIPTextModel",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_OPEN_CLIP_H = {
    "_class_name": "CLIPTextModel",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_OPEN_CLIP_BIG_G = {
    "_class_name": "CLIPTextModelWithProjection",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_PLAIN = {  # pipelines of Stable Diffusion 1 and 2
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


class UNet(Family):
    """`UNet2DConditionModel`, in pipelines whose text encoders are CLIP's."""

    network = NETWORK
    title = "UNet"
    component = "unet"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
    needed = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("sample", "timestep", "encoder_hidden_states")
    time_layers = ("time_emb_proj",)
    float_layers = {  # noqa: RUF012 (read only)
        **FIRST_AND_LAST,
        "encoder_hid_proj.image_embeds": "diffusers casts a picture's embedding to its weight's dtype",
    }
    start_token = True
    tuned = True
    fused = FUSED
    block = re.compile(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.\w+\.\d+")
    shortened = (
        ("down_blocks", "down"),
        ("up_blocks", "up"),
        ("mid_block", "mid"),
        ("attentions", "attention"),
        ("resnets", "resnet"),
        ("samplers", "sample"),
    )
    architectures = {  # noqa: RUF012 (read only); at 512 pixels
        "sd-v1.4": Architecture(
            {"cross_attention_dim": 768, "sample_size": 64},
            2,
            NETWORK,
            pipeline={
                **_PLAIN,
                "text_encoder": _CLIP_L,
                "vae": _VAE,
                "scheduler": {
                    "_class_name": "DDIMScheduler",
                    **_BETAS,
                    "clip_sample": False,
                    "set_alpha_to_one": False,
                },
                "steps": 20,
                "guidance": 7.5,
            },
        ),
        "sd-turbo": Architecture(
            {
                "cross_attention_dim": 1024,
                "sample_size": 64,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            1,
            NETWORK,
            pipeline={
                **_PLAIN,
                "text_encoder": _OPEN_CLIP_H,
                "vae": _VAE,
                "scheduler": {"_class_name": "EulerDiscreteScheduler", **_BETAS, "timestep_spacing": "trailing"},
                "steps": 1,
                "guidance": 0.0,
            },
        ),
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
            NETWORK,
            pipeline={
                "_class_name": "StableDiffusionXLPipeline",
                "text_encoder": _CLIP_L,
                "text_encoder_2": _OPEN_CLIP_BIG_G,
                "vae": {**_VAE, "scaling_factor": 0.13025},
                "scheduler": {
                    "_class_name": "EulerAncestralDiscreteScheduler",
                    **_BETAS,
                    "timestep_spacing": "trailing",
                },
                "force_zeros_for_empty_prompt": True,
                "steps": 1,
                "guidance": 0.0,
            },
        ),
    }

    def upsampled(self, network: Any) -> set[str]:
        """All, where a picture is halved so that it is at most a row and a column more than half as large as it was."""
        return upsampled(network) if network.config.downsample_padding == 1 else set()

    def joined_inputs(self, network: Any) -> dict[str, int]:
        """The shortcuts of the up path, which read hidden state and skip side by side; the skip's channels follow."""
        found: dict[str, int] = {}
        before = network.mid_block or network.down_blocks[-1]
        if not hasattr(before, "resnets"):
            return found
        hidden = before.resnets[-1].out_channels
        for i, block in enumerate(network.up_blocks):
            for j, resnet in enumerate(getattr(block, "resnets", ())):
                shortcut = getattr(resnet, "conv_shortcut", None)
                if isinstance(shortcut, nn.Conv2d) and shortcut.kernel_size == (1, 1) and hidden < shortcut.in_channels:
                    found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = hidden
                hidden = resnet.out_channels
        return found

    def few_steps(
        self, scheduler: Mapping[str, Any], network: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, Any]:
        """LCM's, which are told the guidance scale where the UNet has an input for it; Turbo's and Lightning's.

        The latter have files of a plain model. Their schedulers' trailing timesteps are the first sign: one step has to
        begin at the noise. Others have these too, so it takes a second one: that the model is called so, or that it
        is an SDXL for 512 pixels.
        """
        if scheduler.get("_class_name") in DISTILLED:
            told = network.get("time_cond_proj_dim") is not None
            return {"steps": 4, "guidance": 8.0} if told else super().few_steps(scheduler, network, names)
        euler = scheduler.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        plain = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
        if not (euler and plain and scheduler.get("timestep_spacing") == "trailing"):
            return {}
        called = " ".join(names).lower()
        if LIGHTNING.search(called):
            steps = STEPS.search(called)
            return {"steps": int(steps[1]) if steps else 4, "guidance": 0.0}
        small = network.get("addition_embed_type") == "text_time" and network.get("sample_size") == 64
        return {"steps": 1, "guidance": 0.0} if small or TURBO.search(called) else {}

    def check_configs(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        """Inpainting's takes a mask and a picture too."""
        channels, latent_channels = network.get("in_channels", 4), vae.get("latent_channels", 4)
        if channels != latent_channels:
            raise DgqError(
                f"the UNet takes {channels} channels, the latents have {latent_channels}: it draws from a picture too",
                "dgq calibrates and draws from prompts alone: name a text-to-image model",
            )

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        vae, unet = parts["vae"].config, parts["unet"].config
        check_scale(folder, parts["vae"])
        sizes = unet.sample_size if isinstance(unet.sample_size, list | tuple) else [unet.sample_size]
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise DgqError(f"{folder / 'unet' / 'config.json'}: sample_size is {unet.sample_size!r}")
        encoders = (parts.get("text_encoder"), parts.get("text_encoder_2"))
        width, taken = sum(one.config.hidden_size for one in encoders if one is not None), unet.cross_attention_dim
        text = (width, taken) if unet.encoder_hid_dim is None and isinstance(taken, int) else (0, 0)
        check_fit(folder, self.component, (vae.latent_channels, unet.in_channels), text)

    def doubled(self, config: Any, guidance: float) -> bool:
        """One that is told the guidance scale (LCM) is called once for it."""
        return guidance > 1 and config.time_cond_proj_dim is None

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
        """sample (batch, channels, height, width), timestep (scalar int64), encoder_hidden_states (batch, tokens,
        width), added_cond_kwargs where it takes a text embedding and sizes, and timestep_cond (batch, width) where it
        takes the guidance scale (LCM)."""
        if config.addition_embed_type not in (None, "text_time") or config.class_embed_type is not None:
            raise DgqError("the UNet takes conditions whose shapes are not in its configuration")
        width = config.cross_attention_dim
        widths = {width} if isinstance(width, int) else {*(width or ())}  # or one for each level
        if config.sample_size is None or len(widths) != 1 or config.encoder_hid_dim_type is not None:
            raise DgqError("the UNet's configuration lacks a sample_size or a single cross_attention_dim")
        generator = torch.Generator().manual_seed(seed)
        size = config.sample_size if pixels is None else pixels // 8
        height, width = (size, size) if isinstance(size, int) else size
        arguments: dict[str, Any] = {
            "sample": noise((batch, config.in_channels, height, width), device, generator),
            "timestep": torch.full((), timestep, device=device),
            "encoder_hidden_states": noise((batch, tokens, *widths), device, generator),
        }
        if config.addition_embed_type == "text_time":
            ids = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width], device=device)
            pooled = config.projection_class_embeddings_input_dim - ids.numel() * config.addition_time_embed_dim
            embedding = noise((batch, pooled), device, generator)
            arguments["added_cond_kwargs"] = {"text_embeds": embedding, "time_ids": ids.repeat(batch, 1)}
        if config.time_cond_proj_dim is not None:
            arguments["timestep_cond"] = noise((batch, config.time_cond_proj_dim), device, generator)
        return arguments
