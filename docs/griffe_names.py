"""griffe extension: parameters that a docstring describes together, "a, b: ...", as one item each."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An item of a section: its names, and its text to the next line that is no deeper.
_ITEM = re.compile(r"^    (\w+(?:, \w+)+):((?:.*)(?:\n {8,}.*)*)$", re.MULTILINE)


class SplitNames(griffe.Extension):
    """Repeats the text for each name, so that every parameter finds its type and a misspelt one is noticed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every function and class once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = _ITEM.sub(
                lambda item: "\n".join(f"    {name}:{item[2]}" for name in item[1].split(", ")), obj.docstring.value
            )
