"""What other libraries import and a process that only draws never uses, left for when something asks for it.

Half of the time of importing diffusers and transformers goes into torch's compiler (its decorators alone are used),
peft, torch's distributed tensors and a list of every model's files. Here that is told to wait, in processes of
the command line alone: to import dgq as a library changes nothing of this.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from typing import Any

COMPILER = "torch._dynamo"


class Deferred(types.ModuleType):
    """A package whose code runs when something of it is asked for, but for `stand_ins` and for submodules.

    Attributes:
        apart: the submodules that can be imported before; None for all.
        stand_ins: {name: value} that are there before; its code puts its own in their place.
        marks: (name of a decorator, what it was called with), which are made good once the code ran.
        ran: whether it did.
    """

    apart: tuple[str, ...] | None
    stand_ins: dict[str, Any]
    marks: list[tuple[str, Any]]
    ran: bool

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not self.ran:
            self.ready()
            return getattr(sys.modules[self.__name__], name)
        module = sys.modules[self.__name__]  # some put another one in their own place
        if module is self:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(module, name)

    def stand_in(self, **values: Any) -> None:
        """Have these until the code runs."""
        self.stand_ins = values
        self.__dict__.update(values)

    def ready(self) -> Any:
        """The module, once the package's code ran, which this causes."""
        if self.ran:
            return self
        self.ran = True
        for name in self.stand_ins:
            del self.__dict__[name]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        for decorator, marked in self.marks:
            getattr(self, decorator)(marked)
        return self


class _Finder(MetaPathFinder):
    """Lets a package's code run before its submodules do."""

    def __init__(self, package: Deferred) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package = self.package
        parent, _, leaf = name.rpartition(".")
        if parent != package.__name__ or package.ran or package.apart is None or leaf in package.apart:
            return None
        package.ready()
        return spec_from_loader(name, _Found(sys.modules[name])) if name in sys.modules else None


class _Found(Loader):
    """Of a module that the package's code imported."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


def defer(name: str, apart: tuple[str, ...] | None = None) -> Deferred | None:
    """Let a package wait; None where it is imported already, or there is none."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return None
    module = Deferred(name)
    module.__dict__.update(apart=apart, stand_ins={}, marks=[], ran=False, __spec__=spec, __file__=spec.origin)
    module.__dict__.update(__path__=spec.submodule_search_locations, __loader__=spec.loader, __package__=name)
    sys.modules[name] = module
    sys.meta_path.insert(0, _Finder(module))
    return module


def defer_compiler() -> None:
    """Let torch's compiler wait for whoever compiles. Until then its decorators only note what they mark, and nothing
    is a compiled module."""
    import torch

    waiting = defer(COMPILER, apart=("_trace_wrapped_higher_order_op",))
    if waiting is None:
        return
    package = waiting

    def mark(decorator: str, function: Any) -> Any:
        package.marks.append((decorator, function))
        return function

    def disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
        if function is None:
            return functools.partial(disable, recursive=recursive, **options)
        if not inspect.isroutine(function):
            return package.ready().disable(function, recursive, **options)
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not package.ran:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(package.disable(function, recursive, **options))
            return disabled[0](*args, **kwargs)

        return call

    class Frames(types.ModuleType):
        """torch._dynamo.eval_frame as far as it is asked whether a module was compiled."""

        OptimizedModule = type("OptimizedModule", (), {})

        def __getattr__(self, name: str) -> Any:
            return getattr(package.ready().eval_frame, name)

    marks = {name: functools.partial(mark, name) for name in ("allow_in_graph", "assume_constant_result")}
    package.stand_in(disable=disable, eval_frame=Frames(f"{COMPILER}.eval_frame"), **marks)
    torch._dynamo = package


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Within it there is no package of that name, for those who look; what is imported already stays."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # by which Python knows it as absent
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def light_imports() -> Iterator[None]:
    """Import, within it, what draws pictures. Nothing changes where diffusers is imported already.

    For the whole process: no adapters (peft) and no distributed tensors are known to diffusers and transformers. What
    lives at the end of it the garbage collector leaves alone from then on.
    """
    if "diffusers" in sys.modules:
        yield
        return
    gc.disable()  # it would go through all modules again and again
    try:
        import torch

        defer_compiler()
        torch.distributed.is_available = lambda: False
        with absent("peft"):
            import diffusers  # noqa: F401
        defer("transformers.models")
        yield
    finally:
        gc.freeze()
        gc.enable()
