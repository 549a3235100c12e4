"""Products with a packed integer weight that is trained by its scales alone: y = d_out * (W' (d_in * x)) + bias.

Autograd of the plain formula keeps float copies of the whole weight. Here neither direction has more of it than a tile
of rows in the input's dtype: the gradients of the scales are sums over what is there anyway, that of the input is a
product with the same tiles. Where the backend's ops unpack weights themselves, `unscaled_product` and
`unscaled_product_input` are the products, and no float of a weight reaches memory; elsewhere torch multiplies by tiles.
`reference.py` is the definition of all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from .. import backend
from ..backend import implementation, operator
from ..fakes import register_fake
from . import reference

# Values of a tile, about 4 MiB in float32: it stays in a core's cache. A GPU needs more of them at a time.
_TILE = {"cpu": 2**20, "cuda": 2**23}
# Values of a strip of activations that scales are applied to in float32.
_STRIP = {"cpu": 2**18, "cuda": 2**22}
_ROWS = 16  # a tile is whole blocks of the CPU engine's packed form


@operator("dgq::unscaled_product")
def unscaled_product(
    x: Tensor, weight: Tensor, subscales: Tensor | None, group: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """Float activations times a packed integer weight: a square convolution without its scales, summed in float32.

    Args:
        x: float16, bfloat16 or float32 (B, H, W, C), contiguous; a linear layer's rows as (1, 1, M, C).
        weight: int8 (N, kernel^2 * C), columns in the order (row, column, channel), or uint8 from `packing.pack_int4`
            of it.
        subscales: uint8 from `packing.pack_subscales`; None for an int8 weight.
        group: weights that share a sub-scale.
        kernel, stride, padding: of the convolution; 1, 1 and 0 for a linear layer.

    Returns:
        (B, Ho, Wo, N) in x's dtype.

    Raises:
        ValueError: operands are not contiguous.
    """
    return implementation(reference.unscaled_product, x)(x, weight, subscales, group, kernel, stride, padding)


@operator("dgq::unscaled_product_input")
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
    """The gradient of the x of `unscaled_product`, given that of its result.

    Args:
        gradient: float (B, Ho, Wo, N), contiguous.
        size: of x, (B, H, W, C). The others as in `unscaled_product`.

    Returns:
        (B, H, W, C) in the gradient's dtype.

    Raises:
        ValueError: operands are not contiguous.
    """
    return implementation(reference.unscaled_product_input, gradient)(
        gradient, weight, subscales, group, size, kernel, stride, padding
    )


@register_fake(unscaled_product)
def _(x, weight, subscales, group, kernel, stride, padding):
    batch, *size, _ = x.shape
    return x.new_empty(batch, *((length + 2 * padding - kernel) // stride + 1 for length in size), weight.shape[0])


@register_fake(unscaled_product_input)
def _(gradient, weight, subscales, group, size, kernel, stride, padding):
    return gradient.new_empty(size)


@dataclass(frozen=True)
class Integers:
    """A packed weight as `unscaled_product` takes it.

    Attributes:
        weight, subscales, group: of the operator.
        order: integer (C,), which channel each stored one is; None: in order.
    """

    weight: Tensor
    subscales: Tensor | None = None
    group: int = 0
    order: Tensor | None = None

    def forward(self, x: Tensor, *window: int) -> Tensor:
        """`unscaled_product` of pixels (B, H, W, C), channels in natural order."""
        x = x.contiguous() if self.order is None else x.index_select(-1, self.order)
        return unscaled_product(x, self.weight, self.subscales, self.group, *window)

    def backward(self, gradient: Tensor, size: list[int], *window: int) -> Tensor:
        """`unscaled_product_input`, its channels in natural order."""
        of_x = unscaled_product_input(gradient.contiguous(), self.weight, self.subscales, self.group, size, *window)
        return of_x if self.order is None else torch.empty_like(of_x).index_copy_(-1, self.order.long(), of_x)


@dataclass(frozen=True)
class Weight:
    """An integer weight that is read in tiles.

    Attributes:
        n, k: rows (outputs) and their length.
        rows: rows(start, stop) -> int8 (stop - start, k), where start is a multiple of 16. (The products of gradients
            alone take rows of floats as well.)
        integers: integers() -> the packed weight, for backends whose ops unpack it; None: rows are all there is.
    """

    n: int
    k: int
    rows: Callable[[int, int], Tensor]
    integers: Callable[[], Integers] | None = None

    def packed(self, like: Tensor) -> Integers | None:
        """The packed weight, where ops of the backend of `like` are to multiply by it."""
        unpacks = self.integers is not None and backend.chosen(like.device).unpacks
        return self.integers() if unpacks and self.integers is not None else None

    def tiles(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, their values in the dtype and on the device of `like`)."""
        size = max(_ROWS, _TILE.get(like.device.type, 2**20) // self.k // _ROWS * _ROWS)
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            yield slice(start, stop), self.rows(start, stop).to(like.device, like.dtype)


@dataclass(frozen=True)
class _Linear:
    """Rows (..., K) -> (..., N)."""

    weight: Weight
    axis: int = -1

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.weight.k)
        if packed := self.weight.packed(x):
            return packed.forward(rows[None, None], 1, 1, 0).view(*x.shape[:-1], self.weight.n)
        y = x.new_empty(rows.shape[0], self.weight.n)
        for part, tile in self.weight.tiles(x):
            torch.mm(rows, tile.t(), out=y[:, part])
        return y.view(*x.shape[:-1], self.weight.n)

    def backward(self, gradient: Tensor) -> Tensor:
        rows = gradient.reshape(-1, self.weight.n)
        if packed := self.weight.packed(gradient):
            size = [1, 1, len(rows), self.weight.k]
            return packed.backward(rows[None, None], size, 1, 1, 0).view(*gradient.shape[:-1], self.weight.k)
        result = gradient.new_zeros(rows.shape[0], self.weight.k)
        for part, tile in self.weight.tiles(gradient):
            result.addmm_(rows[:, part], tile)
        return result.view(*gradient.shape[:-1], self.weight.k)


def _format(like: Tensor) -> torch.memory_format:
    return torch.channels_last if like.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


@dataclass(frozen=True)
class _Conv2d:
    """Pictures of `size` (B, C, H, W) -> (B, N, Ho, Wo), by tiles of output channels."""

    weight: Weight
    kernel: int
    stride: int
    padding: int
    size: torch.Size
    axis: int = 1

    @property
    def _window(self) -> tuple[int, int, int]:
        return self.kernel, self.stride, self.padding

    def _tiles(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part, tile in self.weight.tiles(like):
            yield part, tile.view(tile.shape[0], self.kernel, self.kernel, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if packed := self.weight.packed(x):
            return packed.forward(x.permute(0, 2, 3, 1), *self._window).permute(0, 3, 1, 2)
        y: Tensor | None = None
        for part, tile in self._tiles(x):
            one = torch.nn.functional.conv2d(x, tile, stride=self.stride, padding=self.padding)
            if tile.shape[0] == self.weight.n:
                return one
            if y is None:
                size = one.shape[0], self.weight.n, *one.shape[2:]
                y = torch.empty(size, dtype=one.dtype, device=one.device, memory_format=_format(one))
            y[:, part] = one
        assert y is not None
        return y

    def backward(self, gradient: Tensor) -> Tensor:
        if packed := self.weight.packed(gradient):
            batch, channels, *pixels = self.size
            size = [batch, *pixels, channels]
            return packed.backward(gradient.permute(0, 2, 3, 1), size, *self._window).permute(0, 3, 1, 2)
        result: Tensor | None = None
        for part, tile in self._tiles(gradient):
            one = conv2d_input(self.size, tile, gradient[:, part], self.stride, self.padding)
            result = one if result is None else result.add_(one)
        assert result is not None
        return result


class _Scaled(torch.autograd.Function):
    """Kept for the backward pass are x, and for the output scale's gradient the output itself where it is nothing but
    W' x' times that scale (attention keeps it anyway), otherwise W' x', from which a gate is computed anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, d_in: Tensor | None, d_out: Tensor, bias: Tensor | None, product: Any, gated: bool
    ) -> Tensor:
        axis = product.axis
        unscaled = product.forward(x if d_in is None else _times(x, d_in, axis, _like(x, axis)))
        wanted = ctx.needs_input_grad[2]
        if gated:
            y = unscaled.new_empty(*unscaled.shape[:-1], unscaled.shape[-1] // 2)
        else:
            y = _like(unscaled, axis) if wanted and bias is not None else unscaled
        for from_, to in _strips(axis, unscaled, y):
            if gated:
                to.copy_(_gate(_scaled(from_, d_out, bias, axis)))
            else:
                _scaled(from_, d_out, bias, axis, to)
        ctx.product, ctx.gated = product, gated
        ctx.save_for_backward(x, d_in, d_out, bias, unscaled if wanted or gated else None)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, d_in, d_out, bias, kept = ctx.saved_tensors
        axis = ctx.product.axis
        for_x, for_in, for_out, *_ = ctx.needs_input_grad
        before = _like(kept if ctx.gated else gradient, axis)  # the gradient of W' x'
        of_out = _Sum(d_out, axis)
        for g, u, to in _strips(axis, gradient, gradient if kept is None else kept, before):
            if ctx.gated:
                g = _gate_backward(g, _scaled(u, d_out, bias, axis))
            if for_out:
                of_out.add(g, u)
            torch.mul(g, _channels(d_out, axis), out=to)
        total = of_out.value
        if for_out and bias is None and not ctx.gated:  # the sum was over the output: a scale of 0 has none
            total = torch.where(d_out == 0, 0, total / d_out)
        of_x = of_in = None
        if for_x or for_in:
            of_x = ctx.product.backward(before)
            del before
            if for_in:
                sums = _Sum(d_in, axis)
                for g, values in _strips(axis, of_x, x):
                    sums.add(g, values)
                of_in = sums.value
            if not for_x:
                of_x = None
            elif d_in is not None:
                _times(of_x, d_in, axis, of_x)
        return of_x, of_in, total if for_out else None, None, None, None


def _strips(axis: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same part of tensors whose channels lie on `axis`, (B, rows, C) or (B, C, pixels), such that what is
    computed of them in float32 stays small."""
    if axis == 1:
        views = [tensor.reshape(*tensor.shape[:2], -1) for tensor in tensors]
    else:
        views = [tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]) for tensor in tensors]
    along_ = 2 if axis == 1 else 1
    widest = max(views, key=Tensor.numel)
    size = max(1, _STRIP.get(widest.device.type, 2**18) * widest.shape[along_] // max(1, widest.numel()))
    yield from zip(*(view.split(size, along_) for view in views), strict=True)


def _like(tensor: Tensor, axis: int) -> Tensor:
    """Uninitialized, laid out such that `_strips` are views."""
    return torch.empty_like(tensor, memory_format=_format(tensor) if axis == 1 else torch.contiguous_format)


def _channels(values: Tensor, axis: int) -> Tensor:
    """A scale or bias (C,) or (B, C) shaped to broadcast over `_strips`."""
    values = values if values.dim() == 2 else values[None]
    return values.unsqueeze(axis + 1 if axis == 1 else 1)


def _scaled(strip: Tensor, d_out: Tensor, bias: Tensor | None, axis: int, out: Tensor | None = None) -> Tensor:
    """strip * d_out + bias, rounded once, in `out`; in the scale's dtype without it."""
    scale = _channels(d_out, axis)
    if bias is None:
        return torch.mul(strip, scale, out=out)
    return torch.addcmul(_channels(bias, axis), strip, scale, out=out)


def _times(x: Tensor, scale: Tensor, axis: int, out: Tensor) -> Tensor:
    """x times a scale, rounded once, in `out`, which may be x."""
    for from_, to in _strips(axis, x, out):
        torch.mul(from_, _channels(scale, axis), out=to)
    return out


class _Sum:
    """Sums of products of strips over everything that one value of a scale multiplies, in the scale's dtype."""

    def __init__(self, scale: Tensor, axis: int) -> None:
        self.value = torch.zeros_like(scale)
        self.over = ([] if scale.dim() == 2 else [0]) + [2 if axis == 1 else 1]

    def add(self, a: Tensor, b: Tensor) -> None:
        self.value += (a.to(self.value.dtype) * b).sum(self.over)


def _gate(values: Tensor) -> Tensor:
    value, gate = values.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def _gate_backward(gradient: Tensor, values: Tensor) -> Tensor:
    value, gate = values.chunk(2, dim=-1)
    gradient = gradient.to(values.dtype)
    of_gate = torch.ops.aten.gelu_backward(gradient * value, gate)
    return torch.cat((gradient * torch.nn.functional.gelu(gate), of_gate), dim=-1)


def scaled_linear(
    x: Tensor, weight: Weight, d_in: Tensor | None, d_out: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """A linear layer of an integer weight with an input and an output scale, both of which take gradients.

    Args:
        x: float (B, ..., K).
        weight: the integers.
        d_in: float (K,), or (B, K) where samples have scales of their own; None: ones.
        d_out: float (N,) or (B, N).
        bias: float (N,) or None; takes no gradient.
        gated: GEGLU of the result: value * gelu(gate), where the value is the first half of the N outputs.

    Returns:
        (B, ..., N), or (B, ..., N / 2), in x's dtype; what is done with the scales is computed in theirs and rounded
        once. The scales' gradients are in their own dtype; an output scale of exactly 0 has none without a bias.
    """
    y: Tensor = _Scaled.apply(x, d_in, d_out, bias, _Linear(weight), gated)
    return y


def scaled_conv2d(
    x: Tensor,
    weight: Weight,
    d_in: Tensor | None,
    d_out: Tensor,
    bias: Tensor | None = None,
    kernel: int = 1,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """A convolution of an integer weight, as `scaled_linear`.

    Args:
        x: float (B, C, H, W).
        weight: rows of length kernel^2 * C in the order (row, column, channel).
        d_in: float (C,) or (B, C), or None.
        d_out: float (N,) or (B, N).
        bias: float (N,) or None; takes no gradient.
        kernel, stride, padding: of a square convolution.

    Returns:
        (B, N, Ho, Wo) in x's dtype.
    """
    y: Tensor = _Scaled.apply(x, d_in, d_out, bias, _Conv2d(weight, kernel, stride, padding, x.shape), False)
    return y


def linear_input_gradient(gradient: Tensor, weight: Weight) -> Tensor:
    """The gradient of the input of y = W x, float (..., N) -> (..., K) in its dtype, from tiles of the weight."""
    return _Linear(weight).backward(gradient)


def conv2d_input_gradient(
    gradient: Tensor, weight: Weight, size: torch.Size, kernel: int, stride: int, padding: int
) -> Tensor:
    """`linear_input_gradient` of a convolution as of `scaled_conv2d`: float (B, N, Ho, Wo) -> `size`, (B, C, H, W)."""
    return _Conv2d(weight, kernel, stride, padding, size).backward(gradient)
