"""Fake forms of operators: what torch's fake tensors, and so its compiler, run in an operator's place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

Fake = Callable[..., Any]


def register_fake(operator: OpOverload) -> Callable[[Fake], Fake]:
    """Register a function as an operator's fake form, which then refuses tensors of several devices (ValueError)."""

    def register(fake: Fake) -> Fake:
        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            devices = {str(x.device) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"{operator}: tensors on {' and '.join(sorted(devices))}")
            return fake(*args, **kwargs)

        torch.library.register_fake(operator, checked)
        return fake

    return register
