"""Devices: which there are, and tensors moved to them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .errors import DgqError


def to_device(value: Any, device: torch.device) -> Any:
    """value with its tensors moved; they may be nested in dicts (added_cond_kwargs)."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for: "cpu", "cuda" or "cuda:N", or the default one for None.

    Raises:
        DgqError: it is another kind of device, or this machine does not have it.
    """
    if device is None:
        return default_device()
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", str(device))
    if found is None:
        raise DgqError(f"device {str(device)!r} is not cpu, cuda or cuda:N")
    if found[0] == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise DgqError(f"no CUDA device: torch {torch.__version__} sees none", "run on the CPU: device cpu")
    if found[1] and int(found[1]) >= count:
        raise DgqError(f"no device {found[0]!r}: torch sees {count}, cuda:0 to cuda:{count - 1}")
    return torch.device(found[0])
