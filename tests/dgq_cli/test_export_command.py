"""`dgq export` as a user runs it."""

import json

import pytest
from safetensors import safe_open


def test_a_file_for_comfyui(dgq_command, tiny_checkpoint, tmp_path):
    file = tmp_path / "tiny.safetensors"
    arguments = ("export", tiny_checkpoint, "--to", "comfy", "--out", file)
    run = dgq_command(*arguments)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert str(file) in run.stderr
    assert "Linear layers in int8, integers and scales unchanged: " in run.stderr
    assert "without a place in the format: " in run.stderr
    with safe_open(str(file), framework="pt") as handle:
        marks = [name for name in handle.keys() if name.endswith(".comfy_quant")]  # noqa: SIM118 (not a dict)
        assert handle.metadata()["format"] == "pt"
    assert dgq_command(*arguments).returncode == 1
    run = dgq_command(*arguments, "--overwrite", "--json")
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["bytes"] == file.stat().st_size
    assert len(told["exact"]) + len(told["rounded"]) == len(marks)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]


def test_a_folder_for_diffusers(dgq_command, tiny_checkpoint, tmp_path):
    run = dgq_command("export", tiny_checkpoint, "--to", "diffusers", "--out", tmp_path / "made")
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert "layers of unet in float16: " in run.stderr
    run = dgq_command("inspect", tmp_path / "made")
    assert "is a float model: nothing in it is quantized" in run.stdout
    assert [one.name for one in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("target", ["comfy", "diffusers"])
def test_the_simulated_recipe_is_refused(dgq_command, tiny_paper_checkpoint, tmp_path, target):
    run = dgq_command("export", tiny_paper_checkpoint, "--to", target, "--out", tmp_path / "made.safetensors")
    assert (run.returncode, run.stdout) == (1, "")
    told = " ".join(run.stderr.split())
    assert f"{tiny_paper_checkpoint}: is of the paper recipe, whose layers are simulated" in told
    assert "those of integer and convrot can be exported" in told
    assert not list(tmp_path.iterdir())
