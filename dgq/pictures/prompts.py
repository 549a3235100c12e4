"""Calibration and evaluation prompts; the two never overlap."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from ..errors import DgqError

_SUBJECTS = (
    "a cat",
    "a dog",
    "an old man",
    "a young woman",
    "two children",
    "a horse",
    "a red car",
    "a sailing boat",
    "a bowl of fruit",
    "a wooden house",
    "a mountain",
    "a city street",
    "a robot",
    "a birthday cake",
    "a bicycle",
    "a lighthouse",
    "a flock of birds",
    "a cup of coffee",
    "a train",
    "a forest path",
    "a guitar",
    "a castle",
    "an astronaut",
    "a market stall",
)


_SCENES = (
    "",
    " at sunset",
    " in the rain",
    " in the snow",
    " on a beach",
    " in a kitchen",
    " under a starry sky",
    " at night",
    " in a green field",
    " beside a river",
    " in an empty room",
    " on a busy street",
)


_STYLES = (
    "a photo of {}",
    "an oil painting of {}",
    "a pencil drawing of {}",
    "a close-up photo of {}",
    "a watercolour of {}",
    "{}, cartoon style",
    "{}, seen from above",
    "a black and white photo of {}",
)


# COCO's captions, the largest such file that people have, are 91 MB.
LARGEST_FILE = 2**28


def read_text(file: Path) -> str:
    """The UTF-8 text of a user's file, or of a pipe that is open already (`<(command)`).

    Raises:
        DgqError: it cannot be read, is too large, holds NULs, or is a device or a named pipe, which may never end.
    """
    try:
        if os.path.exists(os.path.realpath(file)) and not file.is_file():
            raise DgqError(f"{file}: cannot be read (not a regular file)")
        with open(file, "rb") as handle:
            data = handle.read(LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DgqError(f"{file}: cannot be read ({error})") from None
    if len(data) > LARGEST_FILE:
        raise DgqError(f"{file}: is larger than {LARGEST_FILE // 2**20} MiB")
    if "\0" in text:
        raise DgqError(f"{file}: holds NUL characters, so it is no text file")
    return text


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file: COCO captions (.json: "annotations" with a "caption", or a list of strings), PartiPrompts
    (.tsv: a column "Prompt"), each once; anything else one a line, without blank lines and those that start with #.

    Raises:
        DgqError: the file cannot be read or holds no prompt.
    """
    text, kind = read_text(file), file.suffix.lower()
    try:
        if kind == ".json":
            found = list(dict.fromkeys(_coco(json.loads(text))))
        elif kind == ".tsv":
            found = list(dict.fromkeys(_parti(io.StringIO(text, newline="").readlines())))
        else:
            found = [line for line in map(str.strip, text.splitlines()) if not line.startswith("#")]
    except (ValueError, RecursionError, csv.Error) as error:
        raise DgqError(f"{file}: cannot be read ({error})") from None
    except (KeyError, TypeError, AttributeError):
        wanted = 'a list of strings, or "annotations" with captions' if kind == ".json" else 'a column "Prompt"'
        raise DgqError(f"{file}: holds no prompts where they are looked for", f"it needs {wanted}") from None
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise DgqError(f"{file}: holds no prompt")
    return prompts


def _coco(data: object) -> list[str]:
    if isinstance(data, dict):
        data = [annotation["caption"] for annotation in data["annotations"]]
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise TypeError
    return [text.strip() for text in data]


def _parti(lines: Sequence[str]) -> list[str]:
    return [row["Prompt"].strip() for row in csv.DictReader(lines, delimiter="\t")]


def _pool(folder: Path) -> list[str]:
    """All prompts for a model, in an order of their own: its own concepts where it lists them, else everyday scenes."""
    concepts = folder / "concepts.json"
    if concepts.is_file():
        known = json.loads(concepts.read_text(encoding="utf-8"))
        colours = [name for name in known["backgrounds"] if name != known["default_background"]]
        names = [concept["name"] for concept in known["concepts"]]
        coloured = [f"{name} on a {colours[i % len(colours)]} background" for i, name in enumerate(names)]
        pool = names + coloured
    else:
        pool = [style.format(subject + scene) for style in _STYLES for subject in _SUBJECTS for scene in _SCENES]
    random.Random(20250112).shuffle(pool)
    return pool


def calibration_pool(folder: Path) -> list[str]:
    """Every prompt that calibration may draw."""
    pool = _pool(folder)
    return pool[: len(pool) // 2]


def calibration_prompts(folder: Path, count: int, seed: int = 0) -> list[str]:
    """`count` prompts for calibration, from the first half of the pool."""
    half = calibration_pool(folder)
    return random.Random(seed).sample(half, min(count, len(half)))


def evaluation_prompts(folder: Path, count: int, seed: int = 0) -> list[str]:
    """`count` prompts for evaluation, from the second half of the pool."""
    pool = _pool(folder)
    half = pool[len(pool) // 2 :]
    return random.Random(seed).sample(half, min(count, len(half)))
