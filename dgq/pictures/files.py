"""People's own picture files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import DgqError


def read_picture(file: Path) -> Image.Image:
    """A picture as one sees it, RGB: turned as its EXIF says, and white where it is transparent.

    Raises:
        DgqError: it cannot be read.
    """
    if not file.is_file():
        raise DgqError(f"{file}: is not a regular file")
    try:
        with Image.open(file) as image:
            turned = _eight_bits(ImageOps.exif_transpose(image)).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DgqError(f"{file}: is not a readable picture ({error})", "remove it, or save it anew") from None
    white = Image.new("RGBA", turned.size, "white")
    return Image.alpha_composite(white, turned).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture as it is, but of 16 bits of grey, which Pillow's own conversion would cut at 255: nearly all white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
