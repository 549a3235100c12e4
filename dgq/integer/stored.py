"""The stored form of an integer layer: names, shapes and dtypes of its tensors."""

from __future__ import annotations

import torch

from dgq_kernels import packing

from ..recipe import LayerPlan


def buffer_specs(plan: LayerPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of everything a layer stores; the file format of one layer.

    weight (int8) or packed and subscales (int4, see `dgq_kernels.packing`) hold the matrix (N, kh * kw * C) with the
    input channels in stored order; order[i] is the channel stored at place i; inv_divisor is in natural order.
    """
    n, k, c = plan.out_features, plan.reduction, plan.in_features
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if plan.wbits == 8:
        specs["weight"] = ((n, k), torch.int8)
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
