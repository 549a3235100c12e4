"""What this machine can run and why: versions, devices, kernels and a self-test (`dgq doctor`)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

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

from . import embedded
from .checkpoint import WEIGHTS_NAME, check_folder, unet_bytes
from .errors import DgqError
from .version import __version__

PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow", "matplotlib",
)  # fmt: skip
# The instruction sets that decide how fast int8 and bfloat16 are
ISA_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_TOKEN", "DGQ_BACKEND",
    "DGQ_CPU_ENGINE", "DGQ_DEBUG",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NO_COLOR",
)  # fmt: skip
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


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where a measurement was made, as a JSON object."""
    device = device or torch.device("cpu")
    kernels, reason = _describe(device)
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_flags": isa_flags(),
        "cpu_path": backend.cpu_path(),
        "cpu_engine": _engine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": kernels,
        "backend_reason": reason,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dgq": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Those of `ISA_FLAGS` that the CPU has; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            present = set(found[1].split())
            return [flag for flag in ISA_FLAGS if flag in present]
    return []


def _describe(device: torch.device) -> tuple[str, str]:
    """`backend.describe`, with a bad DGQ_BACKEND as an answer rather than an error."""
    try:
        return backend.describe(device)
    except ValueError as error:
        return "none", str(error)


def _engine() -> str:
    """`native.describe`, with a bad DGQ_CPU_ENGINE as an answer rather than an error."""
    try:
        return native.describe()
    except ValueError as error:
        return str(error)


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def versions() -> dict[str, str | None]:
    """Versions of dgq, python and what dgq builds on; None for a package that is not installed."""
    found: dict[str, str | None] = {"dgq": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def memory() -> dict[str, int | None]:
    """Bytes of memory: total and available; None where the system does not tell."""
    with contextlib.suppress(OSError):
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        return {"total": int(fields["MemTotal"]) * 1024, "available": int(fields["MemAvailable"]) * 1024}
    return {"total": None, "available": None}


def hub_cache() -> Path:
    """Where Hugging Face models are cached."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def disk() -> dict[str, dict[str, Any]]:
    """Free bytes where checkpoints and downloads go by default."""
    places = {"here": Path.cwd(), "hub_cache": hub_cache()}
    report = {}
    for name, path in places.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        report[name] = {"path": str(path), "free_bytes": shutil.disk_usage(existing).free}
    return report


def environment() -> dict[str, str]:
    """Environment variables that change what dgq does; a token is only said to be set."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: "(set)" if "TOKEN" in name else value for name, value in found.items()}


def embedded_model(folder: Path = embedded.FOLDER) -> dict[str, Any]:
    """Whether the embedded model is there and whole.

    Returns:
        folder; status "ok", "missing", "damaged" or "unverified" (readable, but its manifest lists no "sha256");
        detail; and where it is present bytes, unet_bytes and unet_sha256.
    """
    report: dict[str, Any] = {"folder": str(folder)}
    if not folder.is_dir():
        return {**report, "status": "missing", "detail": "reinstall dgq, or name a --model"}
    try:
        check_folder(folder)
    except DgqError as error:
        return {**report, "status": "damaged", "detail": error.message}
    report["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    report["unet_bytes"] = unet_bytes(folder)
    report["unet_sha256"] = _sha256(folder / "unet" / WEIGHTS_NAME)
    expected = _expected_hashes(folder)
    wrong = [name for name, digest in expected.items() if _sha256(folder / name) != digest]
    if wrong:
        return {**report, "status": "damaged", "detail": f"{wrong[0]}: not the file that was shipped; reinstall dgq"}
    if not expected:
        return {**report, "status": "unverified", "detail": "readable; its manifest lists no hashes to compare with"}
    return {**report, "status": "ok", "detail": f"{len(expected)} files have the expected SHA-256"}


def _sha256(file: Path) -> str | None:
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return None


def _expected_hashes(folder: Path) -> dict[str, str]:
    """manifest.json's "sha256": {file: digest}; empty where there is none."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("sha256", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def self_test(device: torch.device) -> list[Check]:
    """Run every op on a device and compare it with its reference on the CPU, on small and extreme inputs."""
    tests: tuple[Callable[[torch.device], float], ...] = (
        _test_quantize_rows, _test_quantize_samples, _test_linear_int8, _test_linear_int4, _test_conv2d,
        _test_log_attention,
    )  # fmt: skip
    if device.type == "cpu" and _engine() in native.ISAS:
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


def report() -> dict[str, Any]:
    """Everything `dgq doctor` prints, as a JSON object; "ok" is whether every self-test passed."""
    checks = [check for device in devices() for check in self_test(device)]
    return {
        "ok": all(check.ok for check in checks),
        "versions": versions(),
        "machine": machine(),
        "devices": [_device(device) for device in devices()],
        "memory": memory(),
        "disk": disk(),
        "environment": environment(),
        "embedded": embedded_model(),
        "self_test": [dataclasses.asdict(check) for check in checks],
    }


def _device(device: torch.device) -> dict[str, Any]:
    kernels, reason = _describe(device)
    entry: dict[str, Any] = {"device": str(device), "backend": kernels, "reason": reason}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {**entry, "name": properties.name, "memory_bytes": properties.total_memory}
    return {**entry, "name": cpu_model(), "memory_bytes": memory()["total"]}
