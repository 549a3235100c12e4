"""Triton's interpreter, in half of the time."""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Have a launch patch triton.language once for each module of the functions it runs.

    The interpreter does so anew whenever one function calls another, tl.sum and tl.zeros_like too, for milliseconds
    each: half of what a kernel of many small programs takes.
    """
    from triton.runtime import interpreter

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
