"""A float pipeline's calls of its network, recorded to be replayed."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .devices import over_tensors, to_device
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
        For each prompt the list of its calls, one or two per sampler step, as keyword arguments without `return_dict`.
        Their tensors are detached copies; what stays the same from step to step, such as the prompt, is one of them.
    """
    return record_all(run, {"": network}, prompts, progress)[""]


def record_all(
    run: Callable[[str, int], Any], modules: Mapping[str, nn.Module], prompts: Sequence[str], progress: Progress
) -> dict[str, list[list[dict[str, Any]]]]:
    """As `record_inputs`, of several modules by name."""
    recorded: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in modules}

    def hook(name: str, names: Sequence[str]) -> Any:
        before: deque[list[Tensor]] = deque(maxlen=2)  # a step's calls, with the prompt and without

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(names, args, strict=False)) | kwargs
            named.pop("return_dict", None)
            call = over_tensors(named, lambda tensor: _copied(tensor.detach(), before))
            recorded[name][-1].append(call)
            before.append(take_apart(call)[1])

        return note

    with hooked(
        module.register_forward_pre_hook(hook(name, family_of(module).arguments), with_kwargs=True)
        for name, module in modules.items()
    ):
        for i, prompt in enumerate(prompts):
            for calls in recorded.values():
                calls.append([])
            run(prompt, i)
            progress("record", i + 1, len(prompts), prompt)
    return recorded


def _copied(tensor: Tensor, before: Iterable[Sequence[Tensor]]) -> Tensor:
    """A copy of a tensor; one of those before where it is the same."""
    for copy in (copy for call in before for copy in call):
        if (copy.dtype, copy.device) == (tensor.dtype, tensor.device) and torch.equal(copy, tensor):
            return copy
    return tensor.clone()


class Enough(Exception):  # noqa: N818 (no error)
    """Raised by a hook of `replay` that needs no more of a call."""


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
    """Run calls of any device through a network whose hooks, of these handles, see what it computes; a call ends where
    one of them raises `Enough`.

    Args:
        network: called on its own device, as its family does.
        calls: keyword arguments.
        handles: of the hooks, which are removed at the end.
        told: called with (done, total) after each.
    """
    device = next(network.parameters()).device
    run = family_of(network).run
    with hooked(handles):
        for done, call in enumerate(calls, start=1):
            with contextlib.suppress(Enough):
                run(network, to_device(call, device))
            told(done, len(calls))


def rows_per_call(
    network: nn.Module, layers: Mapping[str, tuple[nn.Module, int]], call: dict[str, Any]
) -> dict[str, int]:
    """Rows (tokens or pixels, of all samples) that layers of a network, given with the values of a row of their output,
    compute in a call, in the order in which they do."""
    rows: dict[str, int] = {}

    def hook(name: str, module: nn.Module, values: int) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            rows[name] = output.numel() // values

        return module.register_forward_hook(note)

    replay(network, [call], (hook(name, *layer) for name, layer in layers.items()), lambda done, total: None)
    return rows


def predicted(network: nn.Module, call: dict[str, Any]) -> Tensor:
    """What a network makes of a call: (B, ...), stacked where it makes a list of samples."""
    output: Any = network(**call, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


_TENSOR = "tensor"  # the key of a JSON object that stands for a tensor
_FORM = "form"  # among packed tensors: the calls as JSON, in bytes


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Tensors nested in dicts, lists and tuples, and the rest as JSON has it, tuples as lists."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> dict[str, int]:
        tensors.append(tensor)
        return {_TENSOR: len(tensors) - 1}

    return over_tensors(value, note), tensors


def put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    """Inverse of `take_apart`."""
    if isinstance(form, dict):
        if set(form) == {_TENSOR}:
            return tensors[form[_TENSOR]]
        return {key: put_together(item, tensors) for key, item in form.items()}
    return [put_together(item, tensors) for item in form] if isinstance(form, list | tuple) else form


def pack_calls(calls: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Calls as safetensors can hold them: their tensors by number, one that they share once, and all else in the bytes
    of a JSON text."""
    numbers: dict[int, int] = {}
    packed: dict[str, Tensor] = {}

    def note(tensor: Tensor) -> dict[str, int]:
        number = numbers.setdefault(id(tensor), len(packed))
        if number == len(packed):  # copied: they may be views of one memory, which a file may not hold
            packed[str(number)] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: number}

    form = over_tensors(list(calls), note)
    return {**packed, _FORM: torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)}


def unpack_calls(packed: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Inverse of `pack_calls`.

    Raises:
        ValueError, KeyError, TypeError: it did not make this.
    """
    form = json.loads(bytes(packed[_FORM].tolist()))
    calls: list[dict[str, Any]] = put_together(form, [packed[str(i)] for i in range(len(packed) - 1)])
    return calls


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
