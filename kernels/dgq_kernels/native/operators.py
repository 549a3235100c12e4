"""The engine's calls as operators, which torch.compile and torch.export can trace: the packed weight and all else that
a layer reads are arguments. Outside of traces Python calls the library itself, which takes less time."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Layer, Norm, empty_picture, empty_upsampled, linear

# The compiler need not copy an input into the layout that it had in eager mode: pictures may stay channels-last.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)
_NORM = "Tensor? gain, Tensor? shift, float eps, int groups, bool silu"
torch.library.define(
    "dgq::engine_linear",
    "(Tensor x, Tensor[] packed, Tensor[] weight_scale, Tensor[] column_sum, Tensor?[] bias, Tensor? inv_divisor, "
    f"int bits, int rotation, int[] group, Tensor? residual, bool gated, {_NORM}) -> Tensor[]",
    tags=_ANY_LAYOUT,
)
torch.library.define(
    "dgq::engine_conv2d",
    "(Tensor x, Tensor packed, Tensor weight_scale, Tensor column_sum, Tensor? bias, Tensor? inv_divisor, int bits, "
    "int kernel, int stride, int padding, int rotation, int group, Tensor? residual, Tensor? sample_bias, "
    f"{_NORM}) -> Tensor",
    tags=_ANY_LAYOUT,
)
torch.library.define(
    "dgq::engine_upsample",
    "(Tensor x, Tensor packed, Tensor weight_scale, Tensor column_sum, Tensor? bias, Tensor? inv_divisor, int bits, "
    "int rotation, int group) -> Tensor",
    tags=_ANY_LAYOUT,
)


def _norm_of(gain: Tensor | None, shift: Tensor | None, eps: float, groups: int, silu: bool) -> Norm | None:
    return None if gain is None or shift is None else Norm(gain, shift, eps, groups, silu)


@torch.library.impl("dgq::engine_linear", "CPU")
def _(x, packed, weight_scale, column_sum, bias, inv_divisor, bits, rotation, group, residual, gated, *norm):
    parts = zip(packed, weight_scale, column_sum, bias, strict=True)
    layers = [
        Layer.of_blocks(*part, inv_divisor, x.shape[-1], bits, rotation=rotation, group=own)
        for part, own in zip(parts, group, strict=True)
    ]
    return linear(layers, x, residual, gated, _norm_of(*norm))


@torch.library.register_fake("dgq::engine_linear")
def _(x, packed, weight_scale, column_sum, bias, inv_divisor, bits, rotation, group, residual, gated, *norm):
    shrink = 2 if gated else 1
    return [x.new_empty((*x.shape[:-1], scale.shape[0] // shrink)) for scale in weight_scale]


@torch.library.impl("dgq::engine_conv2d", "CPU")
def _(
    x, packed, weight_scale, column_sum, bias, inv_divisor, bits, kernel, stride, padding, rotation, group,
    residual, sample_bias, *norm,
):  # fmt: skip
    k = kernel**2 * x.shape[1]
    layer = Layer.of_blocks(
        packed, weight_scale, column_sum, bias, inv_divisor, k, bits, kernel, stride, padding, rotation, group
    )
    return layer.conv2d(x, residual, sample_bias, _norm_of(*norm))


@torch.library.register_fake("dgq::engine_conv2d")
def _(
    x, packed, weight_scale, column_sum, bias, inv_divisor, bits, kernel, stride, padding, rotation, group,
    residual, sample_bias, *norm,
):  # fmt: skip
    return empty_picture(x, weight_scale.shape[0], kernel, stride, padding)


@torch.library.impl("dgq::engine_upsample", "CPU")
def _(x, packed, weight_scale, column_sum, bias, inv_divisor, bits, rotation, group):
    k = 4 * x.shape[1]
    layer = Layer.of_blocks(packed, weight_scale, column_sum, bias, inv_divisor, k, bits, 2, 1, 1, rotation, group)
    return layer.upsample(x)


@torch.library.register_fake("dgq::engine_upsample")
def _(x, packed, weight_scale, column_sum, bias, inv_divisor, bits, rotation, group):
    return empty_upsampled(x, weight_scale.shape[0])
