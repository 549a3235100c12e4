"""The VAE of most pipelines, of which the decoder is quantized: all that dgq knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from dgq_kernels import backend, native
from dgq_kernels.native.library import BLOCK

from ..family import FIRST_AND_LAST, Family, noise
from ..integer.folding import fold
from ..integer.fused_unet import FUSED, FoldedUpsample, FusedResnetBlock, folds, upsampled
from ..integer.layer import IntegerLayer
from ..integer.prepared import is_hooked, native_norm


class FoldedFloatUpsample(FoldedUpsample):
    """The same in float, where the convolution is."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self.conv
        if output_size is not None or type(conv) is not nn.Conv2d or is_hooked(conv):
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
    (`native.recycled`), results of a block that of its input or residual, and the last is normalized and activated in
    one pass.
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
            inner: Any = ((self.conv_in, {}), (self.mid_block, {}), *_in_order(self.up_blocks))
            own = False  # whether nobody else can hold the picture: then results may be written over it
            for module, others in inner:
                layers = _in_halves(module)
                if layers is None:
                    sample, own = module(sample, **others), _makes_its_own(module)
                    if isinstance(module, Upsample2D):
                        native.give_back()  # what smaller pictures left: those that follow have no use for it
                    continue
                shortened = _is_plain(module.conv_shortcut)
                hidden, residual = module.begin(layers[0], sample, in_place=own and shortened)
                own = shortened or (own and module.conv_shortcut is None)
                del sample  # the largest picture of all, where a shortcut made the residual
                sample = module.finish(layers[1], hidden, residual, in_place=own)
                own = True
                del hidden, residual
            sample = native_norm(self.conv_norm_out, True).over_groups(sample, own)
            pictures: Tensor = self.conv_out(sample)
            return pictures


def _in_order(blocks: Any) -> Iterator[tuple[Any, dict[str, None]]]:
    """What blocks call after each other, and with what else than a picture: whoever calls a block holds its input, the
    largest picture, to its end."""
    for block in blocks:
        if type(block) is not UpDecoderBlock2D or is_hooked(block):
            yield block, {}
            continue
        yield from ((resnet, {"temb": None}) for resnet in block.resnets)
        yield from ((upsampler, {}) for upsampler in block.upsamplers or ())


def _in_halves(block: Any) -> Any:
    """The convolutions of a block of which first one half can be run and then the other; None where it is called."""
    plain = type(block) is FusedResnetBlock and not is_hooked(block) and block._compiled_call_impl is None
    return block.layers() if plain else None


def _is_plain(layer: Any) -> bool:
    """Whether a layer is a convolution whose result nobody sees but who calls it."""
    return (type(layer) is nn.Conv2d or isinstance(layer, IntegerLayer)) and not is_hooked(layer)


def _makes_its_own(module: Any) -> bool:
    """Whether the result of a module that is called is in no other hands."""
    return type(module) is FoldedFloatUpsample and not is_hooked(module) and _is_plain(module.conv)


def _is_plain_end(decoder: Any) -> bool:
    """Whether a decoder's last norm and activation can be one call of the CPU engine, and no hook sees all modules."""
    norm, activation = decoder.conv_norm_out, decoder.conv_act
    if backend.chosen(torch.device("cpu")).name != "cpu" or not native.available():
        return False
    if (type(norm), type(activation)) != (nn.GroupNorm, nn.SiLU) or not norm.affine or norm.num_channels % BLOCK:
        return False
    if of_modules._global_forward_hooks or of_modules._global_forward_pre_hooks:
        return False
    return not (is_hooked(norm) or is_hooked(activation))


class AutoencoderKL(Family):
    """`AutoencoderKL`, called to decode latents and to encode the picture."""

    network = "AutoencoderKL"
    title = "VAE"
    component = "vae"
    arguments = ("z",)
    float_layers = {  # noqa: RUF012 (read only)
        "*quant_conv": "a few channels, from which pipelines tell the dtype",
        "*.conv_shortcut": "a fifth of the error for a hundredth of the time",
        **{f"{half}.{name}": why for half in ("encoder", "decoder") for name, why in FIRST_AND_LAST.items()},
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
        """The picture, which the encoder, where the network is calibrated whole, reads again."""
        picture = network.decode(**call)
        network.encode(picture.sample)
        return picture

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
