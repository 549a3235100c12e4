"""Steps of an architecture and of a model folder, from the files that are written to the rows."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dgq import doctor
from dgq.bench import Options, bench, bench_architecture, bench_step, steps
from dgq.bench.files import load_calls
from dgq.bench.systems import Size, System
from dgq.bench.worker import cast
from dgq.checkpoint.reading import read_header
from dgq.errors import DgqError

CPU = torch.device("cpu")


@pytest.mark.slow
def test_rows_of_an_architecture_and_its_files_for_a_second_run(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bench(arch=str(small_config), repeats=1, compiled=False, device="cpu", work=tmp_path)
    assert [row.system for row in report.rows] == ["float32", "bfloat16", "dgq W8A8", "dgq W4A8"]
    assert {row.case for row in report.rows} == {"small.json step"}
    assert report.machine["model"] == "small.json"
    full, half, byte, nibble = report.rows
    errors = [row.relative_error or 0 for row in report.rows]
    assert errors[0] == 0
    assert 0 < errors[1] < 0.05
    assert 0 < errors[2] < 0.2
    assert errors[2] < errors[3] < 1
    sizes = [row.disk_mib or 0 for row in report.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    assert (full.weights_mib or 0) > (half.weights_mib or 0) >= (nibble.weights_mib or 0)
    assert all((row.peak_rss_mib or 0) > 64 for row in (full, half, byte, nibble))
    assert not any(str(small_config.parent) in note for note in report.notes)

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors") if path.parent.name == "unet"}
    assert len(made) == 4

    def unexpected(task: str, **arguments: Any) -> None:
        raise AssertionError(f"{task} was written again")

    monkeypatch.setattr(steps, "write", unexpected)
    monkeypatch.setattr(steps, "measure", lambda *args: ([], []))
    bench_architecture(str(small_config), (8,), Options(1, CPU, work=tmp_path))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What would be written and measured, with nothing of both done."""
    seen: dict[str, list[Any]] = {"written": [], "systems": []}

    def measured(systems: list[System], *args: Any) -> tuple[list[Any], list[str]]:
        seen["systems"] += systems
        return [], []

    monkeypatch.setattr(steps, "write", lambda task, **arguments: seen["written"].append(task))
    monkeypatch.setattr(steps, "measure", measured)
    return seen


PEERS = ("openvino", "torchao", "sdnq")


def test_every_system_in_its_place(small_config: Path, planned: dict[str, list[Any]]) -> None:
    bench_architecture(str(small_config), (8, 4), Options(1, CPU, PEERS))
    assert planned["written"] == ["random", "random", "OpenVINO", "NNCF", "dgq", "dgq"]
    assert [system.name for system in planned["systems"]] == [
        "float32",
        "bfloat16",
        "torch.compile",
        "torchao int8",
        "sdnq int8",
        "OpenVINO float32",
        "OpenVINO bfloat16",
        "OpenVINO NNCF int8",
        "dgq W8A8",
        "dgq W4A8",
    ]
    calls = {spec.calls for system in planned["systems"] for spec in system.specs}
    assert len(calls) == 1  # all are fed the same
    for system in planned["systems"]:
        assert system.needed(Size(10**9)) > 2**30  # the memory of every kind is known


@pytest.mark.parametrize("compiled", [True, False])
def test_on_cuda_float16_is_graphed_and_compiled_at_its_best(
    compiled: bool, small_config: Path, planned: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**34))
    bench_architecture(str(small_config), (8,), Options(1, torch.device("cuda"), compiled=compiled))
    wanted = ["torch.compile", "torch.compile max-autotune (float16)"] if compiled else []
    names = [system.name for system in planned["systems"]]
    assert names == ["float32", "float16", "float16 in a CUDA graph", *wanted, "dgq W8A8"]
    assert all(system.needed(Size(10**9)) > 2**30 for system in planned["systems"])
    if compiled:
        (spec,) = planned["systems"][-2].specs
        assert (spec.kind, spec.dtype, Path(spec.folder).name) == ("autotune", "float16", "float16")


@pytest.mark.parametrize("network", ["UNet2DConditionModel", "ZImageTransformer2DModel"])
def test_an_architecture_is_called_for_pictures_of_the_size_asked_for(
    network: str, small_config: Path, planned: dict[str, list[Any]], tmp_path: Path
) -> None:
    """Calls of lists, too, come back from their file, and go to the network in half precision."""
    file = small_config
    if network.startswith("ZImage"):
        file = tmp_path / "z.json"
        tiny = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
        file.write_text(json.dumps({"_class_name": network, "in_channels": 4, "axes_dims": [4, 6, 6], **tiny}))
    bench_architecture(str(file), (8,), Options(1, CPU, work=tmp_path), pixels=64)
    assert planned["written"] == ["random", "random", "dgq"]
    (calls,) = tmp_path.rglob("calls.safetensors")
    call = cast(load_calls(calls)[0], torch.bfloat16, CPU)
    pictures = call["x"] if network.startswith("ZImage") else call["sample"]
    assert [tuple(one.shape) for one in pictures] == [(4, 1, 8, 8) if "x" in call else (4, 8, 8)] * 2
    assert {one.dtype for one in pictures} == {torch.bfloat16}
    assert torch.equal(*pictures)  # as guidance has them


def test_a_peer_whose_files_fail_is_a_note(
    small_config: Path, planned: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(task: str, **arguments: Any) -> None:
        if task == "NNCF":
            raise DgqError("writing the NNCF files failed: no such thing")

    monkeypatch.setattr(steps, "write", fails)
    _, notes = bench_architecture(str(small_config), (8,), Options(1, CPU, PEERS))
    assert "NNCF failed: writing the NNCF files failed: no such thing" in notes
    names = [system.name for system in planned["systems"]]
    assert "OpenVINO NNCF int8" not in names
    assert {"OpenVINO float32", "OpenVINO bfloat16", "dgq W8A8"} <= set(names)


def test_files_that_float32_needs_are_no_note(small_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(task: str, **arguments: Any) -> None:
        raise DgqError("no")

    monkeypatch.setattr(steps, "write", fails)
    with pytest.raises(DgqError, match=r"^no$"):
        bench_architecture(str(small_config), (8,), Options(1, CPU))


def test_what_an_architecture_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DgqError, match=r"not one of sd-v1\.4, sd-turbo, sdxl-turbo"):
        bench(arch="sd-v9", device="cpu")
    with pytest.raises(DgqError, match="only steps and pictures"):
        bench(arch="sd-v1.4", what="kernels", device="cpu")
    with pytest.raises(DgqError, match="only an architecture's files are kept"):
        bench(work=tmp_path, device="cpu")
    with pytest.raises(DgqError, match="a model has its own size"):
        bench(pixels=64, device="cpu")
    gib = 2**30
    monkeypatch.setattr(doctor, "memory", lambda: {"total": gib, "available": gib})
    with pytest.raises(DgqError, match=r"sd-v1\.4 takes 6\.\d GiB in float32, 0\.9 GiB are free"):
        bench(arch="sd-v1.4", device="cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * gib, 24 * gib))
    with pytest.raises(DgqError, match=r"sd-v1\.4 takes 6\.\d GiB in float32, 1\.9 GiB are free"):
        bench_architecture("sd-v1.4", (8,), Options(1, torch.device("cuda")))
    monkeypatch.setattr(doctor, "memory", lambda: {"total": 64 * gib, "available": 64 * gib})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=gib))
    with pytest.raises(DgqError, match=r"the models take \d\.\d GiB on disk, 1\.0 GiB are free"):
        bench(arch="sd-v1.4", device="cpu")


def test_step_of_a_float_model_is_quantized_on_the_fly(tiny_pipeline: Path) -> None:
    report = bench(tiny_pipeline, what="step", bits=8, repeats=1)
    rows = {row.system: row for row in report.rows}
    assert list(rows) == ["float32", "bfloat16", "dgq W8A8"]
    assert rows["float32"].relative_error == 0
    for name, limit in (("bfloat16", 0.1), ("dgq W8A8", 0.3)):
        error = rows[name].relative_error
        assert error is not None
        assert 0 < error < limit
    size = rows["dgq W8A8"].disk_mib
    assert size is not None
    assert size < 0.5 * (rows["float32"].disk_mib or 0)
    assert any("on the fly" in note for note in report.notes)


def test_checkpoint_with_its_float_model_gone_measures_no_error(
    tiny_checkpoint: Path, planned: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(tiny_checkpoint)
    assert header is not None
    header.base_model = "/nowhere/model"
    monkeypatch.setattr(steps, "RECORDED_STEPS", 2)
    monkeypatch.setattr(steps, "read_header", lambda folder: header)
    _, notes = bench_step(tiny_checkpoint, None, Options(1, CPU, compiled=False))
    assert planned["written"] == ["random"]  # the float systems' weights
    assert [(system.name, system.comparable) for system in planned["systems"]] == [
        ("float32", True),
        ("bfloat16", True),
        ("dgq W4A8", False),
    ]
    assert planned["systems"][-1].specs[0].folder == str(tiny_checkpoint)
    assert any("not at hand" in note for note in notes)


@pytest.mark.parametrize("options", [{"what": "speed"}, {"bits": 3}, {"repeats": 0}, {"threads": 0}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(DgqError):
        bench(None, **options)  # type: ignore[arg-type]


def test_bits_are_refused_for_a_checkpoint(tiny_checkpoint: Path) -> None:
    with pytest.raises(DgqError, match="W4A8 already"):
        bench(tiny_checkpoint, what="step", bits=8)


def test_other_systems_are_refused_beside_layers() -> None:
    with pytest.raises(DgqError, match="beside steps, not layers"):
        bench(what="kernels", compiled=True)


@pytest.mark.slow
def test_the_compiled_system_gives_the_same_output(small_config: Path) -> None:
    report = bench(arch=str(small_config), bits=8, repeats=1, device="cpu")
    rows = {row.system.split(" ")[0]: row for row in report.rows}
    assert (rows["torch.compile"].relative_error or 0) < 0.05


@pytest.mark.slow
@pytest.mark.skipif((doctor.memory()["available"] or 0) < 12 * 2**30, reason="takes 12 GiB of memory")
def test_a_step_of_stable_diffusion(tmp_path: Path) -> None:
    report = bench(arch="sd-v1.4", bits=8, repeats=1, compiled=False, device="cpu")
    rows = {row.system: row for row in report.rows}
    assert list(rows) == ["float32", "bfloat16", "dgq W8A8"]
    assert 3200 < (rows["float32"].disk_mib or 0) < 3300
    assert 800 < (rows["dgq W8A8"].disk_mib or 0) < 850
    assert 0 < (rows["dgq W8A8"].relative_error or 0) < 0.2
    assert (rows["dgq W8A8"].peak_rss_mib or 0) < (rows["float32"].peak_rss_mib or 0)
