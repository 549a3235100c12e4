"""Definition of the product that is trained by its scales: y = d_out * (W' (d_in * x)) + bias (docs/tuning.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from ..packing import expand_two_level


def along(scale: Tensor, like: Tensor, axis: int) -> Tensor:
    """scale (C,), or (B, C) of each sample, shaped to broadcast along one axis of `like`, which starts with samples."""
    shape = [1] * like.dim()
    shape[axis] = scale.shape[-1]
    if scale.dim() == 2:
        shape[0] = scale.shape[0]
    return scale.view(shape)


def scaled_linear(
    x: Tensor, weight: Tensor, d_in: Tensor | None, d_out: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """See `dgq_kernels.scaled_linear`; weight is the whole integer matrix (N, K)."""
    scaled = x if d_in is None else x * along(d_in, x, -1)
    y = scaled @ weight.to(x.dtype).t()
    y = y * along(d_out, y, -1)
    y = y if bias is None else y + bias
    if not gated:
        return y
    value, gate = y.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    d_in: Tensor | None,
    d_out: Tensor,
    bias: Tensor | None = None,
    kernel: int = 1,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """See `dgq_kernels.scaled_conv2d`; weight is the whole integer matrix (N, kernel^2 * C)."""
    scaled = x if d_in is None else x * along(d_in, x, 1)
    taps = weight.to(x.dtype).view(weight.shape[0], kernel, kernel, -1).permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(scaled, taps, stride=stride, padding=padding)
    y = y * along(d_out, y, 1)
    return y if bias is None else y + bias[:, None, None]


def _taps(weight: Tensor, subscales: Tensor | None, group: int, channels: int, kernel: int, like: Tensor) -> Tensor:
    """A packed weight as torch's convolutions take it, (N, C, kernel, kernel) in the dtype of `like`."""
    if subscales is not None:
        weight = expand_two_level(weight, subscales, kernel**2 * channels, group)
    return weight.to(like.dtype).view(weight.shape[0], kernel, kernel, channels).permute(0, 3, 1, 2)


def unscaled_product(
    x: Tensor, weight: Tensor, subscales: Tensor | None, group: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """See `dgq_kernels.unscaled_product`."""
    taps = _taps(weight, subscales, group, x.shape[3], kernel, x)
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), taps, stride=stride, padding=padding)
    return y.permute(0, 2, 3, 1).contiguous()


def unscaled_product_input(
    gradient: Tensor,
    weight: Tensor,
    subscales: Tensor | None,
    group: int,
    size: list[int],
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    """See `dgq_kernels.unscaled_product_input`."""
    batch, height, width, channels = size
    taps = _taps(weight, subscales, group, channels, kernel, gradient)
    of_y = gradient.permute(0, 3, 1, 2)
    return conv2d_input([batch, channels, height, width], taps, of_y, stride, padding).permute(0, 2, 3, 1).contiguous()
