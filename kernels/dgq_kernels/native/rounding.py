"""The inner loops of rounding a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import checked, matrix_of_rows, row_stride
from .library import loaded


def round_columns(
    values: Tensor, pull: Tensor, ahead: Tensor, diagonal: Tensor, step: Tensor, low: int, high: int
) -> Tensor:
    """`dgq_kernels.weight_rounding.round_columns`; `values`' last axis has to be dense.

    Raises:
        ValueError: shapes or dtypes outside of what is said there; the tensors are not on the CPU.
    """
    rows, columns = values.shape
    if (found := matrix_of_rows("values", values, rows, columns)) is not values:
        raise ValueError("values: rows in one piece expected, which are rounded in place")
    pull = matrix_of_rows("pull", pull, rows, columns)
    ahead = matrix_of_rows("ahead", ahead[:, :columns], columns, columns)
    diagonal = checked("diagonal", diagonal, torch.float32, columns)
    step = checked("step", step, torch.float32, rows)
    change = torch.empty(rows, columns)
    if rows:
        engine = loaded()
        matrices = [part for matrix in (found, pull, ahead) for part in (matrix.data_ptr(), row_stride(matrix))]
        vectors = [tensor.data_ptr() for tensor in (diagonal, step, change)]
        code = engine.library.dgq_round_columns(*matrices, *vectors, rows, columns, low, high, torch.get_num_threads())
        engine.check(code)
    return change


def search_subscales(groups: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`dgq_kernels.weight_rounding.search_subscales`.

    Raises:
        ValueError: shapes or dtypes outside of what is said there; the tensors are not on the CPU.
    """
    rows, count, size = groups.shape
    if not (groups.stride(2) == 1 and groups.stride(1) == size) and count > 1:
        groups = groups.contiguous()
    values = matrix_of_rows("groups", groups.flatten(1), rows, count * size)
    importance = checked("importance", importance, torch.float32, count, size)
    scale = checked("scale", scale, torch.float32, rows)
    best, error = torch.empty(rows, count, dtype=torch.uint8), torch.empty(rows, count)
    if best.numel():
        engine = loaded()
        others = [tensor.data_ptr() for tensor in (importance, scale, best, error)]
        code = engine.library.dgq_search_subscales(
            values.data_ptr(), row_stride(values), *others, rows, count, size, torch.get_num_threads()
        )
        engine.check(code)
    return best, error
