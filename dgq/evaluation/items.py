"""What is drawn for an evaluation: prompts, and for the embedded model what each of them asks for."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from ..errors import DgqError
from ..pictures.prompts import calibration_pool, evaluation_prompts, read_prompts

EVERYDAY = "everyday"


@dataclass(frozen=True)
class Item:
    """A prompt, and what it names.

    Attributes:
        prompt: the text.
        concept, style, background: names as the embedded model's concepts.json has them; None where nothing is asked.
        held_out: whether training never saw this pair of concept and style, or of concept and background.
    """

    prompt: str
    concept: str | None = None
    style: str | None = None
    background: str | None = None
    held_out: bool = False


def items(folder: Path, wanted: str, seed: int = 0) -> list[Item]:
    """The prompts of an evaluation, none of them one that calibration draws from.

    Args:
        folder: the model; one with a concepts.json gets labelled prompts.
        wanted: a number; or "everyday", the plain names of the everyday concepts (they judge a model rather than its
            quantization: calibration may have seen them); or a file: one prompt a line, COCO captions (.json) or
            PartiPrompts (.tsv).
        seed: of the choice.

    Raises:
        DgqError: neither a number nor a readable file; "everyday" for a model without concepts; nothing is left.
    """
    known = folder / "concepts.json"
    if wanted == EVERYDAY:
        if not known.is_file():
            raise DgqError(f"{folder}: lists no concepts", "'--prompts everyday' is for the embedded model")
        concepts = json.loads(known.read_text(encoding="utf-8"))["concepts"]
        found = [Item(concept["name"], concept["name"]) for concept in concepts if concept.get("common")]
    elif not wanted.isdecimal():
        found = [Item(prompt) for prompt in read_prompts(Path(wanted))]
    elif known.is_file():
        found = labelled(folder, int(wanted), seed)
    else:
        found = [Item(prompt) for prompt in evaluation_prompts(folder, int(wanted), seed)]
    if not found:
        raise DgqError(f"--prompts {wanted} leaves nothing to evaluate", f"{folder} has no such prompts")
    return found


def labelled(folder: Path, count: int, seed: int = 0) -> list[Item]:
    """`count` labelled prompts of a model with a concepts.json: a quarter each of plain names, names with a style,
    names with a background, and pairs that training never saw (fewer of a kind where there are no more)."""
    known = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    seen_before = set(calibration_pool(folder))
    colours = [name for name in known["backgrounds"] if name != known["default_background"]]
    kinds: list[list[Item]] = [[], [], [], []]
    for concept in known["concepts"]:
        name = concept["name"]
        kinds[0].append(Item(name, name))
        for style, said in known.get("styles", {}).items():
            held_out = style in concept.get("held_out_styles", ())
            kinds[3 if held_out else 1].append(Item(f"{name} in {said} style", name, style, None, held_out))
        for colour in colours:
            held_out = colour in concept.get("held_out_backgrounds", ())
            article = "an" if colour[0] in "aeiou" else "a"
            prompt = f"{name} on {article} {colour} background"
            kinds[3 if held_out else 2].append(Item(prompt, name, None, colour, held_out))
    rng = random.Random(seed)
    pools = [[item for item in kind if item.prompt not in seen_before] for kind in kinds]
    for pool in pools:
        rng.shuffle(pool)
    chosen: list[Item] = []
    while len(chosen) < count and any(pools):
        for pool in pools:
            if pool and len(chosen) < count:
                chosen.append(pool.pop())
    return chosen
