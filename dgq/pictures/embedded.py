"""The embedded model `dgq-emoji`: where it lies and which words it knows."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

NAME = "dgq-emoji"


FOLDER = Path(__file__).parent.parent / "data" / NAME


# DDIM steps and classifier-free guidance its pictures look best at
GENERATION = {"steps": 20, "guidance": 3.0}


@functools.cache
def vocabulary(folder: Path = FOLDER) -> frozenset[str]:
    """Every word the model saw in a training caption, lower case."""
    known = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    phrases = [*known["backgrounds"], *known.get("styles", {}).values()]
    phrases.append(known.get("caption_example", "on a background"))
    for concept in known["concepts"]:
        phrases += [concept["name"], *concept.get("synonyms", ())]
    return frozenset(re.findall(r"[a-z0-9]+", " ".join(phrases).lower()))


def unknown_words(prompt: str, folder: Path = FOLDER) -> list[str]:
    """The words of a prompt that no training caption held, in order."""
    return [word for word in re.findall(r"[a-z0-9]+", prompt.lower()) if word not in vocabulary(folder)]
