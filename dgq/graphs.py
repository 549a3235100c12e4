"""A network's call replayed from a CUDA graph: one launch from the host in the place of hundreds.

The first call of a form (shapes, types and the values of what is no tensor) runs as it is, the second one is captured,
further ones copy their inputs and replay. Keys and values of cross-attention are a graph of their own, which runs when
the text is another.

A graph repeats kernels on addresses and knows nothing of the Python that launched them. So before each replay the
network is asked whether what that Python read is still what it was: adapters and their strengths, tuned scales,
attention processors and backends, FreeU, weights that moved, modules that were exchanged. What is new is captured anew;
what a graph cannot hold (hooks, offloading, gradients, attention processors with a state of their own) runs as it is,
and one line of the log says so.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .family import family_of, network_of
from .integer.attention import given, text_readers
from .integer.layer import IntegerLayer
from .integer.shared_input import prepare_all, project

log = logging.getLogger(__name__)

KEPT = 4  # graphs of a network; their memory is shared, but for inputs and outputs
# Other forms of calls after which a graph is captured anew: Python that it never runs again may hold what it reads for
# the latest calls alone, as Qwen-Image does the RoPE of 128 sizes, of all models together.
AGE = 32
FREEU = ("s1", "s2", "b1", "b2")
TEXT = "encoder_hidden_states"

Run = Callable[[], Any]
# (what to capture, the pool to take memory from) -> (its replay, what it returned)
Capture = Callable[[Run, Any], tuple[Callable[[], None], Any]]

_serials = itertools.count(1)
_capturing = threading.Lock()  # torch captures one graph at a time in a process


class UnsuitableError(Exception):
    """A call that no graph can stand for, and why."""


class Pool:
    """Memory that the graphs of a network share: they run one after the other."""

    @functools.cached_property
    def handle(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @functools.cached_property
    def stream(self) -> Any:
        """What they are captured on. torch's own is of the device that captured first: on another one a capture would
        hold nothing. Memory of the pool belongs to the stream that it was taken on."""
        return torch.cuda.Stream()


def capture(run: Run, pool: Pool) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a call on the current device. Other threads may do meanwhile what a capture cannot hold, as
    allocating memory."""
    graph = torch.cuda.CUDAGraph()
    # torch's context leaves its own stream the current one where the capture cannot be ended, as after a failed call
    with (
        _capturing,
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"),
    ):
        returned = run()
    return graph.replay, returned


def traced(tensor: Any) -> bool:
    """Whether calls with it are looked at by others, who want to see each operator; or it is no tensor."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or bool(torch._C._len_torch_dispatch_stack())


@dataclass
class Entry:
    """A captured call.

    Attributes:
        inputs: the tensors that it reads, to be written before.
        replay: runs it.
        returned: what it wrote, overwritten by the next replay.
        kept: what it reads beside, which nothing else may keep alive.
        born: how many forms of calls there had been.
        text: which of the inputs the keys and values of cross-attention are made of, -1 for none.
        project: makes them anew.
        projected: (the tensor that they were made of, its version).
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    returned: Any
    kept: list[Any]
    born: int
    text: int = -1
    project: Callable[[], None] = lambda: None
    projected: tuple[Tensor, int] | None = None

    def run(self, given: list[Tensor], anew: bool) -> Any:
        """The call's result on other tensors; `anew`: the text's projections may be others though it is the same."""
        for i, (static, tensor) in enumerate(zip(self.inputs, given, strict=True)):
            if i != self.text:
                static.copy_(tensor)
                continue
            version = -1 if tensor.is_inference() else tensor._version
            last = self.projected
            if anew or last is None or last[0] is not tensor or last[1] != version or version < 0:
                static.copy_(tensor)
                self.project()
                self.projected = tensor, version
        self.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self.returned)


class Graphs:
    """Takes the place of a network's `forward` (`use_graphs`); called as that is."""

    def __init__(self, network: nn.Module, capture: Capture = capture, devices: Iterable[str] = ("cuda",)) -> None:
        # which holds this: a cycle would keep both, and the device's memory, until Python looks for cycles
        self._network = weakref.ref(network)
        self.capture, self.devices = capture, tuple(devices)
        self._start()

    @property
    def network(self) -> nn.Module:
        """Whose calls these are."""
        network = self._network()
        assert network is not None
        return network

    def _start(self) -> None:
        functools.update_wrapper(self, type(self.network).forward)
        self.__signature__ = inspect.signature(type(self.network).forward.__get__(self.network))
        family = family_of(self.network)
        self.timestep, self.places = family.timestep, {name: i for i, name in enumerate(family.arguments)}
        self.known: OrderedDict[tuple[Any, ...], Entry | None] = OrderedDict()  # None: seen once
        self.forms = 0  # that were not in `known`
        self.refused: set[tuple[Any, ...]] = set()
        self.told: set[str] = set()
        self.read: Read | None = None
        self.state: tuple[Any, ...] = ()
        self.stream: Any = None
        self.pool = Pool()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles capture their own
        return {"network": self.network, "capture": self.capture, "devices": self.devices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._network = weakref.ref(state.pop("network"))
        self.__dict__.update(state)
        # the copy of a network is not whole yet: only its class is looked at
        self._start()

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The call as it is without graphs."""
        return type(self.network).forward(self.network, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first: Any = args[0] if args else next(iter(kwargs.values()), None)
        while type(first) is list and first:  # of samples
            first = first[0]
        if (
            traced(first)
            or first.device.type not in self.devices
            or torch.is_grad_enabled()
            or (first.is_cuda and torch.cuda.is_current_stream_capturing())
            or not self.lock.acquire(blocking=False)
        ):
            return self.plain(*args, **kwargs)
        try:
            entry, inputs, call = self._find(first.device, args, kwargs)
            if entry is None:
                return self.plain(*args, **kwargs)
            with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
                if not isinstance(entry, Entry):
                    # inputs that were made in inference mode could be written in it alone
                    with torch.inference_mode(False), torch.no_grad():
                        entry = self._captured(entry, inputs, call)
                    if entry is None:
                        return self.plain(*args, **kwargs)
                assert self.read is not None
                return entry.run(inputs, anew=bool(self.read.adapters))
        except UnsuitableError as why:
            self._tell(str(why))
            return self.plain(*args, **kwargs)
        finally:
            self.lock.release()

    def _find(
        self, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Entry | tuple[Any, ...] | None, list[Tensor], tuple[Any, Any]]:
        """(the captured call, or the key of one to capture now, or None: as it is; its tensors; its arguments).

        Raises:
            UnsuitableError: there can be none.
        """
        args, kwargs = self._timestep_on(device, args, kwargs)
        inputs: list[Tensor] = []
        form = flatten((args, kwargs), device, inputs)
        if torch.is_autocast_enabled(device.type):
            raise UnsuitableError("autocast is on")
        if self.read is None or self.read.changed():
            self.read = Read(self.network)
        hard, soft = self.read.state()
        if hard != self.state:
            if any(layer.prepared(device) is None for layer in self.read.integer):
                # as `load` does: a network that was moved here would join nothing
                with torch.inference_mode(False), torch.no_grad():
                    prepare_all(self.network, device)
                hard, soft = self.read.state()
            self.known.clear()
            self.refused.clear()
            self.state, self.stream = hard, None
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self.stream is not None and stream != self.stream:
            raise UnsuitableError("it is called on several streams")
        self.stream = stream
        key = (soft, form)
        if key in self.refused:
            return None, inputs, (args, kwargs)
        entry = self.known.get(key)
        if entry is not None and self.forms - entry.born > AGE:
            del self.known[key]
        if key not in self.known:
            self.forms += 1
            self.known[key] = None
            self._forget()
            return None, inputs, (args, kwargs)
        self.known.move_to_end(key)
        return entry or key, inputs, (args, kwargs)

    def _captured(self, key: tuple[Any, ...], inputs: list[Tensor], call: tuple[Any, Any]) -> Entry | None:
        statics = [x.clone() for x in inputs]
        args, kwargs = unflatten(call, iter(statics))
        assert self.read is not None
        if not any(self.known.values()):  # memory that its last graph gave back is not to be had again
            self.pool = Pool()
        entry = Entry(statics, lambda: None, None, self.read.kept(), self.forms)
        try:
            # what depends on the text alone is made once for all steps
            with self._projected(entry, args, kwargs):
                entry.replay, returned = self.capture(lambda: self.plain(*args, **kwargs), self.pool)
        except Exception as error:  # what forbids a capture is torch's, CUDA's or another library's own
            self.refused.add(key)
            del self.known[key]
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._tell(f"a call could not be captured ({lines[0]})")
            return None
        if not all(isinstance(leaf, Tensor) or leaf is None for leaf in pytree.tree_leaves(returned)):
            self.refused.add(key)
            raise UnsuitableError(f"it returns {type(returned).__name__}")
        entry.returned = returned
        self.known[key] = entry
        self._forget()
        return entry

    @contextlib.contextmanager
    def _projected(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Capture the projections of the text, and let what is captured within take them as given."""
        text = self._argument(TEXT, args, kwargs)
        readers = text_readers(self.network, text) if isinstance(text, Tensor) else []
        if not readers:
            yield
            return
        entry.text = next(i for i, x in enumerate(entry.inputs) if x is text)
        # not in the memory of the graphs, which what other graphs replay may write over
        made = [[x.contiguous() for x in project([module.to_k, module.to_v], text)] for module in readers]
        entry.kept.append(made)

        def renew() -> None:
            for module, old in zip(readers, made, strict=True):
                for x, new in zip(old, project([module.to_k, module.to_v], text), strict=True):
                    x.copy_(new)

        entry.project, _ = self.capture(renew, self.pool)
        with given(readers, text, made):
            yield

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.places.get(name, len(args))
        return kwargs[name] if name in kwargs else args[place] if place < len(args) else None

    def _forget(self) -> None:
        while len(self.known) > KEPT:
            self.known.popitem(last=False)

    def _timestep_on(
        self, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The timestep as a tensor on the device: a number would be part of the form."""
        name = self.timestep
        value = self._argument(name, args, kwargs)
        if value is None or (isinstance(value, Tensor) and (value.device == device or value.dim())):
            return args, kwargs
        moved = value.to(device) if isinstance(value, Tensor) else torch.tensor(value, device=device)
        if name in kwargs:
            return args, {**kwargs, name: moved}
        place = self.places[name]
        return (*args[:place], moved, *args[place + 1 :]), kwargs

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            log.warning("%s runs without a CUDA graph: %s", type(self.network).__name__, reason)


class Read:
    """What the Python of a network's forward reads, gathered once; `state` asks for it again, in microseconds.

    Raises:
        UnsuitableError: a graph cannot stand for it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = weakref.ref(network)
        modules = list(network.modules())
        self.hooks = RemovableHandle.next_id
        self.children = [module._modules for module in modules]
        self.links = [(children, name, child) for children in self.children for name, child in children.items()]
        self.attributes = [module.__dict__ for module in modules[1:]]
        self.integer = [module for module in modules if isinstance(module, IntegerLayer)]
        # where tensors are held rather than tensors: others may take their places
        held = [x for module in modules for x in (module._parameters, module._buffers)]
        self.tensors: list[tuple[dict[str, Any], str]] = [(tensors, name) for tensors in held for name in tensors]
        self.attentions = [m for m in modules if "processor" in m.__dict__ or "processor" in m._modules]
        self.adapters = [m for m in modules if hasattr(m, "active_adapters") and m is not network]
        self.blocks = [block.__dict__ for block in getattr(network, "up_blocks", None) or ()]
        self.hooked = next((type(m).__name__ for m in modules[1:] if m._forward_hooks or m._forward_pre_hooks), None)

    def changed(self) -> bool:
        """Whether modules were exchanged, added or taken away, or hooks set since."""
        return (
            RemovableHandle.next_id != self.hooks
            or sum(map(len, self.children)) != len(self.links)
            or any(children.get(name) is not child for children, name, child in self.links)
        )

    def state(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(what makes every graph void where it differs, what a graph is for beside the form of its call).

        Raises:
            UnsuitableError: a graph cannot stand for it.
        """
        network = self.network()
        assert network is not None
        # pipelines that name their calls leave a registry of diffusers without hooks
        if "_hf_hook" in network.__dict__ or getattr(network.__dict__.get("_diffusers_hook"), "hooks", None):
            raise UnsuitableError("its weights are offloaded, or hooks of diffusers are on it")
        if network.training:
            raise UnsuitableError("it is in training mode")
        if self.hooked is not None:
            raise UnsuitableError(f"a {self.hooked} in it has hooks")
        for attributes in self.attributes:
            if "forward" in attributes:
                raise UnsuitableError("the forward of a module in it was replaced")
        processors = [module.processor for module in self.attentions]
        for processor in set(map(type, processors)):
            if issubclass(processor, nn.Module) or not processor.__module__.startswith(("diffusers.", "dgq.")):
                raise UnsuitableError(f"{processor.__name__} may have a state of its own")
        hard = (
            len(network._modules),
            tuple([x.data_ptr() for held, name in self.tensors if (x := held.get(name)) is not None]),
            tuple([_serial(layer._prepared) for layer in self.integer]),
        )
        soft = (
            tuple(map(id, processors)),
            _AttentionBackendRegistry._active_backend,
            tuple([getattr(one, "_attention_backend", None) for one in processors]),
            tuple([0 if layer._tuned is None else id(layer._tuned[0]) for layer in self.integer]),
            tuple([_adapter(module) for module in self.adapters]),
            tuple([tuple([block.get(name) for name in FREEU]) for block in self.blocks]),
        )
        return hard, soft

    def kept(self) -> list[Any]:
        """The objects whose ids are in the state, and tensors that only they hold."""
        forms = [layer._prepared for layer in self.integer]
        joined = [getattr(form, "joined", None) for form in forms]
        scales = [one.weight_scale for one in joined if one is not None]
        return [[m.processor for m in self.attentions], [layer._tuned for layer in self.integer], scales]


def _serial(prepared: Any) -> int:
    """A number that no other prepared form has, 0 for none: addresses and ids are used again."""
    if prepared is None:
        return 0
    own: dict[str, Any] = prepared.__dict__
    if "_serial" not in own:
        own["_serial"] = next(_serials)
    serial: int = own["_serial"]
    return serial


def _adapter(module: Any) -> tuple[Any, ...]:
    """What an adapter's forward depends on beside its weights."""
    strengths = getattr(module, "scaling", {})
    scaling = [(n, s.data_ptr() if isinstance(s, Tensor) else s) for n, s in strengths.items()]
    return bool(module.disable_adapters), tuple(module.active_adapters), tuple(scaling), len(module.merged_adapters)


def flatten(value: Any, device: torch.device, tensors: list[Tensor]) -> Any:
    """The hashable form of arguments, whose tensors are appended to `tensors`.

    Raises:
        UnsuitableError: there is something else than tensors of the device, numbers, texts, None, and lists, tuples and
            dicts of them.
    """
    if isinstance(value, Tensor):
        if value.device != device:
            raise UnsuitableError(f"a tensor of its call is on {value.device}")
        tensors.append(value)
        return Tensor, value.shape, value.dtype, value.stride()
    if value is None or type(value) in (bool, int, float, str, torch.dtype):
        return type(value), value
    if type(value) in (list, tuple):
        return type(value), tuple([flatten(one, device, tensors) for one in value])
    if type(value) is dict:
        return dict, tuple([(key, flatten(one, device, tensors)) for key, one in value.items()])
    raise UnsuitableError(f"its call takes a {type(value).__name__}")


def unflatten(value: Any, tensors: Any) -> Any:
    """Arguments with other tensors in the place of theirs, in the order of `flatten`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if type(value) in (list, tuple):
        return type(value)(unflatten(one, tensors) for one in value)
    if type(value) is dict:
        return {key: unflatten(one, tensors) for key, one in value.items()}
    return value


def use_graphs(target: Any, on: bool = True) -> None:
    """Replay a network's calls on CUDA from graphs, or no longer. On the CPU, under torch.compile, where gradients are
    wanted, and within a capture of the caller's own, calls run as they are.

    Args:
        target: a pipeline that dgq works with, or its network.
        on: False takes the graphs away, and gives their memory back.

    Raises:
        DgqError: the pipeline has no network that dgq works with.
    """
    network = target if isinstance(target, nn.Module) else network_of(target)
    attributes: dict[str, Any] = network.__dict__
    if on and "forward" not in attributes:
        network.forward = Graphs(network)
    elif not on and isinstance(attributes.get("forward"), Graphs):
        del attributes["forward"]
