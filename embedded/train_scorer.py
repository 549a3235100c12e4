"""Train the scorer of `dgq eval`: concept, style and background of a picture.

It sees the rendered pictures on all backgrounds, moved, flipped, softened and tinted, but none of the held-out
(concept, style) pairs: its accuracy on those is the ceiling that generated pictures are judged by. Resumes from its
newest checkpoint; when the last step is done, the averaged weights and their accuracies are written to ``--out``.

    python -m embedded.train_scorer --work DIR [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dgq.evaluation.scorer import FOLDER, Network
from embedded import images
from embedded.captions import BACKGROUNDS, STYLES, Concept, read_concepts, style_held_out
from embedded.common import (
    Log,
    Stop,
    add_work_option,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_lr,
    set_rng_state,
    warm_cosine,
    write_json,
)

SEED = 7001
EMA = 0.998
WARMUP = 200
SMOOTHING = 0.1
STYLE_NAMES, BACKGROUND_NAMES = tuple(STYLES), tuple(BACKGROUNDS)
# Pictures of every design in the accuracies that are written.
COPIES = 4


def soften(pictures: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """What a decoder does to a picture, at random: blur, lost resolution, noise, a tint. (B, 3, H, W) in [-1, 1]."""
    kind = rng.random()
    if kind < 0.25:
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif kind < 0.5:
        size = rng.choice((24, 32, 48))
        small = F.interpolate(pictures, size=(size, size), mode="area")
        pictures = F.interpolate(small, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
    if rng.random() < 0.5:
        pictures = pictures + torch.randn(pictures.shape, generator=generator) * rng.uniform(0.01, 0.12)
    tint = torch.rand(len(pictures), 3, 1, 1, generator=generator) * 0.16 - 0.08
    gain = 1 + torch.rand(len(pictures), 1, 1, 1, generator=generator) * 0.2 - 0.1
    return (pictures * gain + tint).clamp(-1, 1)


class Data:
    """Random training pictures with their labels, and fixed pictures of seen and of held-out designs."""

    def __init__(self, masters: images.Masters, concepts: list[Concept]) -> None:
        self.masters, self.concepts = masters, concepts
        held = [style_held_out(concepts[index], style) for index, style in masters.keys]
        self.seen = [row for row, out in enumerate(held) if not out]
        self.held_out = [row for row, out in enumerate(held) if out]

    def labels(self, rows: list[int], backgrounds: list[str]) -> Tensor:
        """(B, 3) int64: concept, style, background."""
        keys = [self.masters.keys[row] for row in rows]
        return torch.tensor(
            [
                (concept, STYLE_NAMES.index(style), BACKGROUND_NAMES.index(name))
                for (concept, style), name in zip(keys, backgrounds, strict=True)
            ]
        )

    def render(
        self, rows: list[int], rng: random.Random, generator: torch.Generator, jitter: images.Jitter
    ) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 64, 64) of masters on random backgrounds, and their labels (B, 3)."""
        names = [rng.choice(BACKGROUND_NAMES) if rng.random() < 0.6 else "white" for _ in rows]
        flip = torch.tensor([self.concepts[self.masters.keys[row][0]].flip and rng.random() < 0.5 for row in rows])
        rgb = images.background_rgb(names)
        return images.render(self.masters.rgba[rows], rgb, flip, jitter, generator), self.labels(rows, names)

    def batch(self, size: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A training batch."""
        pictures, labels = self.render(rng.choices(self.seen, k=size), rng, generator, images.WIDE)
        return soften(pictures, rng, generator), labels


@torch.no_grad()
def accuracy(network: Network, data: Data, rows: list[int], seed: int) -> dict[str, float]:
    """Accuracy on `COPIES` clean pictures of each of some masters."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    network = network.eval()
    right = torch.zeros(4)
    for start in range(0, len(rows), 128):
        for _ in range(COPIES):
            pictures, labels = data.render(rows[start : start + 128], rng, generator, images.NARROW)
            concept, style, background = network(pictures)
            top = concept.topk(5, dim=1).indices == labels[:, :1]
            right += torch.stack(
                [
                    top[:, 0].sum(),
                    top.sum(),
                    (style.argmax(1) == labels[:, 1]).sum(),
                    (background.argmax(1) == labels[:, 2]).sum(),
                ]
            )
    names = ("top1", "top5", "style", "background")
    shares = dict(zip(names, (right / (COPIES * len(rows))).tolist(), strict=True))
    return {"designs": len(rows), "pictures": COPIES * len(rows), **shares}


class Trainer:
    """The network, its average, its optimizer and its random state."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        self.args, self.data, self.step, self.seconds = args, data, 0, 0.0
        self.folder: Path = args.work / "scorer-checkpoints"
        torch.manual_seed(SEED)
        self.network = Network(len(data.concepts), len(STYLES), len(BACKGROUNDS))
        self.network = self.network.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.network.parameters()), "base_lr": args.lr}], lr=args.lr, weight_decay=0.02
        )
        self.rng, self.generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
        if (state := load_checkpoint(self.folder)) is not None:
            self.load(state)

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        for name in ("network", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        set_rng_state(state["rng"], self.rng, self.generator)
        torch.set_rng_state(state["dropout"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write a checkpoint."""
        state = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        state |= {"rng": rng_state(self.rng, self.generator), "dropout": torch.get_rng_state()}
        save_checkpoint(self.folder, self.step, {**state, "step": self.step, "seconds": self.seconds})

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the loss and how often the concept was right."""
        pictures, labels = self.data.batch(self.args.batch, self.rng, self.generator)
        set_lr(self.optimizer, warm_cosine(self.step, WARMUP, self.args.steps))
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(pictures.contiguous(memory_format=torch.channels_last))
        concept, style, background = (part.float() for part in logits)
        loss = F.cross_entropy(concept, labels[:, 0], label_smoothing=SMOOTHING)
        loss = loss + 0.3 * F.cross_entropy(style, labels[:, 1]) + 0.3 * F.cross_entropy(background, labels[:, 2])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            for mean, value in zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - min(EMA, self.step / (self.step + 10)))
                else:
                    mean.copy_(value)
        return float(loss.detach()), float((concept.argmax(1) == labels[:, 0]).float().mean())

    def finish(self) -> None:
        """Write the scorer and what it knows."""
        out: Path = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        half = {
            name: value.half().contiguous() if value.is_floating_point() else value
            for name, value in self.average.state_dict().items()
        }
        self.average.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
        facts = {
            "concepts": [concept.name for concept in self.data.concepts],
            "styles": STYLE_NAMES,
            "backgrounds": BACKGROUND_NAMES,
            "seed": SEED,
            "steps": self.step,
            "pictures": self.step * self.args.batch,
            "held_out": accuracy(self.average, self.data, self.data.held_out, 1),
            "seen": accuracy(self.average, self.data, self.data.seen, 2),
        }
        save_file(half, out / "scorer.safetensors")
        write_json(out / "scorer.json", facts)
        print(f"wrote {out.name}/: held out {facts['held_out']}, seen {facts['seen']}", flush=True)

    def run(self) -> None:
        """Train to the last step, or until stopped."""
        stop, log, started = Stop(), Log(), time.monotonic()
        before, saved = self.seconds, started
        while self.step < self.args.steps and not stop.asked:
            loss, right = self.train_step()
            log.add(self.args.batch, loss=loss, concept=right)
            self.seconds = before + time.monotonic() - started
            log.maybe(self.step, self.seconds)
            if self.step % 1000 == 0:
                print(f"step {self.step}: held out {accuracy(self.average, self.data, self.data.held_out, 1)}")
            if time.monotonic() - saved > self.args.checkpoint_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()
        if self.step >= self.args.steps:
            self.finish()


def main() -> None:
    """Train the scorer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_work_option(parser)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    concepts = read_concepts()
    Trainer(args, Data(images.Masters(args.work, concepts), concepts)).run()


if __name__ == "__main__":
    main()
