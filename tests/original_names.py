"""What the original code of Stable Diffusion calls the tensors of diffusers' folders, in single files and LoRAs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "encoder.down_blocks": "encoder.down",
    "decoder.up_blocks": "decoder.up",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def unet_module(name: str, attends_first: bool = False) -> str:
    """A module of a UNet of one layer a level.

    Args:
        name: diffusers'.
        attends_first: whether the first level of the way up has attention.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    kind, _, rest = name.partition("_block")
    if kind == "mid":
        what, number, rest = re.fullmatch(r"\.(resnets|attentions)\.(\d)\.(.*)", rest).groups()
        place = f"middle_block.{1 if what == 'attentions' else 2 * int(number)}"
    else:
        level, what, number, rest = re.fullmatch(r"s\.(\d)\.(\w+)\.(\d)\.(.*)", rest).groups()
        first = 2 * int(level) + int(number)
        if what == "downsamplers":
            return f"input_blocks.{2 * int(level) + 2}.0.op"
        if what == "upsamplers":
            return f"output_blocks.{2 * int(level) + 1}.{1 + attends_first}.conv"
        place = f"input_blocks.{1 + first}" if kind == "down" else f"output_blocks.{first}"
        place += f".{int(what == 'attentions')}"
    return f"{place}.{RESNET.get(rest, rest) if what == 'resnets' else rest}"


def vae_tensor(name: str) -> str:
    """A tensor of a VAE of two levels."""
    for ours, theirs in VAE.items():
        name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
    return re.sub(r"(?<=decoder\.up\.)\d", lambda level: str(1 - int(level[0])), name)


def open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's text encoder: queries, keys and values are one matrix, the projection is transposed."""
    made = {}
    for name, tensor in state.items():
        if re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_", f".{part}_")] for part in "qkv"])
        theirs = name.removeprefix("text_model.").replace(".q_proj.", ".in_proj_")
        for ours, original in OPEN_CLIP.items():
            theirs = theirs.replace(ours, original)
        projection = name == "text_projection.weight"
        made[prefix + ("text_projection" if projection else theirs)] = tensor.T if projection else tensor
    return made


def single_file(folder: Path, encoders: list[tuple[str, str]], attends_first: bool = False) -> dict[str, Tensor]:
    """The tensors of a pipeline's folder, as one file of the original code has them, in float16.

    Args:
        folder: a tiny pipeline's.
        encoders: of each text encoder, whether it is "clip" or "open_clip" there, and the prefix of its tensors.
        attends_first: as `unet_module`.
    """

    def read(part: str) -> dict[str, Tensor]:
        return load_file(next((folder / part).glob("*.safetensors")))

    made = {}
    for name, tensor in read("unet").items():
        module, leaf = name.rsplit(".", 1)
        made[f"model.diffusion_model.{unet_module(module, attends_first)}.{leaf}"] = tensor
    for name, tensor in read("vae").items():
        matrix = "attentions" in name and tensor.dim() == 2
        made[f"first_stage_model.{vae_tensor(name)}"] = tensor[:, :, None, None] if matrix else tensor
    for part, (kind, prefix) in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
        state = read(part)
        if kind == "open_clip":
            made |= open_clip(state, prefix)
        else:
            made |= {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
    return {name: tensor.half().contiguous() for name, tensor in made.items()}
