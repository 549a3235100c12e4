"""Concepts, styles, backgrounds, and how they combine into captions.

Everything random is drawn from a ``random.Random`` that the caller owns, so a training run's data order is its
state. Which pairs are held out depends on a seed and on names only, never on the order of a list.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
HELD_OUT_SEED = 20
HELD_OUT_STYLE = 0.05
HELD_OUT_BACKGROUND = 0.10
COMMON_WEIGHT = 3

DEFAULT_STYLE = "noto"
DEFAULT_BACKGROUND = "white"

# Design -> what a caption calls it.
STYLES: dict[str, str] = {
    "noto": "noto",
    "noto-v1": "classic noto",
    "fluent-flat": "flat",
    "fluent-3d": "3d",
    "twemoji": "twemoji",
}

# Background name -> 8-bit sRGB.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
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

P_STYLED = 0.5
P_COLOURED = 0.4
P_SAY_WHITE = 0.1
P_UNSTYLED_DEFAULT = 0.5


@dataclass(frozen=True)
class Concept:
    """One thing the model knows: its code point, its phrases (the first is its name), and two flags."""

    code: str
    phrases: tuple[str, ...]
    common: bool = False
    flip: bool = True

    @property
    def name(self) -> str:
        """The first phrase, with its article."""
        return self.phrases[0]


@dataclass(frozen=True)
class Draw:
    """One training example: an index into the concept list, style and background names, and the caption."""

    concept: int
    style: str
    background: str
    caption: str


def parse_concept(line: str) -> Concept:
    """Read one line of ``concepts.txt``."""
    fields = [field.strip() for field in line.split("|")]
    if len(fields) not in (2, 3) or (len(fields) == 3 and fields[2] != "noflip"):
        raise ValueError(f"concepts: expected 'code | phrases [| noflip]', found {line!r}")
    phrases = tuple(phrase.strip() for phrase in fields[1].split(";") if phrase.strip())
    if not phrases:
        raise ValueError(f"concepts: no phrase in {line!r}")
    return Concept(fields[0].removeprefix("*"), phrases, fields[0].startswith("*"), len(fields) == 2)


def read_concepts(path: Path = CONCEPTS_FILE) -> list[Concept]:
    """Read the concept list; code points and phrases must be unique."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    concepts = [parse_concept(line) for line in lines if line and not line.startswith("#")]
    phrases = [phrase for concept in concepts for phrase in concept.phrases]
    codes = [concept.code for concept in concepts]
    for values in (codes, phrases):
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"concepts: used twice in {path.name}: {', '.join(repeated)}")
    return concepts


def _fraction(*parts: str) -> float:
    """Map strings to a number in [0, 1) that never changes between machines or versions."""
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def style_held_out(concept: Concept, style: str, seed: int = HELD_OUT_SEED) -> bool:
    """Whether training never sees this concept in this style (the default style is always seen)."""
    return style != DEFAULT_STYLE and _fraction(str(seed), "style", concept.code, style) < HELD_OUT_STYLE


def background_held_out(concept: Concept, background: str, seed: int = HELD_OUT_SEED) -> bool:
    """Whether training never sees this concept on this background (white is always seen)."""
    if background == DEFAULT_BACKGROUND:
        return False
    return _fraction(str(seed), "background", concept.code, background) < HELD_OUT_BACKGROUND


def article(word: str) -> str:
    """The indefinite article of a colour or style name."""
    return "an" if word[0] in "aeiou" else "a"


def caption(phrase: str, style: str | None = None, background: str | None = None, brief: bool = False) -> str:
    """Put a caption together: ``a cat in 3d style on a blue background``, or ``a cat, 3d style, blue background``."""
    parts = [phrase]
    if style is not None:
        parts.append(f", {STYLES[style]} style" if brief else f" in {STYLES[style]} style")
    if background is not None:
        parts.append(f", {background} background" if brief else f" on {article(background)} {background} background")
    return "".join(parts)


def bare(phrase: str) -> str:
    """A phrase without its article."""
    first, _, rest = phrase.partition(" ")
    return rest if first in ("a", "an", "the") and rest else phrase


def pick_phrase(concept: Concept, rng: random.Random) -> str:
    """The concept's name half of the time, otherwise any of its phrases; the article is dropped now and then."""
    phrase = concept.name if rng.random() < 0.5 else rng.choice(concept.phrases)
    kind = rng.random()
    if kind < 0.15:
        return bare(phrase)
    if kind < 0.20:
        return f"a picture of {phrase}"
    if kind < 0.25:
        return f"an emoji of {phrase}"
    return phrase


class Sampler:
    """Draws training examples from the pairs that are not held out."""

    def __init__(
        self,
        concepts: list[Concept],
        available: dict[int, list[str]],
        seed: int = HELD_OUT_SEED,
        common_weight: float = COMMON_WEIGHT,
    ) -> None:
        """``available`` maps a concept's index to the styles that have a picture of it."""
        self.concepts = concepts
        self.styles = {
            index: [style for style in styles if not style_held_out(concepts[index], style, seed)]
            for index, styles in available.items()
        }
        self.backgrounds = [
            [name for name in BACKGROUNDS if name != DEFAULT_BACKGROUND and not background_held_out(c, name, seed)]
            for c in concepts
        ]
        self.indices = [index for index, styles in self.styles.items() if styles]
        self.weights = [common_weight if concepts[index].common else 1 for index in self.indices]

    def pick_style(self, index: int, rng: random.Random) -> tuple[str, bool]:
        """A style for a concept, and whether the caption names it."""
        styles = self.styles[index]
        if rng.random() < P_STYLED:
            return rng.choice(styles), True
        if DEFAULT_STYLE in styles and rng.random() < P_UNSTYLED_DEFAULT:
            return DEFAULT_STYLE, False
        return rng.choice(styles), False

    def pick_background(self, index: int, rng: random.Random) -> tuple[str, bool]:
        """A background for a concept, and whether the caption names it."""
        if self.backgrounds[index] and rng.random() < P_COLOURED:
            return rng.choice(self.backgrounds[index]), True
        return DEFAULT_BACKGROUND, rng.random() < P_SAY_WHITE

    def draw(self, rng: random.Random) -> Draw:
        """One training example."""
        index = rng.choices(self.indices, self.weights)[0]
        concept = self.concepts[index]
        style, say_style = self.pick_style(index, rng)
        background, say_background = self.pick_background(index, rng)
        text = caption(
            pick_phrase(concept, rng),
            style if say_style else None,
            background if say_background else None,
            brief=rng.random() < 0.3,
        )
        return Draw(index, style, background, text)


def all_captions(concepts: list[Concept]) -> Iterator[str]:
    """A corpus that holds every phrase alone and in every style and background, for training the tokenizer."""
    for concept in concepts:
        for phrase in concept.phrases:
            yield from (phrase, f"a picture of {phrase}", f"an emoji of {phrase}")
            for brief in (False, True):
                yield from (caption(phrase, style, None, brief) for style in STYLES)
                yield from (caption(phrase, None, background, brief) for background in BACKGROUNDS)
