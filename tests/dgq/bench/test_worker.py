"""The process of a system: what it answers, and what happens when it fails."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgq import architectures
from dgq.bench import files, worker
from dgq.bench.systems import Worker
from dgq.bench.worker import Spec
from dgq.errors import DgqError
from dgq.integer.layer import IntegerLayer
from dgq.integer.prepared import Engine
from dgq.recipe import LayerPlan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The float32 system of a small UNet on two calls."""
    root = tmp_path_factory.mktemp("worker")
    config = json.loads(small_config.read_text())
    files.random_model(config, str(root / "float32"), "float32")
    unet = architectures.skeleton(config)
    files.save_calls([architectures.call(unet, 2, CPU, seed=i) for i in range(2)], root / "calls")
    return Spec("torch", str(root / "float32"), "float32", str(root / "calls"))


def test_a_worker_loads_answers_and_tells_when_it_dies(spec: Spec) -> None:
    with Worker(spec) as process:
        unet = files.load_network(Path(spec.folder), torch.float32)
        with torch.no_grad():
            expected = torch.stack([unet(**call).sample for call in files.load_calls(Path(spec.calls))])
        assert process.output.shape == (2, 2, 4, 16, 16)
        torch.testing.assert_close(process.output, expected, rtol=1e-4, atol=1e-4)
        assert process.weight_bytes == sum(parameter.nbytes for parameter in unet.parameters())
        loaded = process.peak_rss_bytes
        assert loaded > 2**26  # torch alone takes more
        assert process.warm_ms > 0
        assert process.run() > 0
        assert process.run() > 0
        assert process.peak_rss_bytes >= loaded
        process._child.kill()
        with pytest.raises(DgqError, match="ended by SIGKILL, perhaps for lack of memory"):
            process.run()
    assert process._child.returncode is not None


def test_a_worker_that_cannot_load_says_why_in_one_line(spec: Spec) -> None:
    with pytest.raises(DgqError, match="nowhere") as caught:
        Worker(dataclasses.replace(spec, folder="/nowhere/model"))
    assert "\n" not in caught.value.message


@torch.no_grad()
def test_max_autotune_is_asked_of_torch(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.append(options) or network)
    step, _ = worker.LOADERS["autotune"](spec)
    assert asked == [{"mode": "max-autotune"}]
    call = files.load_calls(Path(spec.calls))[0]
    unet = files.load_network(Path(spec.folder), torch.float32)
    torch.testing.assert_close(step(call), unet(**call).sample, rtol=1e-4, atol=1e-4)


SCRIPT = """
import os, sys
import torch
from dgq.bench import worker

def noisy(spec):
    print("loading")
    os.write(1, b"from a library\\n")
    def step(call):
        print("stepping")
        return call["sample"]
    return step, None

worker.LOADERS["noisy"] = noisy
worker.main(*sys.argv[1:])
"""


def test_what_libraries_print_is_no_answer(spec: Spec, tmp_path: Path) -> None:
    noisy = worker.as_json(dataclasses.replace(spec, kind="noisy"))
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, noisy, str(tmp_path / "output.npy")],
        input="\n\n",
        capture_output=True,
        text=True,
        check=True,
        env=files.child_environment(),
    )
    first, *others = [json.loads(line) for line in child.stdout.splitlines()]
    assert first["load"].keys() == {"ms", "weight_bytes", "peak_rss_bytes"}
    assert [answer.keys() for answer in others] == [{"ms", "peak_rss_bytes"}] * 2
    assert "from a library" in child.stderr
    assert child.stderr.count("stepping") == 2 + worker.WARM_UP + 2  # both calls, the warm-up, two lines asked


def test_a_step_that_fails_is_an_answer(spec: Spec, tmp_path: Path) -> None:
    wrong = dataclasses.replace(spec, kind="openvino", dtype="float64")
    child = subprocess.run(
        [*files.CHILD, "work", worker.as_json(wrong), str(tmp_path / "output.npy")],
        input="",
        capture_output=True,
        text=True,
        check=False,
        env=files.child_environment(),
    )
    assert child.returncode == 1
    # without OpenVINO it is that which is missing
    assert json.loads(child.stdout)["error"].startswith(("KeyError: ", "ModuleNotFoundError: No module named 'openv"))


def test_casts_keep_timesteps_and_lay_pictures_out_channels_last() -> None:
    call = {"timestep": torch.tensor(3), "sample": torch.randn(1, 4, 2, 2), "added": {"x": torch.randn(2, 3)}}
    moved = {key: worker.cast(value, torch.bfloat16, CPU) for key, value in call.items()}
    assert moved["timestep"].dtype == torch.int64
    assert moved["sample"].dtype == moved["added"]["x"].dtype == torch.bfloat16
    assert moved["sample"].is_contiguous(memory_format=torch.channels_last)


def test_weight_bytes_count_what_a_backend_keeps() -> None:
    layer = IntegerLayer(LayerPlan("linear", 64, 32, 8, 8, False, class_ends=[64]))
    for parameter in layer.parameters():
        parameter.fill_(1)
    stored = worker.weight_bytes(layer)
    assert stored == 32 * 64 + 4 * 32
    ready = layer.prepare(CPU)
    if isinstance(ready, Engine):  # its blocks are the only copy
        assert worker.weight_bytes(layer) == stored - 32 * 64 + ready.engine.packed.nbytes
    else:
        assert worker.weight_bytes(layer) == stored + 32 * 64
