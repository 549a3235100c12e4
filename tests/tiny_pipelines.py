"""Parts of tiny pipelines with random weights, and pipelines of the kinds that people bring: SDXL, LCM, fp16, shards.

Each builder saves a pipeline to a folder that does not exist yet, and returns the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH = 32  # of a text encoder
TOKENS = 77  # of a prompt


def vae() -> Any:
    """Pictures of twice the latents' side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def text_encoder(projection: bool = False, tokens: int = TOKENS, width: int = WIDTH) -> Any:
    """CLIP's text model of one layer, with its projection to the pooled embedding or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=600,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=598,
        eos_token_id=599,
        pad_token_id=599,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tokenizer(tokens: int = TOKENS) -> Any:
    """Of 600 entries."""
    from embedded.tokenizer import build_tokenizer

    made = build_tokenizer(["a cat", "a dog on a blue background"], 600)
    made.model_max_length = tokens
    return made


def unet(seed: int = 0, **options: Any) -> Any:
    """Two levels of Stable Diffusion's blocks; `options` go to diffusers' class."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**defaults, **options})


def stable_diffusion(
    folder: Path, scheduler: Any, save: dict[str, Any] | None = None, kind: Any = None, **options: Any
) -> Path:
    """Stable Diffusion, or another kind of pipeline of its parts; `options` are the UNet's, `save` is of saving."""
    from diffusers import StableDiffusionPipeline

    pipe = (kind or StableDiffusionPipeline)(
        unet=unet(**options),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if save and save.get("variant") == "fp16":
        pipe = pipe.to(torch.float16)
    pipe.save_pretrained(folder, **(save or {}))
    return folder


def stable_diffusion_xl(folder: Path, scheduler: Any, **options: Any) -> Path:
    """SDXL: two text encoders of different widths, a pooled embedding and sizes, several transformer blocks a layer."""
    from diffusers import StableDiffusionXLPipeline

    sizes, second = 8, 2 * WIDTH
    xl: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": WIDTH + second,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sizes,
        "projection_class_embeddings_input_dim": 6 * sizes + second,
    }
    pipe = StableDiffusionXLPipeline(
        unet=unet(**{**xl, **options}),
        vae=vae(),
        scheduler=scheduler,
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True, width=second),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    """As SDXL 1.0."""
    from diffusers import EulerDiscreteScheduler

    return stable_diffusion_xl(folder, EulerDiscreteScheduler(steps_offset=1))


def sdxl_turbo(folder: Path) -> Path:
    """As SDXL-Turbo: one to four steps without guidance, an ancestral sampler."""
    from diffusers import EulerAncestralDiscreteScheduler

    return stable_diffusion_xl(folder, EulerAncestralDiscreteScheduler(timestep_spacing="trailing", steps_offset=1))


def ssd_1b(folder: Path) -> Path:
    """As SSD-1B: unequal numbers of transformer blocks, a middle without attention."""
    from diffusers import EulerDiscreteScheduler

    return stable_diffusion_xl(
        folder,
        EulerDiscreteScheduler(steps_offset=1),
        transformer_layers_per_block=(0, 2),
        reverse_transformer_layers_per_block=((2, 1), 0),
        mid_block_type="UNetMidBlock2D",
    )


def lcm(folder: Path) -> Path:
    """As an LCM distillate: the UNet is told the guidance scale."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    scheduler = LCMScheduler(steps_offset=1)
    return stable_diffusion(folder, scheduler, kind=LatentConsistencyModelPipeline, time_cond_proj_dim=16)


def inpainting(folder: Path) -> Path:
    """As Stable Diffusion for inpainting: the UNet also takes a mask and the masked picture."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return stable_diffusion(folder, scheduler, kind=StableDiffusionInpaintPipeline, in_channels=9)


def fp16(folder: Path) -> Path:
    """Stable Diffusion as variant fp16 alone."""
    from diffusers import DDIMScheduler

    return stable_diffusion(folder, DDIMScheduler(clip_sample=False, steps_offset=1), {"variant": "fp16"})


def fp16_shards(folder: Path) -> Path:
    """Stable Diffusion as variant fp16 alone, the UNet and the text encoder in several files."""
    from diffusers import DDIMScheduler

    return stable_diffusion(
        folder, DDIMScheduler(clip_sample=False, steps_offset=1), {"variant": "fp16", "max_shard_size": "50KB"}
    )


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "ssd-1b": ssd_1b,
    "lcm": lcm,
    "fp16": fp16,
    "fp16-shards": fp16_shards,
}


def small_clip(folder: Path) -> Path:
    """Save a CLIP model with random weights and its processor to `folder`."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPVisionConfig,
    )

    from embedded.tokenizer import build_tokenizer

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=598,
        eos_token_id=599,
        pad_token_id=599,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, build_tokenizer(["a cat", "a dog on a blue background"], 600)).save_pretrained(folder)
    return folder


def lora(file: Path, seed: int = 0, size: float = 1.0, width: int = 64) -> Path:
    """A LoRA of rank 2 on two layers of the tiny pipelines' UNet, in diffusers' names; its file."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(seed)
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    shapes = {f"{block}.attn1.to_q": (width, 64), f"{block}.attn2.to_out.0": (width, 64)}
    tensors = {}
    for name, (columns, rows) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=g) * size
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=g) * size
    save_file(tensors, file)
    return file
