"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""progress(stage, done, total, detail)"""


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback that says nothing."""
