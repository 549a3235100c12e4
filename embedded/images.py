"""Masters and how they become training pictures: jitter, flip, and compositing on a background."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.captions import BACKGROUNDS, Concept

IMAGE_PX = 64


@dataclass(frozen=True)
class Jitter:
    """How far a picture may be scaled and moved, as shares of its width."""

    scale_low: float = 0.80
    scale_high: float = 1.0
    shift: float = 0.05


WIDE = Jitter()
NARROW = Jitter(0.85, 0.97, 0.03)
CENTRED = Jitter(0.92, 0.92, 0.0)


class Masters:
    """All rendered pictures: ``rgba`` is uint8 (N, 4, 128, 128) with straight alpha."""

    def __init__(self, work: Path, concepts: list[Concept]) -> None:
        with np.load(work / "masters.npz") as file:
            self.rgba = torch.from_numpy(file["rgba"])
        index_of = {concept.code: index for index, concept in enumerate(concepts)}
        records = json.loads((work / "masters.json").read_text(encoding="utf-8"))
        self.keys: list[tuple[int, str]] = [(index_of[record["code"]], record["style"]) for record in records]
        self.row = {key: row for row, key in enumerate(self.keys)}

    def available(self) -> dict[int, list[str]]:
        """Concept index -> styles that have a picture of it."""
        styles: dict[int, list[str]] = {}
        for index, style in self.keys:
            styles.setdefault(index, []).append(style)
        return styles


def background_rgb(names: list[str]) -> Tensor:
    """Background colours (B, 3) in [0, 1]."""
    return torch.tensor([BACKGROUNDS[name] for name in names], dtype=torch.float32) / 255


def composite(premultiplied: Tensor, background: Tensor) -> Tensor:
    """Lay premultiplied RGBA (B, 4, H, W) in [0, 1] over colours (B, 3); returns (B, 3, H, W) in [0, 1]."""
    return premultiplied[:, :3] + (1 - premultiplied[:, 3:]) * background[:, :, None, None]


def premultiply(rgba: Tensor) -> Tensor:
    """Straight uint8 RGBA (B, 4, H, W) -> premultiplied float in [0, 1]."""
    values = rgba.float() / 255
    return torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], dim=1)


def render(rgba: Tensor, background: Tensor, flip: Tensor, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """Make training pictures from masters.

    ``rgba`` is uint8 (B, 4, 128, 128), ``background`` (B, 3) in [0, 1], ``flip`` bool (B,). The scale and shift of
    each picture come from ``generator``. Returns (B, 3, 64, 64) in [-1, 1].
    """
    count = len(rgba)
    random = torch.rand(count, 3, generator=generator)
    scale = jitter.scale_low + (jitter.scale_high - jitter.scale_low) * random[:, 0]
    shift = (random[:, 1:] * 2 - 1) * 2 * jitter.shift
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(flip, -1.0, 1.0) / scale
    theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = shift / scale[:, None]
    grid = F.affine_grid(theta, [count, 4, *rgba.shape[-2:]], align_corners=False)
    moved = F.grid_sample(premultiply(rgba), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    small = F.avg_pool2d(moved, rgba.shape[-1] // IMAGE_PX)
    return composite(small, background) * 2 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def grid_of(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Tile uint8 pictures (B, H, W, 3) into one; empty cells stay white."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = picture
    return sheet
