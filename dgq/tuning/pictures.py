"""The pictures of a subject: read, checked, cut to the model's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DgqError
from ..pictures.files import read_picture

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SMALLEST = 16  # pixels of a side: nothing can be learned from less


def read_subject(folder: Path) -> list[Image.Image]:
    """The pictures in a folder, in the order of their names; what is transparent becomes white.

    Raises:
        DgqError: there is no such folder, it holds no pictures, or one that cannot be read or is too small.
    """
    if not folder.is_dir():
        raise DgqError(f"{folder}: no such folder", "give a folder with a few pictures of the subject")
    try:
        names = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DgqError(f"{folder}: cannot be read ({error.strerror})") from None
    files = [file for file in names if file.suffix.lower() in ENDINGS]
    if not files:
        others = f"; it holds {names[0].name!r}" if names else ""
        raise DgqError(f"{folder}: holds no pictures{others}", f"pictures end in {', '.join(sorted(ENDINGS))}")
    return [_read(file) for file in files]


def _read(file: Path) -> Image.Image:
    image = read_picture(file)
    if min(image.size) < SMALLEST:
        raise DgqError(
            f"{file}: is {image.width} x {image.height} pixels, too small to learn from",
            f"each side has at least {SMALLEST}",
        )
    return image


def to_tensor(images: Sequence[Image.Image], width: int, height: int) -> Tensor:
    """Pictures resized to cover width x height and cut at the middle: float32 (B, 3, height, width) in -1 .. 1."""
    fitted = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) for image in images]
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in fitted])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
