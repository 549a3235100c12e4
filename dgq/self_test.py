"""Every operator against its reference, on small inputs, on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dgq_kernels
from dgq_kernels import backend, native, packing
from dgq_kernels.conv2d import cpu as conv2d_cpu
from dgq_kernels.conv2d import reference as conv2d_reference
from dgq_kernels.linear import cpu as linear_cpu
from dgq_kernels.linear import reference as linear_reference
from dgq_kernels.log_attention import reference as attention_reference
from dgq_kernels.quantize_activation import reference as quantize_reference

from .machine import engine_name

# Two float32 computations of one sum may round differently; a wrong kernel is off by far more.
TOLERANCE = 1e-5


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
    """Run every op on a device and compare it with its reference on the CPU, on small and extreme inputs."""
    tests: tuple[Callable[[torch.device], float], ...] = (
        _test_quantize_rows, _test_quantize_samples, _test_linear_int8, _test_linear_int4, _test_conv2d,
        _test_log_attention,
    )  # fmt: skip
    if device.type == "cpu" and engine_name() in native.ISAS:
        tests = (*tests, _test_engine)
    return [_run(test, device) for test in tests]


def _run(test: Callable[[torch.device], float], device: torch.device) -> Check:
    name = test.__name__.removeprefix("_test_")
    try:
        error = test(device)
    except Exception as failure:  # a self-test reports whatever breaks, a compiler's errors included
        reason = (str(failure).strip().splitlines() or [""])[0]
        return Check(name, str(device), False, f"{type(failure).__name__}: {reason}")
    return Check(name, str(device), error <= TOLERANCE, f"relative error {error:.1e}")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; inf where a value is not finite."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def _same(results: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> float:
    return max(relative_error(a, b) for a, b in zip(results, references, strict=True))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _codes(*shape: int) -> Tensor:
    """Codes over the whole range; the first ones are all 255, where saturating sums show."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes[0] = 255
    return codes


def _weights(*shape: int) -> Tensor:
    weights = torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    weights[0] = 127
    return weights


def _to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def _test_quantize_rows(device: torch.device) -> float:
    x, divisor = _random(70, 96) * 5, torch.linspace(0.5, 1, 96)
    result = dgq_kernels.quantize_rows(x.to(device), 8, divisor.to(device))
    return _same(result, quantize_reference.quantize_rows(x, 8, divisor))


def _test_quantize_samples(device: torch.device) -> float:
    x = _random(2, 24, 8, 8) * 5
    result = dgq_kernels.quantize_samples(x.to(device), 8, None, 1)
    return _same(result, quantize_reference.quantize_samples(x, 8, None, 1))


def _epilogue(rows: int, matrix: Tensor) -> list[Tensor]:
    """scale (rows,), zero_point (rows,), weight_scale, column_sum and bias of a product with an int8 matrix (N, K)."""
    n = matrix.shape[0]
    zero = torch.arange(rows, dtype=torch.int32) % 256
    sums = matrix.to(torch.int64).sum(1).to(torch.int32)
    return [torch.linspace(0.01, 0.1, rows), zero, torch.linspace(0.001, 0.01, n), sums, _random(n)]


def _test_linear_int8(device: torch.device) -> float:
    codes, weight = _codes(70, 96), _weights(40, 96)
    scale, zero, weight_scale, sums, bias = _epilogue(70, weight)
    expected = linear_reference.linear_int8(codes, scale, zero, weight, weight_scale, sums, bias, torch.float32, [96])
    moved = _to(device, codes, scale, zero, weight, weight_scale, sums, bias)
    error = relative_error(dgq_kernels.linear_int8(*moved, torch.float32, [96]), expected)
    if backend.select(device) == "cpu" and backend.cpu_path() != "reference":  # what the layers call
        packed, split = linear_cpu.prepack(weight, [96]), linear_cpu.needs_split(8, weight)
        y = dgq_kernels.linear_prepacked(
            codes, scale, zero, packed, [96], split, weight_scale, sums, bias, torch.float32
        )
        error = max(error, relative_error(y, expected))
    return error


def _test_engine(device: torch.device) -> float:
    """Every instruction set of the CPU engine: a linear layer and a convolution, quantization included."""
    weight, x = _weights(40, 216), _random(70, 216)
    _, _, weight_scale, sums, bias = _epilogue(70, weight)
    codes, scale, zero = quantize_reference.quantize_rows(x, 8, None)
    rows = linear_reference.linear_int8(codes, scale, zero, weight, weight_scale, sums, bias, torch.float32, [216])
    image = x.view(-1)[: 2 * 24 * 64].view(2, 24, 8, 8)
    codes, scale, zero = quantize_reference.quantize_samples(image, 8, None, 1)
    kernel = weight.view(40, 3, 3, 24).permute(0, 3, 1, 2)
    pixels = conv2d_reference.conv2d(codes, scale, zero, kernel, weight_scale, sums, bias, 1, torch.float32, [24])
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


def _test_linear_int4(device: torch.device) -> float:
    codes = _codes(70, 96)
    nibbles = _weights(40, 96).div(16, rounding_mode="floor")
    packed = packing.pack_int4(nibbles)
    subscales = packing.pack_subscales(torch.arange(120, dtype=torch.uint8).view(40, 3) % 15 + 1)
    matrix = packing.expand_two_level(packed, subscales, 96, 32)
    scale, zero, weight_scale, sums, bias = _epilogue(70, matrix)
    moved = _to(device, codes, scale, zero, packed, subscales, weight_scale, sums, bias)
    return relative_error(
        dgq_kernels.linear_int4(*moved, torch.float32, 32),
        linear_reference.linear_int4(
            codes, scale, zero, packed, subscales, weight_scale, sums, bias, torch.float32, 32
        ),
    )


def _test_conv2d(device: torch.device) -> float:
    codes, weight = _codes(2, 24, 10, 10).contiguous(memory_format=torch.channels_last), _weights(16, 24, 3, 3)
    scale, zero, weight_scale, sums, bias = _epilogue(2, weight.flatten(1))
    expected = conv2d_reference.conv2d(codes, scale, zero, weight, weight_scale, sums, bias, 1, torch.float32, [24])
    moved = _to(device, codes, scale, zero, weight, weight_scale, sums, bias)
    error = relative_error(dgq_kernels.conv2d(*moved, 1, torch.float32, [24]), expected)
    if backend.select(device) == "cpu" and backend.cpu_path() != "reference":
        packed, split = conv2d_cpu.prepack(weight, 1, [24]), linear_cpu.needs_split(8, weight)
        y = dgq_kernels.conv2d_prepacked(
            codes, scale, zero, packed, [24], split, weight_scale, sums, bias, 3, 1, torch.float32
        )
        error = max(error, relative_error(y, expected))
    return error


def _test_log_attention(device: torch.device) -> float:
    q, k, v = _random(2, 2, 24, 16), _random(2, 2, 24, 16).flip(2) + 1, _random(2, 2, 24, 16) + 0.5
    error = 0.0
    for start_token in (False, True):
        expected = attention_reference.log_attention(q, k, v, 0.25, 8, 4, start_token, 8, 8)
        result = dgq_kernels.log_attention(*_to(device, q, k, v), 0.25, 8, 4, start_token, 8, 8)
        error = max(error, relative_error(result, expected))
    return error
