"""`dgq doctor`: what it reports, and that a broken op makes it fail."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer

from dgq import doctor
from dgq.self_test import relative_error, self_test
from dgq_cli import doctor_command
from dgq_kernels import backend, native

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_json_of_a_healthy_machine(dgq_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = dgq_command("doctor", "--json", alone=True)
    assert run.returncode == 0, run.stderr
    assert "hf_secret" not in run.stdout
    data = json.loads(run.stdout)
    assert data["ok"] is True
    # every operator but those on opaque weights, which "prepacked" tests
    every = {name for name in backend.OPERATORS if not name.endswith("_prepacked")}
    every |= {"prepacked"} if backend.cpu_path() != "reference" else set()
    every |= {"engine"} if native.available() else set()
    assert {check["name"] for check in data["self_test"]} == every
    assert len(data["self_test"]) == len(every)
    assert all(check["ok"] for check in data["self_test"])
    assert torch.__version__.startswith(data["versions"]["torch"].split("+")[0])
    assert data["devices"][0]["device"] == "cpu"
    assert data["devices"][0]["reason"]
    assert data["machine"]["cpu_path"] in ("full", "split", "reference")
    assert data["embedded"]["status"] in ("ok", "missing", "unverified")
    assert data["disk"]["here"]["free_bytes"] > 0


@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_every_backend_passes_its_self_test(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where codes have another form than the references'."""
    if chosen == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("DGQ_BACKEND", chosen)
    checks = self_test(torch.device("cpu"))
    assert len(checks) >= 20
    assert not [check for check in checks if not check.ok]


def test_a_wrong_op_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = backend.OPERATORS["linear_int8"]
    monkeypatch.setitem(backend.OPERATORS, "linear_int8", lambda *args: right(*args) + 0.01)
    with pytest.raises(typer.Exit) as stop:
        doctor_command.command()
    assert stop.value.exit_code == 1
    captured = capsys.readouterr()
    assert "FAILED: relative error" in captured.out
    assert "linear_int8 on cpu" in captured.err


def test_an_unknown_backend_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGQ_BACKEND", "abacus")
    data = doctor.report()
    assert not data["ok"]
    assert data["devices"][0]["backend"] == "none"
    (check,) = data["self_test"]  # not the same of every operator
    assert check["detail"] == "DGQ_BACKEND=abacus is not one of reference, cpu, triton"


def test_the_embedded_models_hashes_are_checked(tiny_pipeline: Path, tmp_path: Path) -> None:
    assert doctor.embedded_model(tmp_path / "none")["status"] == "missing"
    assert doctor.embedded_model(tiny_pipeline)["status"] == "unverified"

    folder = tmp_path / "model"
    folder.symlink_to(tiny_pipeline)
    manifest = tiny_pipeline / "manifest.json"
    name = "unet/diffusion_pytorch_model.safetensors"
    try:
        for digest, status in ((doctor.embedded_model(folder)["unet_sha256"], "ok"), ("0" * 64, "damaged")):
            manifest.write_text(json.dumps({"sha256": {name: digest}}))
            assert doctor.embedded_model(folder)["status"] == status
    finally:
        manifest.unlink()


def test_nan_is_an_infinite_error() -> None:
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")


def test_an_instruction_set_this_cpu_lacks_is_told(dgq_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.LIBRARY.exists():
        pytest.skip("no CPU engine")
    monkeypatch.setenv("DGQ_CPU_ENGINE", "abacus")
    run = dgq_command("doctor")
    assert run.returncode == 1
    assert "test kernels, cpu FAILED: DGQ_CPU_ENGINE=abacus is not one of off, portable" in " ".join(run.stdout.split())
    assert run.stderr == "self-test failed: kernels on cpu\n"
    run = dgq_command("generate", "a cat")
    assert run.returncode == 1
    assert run.stderr.startswith("error: DGQ_CPU_ENGINE=abacus is not one of")
