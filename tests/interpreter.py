"""Triton's interpreter, in a third of the time."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy


def improve() -> None:
    """Have it do once what it does anew for each operation."""
    from triton import language
    from triton.runtime import interpreter

    _patch_once(interpreter)
    # it makes each sum in 64 bits too, and then asserts nothing of it: `debug` is off
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype, language)
    _make_types_once(language.core)


def _patch_once(interpreter: Any) -> None:
    """Have a launch patch triton.language once for each module of the functions it runs.

    The interpreter does so anew whenever one function calls another, tl.sum and tl.zeros_like too, for milliseconds
    each.
    """
    patch, patched = interpreter._patch_lang, set[int]()

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        launched = not patched
        patched.add(module)
        scope = patch(function)
        if launched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = once


def _looked_up_once(numpy_type: Any, language: Any) -> Any:
    """`_get_np_dtype` without a new table each time."""
    scalar = cache(numpy_type)

    def looked_up(dtype: Any) -> Any:
        element = getattr(dtype, "element_ty", None) if isinstance(dtype, language.block_type) else dtype
        return numpy.dtype(numpy.uint64) if isinstance(element, language.pointer_type) else scalar(element)

    return looked_up


def _make_types_once(core: Any) -> None:
    """Have equal block types filled in from the first of them, and tensors from their types.

    A type makes its name and checks its shape; a tensor wraps each extent of its type, and their product, anew.
    """
    fill_type, fill_tensor, made = core.block_type.__init__, core.tensor.__init__, dict[Any, dict[str, Any]]()

    def type_filled(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
        if key not in made:
            fill_type(self, element_ty, shape)
            tensor = core.tensor.__new__(core.tensor)
            fill_tensor(tensor, None, self)
            made[key] = {**self.__dict__, "of_tensors": {"shape": tensor.shape, "numel": tensor.numel}}
        self.__dict__.update(made[key])

    def tensor_filled(self: Any, handle: Any, type: Any) -> None:
        if type.is_block():
            self.__dict__.update(type.of_tensors, handle=handle, type=type, dtype=type.scalar)
        else:
            fill_tensor(self, handle, type)

    core.block_type.__init__ = type_filled
    core.tensor.__init__ = tensor_filled
