"""Which backend a device gets, and what is said where there is none."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dgq_kernels import backend, native
from dgq_kernels.native import build


def device(kind):
    return torch.device(kind)


def test_own_backend(monkeypatch):
    monkeypatch.delenv("DGQ_BACKEND", raising=False)
    assert [backend.select(device(kind)) for kind in ("cpu", "cuda:1", "meta")] == ["cpu", "triton", "reference"]


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_devices_without_kernels(kind, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")  # what torch for ROCm says; it calls its devices cuda
    name = "ROCm" if kind == "cuda" else kind
    monkeypatch.delenv("DGQ_BACKEND", raising=False)
    with pytest.raises(ValueError, match=f"no kernels for {name} devices"):
        backend.select(device(kind))
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    assert backend.select(device(kind)) == "reference"
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    monkeypatch.setattr(backend, "launches", lambda device: False)
    with pytest.raises(ValueError, match="cannot run"):
        backend.select(device(kind))


def test_cuda_devices_that_are_too_old(monkeypatch):
    """Triton ends with "PassManager::run failed" at the first product for 7.5, which is a T4."""
    launch = pytest.importorskip("dgq_kernels.launch")
    monkeypatch.delenv("DGQ_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((7, 5), (8, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        target = SimpleNamespace(backend="cuda", arch=10 * capability[0] + capability[1])
        active = SimpleNamespace(get_current_target=lambda target=target: target)
        monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
        for check in (lambda: backend.check(device("cuda:1")), lambda: launch._check.__wrapped__(1)):
            if capability >= (8, 0):
                check()
                continue
            with pytest.raises(ValueError, match=r"compute capability 7\.5, only from 8\.0 on: use the device cpu"):
                check()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    backend.check(device("cuda"))


def test_without_triton(monkeypatch):
    """As on Windows, where torch has CUDA and pip no Triton."""
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("DGQ_BACKEND", raising=False)
    backend.check(device("cpu"))
    with pytest.raises(ValueError, match="need Triton: it is not installed here"):
        backend.check(device("cuda"))
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    for kind in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"cannot run on {kind}: it is not installed here"):
            backend.select(device(kind))


@pytest.mark.parametrize("command", [["doctor"], ["generate", "a cat", "--device", "cpu", "--out", "unused.png"]])
def test_triton_without_a_gpu_is_one_clear_line(command, tmp_path):
    """The command line without the interpreter, where no Triton kernel can run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"DGQ_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "300"}
    run = subprocess.run(
        [sys.executable, "-m", "dgq_cli", *command], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "DGQ_BACKEND=triton cannot run on cpu" in run.stdout + run.stderr
    assert "unexpected" not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    if command[0] == "generate":
        assert run.stderr.startswith("error: DGQ_BACKEND=triton")


def test_the_engine_is_built_where_there_is_a_compiler():
    """Its tests are left out without it, and a build that fails is only a warning of the installation."""
    if shutil.which(build.compiler()[0]) and os.environ.get("DGQ_CPU_ENGINE") != "off":
        assert native.available(), native.describe()
