"""The gradient of a frozen layer's input: what adapters beside it, or trained layers before it, learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgq_kernels.scaled_product import Weight, conv2d_input_gradient, linear_input_gradient
from dgq_kernels.scaled_product.reference import along

from .channels import rotate_channels

if TYPE_CHECKING:
    from .layer import IntegerLayer


def needed(*sources: Tensor | nn.Module | None) -> bool:
    """Whether any of a layer's inputs, or of the parameters of a norm before it, takes a gradient here."""
    if not torch.is_grad_enabled():
        return False
    for source in sources:
        tensors = source.parameters() if isinstance(source, nn.Module) else (source,)
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return True
    return False


class _StraightThrough(torch.autograd.Function):
    """A layer's product, backwards as if its input had not been rounded: dx = dy W, of the weight that the integers
    stand for. The integers are read in tiles, and nothing is kept for it but the shape of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: IntegerLayer, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _input_gradient(ctx.layer, gradient, ctx.shape), None, None


def straight_through(layer: IntegerLayer, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x), the layer's result without residual, with the gradient of x: (..., C) of a linear layer, (B, C, H, W) of
    a convolution, as `IntegerLayer.forward` takes it."""
    y: Tensor = _StraightThrough.apply(x, layer, run)
    return y


def _input_gradient(layer: IntegerLayer, gradient: Tensor, shape: torch.Size) -> Tensor:
    plan, weight, factor = layer.plan, integers_of(layer), input_factor(layer)
    axis = -1 if plan.kind == "linear" else 1
    if plan.upsampled:
        gradient = _between(gradient)
    gradient = (gradient * along(layer._scale().detach(), gradient, axis)).to(gradient.dtype)
    if plan.kind == "conv2d":
        of_x = conv2d_input_gradient(gradient, weight, shape, plan.kernel_size, plan.stride, plan.padding)
    else:
        of_x = linear_input_gradient(gradient.movedim(axis, -1), weight).movedim(-1, axis)
    of_x = rotate_channels(of_x, plan.rotation, axis)
    return (of_x if factor is None else of_x * along(factor, of_x, axis)).to(gradient.dtype)


def integers_of(layer: IntegerLayer) -> Weight:
    """The layer's integers without their scales, channels in natural order, as products of floats take them."""
    return Weight(layer.out_features, layer.plan.reduction, layer.natural_rows, layer.integers)


def _between(gradient: Tensor) -> Tensor:
    """Of an upsampling's result (B, N, 2 H, 2 W), the gradient of four convolutions' (B, 4 N, H + 1, W + 1)
    (`folding.interleaved`)."""
    batch, n, height, width = gradient.shape[0], gradient.shape[1], gradient.shape[2] // 2, gradient.shape[3] // 2
    result = gradient.new_zeros(batch, 4 * n, height + 1, width + 1)
    for place, part in enumerate(result.chunk(4, 1)):
        row, column = place // 2, place % 2
        part[:, :, row : row + height, column : column + width] = gradient[:, :, row::2, column::2]
    return result


def float_rows(layer: IntegerLayer, start: int, stop: int, factor: Tensor | None) -> Tensor:
    """Rows of the matrix that the integers stand for, float32 (stop - start, K), channels in natural order; start is a
    multiple of 16, `factor` that of `input_factor`."""
    plan = layer.plan
    matrix = layer.natural_rows(start, stop) * layer._scale().detach()[start:stop, None]
    by_channel = rotate_channels(matrix.view(len(matrix), -1, plan.in_features), plan.rotation, -1)
    return (by_channel if factor is None else by_channel * factor).flatten(1)


def input_factor(layer: IntegerLayer) -> Tensor | None:
    """float32 (C,), what the integers' inputs are multiplied by, in natural order: the reciprocal of the divisor times
    the shift that the accumulator adds; None where it is one everywhere."""
    plan, factor = layer.plan, layer._inv_divisor()
    if factor is None:
        return None
    factor = factor.detach()
    if len(plan.class_ends) > 1:
        place = torch.arange(plan.in_features, device=factor.device)
        ends = torch.tensor(plan.class_ends[:-1], device=factor.device)
        shift = torch.empty_like(factor)
        shift[layer.order.long()] = 2.0 ** torch.bucketize(place, ends, right=True)
        factor = factor * shift
    return None if bool((factor == 1).all()) else factor
