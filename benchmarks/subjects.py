"""Subjects that no model here ever saw: drawings by this script, moved, turned and scaled on plain backgrounds.

    python benchmarks/subjects.py --out FOLDER

writes the training pictures of each into a folder of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (222, 60, 56),
    "orange": (246, 150, 52),
    "yellow": (250, 216, 82),
    "green": (88, 178, 92),
    "blue": (76, 138, 230),
    "purple": (148, 98, 206),
    "pink": (250, 170, 202),
    "brown": (140, 96, 64),
    "grey": (150, 150, 150),
    "black": (22, 22, 22),
}
SIDE, SCALE = 64, 8  # pixels of a picture, and how much larger it is drawn
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class View:
    """How a subject lies in a picture: the background's name, a shift in pixels, a size, and a turn in degrees."""

    background: str
    dx: float = 0
    dy: float = 0
    size: float = 1
    turn: float = 0


class Pen:
    """Draws shapes of a subject, given upright in a square of SIDE pixels, as a view has them."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), BACKGROUNDS[view.background])
        self.draw = ImageDraw.Draw(self.image)
        self.cos, self.sin = math.cos(math.radians(view.turn)), math.sin(math.radians(view.turn))

    def _at(self, x: float, y: float) -> tuple[float, float]:
        x, y = x - SIDE / 2, y - SIDE / 2
        x, y = self.cos * x - self.sin * y, self.sin * x + self.cos * y
        size, view = self.view.size, self.view
        return (SIDE / 2 + view.dx + size * x) * SCALE, (SIDE / 2 + view.dy + size * y) * SCALE

    def polygon(self, points: Points, colour: str) -> None:
        self.draw.polygon([self._at(*point) for point in points], colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: str) -> None:
        self.polygon(_around(x, y, rx, ry, 0, 360), colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: Points, colour: str, width: float) -> None:
        """Through points, with round ends and corners."""
        at, wide = [self._at(*point) for point in points], width * SCALE * self.view.size
        self.draw.line(at, colour, round(wide))
        for x, y in at:
            self.draw.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), colour)

    def arc(
        self, x: float, y: float, rx: float, ry: float, first: float, last: float, colour: str, width: float
    ) -> None:
        """Of an oval, from one angle to another in degrees, clockwise from the right."""
        self.line(_around(x, y, rx, ry, first, last), colour, width)


def _around(x: float, y: float, rx: float, ry: float, first: float, last: float) -> Points:
    angles = [math.radians(first + (last - first) * i / 48) for i in range(49)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def blob(pen: Pen) -> None:
    """A teal creature with one eye, two orange horns and a striped belly."""
    for side in (-1, 1):
        pen.polygon([(32 + side * 8, 18), (32 + side * 20, 4), (32 + side * 16, 22)], "#f28c1e")
        pen.oval(32 + side * 9, 56, 6, 4, "#0f6f6a")
    pen.oval(32, 36, 20, 21, "#18a89f")
    pen.oval(32, 45, 12, 10, "#d7f3e3")
    for y in (41, 46, 51):
        pen.oval(32, y, 9 - abs(y - 46) / 2, 1.2, "#e0489a")
    pen.oval(32, 27, 9, 9, "#ffffff")
    pen.oval(32, 28, 5, 5, "#3b2a7a")
    pen.oval(34, 26, 1.6, 1.6, "#ffffff")


def kite(pen: Pen) -> None:
    """A kite of four coloured quarters with a face and a tail of bows."""
    top, bottom, left, right, middle = (32, 4), (32, 48), (13, 22), (51, 22), (32, 22)
    for points, colour in (
        ([top, left, middle], "#ff4f6d"),
        ([top, right, middle], "#ffc93c"),
        ([bottom, left, middle], "#3fc1c9"),
        ([bottom, right, middle], "#7a4fd0"),
    ):
        pen.polygon(points, colour)
    for x in (26, 38):
        pen.oval(x, 20, 2.5, 3, "#202030")
    pen.arc(32, 25, 7, 7, 20, 160, "#202030", 2)
    for i, colour in enumerate(("#ff4f6d", "#ffc93c", "#3fc1c9")):
        x, y = 32 + 5 * math.sin(1.8 * i + 1), 51 + 4.2 * i
        pen.polygon([(x - 4, y - 2), (x, y), (x - 4, y + 2)], colour)
        pen.polygon([(x + 4, y - 2), (x, y), (x + 4, y + 2)], colour)


def fish(pen: Pen) -> None:
    """A fish striped in navy and lime, with a red crest and a tail of two leaves."""
    pen.polygon([(46, 34), (61, 20), (57, 35)], "#e2502f")
    pen.polygon([(46, 34), (61, 50), (57, 35)], "#f59a23")
    pen.polygon([(18, 22), (30, 7), (44, 21)], "#e2502f")
    pen.oval(28, 35, 23, 16, "#b6df3a")
    for x, height in ((27, 15.5), (35, 14.5), (43, 11)):
        pen.box(x, 35 - height, x + 3.6, 35 + height, "#1d2f6f")
    pen.oval(15, 31, 5, 5, "#ffffff")
    pen.oval(14.5, 31.5, 2.4, 2.4, "#101030")
    pen.arc(9, 39, 4, 3, 0, 120, "#1d2f6f", 1.4)


def cat(pen: Pen) -> None:
    """A sitting violet cat with mint ears, a white eye patch and an orange scarf."""
    pen.arc(50, 46, 8, 11, -70, 120, "#6c43b5", 4)
    pen.oval(32, 47, 16, 14, "#7d52c9")
    for side in (-1, 1):
        pen.polygon([(32 + side * 4, 14), (32 + side * 17, 3), (32 + side * 17, 22)], "#7d52c9")
        pen.polygon([(32 + side * 8, 13), (32 + side * 15, 7), (32 + side * 15, 18)], "#8ff0c8")
        pen.oval(32 + side * 8, 59, 6, 3, "#f4e9ff")
    pen.oval(32, 22, 17, 14, "#7d52c9")
    pen.oval(24.5, 21, 6.5, 6, "#f4e9ff")
    for x in (25, 39):
        pen.oval(x, 21, 2.2, 3.4, "#1b1236")
    pen.polygon([(29.6, 26), (34.4, 26), (32, 29)], "#ff8fb1")
    for side in (-1, 1):
        pen.line([(32 + side * 10, 28), (32 + side * 20, 26)], "#f4e9ff", 1)
    pen.line([(19, 36), (32, 39), (45, 36)], "#f07c1b", 5)
    pen.polygon([(38, 37), (46, 50), (38, 51)], "#f07c1b")


def bird(pen: Pen) -> None:
    """A round black bird with a pink crest, a turquoise wing and long yellow legs."""
    for x in (26, 36):
        pen.line([(x, 46), (x, 60), (x - 5, 61)], "#f5c21d", 2)
    for x in (20, 26, 32):
        pen.line([(28, 14), (x, 3)], "#ff5fa2", 3.4)
    pen.polygon([(44, 30), (62, 24), (60, 37)], "#23262f")
    pen.oval(31, 31, 19, 18, "#2c303c")
    pen.oval(27, 39, 11, 8, "#f3efe2")
    pen.polygon([(30, 28), (54, 30), (38, 44)], "#25c7c0")
    pen.line([(36, 33), (48, 32)], "#0d7d86", 1.4)
    pen.polygon([(14, 22), (2, 28), (15, 30)], "#f5841d")
    pen.oval(21, 23, 4.6, 4.6, "#ffffff")
    pen.oval(20, 23.4, 2.2, 2.2, "#101010")


def house(pen: Pen) -> None:
    """A crooked lilac tower with a green roof, a round window and a red door."""
    pen.box(43, 12, 48, 26, "#6d4b3a")
    pen.polygon([(18, 26), (46, 26), (51, 60), (13, 60)], "#c7a9f0")
    pen.polygon([(11, 28), (30, 3), (53, 28)], "#2f9c5a")
    pen.line([(16, 27), (48, 27)], "#1d6b3b", 2)
    pen.oval(32, 37, 6.5, 6.5, "#ffffff")
    pen.oval(32, 37, 5, 5, "#ffd447")
    pen.line([(27, 37), (37, 37)], "#ffffff", 1.2)
    pen.line([(32, 32), (32, 42)], "#ffffff", 1.2)
    pen.box(26, 49, 38, 60, "#d8323f")
    pen.oval(32, 49, 6, 5, "#d8323f")
    pen.oval(35, 54, 1.2, 1.2, "#ffd447")
    for x in (18, 45):
        pen.oval(x, 59, 5, 4, "#4cb944")


def teapot(pen: Pen) -> None:
    """A cobalt teapot with yellow dots, a coral lid and a curled handle."""
    pen.arc(49, 35, 9, 11, -90, 90, "#ef6a5b", 3.6)
    pen.polygon([(18, 30), (3, 18), (8, 15), (22, 40)], "#1f4fc4")
    pen.oval(32, 38, 19, 16, "#2a62e6")
    pen.box(20, 52, 44, 56, "#1f4fc4")
    pen.oval(32, 23, 12, 4.5, "#ef6a5b")
    pen.oval(32, 16, 3.6, 3.6, "#ffd447")
    for x, y in ((22, 34), (32, 31), (42, 34), (27, 43), (37, 43)):
        pen.oval(x, y, 2.8, 2.8, "#ffd447")


def windmill(pen: Pen) -> None:
    """A windmill with a brown body, a blue cap and four sails of different colours."""
    pen.polygon([(24, 26), (40, 26), (46, 61), (18, 61)], "#a4713f")
    for y in (38, 48):
        pen.box(20.5, y, 43.5, y + 2.4, "#6f4724")
    pen.oval(32, 57, 4.5, 6, "#3a2614")
    pen.polygon([(22, 27), (32, 12), (42, 27)], "#275c9e")
    for i, colour in enumerate(("#ffffff", "#f2b632", "#e8506a", "#59c98f")):
        angle = math.radians(45 + 90 * i)
        x, y = math.cos(angle), math.sin(angle)
        pen.polygon(
            [
                (32 + 5 * x, 24 + 5 * y),
                (32 + 27 * x - 3 * y, 24 + 27 * y + 3 * x),
                (32 + 27 * x + 5 * y, 24 + 27 * y - 5 * x),
                (32 + 5 * x + 5 * y, 24 + 5 * y - 5 * x),
            ],
            colour,
        )
        pen.line([(32, 24), (32 + 27 * x, 24 + 27 * y)], "#4d2f17", 1.6)
    pen.oval(32, 24, 3, 3, "#4d2f17")


@dataclass(frozen=True)
class Subject:
    """A drawing and its names: a word that no caption held, and its class."""

    shapes: Callable[[Pen], None]
    word: str
    kind: str

    @property
    def noun(self) -> str:
        return f"{self.word} {self.kind}"


# The defaults were chosen on the first; only the others are reported. Cats, birds, fish and houses the model knows.
CHOSEN_ON = {
    "blob": Subject(blob, "sks", "creature"),
    "kite": Subject(kite, "zwx", "kite"),
    "fish": Subject(fish, "vkj", "fish"),
}
REPORTED = {
    "cat": Subject(cat, "sks", "cat"),
    "bird": Subject(bird, "zwx", "bird"),
    "teapot": Subject(teapot, "vkj", "teapot"),
    "house": Subject(house, "sks", "house"),
    "windmill": Subject(windmill, "zwx", "windmill"),
}
SUBJECTS = {**CHOSEN_ON, **REPORTED}
TRAINING = (
    View("white"),
    View("yellow", 2, 1, 0.95, 6),
    View("grey", -2, 1, 1, -5),
    View("red", 1, -1, 0.9, 3),
    View("black", 0, 2, 0.95, -8),
)
HELD_OUT = (
    View("white", 1, 0, 0.97, -3),
    View("blue", 0, 1, 0.93, 4),
    View("green", -1, 0, 0.98, -6),
    View("purple", 0, -1, 0.95, 2),
    View("pink", 2, 0, 0.92, -1),
    View("orange", -1, 1, 1, 7),
)


def pictures(name: str, views: tuple[View, ...]) -> list[Image.Image]:
    """A subject as views have it, SIDE x SIDE pixels."""
    found = []
    for view in views:
        pen = Pen(view)
        SUBJECTS[name].shapes(pen)
        found.append(pen.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return found


def write_training(name: str, out: Path) -> Path:
    """The folder below `out` with the training pictures of a subject."""
    folder = out / "subjects" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pictures(name, TRAINING)):
        image.save(folder / f"{number}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for name in SUBJECTS:
        print(write_training(name, out))


if __name__ == "__main__":
    main()
