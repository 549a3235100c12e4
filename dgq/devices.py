"""Devices: which there are, and tensors moved to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgq_kernels import backend, native

from .errors import DgqError


def to_device(value: Any, device: torch.device) -> Any:
    """value with its tensors moved; they may be nested in dicts (added_cond_kwargs), lists and tuples."""
    return over_tensors(value, lambda tensor: tensor.to(device))


def over_tensors(value: Any, made: Callable[[Tensor], Any]) -> Any:
    """value with what is made of each tensor in its place; they may be nested in dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: over_tensors(item, made) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(over_tensors(item, made) for item in value)
    return made(value) if isinstance(value, Tensor) else value


def _kinds() -> list[str]:
    """Types of device other than the CPU that have kernels."""
    return [kind for kind in backend.device_types() if kind != "cpu"]


def present() -> list[torch.device]:
    """The CPU and every device of this machine that has kernels."""
    others = [torch.device(kind, i) for kind in _kinds() for i in range(torch.get_device_module(kind).device_count())]
    return [torch.device("cpu"), *others]


def default_device() -> torch.device:
    """CUDA, or another kind of device with kernels, where there is one, else the CPU."""
    there = (kind for kind in _kinds() if torch.get_device_module(kind).is_available())
    return torch.device(next(there, "cpu"))


def check_kernels(device: torch.device) -> None:
    """Refuse a device that a model cannot run on, and what the environment asks for and is not there.

    Raises:
        DgqError: which.
    """
    try:
        backend.check(device)
        native.available()
    except ValueError as error:
        raise DgqError(str(error)) from None


def check_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for: "cpu", "cuda" or "cuda:N", or the default one for None.

    Raises:
        DgqError: it is another kind of device, or this machine does not have it.
    """
    if device is None:
        return default_device()
    kinds = _kinds()
    found = re.fullmatch(rf"cpu|({'|'.join(kinds)})(?::(\d{{1,4}}))?", str(device))
    if found is None:
        known = " or ".join(f"{kind} or {kind}:N" for kind in kinds)
        raise DgqError(f"device {str(device)!r} is not cpu, {known}")
    kind, index = found[1], found[2]
    if kind is None:
        return torch.device("cpu")
    count = torch.get_device_module(kind).device_count()
    if not count:
        raise DgqError(f"no {kind.upper()} device: torch {torch.__version__} sees none", "run on the CPU: device cpu")
    if index and int(index) >= count:
        raise DgqError(f"no device {found[0]!r}: torch sees {count}, {kind}:0 to {kind}:{count - 1}")
    return torch.device(found[0])
