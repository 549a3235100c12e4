"""Personalisation by scales: subjects that no model here ever saw, tuned and judged.

python benchmarks/tuning.py draw --out build/subjects          # the subjects' pictures
python benchmarks/tuning.py run --checkpoint DIR --out build/tuning   # tune, draw, judge; baselines beside it
"""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

BACKGROUNDS = {
    "white": (255, 255, 255), "red": (222, 60, 56), "orange": (246, 150, 52), "yellow": (250, 216, 82),
    "green": (88, 178, 92), "blue": (76, 138, 230), "purple": (148, 98, 206), "pink": (250, 170, 202),
    "brown": (140, 96, 64), "grey": (150, 150, 150), "black": (22, 22, 22),
}  # fmt: skip
SIDE, SCALE = 64, 8  # pixels of a picture, and how much larger it is drawn


def _canvas(background: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), BACKGROUNDS[background])
    return image, ImageDraw.Draw(image)


def _box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
    return ((x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE)


def blob(background: str, dx: float, dy: float, size: float) -> Image.Image:
    """A teal creature with one eye, two orange horns and a striped belly."""
    image, draw = _canvas(background)

    def oval(x: float, y: float, rx: float, ry: float, colour: str) -> None:
        draw.ellipse(_box(32 + dx + (x - 32) * size, 32 + dy + (y - 32) * size, rx * size, ry * size), colour)

    def polygon(points: list[tuple[float, float]], colour: str) -> None:
        moved = [(32 + dx + (x - 32) * size, 32 + dy + (y - 32) * size) for x, y in points]
        draw.polygon([(x * SCALE, y * SCALE) for x, y in moved], colour)

    for side in (-1, 1):
        polygon([(32 + side * 8, 18), (32 + side * 20, 4), (32 + side * 16, 22)], "#f28c1e")
        oval(32 + side * 9, 56, 6, 4, "#0f6f6a")
    oval(32, 36, 20, 21, "#18a89f")
    oval(32, 45, 12, 10, "#d7f3e3")
    for y in (41, 46, 51):
        oval(32, y, 9 - abs(y - 46) / 2, 1.2, "#e0489a")
    oval(32, 27, 9, 9, "#ffffff")
    oval(32, 28, 5, 5, "#3b2a7a")
    oval(34, 26, 1.6, 1.6, "#ffffff")
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def kite(background: str, dx: float, dy: float, size: float) -> Image.Image:
    """A kite of four coloured quarters with a face and a tail of bows."""
    image, draw = _canvas(background)

    def at(x: float, y: float) -> tuple[float, float]:
        return ((32 + dx + (x - 32) * size) * SCALE, (32 + dy + (y - 32) * size) * SCALE)

    top, bottom, left, right, middle = at(32, 4), at(32, 48), at(13, 22), at(51, 22), at(32, 22)
    for points, colour in (
        ((top, left, middle), "#ff4f6d"), ((top, right, middle), "#ffc93c"),
        ((bottom, left, middle), "#3fc1c9"), ((bottom, right, middle), "#7a4fd0"),
    ):  # fmt: skip
        draw.polygon(points, colour)
    for x in (26, 38):
        draw.ellipse((*at(x - 2.5, 17), *at(x + 2.5, 23)), "#202030")
    draw.arc((*at(25, 18), *at(39, 32)), 20, 160, "#202030", round(2 * SCALE * size))
    for i, colour in enumerate(("#ff4f6d", "#ffc93c", "#3fc1c9")):
        x, y = 32 + 5 * math.sin(1.8 * i + 1), 51 + 4.2 * i
        draw.polygon([at(x - 4, y - 2), at(x, y), at(x - 4, y + 2)], colour)
        draw.polygon([at(x + 4, y - 2), at(x, y), at(x + 4, y + 2)], colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


SUBJECTS = {"blob": (blob, "sks creature"), "kite": (kite, "zwx kite")}
TRAINING = (
    ("white", 0, 0, 1.0), ("yellow", 2, 1, 0.95), ("grey", -2, 1, 1.0), ("red", 1, -1, 0.9), ("black", 0, 2, 0.95),
)  # fmt: skip
HELD_OUT = tuple((name, 0, 0, 0.97) for name in ("white", "blue", "green", "purple", "pink", "orange"))
