"""The stored form of an integer layer: names, shapes and dtypes of its tensors, and where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dgq_kernels import packing

from ..errors import DgqError
from ..recipe import LayerPlan


def stored_shapes(plan: LayerPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of everything a layer stores; the file format of one layer.

    weight (int8) is shaped as the float layer's; packed and subscales (int4, see `dgq_kernels.packing`) hold the matrix
    (N, kh * kw * C). Their input channels are in stored order; order[i] is the channel stored at place i; inv_divisor
    is in natural order.
    """
    n, k, c = plan.out_features, plan.reduction, plan.in_features
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if plan.wbits == 8:
        taps = () if plan.kind == "linear" else (plan.kernel_size,) * 2
        specs["weight"] = ((n, c, *taps), torch.int8)
    else:
        padded = packing.padded_length(k, plan.weight_group)
        specs["packed"] = ((n, padded // 2), torch.uint8)
        specs["subscales"] = ((n, -(-padded // plan.weight_group // 2)), torch.uint8)
    specs["weight_scale"] = ((n,), torch.float32)
    if plan.bias:
        specs["bias"] = ((n,), torch.float32)
    if plan.channels != "none":
        specs["inv_divisor"] = ((c,), torch.float32)
    if plan.reordered:
        specs["order"] = ((c,), torch.int32)
    return specs


class StoredWeight(Tensor):
    """A stored weight whose bytes are held in another form, a backend's blocks say.

    It has the shape, dtype and device of the tensor that it stands for, which is made when something reads it: moves,
    copies and saves see that tensor, and nothing is kept twice. Changing it in place, or taking its integers for the
    float weight, is a DgqError.

    Attributes:
        make: makes the tensor.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        """What makes a parameter of `type(parameter)` from another tensor (accelerate does) gets a plain one."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def of(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]
    ) -> StoredWeight:
        """A tensor of this shape, dtype and device, which `make` makes."""
        weight: StoredWeight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        weight.make = make
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            one = args[0]
            return cls.of(one.shape, one.dtype, one.device, one.make)

        if function._schema.is_mutable:  # it would change a tensor that nobody keeps
            raise DgqError(
                "a packed weight cannot be changed in place", "adapters stay beside it: they cannot be fused"
            )

        others = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        if any(one.is_floating_point() for one in others) or (kwargs or {}).get("dtype", torch.int8).is_floating_point:
            raise DgqError(
                "a packed weight has integers, not the float values", "IntegerLayer.dequantize() makes these"
            )

        def made(value: Any) -> Any:
            return value.make() if isinstance(value, cls) else value

        return function(*tree_map(made, args), **tree_map(made, kwargs or {}))
