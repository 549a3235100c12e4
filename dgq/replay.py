"""A float pipeline's calls of its network, recorded to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .family import family_of
from .progress import silent

if TYPE_CHECKING:
    from .progress import Progress


def record_inputs(
    run: Callable[[str, int], Any], network: nn.Module, prompts: Sequence[str], progress: Progress = silent
) -> list[list[dict[str, Any]]]:
    """Every call the float pipeline makes to its network, per prompt.

    Args:
        run: run(prompt, i) makes picture i (steps, guidance and seed are the caller's).
        network: the module whose calls are recorded.
        prompts: calibration prompts.

    Returns:
        For each prompt the list of its calls, one per sampler step, as keyword arguments (tensors detached).
    """
    calls: list[dict[str, Any]] = []
    names = family_of(network).arguments

    def keep(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names, args, strict=False)) | kwargs
        calls.append({name: keep(value) for name, value in named.items()})

    recorded = []
    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for i, prompt in enumerate(prompts):
            calls = []
            run(prompt, i)
            recorded.append(calls)
            progress("record", i + 1, len(prompts), prompt)
    finally:
        handle.remove()
    return recorded


def spread(recorded: list[list[dict[str, Any]]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` calls, spread evenly over prompts and steps (a different set of steps for each prompt)."""
    total = sum(map(len, recorded))
    if total <= limit:
        return [call for calls in recorded for call in calls]
    flat = [(step / len(calls) + 0.618 * i) % 1 for i, calls in enumerate(recorded) for step in range(len(calls))]
    order = sorted(range(total), key=lambda index: (round(flat[index], 9), index))
    calls = [call for group in recorded for call in group]
    picked = [order[round(i * (total - 1) / (limit - 1))] for i in range(limit)] if limit > 1 else order[:1]
    return [calls[index] for index in sorted(picked)]
