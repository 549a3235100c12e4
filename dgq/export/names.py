"""What the original code of Stable Diffusion, and ComfyUI, call the tensors of diffusers' UNet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import DgqError

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(unet: Any, tensors: Iterable[str]) -> dict[str, str]:
    """The original name of each tensor of a `UNet2DConditionModel`.

    Args:
        unet: the network.
        tensors: names in its state_dict.

    Raises:
        DgqError: a tensor has none: the original code has no such UNet.
    """
    modules = dict(_modules(unet))
    found = {}
    for tensor in tensors:
        parts = tensor.split(".")
        owner = next((known for end in range(len(parts), 0, -1) if (known := ".".join(parts[:end])) in modules), None)
        if owner is None:
            raise DgqError(
                f"tensor {tensor!r} has no name in the original code of Stable Diffusion",
                "only UNets of Stable Diffusion 1 and 2, SDXL and their fine-tunes have all",
            )
        found[tensor] = modules[owner] + tensor.removeprefix(owner)
    return found


def _modules(unet: Any) -> Iterable[tuple[str, str]]:
    """(diffusers' name, original name) of the modules that stand for themselves and all below."""
    yield from _OUTSIDE.items()
    place = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from _pair(f"down_blocks.{i}", j, f"input_blocks.{place}")
            place += 1
        if getattr(block, "downsamplers", None):
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1
    for j, place in enumerate((0, 2)):
        yield from _resnet(f"mid_block.resnets.{j}", f"middle_block.{place}")
    yield "mid_block.attentions.0", "middle_block.1"
    place = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield from _pair(f"up_blocks.{i}", j, f"output_blocks.{place}")
            place += 1
        if getattr(block, "upsamplers", None):
            after = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{place - 1}.{after}.conv"


def _pair(block: str, j: int, place: str) -> Iterable[tuple[str, str]]:
    """A residual block, and the attention that may follow it."""
    yield from _resnet(f"{block}.resnets.{j}", f"{place}.0")
    yield f"{block}.attentions.{j}", f"{place}.1"


def _resnet(ours: str, theirs: str) -> Iterable[tuple[str, str]]:
    return ((f"{ours}.{name}", f"{theirs}.{original}") for name, original in _RESNET.items())
