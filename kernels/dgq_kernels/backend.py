"""Which implementation runs an op on a device, and why.

`reference` is the definition, `cpu` the own engine (`native`), or oneDNN's int8 products where that is missing, and
`triton` the CUDA kernels. The environment variable DGQ_BACKEND=reference forces the definition everywhere (slow; for
finding out which kernel is wrong).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native

BACKENDS = ("reference", "cpu", "triton")
_OWN = {"cpu": "cpu", "cuda": "triton", "meta": "reference"}  # by a device's type


def select(device: torch.device) -> str:
    """The backend for tensors on `device`: "triton" on CUDA, "cpu" on the CPU, "reference" for mere shapes (meta).

    Raises:
        ValueError: DGQ_BACKEND names no backend, or "triton" where its kernels cannot run; or there are no kernels for
            the device and DGQ_BACKEND does not ask for the reference.
    """
    forced, kind = os.environ.get("DGQ_BACKEND"), device.type
    if not forced:
        if kind in _OWN and not (kind == "cuda" and torch.version.hip):
            return _OWN[kind]
        kind = "ROCm" if kind == "cuda" else kind
        raise ValueError(f"there are no kernels for {kind} devices, only for cuda and cpu: use the device cpu")
    if forced not in BACKENDS:
        raise ValueError(f"DGQ_BACKEND={forced} is not one of {', '.join(BACKENDS)}")
    if forced == "triton" and not launches(device):
        raise ValueError(
            f"DGQ_BACKEND=triton cannot run on {kind}: its kernels need a CUDA device, or TRITON_INTERPRET=1"
        )
    return forced


def launches(device: torch.device) -> bool:
    """Whether Triton kernels can run on the tensors of a device: on CUDA, and anywhere in Triton's interpreter."""
    if device.type == "cuda":
        return torch.version.hip is None
    from triton import knobs

    return bool(knobs.runtime.interpret)


def operator(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Register a function of tensors as the operator `name`, to run with the CUDA device of its first argument as the
    current one: Triton launches there, wherever the tensors are."""

    def register(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not first.is_cuda:
                return function(first, *args, **kwargs)
            with torch.cuda.device(first.device):
                return function(first, *args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(name, on_its_device, mutates_args=(), schema=schema)

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
            image, 1.0, 0, packed, ones, zeros, None, [1, 1], [0, 0], [1, 1], 1,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return torch.equal(product, torch.nn.functional.conv2d(image.double(), kernel.double()).float())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def describe(device: torch.device) -> tuple[str, str]:
    """(backend, reason in one sentence) for `dgq doctor`."""
    backend = select(device)
    if backend == "triton" and device.type != "cuda":
        return backend, "forced by DGQ_BACKEND: Triton's interpreter, slow"
    if backend == "triton":
        major, minor = torch.cuda.get_device_capability(device)
        return backend, f"CUDA device of compute capability {major}.{minor}: Triton kernels"
    if backend == "reference":
        return backend, "forced by DGQ_BACKEND" if os.environ.get("DGQ_BACKEND") else f"no kernels for {device.type}"
    if native.available():
        what = "layers and attention" if native.attention_pays() else "layers, float attention (the faster here)"
        return f"cpu ({native.describe()})", f"own engine of fused int8 {what}, {torch.get_num_threads()} threads"
    reasons = {
        "full": "exact int8 products in one pass (32-bit accumulation, as VNNI has it)",
        "split": "no 32-bit int8 accumulation (no VNNI): 8-bit codes run as two exact 7-bit products",
        "reference": "oneDNN's int8 products are missing or inexact here: slow exact fallback",
    }
    return f"cpu ({cpu_path()})", f"{reasons[cpu_path()]}; own engine {native.describe()}"
