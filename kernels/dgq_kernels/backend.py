"""Which implementation runs an op on a device, and why.

`reference` is the definition, `cpu` the own engine (`native`), or oneDNN's int8 products where that is missing, and
`triton` the CUDA kernels. The environment variable DGQ_BACKEND=reference forces the definition everywhere (slow; for
finding out which kernel is wrong).

A table of our own rather than torch's dispatch by device: a backend may be forced on any device that it can run on
(the reference everywhere, Triton's interpreter on CPU tensors), which a dispatch key cannot say.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import native

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Backend:
    """Implementations of the ops: each the function of an op's name in the file of the backend's name in the op's
    folder. An op that it lacks runs its reference.

    Attributes:
        name: for DGQ_BACKEND too.
        devices: types of the devices that are its own.
        reason: (device) -> why it runs there, in one sentence for `dgq doctor`.
        refusal: (device) -> why it cannot run there, None where it can.
        fuses: its ops quantize together with what comes before, and add residuals and gate: layers leave that to them.
        unpacks: its product ops unpack int4 weights themselves; others get int8 ones.
        codes: the dtype, and so the form, of the codes that its quantizing ops return (`codes`).
        kernels: implementations that lie elsewhere, by the op's name.
    """

    name: str
    devices: tuple[str, ...]
    reason: Callable[[torch.device], str]
    refusal: Callable[[torch.device], str | None] = lambda device: None
    fuses: bool = False
    unpacks: bool = False
    codes: torch.dtype = torch.uint8
    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


# Every operator by its name, as `operator` enters them, and the module of its folder.
OPERATORS: dict[str, OpOverload] = {}
FOLDERS: dict[str, str] = {}
_BACKENDS: dict[str, Backend] = {}
_OWN: dict[str, str] = {}  # a device's type -> the backend whose own it is
_NO_TRITON = "it is not installed here (pip has it for Linux; on Windows use WSL 2)"
_FOUND: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}  # (reference, backend) -> implementation


def register(backend: Backend) -> None:
    """Enter a backend into the table, in the place of one of its name."""
    unregister(backend.name)
    _BACKENDS[backend.name] = backend
    _OWN.update(dict.fromkeys(backend.devices, backend.name))


def unregister(name: str) -> None:
    """Take a backend out of the table."""
    _BACKENDS.pop(name, None)
    for device in [device for device, own in _OWN.items() if own == name]:
        del _OWN[device]
    _FOUND.clear()


def folders() -> list[str]:
    """The modules that define operators, each once."""
    return list(dict.fromkeys(FOLDERS.values()))


# Where they are read anything else would mean nothing, in silence.
_SWITCHES = ("DGQ_LOG_ATTENTION", "DGQ_AUTOTUNE", "DGQ_PDL", "DGQ_ASYNC_WGMMA")


def device_types() -> list[str]:
    """The types of device that a model can be placed on: those with a backend of their own, but for mere shapes."""
    return [kind for kind in _OWN if kind != "meta"]


def select(device: torch.device) -> str:
    """The backend for tensors on `device`: "triton" on CUDA, "cpu" on the CPU, "reference" for mere shapes (meta).

    Raises:
        ValueError: DGQ_BACKEND names no backend, or one that cannot run there; or there are no kernels for the device
            and DGQ_BACKEND does not ask for the reference.
    """
    forced, kind = os.environ.get("DGQ_BACKEND"), device.type
    if not forced:
        if kind in _OWN and not (kind == "cuda" and torch.version.hip):
            return _OWN[kind]
        kind = "ROCm" if kind == "cuda" else kind
        known = " and ".join(sorted(device_types(), reverse=True))
        raise ValueError(f"there are no kernels for {kind} devices, only for {known}: use the device cpu")
    if forced not in _BACKENDS:
        raise ValueError(f"DGQ_BACKEND={forced} is not one of {', '.join(_BACKENDS)}")
    refusal = _BACKENDS[forced].refusal(device)
    if refusal is not None:
        raise ValueError(f"DGQ_BACKEND={forced} cannot run on {kind}: {refusal}")
    return forced


def check(device: torch.device) -> None:
    """Refuse a device that a model cannot be placed on, before it is.

    Raises:
        ValueError: as `select`; a switch in the environment is neither 0 nor 1; or the kernels do not compile for the
            CUDA device, or there is no Triton to do it.
    """
    for name in _SWITCHES:
        if os.environ.get(name, "") not in ("", "0", "1"):
            raise ValueError(f"{name}={os.environ[name]} is neither 0 nor 1")
    if select(device) == "triton" and device.type == "cuda" and torch.cuda.is_available():
        if not _has_triton():
            raise ValueError(f"kernels for CUDA devices need Triton: {_NO_TRITON}; or use the device cpu")
        check_capability(*torch.cuda.get_device_capability(device))


def check_capability(major: int, minor: int) -> None:
    """Refuse a CUDA device older than 8.0, for which Triton has no int8 product (ValueError)."""
    if major < 8:
        raise ValueError(
            f"there are no kernels for CUDA devices of compute capability {major}.{minor}, only from 8.0 on: "
            "use the device cpu"
        )


def chosen(device: torch.device) -> Backend:
    """`select`, with all that is known of the backend."""
    return _BACKENDS[select(device)]


def implementation(reference: Callable[P, R], first: Tensor) -> Callable[P, R]:
    """The function that runs an op on the device of its first operand, of the signature of the op's reference."""
    key = reference, select(first.device)
    found = _FOUND.get(key)
    if found is None:
        found = _FOUND[key] = _find(reference, _BACKENDS[key[1]])
    return found


def _find(reference: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    name, file = reference.__name__, f"{reference.__module__.rpartition('.')[0]}.{backend.name}"
    if name in backend.kernels:
        return backend.kernels[name]
    if importlib.util.find_spec(file) is None:
        return reference
    return getattr(importlib.import_module(file), name, reference)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def launches(device: torch.device) -> bool:
    """Whether Triton kernels can run on the tensors of a device: on CUDA, and anywhere in Triton's interpreter."""
    if not _has_triton():
        return False
    if device.type == "cuda":
        return torch.version.hip is None
    from triton import knobs

    return bool(knobs.runtime.interpret)


def operator(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Register a function of tensors as the operator `name`, to run with the CUDA device of its first argument as the
    current one: Triton launches there, wherever the tensors are.

    None takes gradients: torch warns where one is asked for. `torch.library.custom_op` would refuse, in a kernel of
    Python that every call goes through, which takes three times what calling an operator does.
    """

    def register(function: Callable[..., Any]) -> OpOverload:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return on_its_device(first, *args, **kwargs)
            if not first.is_cuda or first.get_device() == torch.cuda.current_device():
                return function(first, *args, **kwargs)
            with torch.cuda.device(first.device):
                return function(first, *args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", on_its_device)
        namespace, short = name.split("::")
        made: OpOverload = getattr(getattr(torch.ops, namespace), short).default
        OPERATORS[function.__name__], FOLDERS[function.__name__] = made, function.__module__
        return made

    return register


@functools.cache
def cpu_path() -> str:
    """How exact int8 products are formed on this CPU: "full", "split" or "reference".

    oneDNN's u8 * s8 product is exact where the CPU accumulates in 32 bits (VNNI, AMX). Without that, x86 adds
    pairs of products in 16 saturating bits: 255 * 127 * 2 overflows, 127 * 128 * 2 does not. There the codes are
    split into two 7-bit halves, which is exact at twice the products ("split"). Both are tried here on extreme
    values, in shapes that reach oneDNN's different kernels; "reference" stays if even the halves come out wrong.
    """
    if not torch.backends.mkldnn.is_available():
        return "reference"
    for path, top in (("full", 255), ("split", 127)):
        if all(_exact(top, *shape) for shape in ((1, 64, 48), (70, 320, 64), (256, 128, 128))):
            return path
    return "reference"


def _exact(top: int, m: int, k: int, n: int) -> bool:
    """Whether oneDNN multiplies codes up to `top` by int8 weights exactly, as a linear and as a 3x3 convolution."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(n, k, generator=generator) < 0.8, 127, -128).to(torch.int8)
    codes = torch.full((m, k), top, dtype=torch.uint8)
    ones, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        expected = codes.double() @ weight.double().t()
        if not torch.equal(product, expected.float()):  # sums above 2^24 are rounded once, on both sides
            return False
        image = torch.full((1, k, 4, 4), top, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        kernel = weight[:, :, None, None].expand(n, k, 3, 3).contiguous()
        packed = torch.ops.onednn.qconv_prepack(kernel, ones, 1.0, 0, [1, 1], [0, 0], [1, 1], 1, image.shape)
        product = torch.ops.onednn.qconv_pointwise(
            image,
            1.0,
            0,
            packed,
            ones,
            zeros,
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            1,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return torch.equal(product, torch.nn.functional.conv2d(image.double(), kernel.double()).float())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def describe(device: torch.device) -> tuple[str, str]:
    """(backend, reason in one sentence) for `dgq doctor`."""
    backend = chosen(device)
    path = native.describe() if native.available() else cpu_path()
    return f"cpu ({path})" if backend.name == "cpu" else backend.name, backend.reason(device)


def _why_reference(device: torch.device) -> str:
    return "forced by DGQ_BACKEND" if os.environ.get("DGQ_BACKEND") else f"no kernels for {device.type}"


def _why_triton(device: torch.device) -> str:
    if device.type != "cuda":
        return "forced by DGQ_BACKEND: Triton's interpreter, slow"
    major, minor = torch.cuda.get_device_capability(device)
    return f"CUDA device of compute capability {major}.{minor}: Triton kernels"


def _why_not_triton(device: torch.device) -> str | None:
    if launches(device):
        return None
    return "its kernels need a CUDA device, or TRITON_INTERPRET=1" if _has_triton() else _NO_TRITON


def _why_cpu(device: torch.device) -> str:
    if native.available():
        what = "layers and attention" if native.attention_pays() else "layers, float attention (the faster here)"
        return f"own engine of fused int8 {what}, {torch.get_num_threads()} threads"
    reasons = {
        "full": "exact int8 products in one pass (32-bit accumulation, as VNNI has it)",
        "split": "no 32-bit int8 accumulation (no VNNI): 8-bit codes run as two exact 7-bit products",
        "reference": "oneDNN's int8 products are missing or inexact here: slow exact fallback",
    }
    return f"{reasons[cpu_path()]}; own engine {native.describe()}"


register(Backend("reference", ("meta",), _why_reference))
register(Backend("cpu", ("cpu",), _why_cpu))
register(Backend("triton", ("cuda",), _why_triton, _why_not_triton, fuses=True, unpacks=True, codes=torch.int8))
