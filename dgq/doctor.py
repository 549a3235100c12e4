"""What this machine can run and why: versions, devices, kernels and a self-test (`dgq doctor`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from . import devices
from .checkpoint.reading import check_folder, component_at, network_bytes
from .checkpoint.writing import WEIGHTS_NAME
from .errors import DgqError
from .machine import cpu_model, describe_backend, machine
from .pictures import embedded
from .self_test import self_test
from .version import __version__

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "matplotlib",
)


VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_TOKEN",
    "DGQ_BACKEND",
    "DGQ_CPU_ENGINE",
    "DGQ_CPU_LIBRARY",
    "DGQ_LOG_ATTENTION",
    "DGQ_AUTOTUNE",
    "DGQ_PDL",
    "DGQ_ASYNC_WGMMA",
    "DGQ_API_KEY",
    "DGQ_DEBUG",
    "DGQ_VERIFY",
    "CXX",
    "WORLD_SIZE",
    "RANK",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "ONEDNN_MAX_CPU_ISA",
    "THP_MEM_ALLOC_ENABLE",
    "NO_COLOR",
)


def versions() -> dict[str, str | None]:
    """Versions of dgq, python and what dgq builds on; None for a package that is not installed."""
    found: dict[str, str | None] = {"dgq": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def memory() -> dict[str, int]:
    """Bytes of memory: total, and available without swapping."""
    found = psutil.virtual_memory()
    return {"total": found.total, "available": found.available}


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
    """Environment variables that change what dgq does; a token or key is only said to be set."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: "(set)" if "TOKEN" in name or "KEY" in name else value for name, value in found.items()}


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
    report["unet_bytes"] = network_bytes(folder)
    report["unet_sha256"] = _sha256(component_at(folder) / WEIGHTS_NAME)
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


def report() -> dict[str, Any]:
    """Everything `dgq doctor` prints, as a JSON object; "ok" is whether every self-test passed."""
    checks = [check for device in devices.present() for check in self_test(device)]
    return {
        "ok": all(check.ok for check in checks),
        "versions": versions(),
        "machine": machine(),
        "devices": [_device(device) for device in devices.present()],
        "memory": memory(),
        "disk": disk(),
        "environment": environment(),
        "embedded": embedded_model(),
        "self_test": [dataclasses.asdict(check) for check in checks],
    }


def _device(device: torch.device) -> dict[str, Any]:
    kernels, reason = describe_backend(device)
    entry: dict[str, Any] = {"device": str(device), "backend": kernels, "reason": reason}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {**entry, "name": properties.name, "memory_bytes": properties.total_memory}
    return {**entry, "name": cpu_model(), "memory_bytes": memory()["total"]}
