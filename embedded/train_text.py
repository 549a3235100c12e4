"""Pretrain the text encoder without the UNet.

From the end-of-text state, and from the mean of the token states, it learns to predict a caption's concept, style
and background, and to regress a principal-component code of the picture that the caption stands for, so that
captions of similar pictures come to lie near each other. Writes ``text_encoder/``.

    python -m embedded.train_text --work DIR [--steps N]
"""

from __future__ import annotations

import argparse
import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from embedded import images
from embedded.captions import BACKGROUNDS, STYLES, Draw, Sampler, read_concepts
from embedded.common import Log, add_work_option, set_lr, warm_cosine
from embedded.text_model import build_text_encoder, token_ids

CODE_SIZE = 48
CODE_PX = 16
BACKGROUND_NAMES = tuple(BACKGROUNDS)
STYLE_NAMES = tuple(STYLES)


def picture_codes(masters: images.Masters, size: int = CODE_SIZE) -> Tensor:
    """Principal-component codes (N, size) of the masters on white, each component at unit deviation."""
    rows = []
    for part in masters.rgba.split(64):
        white = torch.ones(len(part), 3)
        picture = images.composite(images.premultiply(part), white)
        rows.append(F.adaptive_avg_pool2d(picture, CODE_PX).flatten(1))
    flat = torch.cat(rows)
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    codes = flat @ directions[:size].T
    return codes / codes.std(dim=0)


class Heads(nn.Module):
    """Linear heads on a caption's features (B, width)."""

    def __init__(self, width: int, concepts: int) -> None:
        super().__init__()
        self.concept = nn.Linear(width, concepts)
        self.style = nn.Linear(width, len(STYLES))
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.code = nn.Linear(width, CODE_SIZE)

    def forward(self, features: Tensor, draws: list[Draw], codes: Tensor) -> tuple[Tensor, Tensor]:
        """The summed losses of all heads, and the concept logits."""
        concept = torch.tensor([draw.concept for draw in draws])
        style = torch.tensor([STYLE_NAMES.index(draw.style) for draw in draws])
        background = torch.tensor([BACKGROUND_NAMES.index(draw.background) for draw in draws])
        logits = self.concept(features)
        loss = F.cross_entropy(logits, concept) + F.cross_entropy(self.style(features), style)
        loss = loss + F.cross_entropy(self.background(features), background)
        return loss + F.mse_loss(self.code(features), codes), logits


class TextTask(nn.Module):
    """The text encoder with two sets of heads, on the pooled state and on the mean state."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, concepts: int) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        width = encoder.config.hidden_size
        self.pooled, self.mean = Heads(width, concepts), Heads(width, concepts)

    def forward(self, draws: list[Draw], codes: Tensor) -> tuple[Tensor, float]:
        """Loss, and how often the concept is guessed right from the pooled state."""
        output = self.encoder(token_ids(self.tokenizer, [draw.caption for draw in draws]))
        loss, logits = self.pooled(output.pooler_output, draws, codes)
        mean_loss, _ = self.mean(output.last_hidden_state.mean(dim=1), draws, codes)
        right = logits.argmax(dim=1) == torch.tensor([draw.concept for draw in draws])
        return loss + 0.5 * mean_loss, float(right.float().mean())


def main() -> None:
    """Pretrain the text encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    concepts = read_concepts()
    masters = images.Masters(args.work, concepts)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    task = TextTask(build_text_encoder(tokenizer), tokenizer, len(concepts))
    optimizer = torch.optim.AdamW(
        [{"params": list(task.parameters()), "base_lr": args.lr}], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    sampler, rng = Sampler(concepts, masters.available()), random.Random(0)
    codes, log, started = picture_codes(masters), Log(15), time.monotonic()
    for step in range(args.steps):
        draws = [sampler.draw(rng) for _ in range(args.batch)]
        rows = [masters.row[draw.concept, draw.style] for draw in draws]
        set_lr(optimizer, warm_cosine(step, 100, args.steps))
        loss, right = task(draws, codes[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        log.add(args.batch, loss=float(loss.detach()), concept=right)
        log.maybe(step + 1, time.monotonic() - started)
    task.encoder.save_pretrained(args.work / "text_encoder")
    print(f"wrote text_encoder/; concept from caption, last batch: {right:.2f}")


if __name__ == "__main__":
    main()
