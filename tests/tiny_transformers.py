"""Tiny pipelines of the transformers that people bring, with random weights: a builder each.

Each builder saves a pipeline to a folder that does not exist yet, and returns the folder. Tokenizers are made here, of
single letters or bytes; text encoders and decoders are of the models' own classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import WIDTH, text_encoder, tokenizer
from tokenizers import pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
CHANNELS = 4  # of latents
# as Qwen's chat models have it, in short
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vae(**options: Any) -> Any:
    """Pictures of twice the latents' side, whose scale and shift are not 1 and 0."""
    from diffusers import AutoencoderKL

    defaults: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": CHANNELS,
        "norm_num_groups": 8,
        "sample_size": 16,
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**{**defaults, **options})


def t5(width: int = WIDTH) -> dict[str, Any]:
    """T5's encoder and its tokenizer of letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    entries = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    made = T5Tokenizer(vocab=[(entry, -2.0) for entry in entries], extra_ids=0)
    config = T5Config(vocab_size=len(made), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return {"text_encoder": T5EncoderModel(config), "tokenizer": made}


def qwen_tokenizer() -> Any:
    """Of bytes, with a template; it says that it reads more than the encoder does, as the published ones do."""
    from transformers import Qwen2Tokenizer

    entries = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Qwen2Tokenizer(vocab={entry: i for i, entry in enumerate(entries)}, model_max_length=131072)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


def qwen3(layers: int) -> dict[str, Any]:
    """Qwen 3 and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    made = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(made),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        max_window_layers=2,
    )
    return {"text_encoder": Qwen3ForCausalLM(config), "tokenizer": made}


def flow(dynamic: bool = False) -> Any:
    """The scheduler of flow matching; with a shift by the picture's size, as FLUX.1-dev and Qwen-Image have it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)


def with_outliers(network: Any) -> Any:
    """No layer is zero, and some channels are larger than others."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter[3] *= 4
            elif not parameter.abs().max():
                parameter.normal_(std=0.1)
    return network


def sd3(folder: Path) -> Path:
    """As Stable Diffusion 3.5: a second attention in some blocks, norms of queries and keys, three text encoders."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH * 2,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    third = {f"{name}_3": part for name, part in t5(2 * WIDTH).items()}
    StableDiffusion3Pipeline(
        transformer=with_outliers(network),
        scheduler=flow(),
        vae=vae(),
        text_encoder=text_encoder(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projection=True),
        tokenizer_2=tokenizer(),
        **third,
    ).save_pretrained(folder)
    return folder


def flux(folder: Path) -> Path:
    """As FLUX.1-dev."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    second = {f"{name}_2": part for name, part in t5().items()}
    FluxPipeline(
        transformer=with_outliers(network),
        scheduler=flow(dynamic=True),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        **second,
    ).save_pretrained(folder)
    return folder


def flux2_klein(folder: Path) -> Path:
    """As FLUX.2-klein-base, which is not distilled: guidance takes two calls a step."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    network = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    decoder = AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        transformer=with_outliers(network), scheduler=flow(dynamic=True), vae=decoder, **qwen3(27)
    ).save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    """As PixArt-Sigma."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        sample_size=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    PixArtSigmaPipeline(
        transformer=with_outliers(network), scheduler=DPMSolverMultistepScheduler(), vae=vae(shift_factor=None), **t5()
    ).save_pretrained(folder)
    return folder


def z_image(folder: Path) -> Path:
    """As Z-Image."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    ZImagePipeline(transformer=with_outliers(network), scheduler=flow(), vae=vae(), **qwen3(2)).save_pretrained(folder)
    return folder


def qwen_image(folder: Path) -> Path:
    """As Qwen-Image."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    network = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.0, 2.0, 1.5],
    )
    made = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(made),
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "max_window_layers": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    QwenImagePipeline(
        transformer=with_outliers(network),
        scheduler=flow(dynamic=True),
        vae=decoder,
        tokenizer=made,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
    ).save_pretrained(folder)
    return folder


def sana(folder: Path) -> Path:
    """As Sana."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    torch.manual_seed(0)
    network = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=16,
    )
    levels: dict[str, Any] = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    decoder = AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.7,
        **levels,
    )
    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    made = GemmaTokenizer(vocab={entry: i for i, entry in enumerate(entries)})
    config = Gemma2Config(
        vocab_size=len(made),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
    )
    SanaPipeline(
        transformer=with_outliers(network),
        scheduler=flow(),
        vae=decoder,
        tokenizer=made,
        text_encoder=Gemma2Model(config),
    ).save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "flux2-klein": flux2_klein,
    "sana": sana,
}
