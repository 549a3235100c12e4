"""A heat map for the terminal: coloured numbers, readable without the colours too."""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

# From bad to good; the ends stand for LOW dB and less, and HIGH dB and more. Red to blue also for colour-blind readers.
RAMP = ((165, 0, 38), (244, 109, 67), (254, 224, 144), (171, 217, 233), (69, 117, 180))
LOW, HIGH = 10.0, 40.0
CELL = 3  # two digits and a space


def columns(steps: int, width: int) -> list[range]:
    """The steps of each column, as many columns as fit `width` characters."""
    together = -(-steps // max(width // CELL, 1))
    return [range(i, min(i + together, steps)) for i in range(0, steps, together)]


def row(label: str, values: Sequence[float], width: int, shown: Sequence[range]) -> Text:
    """One line: the label in `width` characters, then the lowest value (dB) of each column's steps."""
    text = Text(f"{label[:width]:<{width}}")
    for steps in shown:
        text.append_text(cell(min(values[step] for step in steps)))
    return text


def cell(value: float) -> Text:
    """A value (dB) as a coloured block of `CELL` characters."""
    colour = _colour(value)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    style = Style(color="black" if bright else "white", bgcolor=f"rgb({colour[0]},{colour[1]},{colour[2]})")
    return Text(f"{max(-9, min(99, round(value))):>2} ", style)


def head(width: int, shown: Sequence[range]) -> Text:
    """The number of each column's first step, counted from 1; a dot where it has three digits."""
    text = Text(f"{'step':<{width}}")
    for steps in shown:
        text.append(f"{steps[0] + 1:>2} " if steps[0] < 99 else " . ")
    return text


def _colour(value: float) -> tuple[int, int, int]:
    place = (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (place - i) * (b - a)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True))
    return red, green, blue
