"""Make a stress variant of a Stable Diffusion model: the same function in float, much harder to quantize.

A share of the channels in front of some layers is made larger by exact, function-preserving rescaling, such as large
models grow by themselves.

Kind "linear": a norm's gain and offset times s, its consumers' columns divided by s; a row of V times s, the column of
the output projection divided by s; a row of GEGLU's value half times s, the column of the layer after it divided by s.

Kind "convolutions": channels of the residual streams, which shortcuts and the convolutions of up- and downsamplers read
as they are: whatever writes to a stream times s, the columns that read it divided by s. Group norms read it too, and do
not see a factor that a whole group of theirs has (but for their epsilon), so channels are scaled in sets that are whole
groups of every norm that reads them. Large sets, and sets of two streams, stay as they are.

Convolutions behind SiLU cannot be stressed in either way and stay as they are.

    python -m embedded.stress --out DIR [--kind linear] [--model MODEL] [--strength 16] [--share 0.03] [--seed 0]

What it measures is a method's robustness, never a model's quality: the folder's card and configuration say so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dgq.checkpoint.reading import read_header
from dgq.errors import DgqError
from dgq.pictures.pipelines import resolve
from embedded.common import write_json

Kind = Literal["linear", "convolutions"]
LABEL = "stress variant"
LARGEST_SET = 1 / 3  # of a stream's channels: a set of more is no outlier
# through which residual streams are followed
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
CARD = """# A stress variant, not a model

Made from {model} by

    python -m embedded.stress --kind {kind} --strength {strength:g} --share {share:g} --seed {seed}

{channels} channels of {places} layer inputs were made up to {strength:g} times larger, and the weights that read them
as much smaller. In float it computes what the original computes. It exists to measure how quantization copes with
channel outliers; figures from it are to be labelled "stress variant" and say nothing about any model's pictures.
"""


@dataclass(frozen=True)
class Place:
    """Where channels can be rescaled without changing the function.

    Attributes:
        name: of the input that gets the outliers.
        makers: parameters whose entries along dimension 0, `rows`, make the channels.
        rows: the part of dimension 0 that makes them.
        readers: weights (N, C, ...) whose columns read them.
        sets: of channels that have to be scaled alike; None where each may be scaled by itself.
    """

    name: str
    makers: Sequence[Tensor]
    rows: slice
    readers: Sequence[Tensor]
    sets: Sequence[Sequence[int]] | None = None

    @property
    def channels(self) -> int:
        return int(self.readers[0].shape[1])


def _norm_place(name: str, norm: nn.Module, readers: Sequence[nn.Module]) -> Place | None:
    makers = [parameter for parameter in (norm.weight, norm.bias) if isinstance(parameter, Tensor)]
    if not makers:
        return None  # without a gain of its own a norm cannot be rescaled
    return Place(name, makers, slice(None), [reader.weight for reader in readers])  # type: ignore[misc]


def _own(layer: Any, name: str, rows: slice, reader: nn.Module) -> Place:
    makers = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return Place(name, makers, rows, [reader.weight])  # type: ignore[list-item]


def places(unet: nn.Module, kind: Kind = "linear") -> Iterator[Place]:
    """Every input of the kind's layers that can be rescaled, in the model's order."""
    yield from _linear_places(unet) if kind == "linear" else _stream_places(unet)


def _linear_places(unet: nn.Module) -> Iterator[Place]:
    for name, module in unet.named_modules():
        found: list[Place | None] = []
        part: Any = module
        if isinstance(module, Transformer2DModel):
            found.append(_norm_place(f"{name}.proj_in", part.norm, [part.proj_in]))
        elif isinstance(module, BasicTransformerBlock):
            first, second = part.attn1, part.attn2
            found.append(_norm_place(f"{name}.attn1", part.norm1, [first.to_q, first.to_k, first.to_v]))
            found.append(_own(first.to_v, f"{name}.attn1.to_out", slice(None), first.to_out[0]))
            if second is not None:
                readers = [second.to_q] if second.is_cross_attention else [second.to_q, second.to_k, second.to_v]
                found.append(_norm_place(f"{name}.attn2", part.norm2, readers))
                found.append(_own(second.to_v, f"{name}.attn2.to_out", slice(None), second.to_out[0]))
            found.append(_norm_place(f"{name}.ff", part.norm3, [part.ff.net[0].proj]))
            half = part.ff.net[2].in_features
            found.append(_own(part.ff.net[0].proj, f"{name}.ff.net.2", slice(half), part.ff.net[2]))
        yield from (place for place in found if place is not None)


@dataclass(eq=False)
class _Stream:
    """A tensor that layers add to and read from.

    Attributes:
        writers: layers whose outputs are its summands.
        readers: (name, convolution, first of the columns that read it); group norms are not among them.
    """

    writers: list[Any]
    readers: list[tuple[str, Any, int]] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return int(self.writers[0].weight.shape[0])


class _Streams:
    """The residual streams of a UNet, found by going through it as its forward does.

    Attributes:
        found: all streams.
        norms: (number of groups, the streams that are joined in front of it) of each group norm that reads streams.
    """

    def __init__(self, unet: Any) -> None:
        self.found: list[_Stream] = []
        self.norms: list[tuple[int, list[_Stream]]] = []
        hidden = self._new([unet.conv_in])
        skips = [hidden]
        for i, block in enumerate(unet.down_blocks):
            name = f"down_blocks.{i}"
            for j, resnet in enumerate(block.resnets):
                hidden = self._resnet(f"{name}.resnets.{j}", resnet, [hidden])
                self._attention(getattr(block, "attentions", ()), j, hidden)
                skips.append(hidden)
            if block.downsamplers is not None:
                hidden = self._sampler(f"{name}.downsamplers.0", block.downsamplers[0], hidden)
                skips.append(hidden)
        for j, resnet in enumerate(unet.mid_block.resnets):
            hidden = self._resnet(f"mid_block.resnets.{j}", resnet, [hidden])
            self._attention(unet.mid_block.attentions, j, hidden)
        for i, block in enumerate(unet.up_blocks):
            name = f"up_blocks.{i}"
            for j, resnet in enumerate(block.resnets):
                hidden = self._resnet(f"{name}.resnets.{j}", resnet, [hidden, skips.pop()])
                self._attention(getattr(block, "attentions", ()), j, hidden)
            if block.upsamplers is not None:
                hidden = self._sampler(f"{name}.upsamplers.0", block.upsamplers[0], hidden)
        self.norms.append((unet.conv_norm_out.num_groups, [hidden]))

    def _new(self, writers: list[Any]) -> _Stream:
        self.found.append(_Stream(writers))
        return self.found[-1]

    def _resnet(self, name: str, resnet: Any, inputs: list[_Stream]) -> _Stream:
        self.norms.append((resnet.norm1.num_groups, inputs))
        if resnet.conv_shortcut is None:
            inputs[0].writers.append(resnet.conv2)
            return inputs[0]
        column = 0
        for stream in inputs:
            stream.readers.append((f"{name}.conv_shortcut", resnet.conv_shortcut, column))
            column += stream.channels
        return self._new([resnet.conv2, resnet.conv_shortcut])

    def _attention(self, layers: Sequence[Any], number: int, hidden: _Stream) -> None:
        if number < len(layers):
            self.norms.append((layers[number].norm.num_groups, [hidden]))
            hidden.writers.append(layers[number].proj_out)

    def _sampler(self, name: str, sampler: Any, hidden: _Stream) -> _Stream:
        hidden.readers.append((f"{name}.conv", sampler.conv, 0))
        return self._new([sampler.conv])

    def sets(self) -> dict[_Stream, list[list[int]]]:
        """The channels of each stream in sets that are whole groups of every norm; those of two streams left out."""
        parent = {(stream, i): (stream, i) for stream in self.found for i in range(stream.channels)}

        def root(channel: tuple[_Stream, int]) -> tuple[_Stream, int]:
            while parent[channel] != channel:
                channel = parent[channel]
            return channel

        for groups, streams in self.norms:
            joined = [(stream, i) for stream in streams for i in range(stream.channels)]
            size = len(joined) // groups
            for i, channel in enumerate(joined):
                parent[root(channel)] = root(joined[i - i % size])
        members: dict[tuple[_Stream, int], list[tuple[_Stream, int]]] = {}
        for channel in parent:
            members.setdefault(root(channel), []).append(channel)
        found: dict[_Stream, list[list[int]]] = {stream: [] for stream in self.found}
        for channels in members.values():
            if len({stream for stream, _ in channels}) == 1:
                found[channels[0][0]].append([i for _, i in channels])
        return found


def _stream_places(unet: Any) -> Iterator[Place]:
    network = isinstance(unet, UNet2DConditionModel)
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks] if network else []
    attentions = [layer for block in blocks for layer in getattr(block, "attentions", ())]
    if (
        not network
        or not {type(block).__name__ for block in blocks} <= BLOCKS
        or not all(isinstance(layer, Transformer2DModel) for layer in attentions)
    ):
        raise DgqError("the model's blocks are not Stable Diffusion's", "the kind 'convolutions' needs its UNet")
    streams = _Streams(unet)
    for stream, sets in streams.sets().items():
        sets = [one for one in sets if len(one) <= LARGEST_SET * stream.channels]
        if stream.readers and sets:
            makers = [part for layer in stream.writers for part in (layer.weight, layer.bias) if part is not None]
            readers = [layer.weight[:, column : column + stream.channels] for _, layer, column in stream.readers]
            yield Place(stream.readers[0][0], makers, slice(None), readers, sets)


@torch.no_grad()
def add_outliers(unet: nn.Module, strength: float, share: float, seed: int, kind: Kind = "linear") -> dict[str, int]:
    """Give every place some outlier channels, in place; the float function stays.

    Args:
        unet: a diffusers UNet with transformer blocks; its parameters should be float32, since the rescaling rounds.
        strength: the largest factor; factors are log-uniform in strength / 2 .. strength.
        share: of a place's channels that are rescaled, at least one channel or set of them.
        seed: of the choice of channels and factors.
        kind: of the layers whose inputs get them.

    Returns:
        {place: rescaled channels}.

    Raises:
        DgqError: an argument is out of range, or the model has no place that can be rescaled.
    """
    if not 1 < strength <= 1000 or not 0 < share <= 0.5:
        raise DgqError(f"strength {strength:g}, share {share:g}", "strength is 1 to 1000, share 0 to 0.5")
    generator = torch.Generator().manual_seed(seed)
    done: dict[str, int] = {}
    for place in places(unet, kind):
        sets = place.sets or [[i] for i in range(place.channels)]
        order = torch.randperm(len(sets), generator=generator).tolist()
        picked: list[Sequence[int]] = []
        for number in order:
            if picked and sum(map(len, picked)) + len(sets[number]) > round(share * place.channels):
                break
            picked.append(sets[number])
        factor = torch.ones(place.channels)
        for channels, drawn in zip(picked, torch.rand(len(picked), generator=generator), strict=True):
            factor[channels] = strength * 2 ** (drawn - 1)
        for maker in place.makers:
            part = maker[place.rows]
            part.mul_(factor.view(-1, *[1] * (part.dim() - 1)).to(part))
        for reader in place.readers:
            reader.div_(factor.view(1, -1, *[1] * (reader.dim() - 2)).to(reader))
        done[place.name] = sum(map(len, picked))
    if not done:
        needed = "no transformer block" if kind == "linear" else "no channels that can be rescaled"
        raise DgqError(f"the model has {needed}", "the stress variant needs one")
    return done


def make(
    model: str | None, out: Path, strength: float = 16, share: float = 0.03, seed: int = 0, kind: Kind = "linear"
) -> dict[str, int]:
    """Write a stress variant of a float pipeline folder; its UNet is stored in float32.

    Raises:
        DgqError: the model is quantized or missing, `out` exists, or an argument is out of range.
    """
    source = resolve(model)
    if read_header(source) is not None:
        raise DgqError(f"{source}: is quantized already", "name the float model")
    if out.exists():
        raise DgqError(f"{out}: already exists", "choose another --out")
    unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float32)
    done = add_outliers(unet, strength, share, seed, kind)
    shutil.copytree(source, out, ignore=lambda folder, _: ["unet"] if Path(folder) == source else [])
    unet.save_pretrained(out / "unet")
    facts = {"model": model or source.name, "kind": kind, "strength": strength, "share": share, "seed": seed}
    config = json.loads((out / "unet" / "config.json").read_text(encoding="utf-8"))
    write_json(out / "unet" / "config.json", {**config, "_stress_variant": facts})
    card = CARD.format(channels=sum(done.values()), places=len(done), **facts)
    (out / "README.md").write_text(card, encoding="utf-8")
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="float model: a folder or hub id; the embedded model if left out")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--kind", choices=get_args(Kind), default="linear", help="layers whose inputs get outliers (default linear)"
    )
    parser.add_argument("--strength", type=float, default=16, help="largest factor of a channel (default 16)")
    parser.add_argument("--share", type=float, default=0.03, help="share of the channels (default 0.03)")
    parser.add_argument("--seed", type=int, default=0, help="which channels (default 0)")
    args = parser.parse_args()
    done = make(args.model, args.out, args.strength, args.share, args.seed, args.kind)
    print(f"{args.out}: {LABEL} with outliers in {sum(done.values())} channels of {len(done)} layer inputs")


if __name__ == "__main__":
    try:
        main()
    except DgqError as error:
        sys.exit(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
