"""What other libraries import and a process that draws, calibrates, inspects, exports or predicts never uses, left for
when something asks for it.

Half of the time of importing diffusers and transformers goes into torch's compiler (its decorators alone are used),
peft, torch's distributed tensors and a list of every model's files. Here that is told to wait, in processes of
the command line alone: to import dgq as a library changes nothing of this.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from typing import Any

COMPILER = "torch._dynamo"
FLEX = "torch.nn.attention.flex_attention"  # since torch 2.15 it imports sympy, which takes a second
# Where transformers has the classes that all its models' are made of.
BASES = {
    "FeatureExtractionMixin": "feature_extraction_utils",
    "ImageProcessingMixin": "image_processing_base",
    "PreTrainedModel": "modeling_utils",
    "PreTrainedTokenizer": "tokenization_python",
    "PreTrainedTokenizerFast": "tokenization_utils_tokenizers",
    "ProcessorMixin": "processing_utils",
}
# Of diffusers and onnxruntime, which diffusers asks of every library, without an answer.
OTHERS = ("ModelMixin", "SchedulerMixin", "DiffusionPipeline", "OnnxRuntimeModel", "BaseGuidance", "ORTModule")


class Deferred(types.ModuleType):
    """A package whose code runs when something of it is asked for, but for `stand_ins` and for submodules.

    Attributes:
        apart: the submodules that can be imported before; None for all.
        stand_ins: {name: value} that are there before; its code puts its own in their place.
        marks: (name of a decorator, what it was called with), which are made good once the code ran.
        narrow: what finds a name without the package's code, or None.
        ran: whether it did.
    """

    apart: tuple[str, ...] | None
    stand_ins: dict[str, Any]
    marks: list[tuple[str, Any]]
    narrow: Callable[[str], Any]
    ran: bool

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not self.ran:
            if (found := self.narrow(name)) is not None:
                return found
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


class _Last(MetaPathFinder):
    """Lets a package's code run for a submodule that is nowhere: its own finders may know it."""

    def __init__(self, package: Deferred) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if self.package.ran or not name.startswith(f"{self.package.__name__}."):
            return None
        self.package.ready()
        return find_spec(name)


class _Found(Loader):
    """Of a module that the package's code imported."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


def defer(
    name: str, apart: tuple[str, ...] | None = None, narrow: Callable[[str], Any] = lambda name: None
) -> Deferred | None:
    """Let a package wait; None where it is imported already, or there is none."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return None
    module = Deferred(name)
    module.__dict__.update(apart=apart, narrow=narrow, stand_ins={}, marks=[], ran=False)
    module.__dict__.update(__spec__=spec, __loader__=spec.loader, __file__=spec.origin, __package__=name)
    module.__dict__.update(__path__=spec.submodule_search_locations)
    sys.modules[name] = module
    sys.meta_path.insert(0, _Finder(module))
    sys.meta_path.append(_Last(module))
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


def defer_models() -> None:
    """Let transformers' list of all its models' classes wait, for which it reads their sources: what diffusers asks it
    for is found by name. And diffusers' packages of networks, which import all of theirs, where one is used."""
    waiting = defer("transformers", narrow=_of_transformers)
    if waiting is not None:
        waiting.stand_in(__version__=importlib.metadata.version("transformers"))
        import_module("transformers.dependency_versions_check")
        # by which transformers' own modules would run the package's code, once more where it ran
        utils: Any = import_module("transformers.utils")
        utils.direct_transformers_import = lambda *path: sys.modules["transformers"]
        for module in (utils, utils.import_utils):
            module.is_torch_flex_attn_available = lambda: False  # where it is, FLEX is imported
    defer("transformers.models")
    defer(FLEX)  # diffusers imports it, and asks it for something where a user chose it
    with absent("peft"):
        import diffusers.models  # noqa: F401
    for package in ("autoencoders", "controlnets", "transformers", "unets"):
        defer(f"diffusers.models.{package}")


def _of_transformers(name: str) -> Any:
    """A module of transformers, a base class, or a class of the model that it is named after; None for others."""
    if name in OTHERS:
        raise AttributeError(f"module 'transformers' has no attribute {name!r}")
    path = sys.modules["transformers"].__path__
    if PathFinder.find_spec(f"transformers.{name}", path) is not None:
        return import_module(f"transformers.{name}")
    start = name.lower().replace("_", "")
    models = [folder.name for folder in Path(path[0], "models").iterdir()]
    models = sorted((model for model in models if start.startswith(model.replace("_", ""))), key=len, reverse=True)
    for place in [BASES[name]] if name in BASES else [f"models.{model}" for model in models]:
        with suppress(ModuleNotFoundError):  # another version may have it elsewhere
            if (found := getattr(import_module(f"transformers.{place}"), name, None)) is not None:
                return found
    return None


class _Distributions(Mapping[str, list[str]]):
    """Which distributions packages come from; the files of all that are installed are read when one is looked up."""

    def __init__(self, find: Callable[[], Mapping[str, list[str]]]) -> None:
        self.find = functools.cache(find)

    def __getitem__(self, package: str) -> list[str]:
        return self.find()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self.find())

    def __len__(self) -> int:
        return len(self.find())


@contextmanager
def unread_distributions() -> Iterator[None]:
    """Within it `importlib.metadata.packages_distributions` answers at once, with one mapping for all who ask."""
    find = importlib.metadata.packages_distributions
    made = _Distributions(find)
    importlib.metadata.packages_distributions = lambda: made
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = find


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
    """Import, within it, what a command needs. Nothing changes where diffusers is imported already.

    For the whole process: no adapters (peft) and no distributed tensors are known to diffusers and transformers, nor
    flex attention to the latter. What lives at the end of it the garbage collector leaves alone from then on.
    """
    if "diffusers" in sys.modules:
        yield
        return
    gc.disable()  # it would go through all modules again and again
    try:
        import torch

        defer_compiler()
        torch.distributed.is_available = lambda: False
        with unread_distributions():
            defer_models()
            yield
    finally:
        gc.freeze()
        gc.enable()
