"""LoRA and tuned scales that a command draws with."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .light_imports import light_imports

if TYPE_CHECKING:
    from dgq.pictures.pipelines import Model

LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:STRENGTH]", help="Draw with a LoRA; repeatable, they add up."),
]
TunedOption = Annotated[
    list[str] | None,
    typer.Option("--tuned", metavar="FILE[:STRENGTH]", help="Draw with scales of dgq tune; repeatable, they add up."),
]


def with_strength(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH; a file's own name may hold colons."""
    file, _, number = text.rpartition(":")
    try:
        strength = float(number) if file else 1.0
    except ValueError:  # a colon of the file's name
        file, strength = "", 1.0
    if not math.isfinite(strength):
        raise typer.BadParameter(f"{text!r}: the strength is not finite")
    return Path(file or text), strength


def imports(lora: list[str] | None) -> AbstractContextManager[None]:
    """Within it a command imports what it needs. Light imports leave peft out, which LoRA needs."""
    return contextlib.nullcontext() if lora else light_imports()


class Adapters:
    """What `--lora` and `--tuned` name, checked as far as names of tensors tell before a model is loaded.

    Attributes:
        fields: of the pictures' metadata.
    """

    def __init__(self, lora: list[str] | None, tuned: list[str] | None, model: Model) -> None:
        self.loras, self.tuned = ([with_strength(text) for text in texts or []] for texts in (lora, tuned))
        named = {"Lora": self.loras, "Tuned": self.tuned}
        self.fields = {
            key: ", ".join(f"{file.stem}:{strength:g}" for file, strength in files)
            for key, files in named.items()
            if files
        }
        if self.loras:
            from dgq.pictures.loras import check_loras

            check_loras(self.loras, model.folder)

    def put_on(self, pipe: Any) -> None:
        """On a loaded pipeline."""
        from dgq.pictures.loras import load_loras
        from dgq.tuning.apply import load_tuned

        for number, (file, strength) in enumerate(self.tuned):
            load_tuned(pipe, file, strength, f"{file.stem}-{number}")
        load_loras(pipe, self.loras)
