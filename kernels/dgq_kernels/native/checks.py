"""What the library cannot see behind a pointer: dtypes, shapes, devices and layouts of the tensors it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """ValueError where a tensor is not what the library will read."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu:
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: {dtype} {shape} on the CPU expected, got {got}")


def checked(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor in one piece; ValueError where it is not what the library will read."""
    expect(name, tensor, dtype, *shape)
    return tensor.contiguous()


def other_channels(expected: int, x: Tensor) -> ValueError:
    return ValueError(f"{expected} input channels expected, got an input of {tuple(x.shape)}")


def on_cpu(tensor: Tensor | None, what: str) -> None:
    """The library cannot see what lies behind a pointer."""
    if tensor is not None and not tensor.is_cpu:
        raise ValueError(f"the CPU engine cannot read {what} on {tensor.device}")


def laid_out(residual: Tensor, y: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A residual as the library adds it to y: most are, and then no operator is called."""
    if residual.dtype != y.dtype:
        residual = residual.to(y.dtype)
    if residual.shape != y.shape:
        residual = residual.expand(y.shape)
    return residual.contiguous(memory_format=memory_format)


def matrix_of_rows(name: str, tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A float32 matrix on the CPU whose rows may lie apart; ValueError where it is something else."""
    expect(name, tensor, torch.float32, rows, columns)
    in_rows = tensor.stride(1) == 1 and (rows == 1 or tensor.stride(0) >= columns)
    return tensor if in_rows else tensor.contiguous()


def row_stride(matrix: Tensor) -> int:
    """How far the rows lie apart."""
    return max(matrix.stride(0), matrix.shape[1])
