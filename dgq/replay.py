"""A float pipeline's calls of its network, recorded to be replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .devices import to_device
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
    with hooked([network.register_forward_pre_hook(hook, with_kwargs=True)]):
        for i, prompt in enumerate(prompts):
            calls = []
            run(prompt, i)
            recorded.append(calls)
            progress("record", i + 1, len(prompts), prompt)
    return recorded


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that go with the block, however it ends: their handles are given."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def replay(
    network: nn.Module, calls: Sequence[dict[str, Any]], handles: Iterable[Any], told: Callable[[int, int], None]
) -> None:
    """Run calls of any device through a network whose hooks, of these handles, see what it computes.

    Args:
        network: called on its own device.
        calls: keyword arguments.
        handles: of the hooks, which are removed at the end.
        told: called with (done, total) after each.
    """
    device = next(network.parameters()).device
    with hooked(handles):
        for done, call in enumerate(calls, start=1):
            network(**to_device(call, device))
            told(done, len(calls))


def pack_calls(calls: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of calls, and of the mappings in them, by "number/argument/key" as safetensors can hold them.

    What is no tensor is the pipeline's constant, and left out.
    """
    packed: dict[str, Tensor] = {}
    for i, call in enumerate(calls):
        for name, value in call.items():
            nested = value if isinstance(value, Mapping) else {"": value}
            for key, tensor in nested.items():
                if isinstance(tensor, Tensor):  # copied: calls share what stays the same, a file may not
                    packed[f"{i}/{name}/{key}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return packed


def unpack_calls(packed: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Inverse of `pack_calls`.

    Raises:
        ValueError: a name is none that it makes.
    """
    calls: dict[int, dict[str, Any]] = {}
    for path, tensor in packed.items():
        number, name, key = path.split("/")
        call = calls.setdefault(int(number), {})
        if key:
            call.setdefault(name, {})[key] = tensor
        else:
            call[name] = tensor
    return [calls[i] for i in sorted(calls)]


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
