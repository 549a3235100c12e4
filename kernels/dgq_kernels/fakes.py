"""Fake forms of operators: what torch's fake tensors, and so its compiler, run in an operator's place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._pytree import tree_leaves

Fake = Callable[..., Any]


def register_fake(operator: CustomOpDef) -> Callable[[Fake], Fake]:
    """Register a function as an operator's fake form, which then refuses tensors of several devices (ValueError)."""

    def register(fake: Fake) -> Fake:
        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            devices = {str(x.device) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"{operator}: tensors on {' and '.join(sorted(devices))}")
            return fake(*args, **kwargs)

        operator.register_fake(checked)
        return fake

    return register
