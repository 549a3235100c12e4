"""How attention probabilities fare under each quantizer, on a model's own attention maps (docs/studies.md).

    python benchmarks/attention_study.py [--model MODEL] [--out PREFIX]

Layer by layer: SQNR of A V with float q, k and v, self- and cross-attention apart, and of dgq's integer kernel. End to
end: pictures with nothing but the attention quantized, against the float model's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captures import publish, record
from fidelity import FIRST_SEED, say
from torch import Tensor, nn

from dgq.pictures.fidelity import compare
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import load, resolve
from dgq.pictures.prompts import evaluation_prompts
from dgq_kernels.log_attention import reference

Core = Callable[[str, Tensor, Tensor, Tensor, float, bool], Tensor]
"""(layer, q (B, H, T, d), k and v (B, H, S, d), scale of the logits, cross) -> (B, H, T, d)"""


@dataclass(frozen=True)
class Way:
    """A quantizer of attention probabilities.

    Attributes:
        name: in the tables.
        bits: of a code.
        fraction: steps per octave are 2^fraction; None for linear codes.
        rows: the largest probability of each row is d; else of the sample.
        start: cross-attention keeps the start token's column in float and d is taken over the others.
        renormalize: divide by the sum of the quantized probabilities; else by that of the float ones, as published.
        kernel: "" for the simulation, else dgq's own definition with "float" or "integer" q, k and v.
    """

    name: str
    bits: int
    fraction: int | None = None
    rows: bool = True
    start: bool = True
    renormalize: bool = False
    kernel: str = ""

    def __call__(self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float, cross: bool) -> Tensor:
        if self.kernel:
            width = 8 if self.kernel == "integer" else 0
            return reference.log_attention(
                q, k, v, scale, self.bits, self.fraction or 0, cross and self.start, width, width
            )
        first = int(cross and self.start)
        p = probabilities(q, k, scale)
        rounded = torch.cat([p[..., :first], self.quantize(p[..., first:])], -1)
        if self.renormalize:
            rounded = rounded / rounded.sum(-1, keepdim=True)
        return rounded @ v

    def quantize(self, p: Tensor) -> Tensor:
        """Probabilities (B, H, T, S) after rounding."""
        largest = p.amax(-1 if self.rows else (1, 2, 3), keepdim=True).clamp(min=1e-30)
        top = 2**self.bits - 1
        if self.fraction is None:
            step = largest / top
            return (p / step).round() * step
        codes = ((p / largest).log2().neg() * 2**self.fraction).round().clamp(0, top)
        values = largest * torch.exp2(-codes / 2**self.fraction)
        # base 2 as published has a value for the top code; the fractional code gives it to zero
        return values if self.fraction == 0 else values.masked_fill(codes == top, 0)


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T), float32."""
    return torch.softmax(q.float() @ k.float().mT * scale, -1)


def float_core(layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float, cross: bool) -> Tensor:
    """Attention in float32."""
    return probabilities(q, k, scale) @ v


class Processor:
    """A diffusers attention processor (of transformer blocks) around a `Core`."""

    def __init__(self, name: str, core: Core) -> None:
        self.name, self.core = name, core

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        cross = encoder_hidden_states is not None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear, x in inputs)
        out = self.core(self.name, q, k, v, attn.scale, cross).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def use(unet: nn.Module, core: Core) -> None:
    """Run every attention layer of a UNet by `core`."""
    model: Any = unet
    model.set_attn_processor({name: Processor(name, core) for name in model.attn_processors})


def ways() -> list[Way]:
    """Everything that is compared layer by layer."""
    found = []
    for bits, best in ((8, 4), (6, 3)):
        found += [
            Way("linear, tensor-wise", bits, rows=False),
            Way("linear, row-wise", bits),
            Way("linear, row-wise, start token not apart", bits, start=False),
            Way("linear, row-wise, sum of quantized", bits, renormalize=True),
            Way("base 2, tensor-wise (published)", bits, 0, rows=False),
            Way("base 2, tensor-wise, start token not apart", bits, 0, rows=False, start=False),
            Way("base 2, row-wise", bits, 0),
            *(Way(f"fractional f={f}, row-wise", bits, f) for f in (1, 2, 3, 4)),
            Way("fractional, tensor-wise", bits, best, rows=False),
            Way("fractional, start token not apart", bits, best, start=False),
            Way("base 2, row-wise, sum of quantized", bits, 0, renormalize=True),
            Way("fractional, sum of quantized", bits, best, renormalize=True),
            Way("dgq's definition, q, k, v float", bits, best, kernel="float"),
            Way("dgq's definition, all integer", bits, best, kernel="integer"),
        ]
    return found


END_TO_END = (
    "linear, tensor-wise",
    "linear, row-wise",
    "linear, row-wise, sum of quantized",
    "base 2, tensor-wise (published)",
    "fractional, sum of quantized",
    "dgq's definition, q, k, v float",
    "dgq's definition, all integer",
)


class Meter:
    """A core that computes in float and adds up each way's error on the side.

    Attributes:
        noise: {(layer, way's index): squared error}; signal, cross, start, peak: per layer.
    """

    def __init__(self, compared: list[Way]) -> None:
        self.ways = compared
        self.noise: dict[tuple[str, int], float] = {}
        self.signal: dict[str, float] = {}
        self.cross: dict[str, bool] = {}
        self.start: dict[str, list[float]] = {}
        self.peak: dict[str, list[float]] = {}

    def __call__(self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float, cross: bool) -> Tensor:
        p = probabilities(q, k, scale)
        target = p @ v
        self.cross[layer] = cross
        self.signal[layer] = self.signal.get(layer, 0) + float(target.square().sum())
        self.start.setdefault(layer, []).append(float(p[..., 0].mean()))
        self.peak.setdefault(layer, []).append(float(p[..., int(cross) :].amax(-1).mean()))
        for i, way in enumerate(self.ways):
            error = float((way(layer, q, k, v, scale, cross) - target).square().sum())
            self.noise[layer, i] = self.noise.get((layer, i), 0) + error
        return target

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and a way."""
        return [
            {
                "layer": layer.removesuffix(".processor"),
                "kind": "cross" if self.cross[layer] else "self",
                "way": self.ways[i].name,
                "bits": self.ways[i].bits,
                "sqnr_db": round(10 * math.log10(self.signal[layer] / max(noise, 1e-30)), 2),
            }
            for (layer, i), noise in self.noise.items()
        ]


def table(rows: list[dict[str, Any]], pictures: list[dict[str, Any]]) -> str:
    """Mean / worst layer per way, then end to end."""
    keys = [(kind, bits) for kind in ("self", "cross") for bits in (8, 6)]
    lines = ["| mean / worst layer, dB | " + " | ".join(f"{k}, {b} bit" for k, b in keys) + " |", "|---" * 5 + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for key in keys:
            found = [row["sqnr_db"] for row in rows if (row["kind"], row["bits"]) == key and row["way"] == way]
            cells.append(f"{statistics.mean(found):.1f} / {min(found):.1f}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += ["", "| only attention quantized | bits | PSNR (dB) | latent SQNR (dB) |", "|---|---|---|---|"]
    for row in pictures:
        lines.append(f"| {row['way']} | {row['bits']} | {row['psnr_db']:.1f} | {row['latent_sqnr_db']:.1f} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="float model; the embedded model if left out")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the layer-wise part (default 8)")
    parser.add_argument("--pictures", type=int, default=16, help="pictures of the end-to-end part (default 16)")
    parser.add_argument("--every", type=int, default=2, help="look at every n-th sampler step (default 2)")
    parser.add_argument("--out", type=Path, help="write PREFIX.md and PREFIX.json")
    args = parser.parse_args()
    recorded = record(args.model, 0, args.prompts)
    say("layer by layer")
    meter = Meter(ways())
    use(recorded.pipe.unet, meter)
    for calls in recorded.evaluation:
        for call in calls[:: args.every]:
            recorded.pipe.unet(**call)
    rows = meter.rows()
    maps = {
        kind: {
            "start_mass": statistics.mean(x for n, xs in meter.start.items() if meter.cross[n] == cross for x in xs),
            "largest_other": statistics.mean(x for n, xs in meter.peak.items() if meter.cross[n] == cross for x in xs),
        }
        for kind, cross in (("self", False), ("cross", True))
    }
    folder = resolve(args.model)
    pipe = load(folder, dtype=torch.float32)
    settings = Settings(seed=FIRST_SEED, batch=8).resolved(folder)
    prompts = evaluation_prompts(folder, args.pictures)
    use(pipe.unet, float_core)
    target = generate(pipe, prompts, settings)
    pictures: list[dict[str, Any]] = []
    for way in ways():
        if way.name in END_TO_END:
            say(f"{way.name}, {way.bits} bit")
            use(pipe.unet, way)
            measured = compare(target, generate(pipe, prompts, settings))
            pictures.append({"way": way.name, "bits": way.bits, **measured})
    text = table(rows, pictures) + f"\n\n{json.dumps(maps)}\n"
    publish(text, {"maps": maps, "layers": rows, "pictures": pictures}, args.out)


if __name__ == "__main__":
    main()
