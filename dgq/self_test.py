"""Every operator against its reference, on small inputs, on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dgq_kernels
from dgq_kernels import backend, native
from dgq_kernels.codes import unsigned
from dgq_kernels.conv2d import cpu as conv2d_cpu
from dgq_kernels.conv2d import reference as conv2d_reference
from dgq_kernels.linear import cpu as linear_cpu
from dgq_kernels.linear import reference as linear_reference
from dgq_kernels.quantize_activation import reference as quantize_reference
from dgq_kernels.samples import Sample, codes, epilogue, floats, reference, samples, weights

from .devices import check_kernels
from .errors import DgqError
from .machine import engine_name

# Two float32 computations of one sum may round differently; a wrong kernel is off by far more.
TOLERANCE = 1e-5
# Where codes are made of such sums: the share of codes that may differ by one, and the error of what follows from them.
FEW_CODES = 0.02
ROUGH = 5e-3


@dataclass(frozen=True)
class Check:
    """One self-test.

    Attributes:
        name: the op; device: where it ran; ok: whether it equals its reference.
        detail: the relative error, or what went wrong.
    """

    name: str
    device: str
    ok: bool
    detail: str


def self_test(device: torch.device) -> list[Check]:
    """Run every op on a device and compare it with its reference on the CPU, on small and extreme inputs; on the CPU
    also the forms of a weight that have no reference of their own. Where nothing can run, why is the only check."""
    try:
        check_kernels(device)
    except DgqError as error:
        return [Check("kernels", str(device), False, str(error))]
    every: dict[str, list[Sample]] = {}
    for sample in samples():
        every.setdefault(sample.operator, []).append(sample)
    tests: dict[str, Callable[[], float]] = {name: partial(_test, mine, device) for name, mine in every.items()}
    if device.type == "cpu" and backend.cpu_path() != "reference":
        tests["prepacked"] = _test_prepacked
    if device.type == "cpu" and engine_name() in native.ISAS:
        tests["engine"] = _test_engine
    return [_run(name, test, device) for name, test in tests.items()]


def _run(name: str, test: Callable[[], float], device: torch.device) -> Check:
    try:
        error = test()
    except Exception as failure:  # a self-test reports whatever breaks, a compiler's errors included
        reason = (str(failure).strip().splitlines() or [""])[0]
        return Check(name, str(device), False, f"{type(failure).__name__}: {reason}")
    return Check(name, str(device), error <= TOLERANCE, f"relative error {error:.1e}")


def _test(mine: Sequence[Sample], device: torch.device) -> float:
    """The largest error of an operator on its samples; 0 within what `Sample.exact` allows."""
    errors = []
    for name, arguments, exact in mine:
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
        got, expected = backend.OPERATORS[name](*moved), reference(name)(*arguments)
        measure = relative_error if exact else _beyond_rounding
        for value, right in zip(_results(got), _results(expected), strict=True):  # codes in either form
            errors.append(measure(unsigned(value) if right.dtype == torch.uint8 else value, right))
    return max(errors)


def _results(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, tuple) else (value,)


def _beyond_rounding(value: Tensor, reference: Tensor) -> float:
    error = relative_error(value, reference)
    if value.is_floating_point():
        return 0.0 if error <= ROUGH else error
    apart = (value.cpu().int() - reference.int()).abs()
    return 0.0 if int(apart.max()) <= 1 and float(apart.double().mean()) <= FEW_CODES else error


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; inf where a value is not finite."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def _test_prepacked() -> float:
    """oneDNN's layout of a weight, which layers without the engine keep."""
    weight, image = weights(40, 96), codes(2, 10, 10, 24).permute(0, 3, 1, 2)
    rows, channels = epilogue(9, weight)
    parts = linear_cpu.prepack(weight, [96]), [96], linear_cpu.needs_split(8, weight)
    y = dgq_kernels.linear_prepacked(codes(9, 96), *rows, *parts, *channels, torch.float32)
    error = relative_error(y, linear_reference.linear_int8(codes(9, 96), *rows, weight, *channels, torch.float32, [96]))
    kernel = weights(16, 24, 3, 3)
    rows, channels = epilogue(2, kernel.flatten(1))
    parts = conv2d_cpu.prepack(kernel, 1, [24]), [24], linear_cpu.needs_split(8, kernel)
    y = dgq_kernels.conv2d_prepacked(image, *rows, *parts, *channels, 3, 1, torch.float32)
    return max(
        error, relative_error(y, conv2d_reference.conv2d(image, *rows, kernel, *channels, 1, torch.float32, [24]))
    )


def _test_engine() -> float:
    """Every instruction set of the CPU engine: a linear layer and a convolution, quantization included."""
    weight, x = weights(40, 216), floats(70, 216)
    _, (weight_scale, sums, bias) = epilogue(70, weight)
    quantized = quantize_reference.quantize_rows(x, 8, None)
    rows = linear_reference.linear_int8(*quantized, weight, weight_scale, sums, bias, torch.float32, [216])
    image = x.view(-1)[: 2 * 24 * 64].view(2, 24, 8, 8)
    quantized = quantize_reference.quantize_samples(image, 8, None, 1)
    kernel = weight.view(40, 3, 3, 24).permute(0, 3, 1, 2)
    pixels = conv2d_reference.conv2d(*quantized, kernel, weight_scale, sums, bias, 1, torch.float32, [24])
    linear = native.Layer(weight, weight_scale, bias, None, 8)
    conv2d = native.Layer(weight, weight_scale, bias, None, 8, 3, 1, 1)
    error, chosen = 0.0, native.describe()
    try:
        for isa in native.supported():
            native.use(isa)
            error = max(error, relative_error(linear.linear(x), rows), relative_error(conv2d.conv2d(image), pixels))
    finally:
        native.use(chosen)
    return error
