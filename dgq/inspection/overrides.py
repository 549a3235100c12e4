"""Which layers more bits would help most, within a budget."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.header import Header
from ..integer.plan import packed_bytes
from .measurement import Measurement, decibels

# Share of the network's file that the suggested overrides may add
DEFAULT_BUDGET = 0.02


# Noise is estimated from few random probes: smaller differences between choices mean nothing
CLEARLY = 1.1


@dataclass(frozen=True)
class Suggestion:
    """Layers that would gain from more bits.

    Attributes:
        overrides: "name=8", or "name=float" where a rounded input does the harm, as `dgq calibrate --override` takes
            them: worst first by the recorded SQNR (8 bits only), or where layers were measured, by the output noise
            that a byte takes away.
        extra_bytes: what they add to the network's file; budget_bytes: what they were allowed to add.
        predicted_sqnr_db: of the network's output with them, by the measured layers' noise; None where not measured.
    """

    overrides: list[str]
    extra_bytes: int
    budget_bytes: int
    predicted_sqnr_db: float | None = None

    @property
    def command_line(self) -> str:
        """The options to add to `dgq calibrate`."""
        return " ".join(f"--override '{item}'" for item in self.overrides)


def count_of(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def growth_of(header: Header) -> dict[str, dict[int, int]]:
    """Bytes that other weight bits would add, of every float layer (whose name an override takes).

    Returns:
        {name: {bits: bytes}}; bits are 8 where the layer is stored in 4, and 0 (float16).
    """
    found: dict[str, Counter[int]] = {}
    for name, plan in header.layers.items():
        sizes = found.setdefault(plan.owner(name), Counter())
        stored = packed_bytes(plan)
        sizes[0] += 2 * plan.out_features * (plan.reduction + plan.bias) - stored
        if plan.wbits == 4:
            sizes[8] += packed_bytes(dataclasses.replace(plan, wbits=8)) - stored
    return {name: dict(sizes) for name, sizes in found.items()}


def suggest(order: Iterable[str], header: Header, budget: int) -> Suggestion | None:
    """8-bit weights for those of the 4-bit layers, in this order, that fit the budget (bytes)."""
    growth = growth_of(header)
    chosen, spent = [], 0
    for owner in order:
        if 8 in growth.get(owner, {}) and spent + growth[owner][8] <= budget:  # another method's takes no overrides
            chosen.append(owner)
            spent += growth[owner][8]
    return Suggestion([f"{owner}=8" for owner in chosen], spent, budget) if chosen else None


def suggest_measured(
    measurement: Measurement,
    header: Header,
    budget: int,
    growth: dict[str, dict[int, int]] | None = None,
) -> Suggestion | None:
    """Most noise taken away per byte first; or with one of the largest gains first, which would find no room later.

    Args:
        measurement: of the checkpoint with this header.
        header: whose layers get more bits.
        budget: bytes.
        growth: what may be chosen, and the bytes that it adds; None: all that `growth_of` has.
    """
    growth = growth_of(header) if growth is None else growth
    saved: dict[str, dict[int, float]] = {owner: {8: 0.0, 0: 0.0} for owner in growth}
    for one in measurement.layers:
        plan = header.layers.get(one.name)
        if plan is not None and plan.owner(one.name) in saved:
            saved[plan.owner(one.name)][8] += max(0.0, one.noise - one.input_noise)
            saved[plan.owner(one.name)][0] += one.noise
    single = [(owner, bits) for owner, sizes in growth.items() for bits in sizes if 0 < sizes[bits] <= budget]
    single.sort(key=lambda option: -saved[option[0]][option[1]])

    def total(choice: dict[str, int]) -> float:
        return sum(saved[owner][bits] for owner, bits in choice.items())

    chosen = _fill({}, growth, saved, budget)
    other = max((_fill({owner: bits}, growth, saved, budget) for owner, bits in single[:16]), key=total, default={})
    if total(other) > CLEARLY * total(chosen):
        chosen = other
    if not chosen:
        return None
    spent = sum(growth[owner][bits] for owner, bits in chosen.items())
    left = measurement.noise - total(chosen)
    return Suggestion(
        [f"{owner}={bits or 'float'}" for owner, bits in chosen.items()], spent, budget, decibels(1, left)
    )


def _fill(
    start: dict[str, int], growth: dict[str, dict[int, int]], saved: dict[str, dict[int, float]], budget: int
) -> dict[str, int]:
    """Add to a choice {layer: bits} what saves most per byte while it fits; 8 bits may still become float."""
    chosen = dict(start)
    room = budget - sum(growth[owner][bits] for owner, bits in start.items())
    while True:
        best: tuple[float, str, int, int] | None = None
        for owner, sizes in growth.items():
            has = chosen.get(owner)
            size, noise = (0, 0.0) if has is None else (sizes[has], saved[owner][has])
            for bits in sizes:
                more, less = sizes[bits] - size, saved[owner][bits] - noise
                if 0 < more <= room and less > 0 and (best is None or less / more > best[0]):
                    best = (less / more, owner, bits, more)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
        room -= best[3]
