"""What dgq asks of a kind of network. One file of `dgq.families` answers for each kind; nothing else knows its class.

`family_of` finds the family of a network, `network_of` the network of a pipeline, `family_at` the family of a folder.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DgqError

TOKENS = 77

DISTILLED = ("LCMScheduler", "TCDScheduler")

FIRST_AND_LAST = dict.fromkeys(("conv_in", "conv_out"), "first and last convolution stay float")


@dataclass(frozen=True)
class Architecture:
    """A network and how it is called.

    Attributes:
        config: of diffusers' class, where it differs from the defaults.
        batch: samples of a call (two with guidance).
        network: diffusers' class.
        tokens: of the text; None for the family's.
        pixels: height and width of the picture; None for the network's default size.
        pipeline: what its model_index.json says, with a component's configuration (and `_class_name`) in the place of
            its class, but for network and tokenizers; and its "steps" and "guidance". None where it is not known.
    """

    config: dict[str, Any]
    batch: int
    network: str
    tokens: int | None = None
    pixels: int | None = None
    pipeline: dict[str, Any] | None = None


class Family:
    """A kind of network that diffusers has, quantized, loaded, drawn with and measured by what is said here.

    The defaults are those of a network that nothing is known of. A family is a subclass, of which `FAMILIES` holds an
    instance.

    Attributes:
        network: its class in diffusers, the `_class_name` of its configuration.
        title: what people call it.
        component: its name in a pipeline and the folder of its files.
        pipelines: diffusers' classes that draw with it from a text alone; none where it cannot be quantized yet.
        needed: the components that these cannot do without.
        arguments: a call's arguments in the order they may be given by position.
        timestep: which of them is the timestep.
        tokens: of the text that a call reads, usually.
        separate_guidance: whether the two halves of the guidance are computed in two calls, not in one of two samples.
        guidance_argument: how the pipeline calls its guidance scale.
        float_layers: layers that stay float, names or patterns of `fnmatch`, and why.
        wide_layers: layers, by pattern, whose weights take 8 bits where the recipe says fewer, and why.
        shared_inputs: names of layers in a module, below its own, that read one tensor, beside the queries, keys and
            values of an attention.
        time_layers: last names of layers that read the time's embedding, one tensor in the whole network; each has a
            channel handling of its own.
        start_token: whether the first key of cross-attention is a start token, which takes most of the probability:
            then attention may be the logarithmic one, else it is float.
        tuned: whether `dgq tune` knows what it predicts and reads, and where latents come from.
        fused: exact type of a module -> (whether one of them can leave work to its quantized layers, the class that
            does, whose `after_norm` names the layers that take in a norm or an activation).
        block: what a layer's name begins with where it lies in one of the repeated blocks.
        shortened: (long, short) of the words in such a block's name, for tables.
        wide_upsampling: whether the layers of `upsampled` take inputs of 16 bits and weights of 8, whatever the recipe.
        cast: whether pipelines cast it while they draw, what is not quantized of it.
        architectures: well-known networks by name, which `dgq bench --arch` runs with random weights.
    """

    network = ""
    title = "network"
    component = ""
    pipelines: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    timestep = "timestep"
    tokens = TOKENS
    separate_guidance = False
    guidance_argument = "guidance_scale"
    float_layers: Mapping[str, str] = FIRST_AND_LAST
    wide_layers: Mapping[str, str] = {}
    shared_inputs: tuple[tuple[str, ...], ...] = (("add_q_proj", "add_k_proj", "add_v_proj"),)
    time_layers: tuple[str, ...] = ()
    start_token = False
    tuned = False
    fused: Mapping[type[nn.Module], tuple[Callable[[Any], bool], Any]] = {}
    block = re.compile(r"(?!)")
    shortened: tuple[tuple[str, str], ...] = ()
    wide_upsampling = False
    cast = False
    architectures: Mapping[str, Architecture] = {}

    def network_class(self) -> Any:
        """diffusers' class."""
        import diffusers

        return getattr(diffusers, self.network)

    def skeleton(self, config: Mapping[str, Any]) -> Any:
        """The float network of a configuration without weights, on the meta device.

        Raises:
            DgqError: diffusers refuses the configuration.
        """
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        try:
            with torch.device("meta"):
                return self.network_class().from_config(plain).eval()
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DgqError(f"the {self.title}'s configuration cannot be used ({reason})") from None

    def kept(self, name: str) -> str | None:
        """Why a layer stays float; None for those that are quantized."""
        return next((why for pattern, why in self.float_layers.items() if fnmatch.fnmatchcase(name, pattern)), None)

    def weight_bits(self, name: str, bits: int) -> int:
        """Bits of a layer's weight where the recipe says `bits` of all layers."""
        return max(bits, 8) if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.wide_layers) else bits

    def joined_inputs(self, network: nn.Module) -> dict[str, int]:
        """Linear layers and 1x1 convolutions that read two tensors joined along the channels: {name: channels of the
        first}."""
        return {}

    def after_norm(self, network: nn.Module) -> set[str]:
        """Layers whose input comes straight from a norm or an activation, which the quantizing op takes in."""
        return {
            f"{name}.{layer}"
            for name, module in network.named_modules()
            if type(module) in self.fused
            for layer in self.fused[type(module)][1].after_norm
        }

    def upsampled(self, network: nn.Module) -> set[str]:
        """3x3 convolutions of a float network whose input is a picture upsampled by two, each pixel four times, and
        which `fused` hands the small picture once they are quantized (`wide_upsampling`)."""
        return set()

    def check_configs(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        """Refuse, by the configurations of network and VAE, what does not draw from a text alone.

        Raises:
            DgqError: it takes more than latents.
        """

    def generation(self, index: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
        """A model's own "steps" and "guidance", by its model_index.json and its network's configuration."""
        return {"steps": 25, "guidance": 7.5}

    def few_steps(
        self, scheduler: Mapping[str, Any], network: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, Any]:
        """What goes before `generation` where a model was distilled to draw in a few steps; nothing for others.

        Args:
            scheduler: its configuration.
            network: the network's configuration.
            names: what the model is called, and what its files say they were.
        """
        # schedulers that are made for distillates and for nothing else
        return {"steps": 4, "guidance": 1.0} if scheduler.get("_class_name") in DISTILLED else {}

    def check_parts(self, folder: Path, parts: Mapping[str, Any]) -> None:
        """Refuse components of a folder's pipeline that load one by one and fail only while they draw.

        Raises:
            DgqError: the latents or the text are not the network's.
        """

    def default_size(self, pipe: Any) -> tuple[int, int]:
        """(width, height) in pixels of the pictures it was trained on."""
        size = getattr(pipe, self.component).config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return columns * pipe.vae_scale_factor, rows * pipe.vae_scale_factor

    def size_factor(self, pipe: Any) -> int:
        """What a picture's width and height are multiples of."""
        return int(pipe.vae_scale_factor)

    def latent_shape(self, pipe: Any, width: int, height: int) -> tuple[int, int, int]:
        """Channels, height and width of one sample's latents."""
        factor = pipe.vae_scale_factor
        return getattr(pipe, self.component).config.in_channels, height // factor, width // factor

    def packed(self, pipe: Any, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the pipeline takes and returns them."""
        return latents

    def unpacked(self, pipe: Any, latents: Tensor, width: int, height: int) -> Tensor:
        """Inverse of `packed`, for pictures of this width and height in pixels."""
        return latents

    def prompt_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """How many tokens a prompt has, and how many the model reads: of the encoder that reads most."""
        tokenizer = pipe.tokenizer
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids), tokenizer.model_max_length

    def pipeline_arguments(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        """What the pipeline is called with for prompts and guidance.

        Raises:
            DgqError: it takes no negative prompt.
        """
        return {
            "prompt": list(prompts),
            "negative_prompt": [negative] * len(prompts),
            self.guidance_argument: guidance,
        }

    def step_callback(self, pipe: Any, on_step: Callable[[int], None]) -> dict[str, Any]:
        """What the pipeline is called with so that it tells after each timestep of the scheduler how many are done."""

        def after(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(step + 1)
            return tensors

        return {"callback_on_step_end": after}

    def doubled(self, config: Any, guidance: float) -> bool:
        """Whether both halves of the guidance are computed, in one call or in two (`separate_guidance`)."""
        return guidance > 1

    def guidance_weights(self, batch: int, guidance: float) -> Tensor:
        """How the samples of a call make up the guided output: (B,), or one where each is a result by itself."""
        return torch.tensor([1 - guidance, guidance]) if batch == 2 else torch.ones(1)

    def plain_latents(self, pipe: Any, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the VAE has them."""
        config = pipe.vae.config
        plain = latents.to(pipe.vae.dtype) / config.scaling_factor
        shift = config.get("shift_factor")
        return plain if shift is None else plain + shift

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of latents (B, C, h, w)."""
        pixels: Tensor = pipe.vae.decode(self.plain_latents(pipe, latents)).sample
        return pixels

    def run(self, network: Any, call: dict[str, Any]) -> Any:
        """What a network makes of a call's keyword arguments."""
        return network(**call)

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
        """Keyword arguments of one call of a network of this configuration, float32 noise.

        Args:
            config: the network's.
            batch: samples.
            device: where they are made.
            tokens: of the text.
            timestep: of 1000.
            seed: of the noise.
            pixels: height and width of the picture; None for the default size.

        Raises:
            DgqError: the configuration does not tell them.
        """
        raise DgqError(f"how a {self.title} is called is not known")


class Patched(Family):
    """Latents that pipelines take and return as a row for each patch of 2x2.

    Attributes:
        side: of the default picture's latents.
    """

    side = 128

    def default_size(self, pipe: Any) -> tuple[int, int]:
        return self.side * pipe.vae_scale_factor, self.side * pipe.vae_scale_factor

    def size_factor(self, pipe: Any) -> int:
        return int(2 * pipe.vae_scale_factor)

    def latent_shape(self, pipe: Any, width: int, height: int) -> tuple[int, int, int]:
        factor = pipe.vae_scale_factor
        return getattr(pipe, self.component).config.in_channels // 4, height // factor, width // factor

    def packed(self, pipe: Any, latents: Tensor) -> Tensor:
        """(B, C, h, w) as (B, h / 2 * w / 2, 4 C)."""
        patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h / 2, 2, w / 2, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpacked(self, pipe: Any, latents: Tensor, width: int, height: int) -> Tensor:
        factor = self.size_factor(pipe)
        patches = latents.unflatten(1, (height // factor, width // factor)).unflatten(3, (-1, 2, 2))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


FAMILIES: list[Family] = []
DECODERS: list[Family] = []  # what makes pixels of the networks' latents, and is quantized beside them
ENCODERS: list[Family] = []  # what makes embeddings of prompts, and is quantized beside them


class Unknown(Family):
    """Networks that are in no family: of every Linear and Conv2d only what its name says is a first or last layer, or
    an embedder, stays float, and what modulates a block keeps 8 bits."""

    float_layers = {  # noqa: RUF012 (read only)
        **FIRST_AND_LAST,
        **dict.fromkeys(
            (
                "x_embedder*",
                "img_in*",
                "pos_embed.*",
                "patch_embed*",
                "proj_in",
                "proj_out",
                "norm_out.*",
                "final_layer.*",
            ),
            "first and last layer stay float",
        ),
        **dict.fromkeys(("context_embedder*", "txt_in*", "caption_projection.*"), "reads the text, once a call"),
        **dict.fromkeys(("time_*", "t_embedder*", "adaln_single.*"), "one row a sample, which every block reads"),
    }
    wide_layers = dict.fromkeys(
        ("*.norm*.linear", "*modulation*", "*_mod.*"), "scales and gates of a whole block or of all"
    )


UNKNOWN = Unknown()


def named(network: str) -> Family:
    """The family of a class of diffusers, or `UNKNOWN`."""
    return next((family for family in (*FAMILIES, *DECODERS) if family.network == network), UNKNOWN)


def family_of(network: Any) -> Family:
    """The family of a network, which may be of a subclass, or `UNKNOWN`."""
    names = [kind.__name__ for kind in type(network).__mro__]
    return next((family for family in (*FAMILIES, *DECODERS, *ENCODERS) if family.network in names), UNKNOWN)


def network_of(pipe: Any) -> Any:
    """The network of a pipeline that dgq quantizes, or has quantized.

    Raises:
        DgqError: it has none.
    """
    for family in FAMILIES:
        network = getattr(pipe, family.component, None)
        if network is not None and family_of(network) is family:
            return network
    raise DgqError(f"{type(pipe).__name__} has no network that dgq works with", f"dgq works with {working()}")


def working() -> str:
    """The pipelines that dgq works with, for messages."""
    return ", ".join(name for family in FAMILIES for name in family.pipelines)


def drawing(pipeline: Any) -> Family | None:
    """The family that pipelines of this class draw with."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def noise(shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal float32 numbers drawn on the CPU; on the meta device none."""
    if device.type == "meta":
        return torch.empty(tuple(shape), device=device)
    return torch.randn(tuple(shape), generator=generator).to(device)


def chat_tokens(tokenizer: Any, prompt: str, **options: Any) -> int:
    """How many tokens a prompt has in the template of a chat; `options` are the template's."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


def no_negative(title: str, negative: str) -> None:
    """Refuse a negative prompt that a pipeline does not take.

    Raises:
        DgqError: there is one.
    """
    if negative:
        raise DgqError(f"a {title} takes no negative prompt", "leave it out")


def check_fit(folder: Path, component: str, latents: tuple[int, int], text: tuple[int, int]) -> None:
    """Refuse components that are not the network's.

    Args:
        folder: the pipeline's.
        component: of the network.
        latents: channels that the VAE makes, and that the network takes.
        text: width that the encoders make, and that the network takes.

    Raises:
        DgqError: they differ.
    """
    if latents[0] != latents[1]:
        raise DgqError(f"{folder}: latents of {latents[0]} channels, but the {component} takes {latents[1]}")
    if text[0] != text[1]:
        raise DgqError(f"{folder}: text of width {text[0]}, but the {component} takes {text[1]}")


def check_scale(folder: Path, vae: Any) -> None:
    """Refuse a VAE whose latents' scale is no positive number.

    Raises:
        DgqError: it is not.
    """
    scale = vae.config.get("scaling_factor")
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise DgqError(f"{folder / 'vae' / 'config.json'}: scaling_factor {scale!r} is not positive")
