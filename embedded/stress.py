"""Make the stress variant of a Stable Diffusion model: the same function in float, much harder to quantize.

A share of the channels in front of a linear layer is made larger by exact, function-preserving rescaling,
such as large models grow by themselves: a norm's gain and offset times s, its consumers' columns divided by s;
a row of V times s, the column of the output projection divided by s; a row of GEGLU's value half times s, the column of
the layer after it divided by s. Convolutions behind SiLU cannot be stressed this way and stay as they are.

    python -m embedded.stress --out DIR [--model MODEL] [--strength 16] [--share 0.03] [--seed 0]

What it measures is a method's robustness, never a model's quality: the folder's card and configuration say so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dgq.checkpoint.reading import read_header
from dgq.errors import DgqError
from dgq.pictures.pipelines import resolve
from embedded.common import write_json

LABEL = "stress variant"
CARD = """# A stress variant, not a model

Made from {model} by

    python -m embedded.stress --strength {strength:g} --share {share:g} --seed {seed}

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
    """

    name: str
    makers: Sequence[Tensor]
    rows: slice
    readers: Sequence[Tensor]

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


def places(unet: nn.Module) -> Iterator[Place]:
    """Every input of a linear layer that can be rescaled, in the model's order."""
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


@torch.no_grad()
def add_outliers(unet: nn.Module, strength: float, share: float, seed: int) -> dict[str, int]:
    """Give every place some outlier channels, in place; the float function stays.

    Args:
        unet: a diffusers UNet with transformer blocks; its parameters should be float32, since the rescaling rounds.
        strength: the largest factor; factors are log-uniform in strength / 2 .. strength.
        share: of a place's channels that are rescaled, at least one.
        seed: of the choice of channels and factors.

    Returns:
        {place: rescaled channels}.

    Raises:
        DgqError: an argument is out of range, or the model has no place that can be rescaled.
    """
    if not 1 < strength <= 1000 or not 0 < share <= 0.5:
        raise DgqError(f"strength {strength:g}, share {share:g}", "strength is 1 to 1000, share 0 to 0.5")
    generator = torch.Generator().manual_seed(seed)
    done: dict[str, int] = {}
    for place in places(unet):
        count = max(1, round(share * place.channels))
        picked = torch.randperm(place.channels, generator=generator)[:count]
        factor = torch.ones(place.channels)
        factor[picked] = strength * 2 ** (torch.rand(count, generator=generator) - 1)
        for maker in place.makers:
            part = maker[place.rows]
            part.mul_(factor.view(-1, *[1] * (part.dim() - 1)).to(part))
        for reader in place.readers:
            reader.div_(factor.view(1, -1, *[1] * (reader.dim() - 2)).to(reader))
        done[place.name] = count
    if not done:
        raise DgqError("the model has no transformer block", "the stress variant needs one")
    return done


def make(model: str | None, out: Path, strength: float = 16, share: float = 0.03, seed: int = 0) -> dict[str, int]:
    """Write the stress variant of a float pipeline folder; its UNet is stored in float32.

    Raises:
        DgqError: the model is quantized or missing, `out` exists, or an argument is out of range.
    """
    source = resolve(model)
    if read_header(source) is not None:
        raise DgqError(f"{source}: is quantized already", "name the float model")
    if out.exists():
        raise DgqError(f"{out}: already exists", "choose another --out")
    unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float32)
    done = add_outliers(unet, strength, share, seed)
    shutil.copytree(source, out, ignore=lambda folder, _: ["unet"] if Path(folder) == source else [])
    unet.save_pretrained(out / "unet")
    facts = {"model": model or source.name, "strength": strength, "share": share, "seed": seed}
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
    parser.add_argument("--strength", type=float, default=16, help="largest factor of a channel (default 16)")
    parser.add_argument("--share", type=float, default=0.03, help="share of the channels (default 0.03)")
    parser.add_argument("--seed", type=int, default=0, help="which channels (default 0)")
    args = parser.parse_args()
    done = make(args.model, args.out, args.strength, args.share, args.seed)
    print(f"{args.out}: {LABEL} with outliers in {sum(done.values())} channels of {len(done)} layer inputs")


if __name__ == "__main__":
    try:
        main()
    except DgqError as error:
        sys.exit(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
