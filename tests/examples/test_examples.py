"""Every example runs as its own first line says, on the tiny pipeline."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import dgq

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """run(script, *arguments): what the script prints; the files it writes are in tmp_path."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_load_and_draw(example, tiny_checkpoint, tmp_path):
    files = example("load_and_draw.py", tiny_checkpoint, "a dog").split()
    assert files == ["picture-1.png", "picture-2.png"]
    first, second = (Image.open(tmp_path / file) for file in files)
    assert first.text["parameters"].startswith("a dog\nSteps: 3,")
    assert first.tobytes() != second.tobytes()


def test_calibrate(example, tiny_pipeline, tmp_path):
    printed = example("calibrate.py", tiny_pipeline, tmp_path / "out")
    assert re.search(r"\d+ layers, the worst is \S+ with [\d.]+ dB", printed)
    assert "'psnr_db'" in printed
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_compare_with_float(example, tiny_checkpoint):
    found = dict(line.split(": ") for line in example("compare_with_float.py", tiny_checkpoint).splitlines())
    assert found["prompts"] == "2"
    assert 10 < float(found["latent_sqnr_db"]) < 80


def test_plain_diffusers(example, tiny_checkpoint, tmp_path):
    assert example("plain_diffusers.py", tiny_checkpoint) == "cat.png, 16 x 16, drawn by StableDiffusionPipeline\n"
    assert Image.open(tmp_path / "cat.png").size == (16, 16)


def test_on_the_fly(example, tiny_pipeline, tmp_path):
    printed = example("on_the_fly.py", tiny_pipeline, tmp_path / "out")
    assert re.fullmatch(r"DgqConfig\(wbits=8, .*\): [\d.]+ MiB, the same picture again\n", printed)
    assert (tmp_path / "out" / "unet" / "config.json").is_file()


def test_inspect_layers(example, tiny_checkpoint):
    first, *rest = example("inspect_layers.py", tiny_checkpoint).splitlines()
    assert first.startswith("integer W4A8: ")
    assert len([line for line in rest if " dB  W4A8" in line]) == 5
    assert rest[-1].startswith("--override ")


def test_train_lora(example, tiny_checkpoint, tmp_path):
    Image.new("RGB", (24, 24), (200, 30, 30)).save(tmp_path / "red.png")
    *losses, files = example("train_lora.py", tiny_checkpoint, "red.png", "a cat", 11).splitlines()
    assert len(losses) == 2
    assert files == "lora/pytorch_lora_weights.safetensors, with.png, without.png"
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    pipe.load_lora_weights(tmp_path / "lora" / "pytorch_lora_weights.safetensors", adapter_name="again")
    assert pipe.get_active_adapters() == ["again"]
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_serve_with_ray(tiny_checkpoint, tmp_path):
    """In a process of its own: Ray starts others, and ends with it."""
    pytest.importorskip("ray", reason="Ray is not installed")
    command = [sys.executable, EXAMPLES / "serve_with_ray.py", tiny_checkpoint, "2"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "16 pictures of 2 replicas; a seed's are the same: True" in run.stdout


def test_each_example_has_its_test():
    assert all(f"test_{file.stem}" in globals() for file in EXAMPLES.glob("*.py"))
