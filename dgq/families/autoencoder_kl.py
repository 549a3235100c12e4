"""The VAE of most pipelines, of which the decoder is quantized: all that dgq knows of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from dgq_kernels import backend, native
from dgq_kernels.native.library import BLOCK

from ..family import FIRST_AND_LAST, Family, noise
from ..integer.folding import fold
from ..integer.fused_unet import FUSED, FoldedUpsample, folds, upsampled
from ..integer.prepared import native_norm


class FoldedFloatUpsample(FoldedUpsample):
    """The same in float, where the convolution is."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self.conv
        if output_size is not None or type(conv) is not nn.Conv2d or "forward" in conv.__dict__ or _hooked(conv):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        batch, _, height, width = hidden_states.shape
        taps = fold(conv.weight).chunk(4)
        out = torch.empty(
            (batch, conv.out_channels, 2 * height, 2 * width),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
            memory_format=torch.channels_last,
        )
        for row in range(2):
            for column in range(2):
                near = nn.functional.pad(hidden_states, (1 - column, column, 1 - row, row))
                out[:, :, row::2, column::2] = nn.functional.conv2d(near, taps[2 * row + column], conv.bias)
        return out


class LeanDecoder(Decoder):
    """A decoder that is lean with memory, and with time to get it, on the CPU.

    It begins by returning to the system what was freed before: the heap that a network's steps leave, in pieces too
    small for what follows, would stay beside a decoder's far larger pictures. Those take each other's place
    (`native.recycled`), and the last is normalized and activated in one pass.
    """

    after_norm = ()

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        plain: Any = super()
        if sample.device.type != "cpu" or torch.compiler.is_compiling():
            whole: Tensor = plain.forward(sample, latent_embeds, *args, **kwargs)
            return whole
        native.give_back()
        with native.recycled():
            if latent_embeds is not None or torch.is_grad_enabled() or not _is_plain_end(self):
                return plain.forward(sample, latent_embeds, *args, **kwargs)
            inner: Any = (self.conv_in, self.mid_block, *_in_order(self.up_blocks))
            for module in inner:
                sample = module(sample)
            pictures: Tensor = self.conv_out(native_norm(self.conv_norm_out, True).over_groups(sample))
            return pictures


def _in_order(blocks: Any) -> Iterator[Any]:
    """What blocks call after each other: whoever calls a block holds its input, the largest picture, to its end."""
    for block in blocks:
        if type(block) is not UpDecoderBlock2D or "forward" in block.__dict__ or _hooked(block):
            yield block
            continue
        yield from (functools.partial(resnet, temb=None) for resnet in block.resnets)
        yield from block.upsamplers or ()


def _is_plain_end(decoder: Any) -> bool:
    """Whether a decoder's last norm and activation can be one call of the CPU engine."""
    norm, activation = decoder.conv_norm_out, decoder.conv_act
    if backend.chosen(torch.device("cpu")).name != "cpu" or not native.available():
        return False
    if (type(norm), type(activation)) != (nn.GroupNorm, nn.SiLU) or not norm.affine or norm.num_channels % BLOCK:
        return False
    return not any("forward" in x.__dict__ or _hooked(x) for x in (norm, activation))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class AutoencoderKL(Family):
    """`AutoencoderKL`, called to decode latents."""

    network = "AutoencoderKL"
    title = "VAE"
    component = "vae"
    arguments = ("z",)
    float_layers = {  # noqa: RUF012 (read only)
        "encoder.*": "pictures are drawn by the decoder alone",
        "*quant_conv": "a few channels, from which pipelines tell the dtype",
        "decoder.*.conv_shortcut": "a fifth of the error for a hundredth of the time",
        **{f"decoder.{name}": why for name, why in FIRST_AND_LAST.items()},
    }
    fused = {  # noqa: RUF012 (read only)
        ResnetBlock2D: FUSED[ResnetBlock2D],
        Upsample2D: (folds, FoldedFloatUpsample),
        Decoder: (lambda module: True, LeanDecoder),
    }
    wide_upsampling = True
    cast = True

    def upsampled(self, network: nn.Module) -> set[str]:
        return upsampled(network)

    def run(self, network: Any, call: dict[str, Any]) -> Any:
        return network.decode(**call)

    def call(
        self,
        config: Any,
        batch: int,
        device: torch.device,
        *,
        tokens: int = 0,
        timestep: int = 0,
        seed: int = 0,
        pixels: int | None = None,
    ) -> dict[str, Any]:
        """z (batch, channels, height, width)."""
        side = (pixels or config.sample_size) // 2 ** (len(config.block_out_channels) - 1)
        generator = torch.Generator().manual_seed(seed)
        return {"z": noise((batch, config.latent_channels, side, side), device, generator)}
