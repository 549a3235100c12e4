"""The checkpoint that is exported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import checksums
from ..checkpoint.header import Header
from ..checkpoint.reading import component_at, components
from ..errors import DgqError
from ..method import METHODS
from ..pictures.components import component, without_bars
from ..pictures.pipelines import find_model


@dataclass(frozen=True)
class Source:
    """A checkpoint on the disk: its folder, and its network's header."""

    folder: Path
    header: Header


def open_checkpoint(model: str | os.PathLike[str], verify: bool = True) -> Source:
    """An integer checkpoint, its files held against their checksums.

    Args:
        model: its folder or hub id.
        verify: False takes files that were changed on purpose.

    Raises:
        DgqError: there is none, it is damaged or float, or its recipe is a simulated one.
    """
    found = find_model(model)
    if found.header is None:
        raise DgqError(f"{found.folder}: is a float model: there is nothing to export", "dgq calibrate quantizes it")
    if METHODS[found.header.recipe.name].simulated:
        what = f"the {found.header.recipe.name} recipe, whose layers are simulated"
        raise DgqError(f"{found.folder}: is of {what}", "those of integer and convrot can be exported")
    if verify and checksums.wanted():
        checksums.verify(component_at(found.folder))
    return Source(found.folder, found.header)


@without_bars()
def loaded(source: Source, name: str) -> Any:
    """A quantized component of a checkpoint, in float16 but for its integers and scales."""
    library, kind = components(source.folder)[name]
    with checksums.left_out():
        return component(source.folder, name, library, kind, torch.float16)
