"""The emoji-domain scorer: a small classifier of concept, style and background, trained apart from the embedded model.

It shares the rendered pictures with that model and nothing else: own network, own seed, no text. What it says of
generated pictures means something only beside what it says of real renders (`Scorer.facts`) and of shuffled labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import DgqError

FOLDER = Path(__file__).parent.parent / "data" / "scorer"
SIZE = 64
WIDTHS = (32, 64, 128, 128, 192)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; (B, before, H, W) -> (B, after, H / stride, W / stride)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """A residual block."""
        y = torch.relu(self.norm1(self.conv1(x)))
        out: Tensor = torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
        return out


class Network(nn.Module):
    """The classifier.

    Args:
        concepts, styles, backgrounds: numbers of classes.
    """

    def __init__(self, concepts: int, styles: int, backgrounds: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        strides = (2, 2, 1, 2)
        self.blocks = nn.Sequential(
            *(_Block(a, b, stride) for a, b, stride in zip(WIDTHS[:-1], WIDTHS[1:], strides, strict=True))
        )
        self.dropout = nn.Dropout(0.2)
        self.concept = nn.Linear(WIDTHS[-1], concepts)
        self.style = nn.Linear(WIDTHS[-1], styles)
        self.background = nn.Linear(WIDTHS[-1], backgrounds)

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 192), what the heads see."""
        out: Tensor = self.blocks(self.stem(pictures)).mean(dim=(2, 3))
        return out

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits of concept, style and background."""
        features = self.dropout(self.features(pictures))
        return self.concept(features), self.style(features), self.background(features)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as (B, 3, 64, 64) in [-1, 1]; other sizes are resampled."""
    arrays = []
    for image in images:
        rgb = image.convert("RGB")
        if rgb.size != (SIZE, SIZE):
            rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BOX if rgb.width > SIZE else Image.Resampling.BICUBIC)
        arrays.append(np.asarray(rgb, dtype=np.float32))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


class Scorer:
    """The shipped classifier and what is known of it.

    Attributes:
        concepts, styles, backgrounds: names in the order of the logits.
        facts: how it was trained, and its accuracy on real renders ("held_out": designs it never saw; "seen": designs
            it was trained on, moved and laid on other backgrounds).

    Raises:
        DgqError: its files are missing or damaged.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        try:
            self.facts: dict[str, Any] = json.loads((folder / "scorer.json").read_text(encoding="utf-8"))
            self.concepts, self.styles, self.backgrounds = (
                list(self.facts[key]) for key in ("concepts", "styles", "backgrounds")
            )
            self.network = Network(len(self.concepts), len(self.styles), len(self.backgrounds)).eval()
            weights = load_file(folder / "scorer.safetensors")
            self.network.load_state_dict(
                {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DgqError(f"{folder}: the scorer cannot be loaded ({reason})") from None

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of concept, style and background, and features (B, 192), of pictures.

        Pictures are scored one by one, so that no result depends on its neighbours.
        """
        rows = []
        for image in images:
            features = self.network.features(to_pixels([image]))
            rows.append(
                (
                    self.network.concept(features),
                    self.network.style(features),
                    self.network.background(features),
                    features,
                )
            )
        concept, style, background, features = (torch.cat(column) for column in zip(*rows, strict=True))
        return concept, style, background, features
