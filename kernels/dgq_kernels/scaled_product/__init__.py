"""Products with a packed integer weight that is trained by its scales alone: y = d_out * (W' (d_in * x)) + bias.

Autograd of the plain formula keeps float copies of the whole weight. Here neither direction has more of it than a tile
of rows in the input's dtype: the gradients of the scales are sums over what is there anyway, that of the input is a
product with the same tiles. One implementation serves every device; `reference.py` is its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from .reference import along

# Values of a tile, about 4 MiB in float32: it stays in a core's cache. A GPU needs more of them at a time.
_TILE = {"cpu": 2**20, "cuda": 2**23}
_ROWS = 16  # a tile is whole blocks of the CPU engine's packed form


@dataclass(frozen=True)
class Weight:
    """An integer weight that is read in tiles.

    Attributes:
        n, k: rows (outputs) and their length.
        rows: rows(start, stop) -> int8 (stop - start, k), where start is a multiple of 16. (The products of gradients
            alone take rows of floats as well.)
    """

    n: int
    k: int
    rows: Callable[[int, int], Tensor]

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
        y = x.new_empty(rows.shape[0], self.weight.n)
        for part, tile in self.weight.tiles(x):
            y[:, part] = rows @ tile.t()
        return y.view(*x.shape[:-1], self.weight.n)

    def backward(self, gradient: Tensor) -> Tensor:
        rows = gradient.reshape(-1, self.weight.n)
        result = gradient.new_zeros(rows.shape[0], self.weight.k)
        for part, tile in self.weight.tiles(gradient):
            result.addmm_(rows[:, part], tile)
        return result.view(*gradient.shape[:-1], self.weight.k)


@dataclass(frozen=True)
class _Conv2d:
    """Pictures of `size` (B, C, H, W) -> (B, N, Ho, Wo), by tiles of output channels."""

    weight: Weight
    kernel: int
    stride: int
    padding: int
    size: torch.Size
    axis: int = 1

    def _tiles(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part, tile in self.weight.tiles(like):
            yield part, tile.view(tile.shape[0], self.kernel, self.kernel, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            torch.nn.functional.conv2d(x, tile, stride=self.stride, padding=self.padding) for _, tile in self._tiles(x)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def backward(self, gradient: Tensor) -> Tensor:
        result: Tensor | None = None
        for part, tile in self._tiles(gradient):
            one = conv2d_input(self.size, tile, gradient[:, part], self.stride, self.padding)
            result = one if result is None else result.add_(one)
        assert result is not None
        return result


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, d_in: Tensor | None, d_out: Tensor, product: Any) -> Tensor:
        scaled = x if d_in is None else x * along(d_in, x, product.axis).to(x.dtype)
        unscaled = product.forward(scaled)
        ctx.product = product
        ctx.save_for_backward(x, d_in, d_out, unscaled if ctx.needs_input_grad[2] else None)
        return unscaled * along(d_out, unscaled, product.axis).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, d_in, d_out, unscaled = ctx.saved_tensors
        axis = ctx.product.axis
        for_x, for_in, for_out, _ = ctx.needs_input_grad
        of_out = _reduced(gradient, unscaled, d_out, axis) if for_out else None
        of_x = of_in = None
        if for_x or for_in:
            of_x = ctx.product.backward(gradient * along(d_out, gradient, axis).to(gradient.dtype))
            of_in = _reduced(of_x, x, d_in, axis) if for_in else None
            if not for_x:
                of_x = None
            elif d_in is not None:
                of_x = of_x * along(d_in, of_x, axis).to(of_x.dtype)
        return of_x, of_in, of_out, None


def _reduced(a: Tensor, b: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Sums of a * b over everything that one value of the scale (C,) or (B, C) multiplies."""
    kept = {axis % a.dim()} | ({0} if scale.dim() == 2 else set())
    others = [i for i in range(a.dim()) if i not in kept]
    products = a * b
    return (products.sum(others, dtype=scale.dtype) if others else products.to(scale.dtype)).view(scale.shape)


def scaled_linear(x: Tensor, weight: Weight, d_in: Tensor | None, d_out: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of an integer weight with an input and an output scale, both of which take gradients.

    Args:
        x: float (B, ..., K).
        weight: the integers.
        d_in: float (K,), or (B, K) where samples have scales of their own; None: ones.
        d_out: float (N,) or (B, N).
        bias: float (N,) or None; takes no gradient.

    Returns:
        (B, ..., N) in x's dtype. The scales' gradients are in their own dtype.
    """
    y: Tensor = _Scaled.apply(x, d_in, d_out, _Linear(weight))
    return y if bias is None else y + bias.to(y.dtype)


def scaled_conv2d(
    x: Tensor, weight: Weight, d_in: Tensor | None, d_out: Tensor, bias: Tensor | None = None, kernel: int = 1,
    stride: int = 1, padding: int = 0,
) -> Tensor:  # fmt: skip
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
    y: Tensor = _Scaled.apply(x, d_in, d_out, _Conv2d(weight, kernel, stride, padding, x.shape))
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def linear_input_gradient(gradient: Tensor, weight: Weight) -> Tensor:
    """The gradient of the input of y = W x, float (..., N) -> (..., K) in its dtype, from tiles of the weight."""
    return _Linear(weight).backward(gradient)


def conv2d_input_gradient(
    gradient: Tensor, weight: Weight, size: torch.Size, kernel: int, stride: int, padding: int
) -> Tensor:
    """`linear_input_gradient` of a convolution as of `scaled_conv2d`: float (B, N, Ho, Wo) -> `size`, (B, C, H, W)."""
    return _Conv2d(weight, kernel, stride, padding, size).backward(gradient)
