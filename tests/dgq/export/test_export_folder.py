"""A checkpoint as a float folder: plain diffusers loads it, in a process that has no dgq."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file

import dgq
from dgq.calibration.run import Options, calibrate
from dgq.errors import DgqError
from dgq.export import comfy, folder
from dgq.export.source import loaded, open_checkpoint
from dgq.recipe import Recipe

SCRIPT = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
picture = pipe("a cat", num_inference_steps=3, height=16, width=16, output_type="np",
               generator=torch.Generator().manual_seed(1)).images[0]
numpy.save(sys.argv[2], picture)
assert not any(name.split(".")[0] in ("dgq", "dgq_kernels") for name in sys.modules)
"""


def drawn(made, file):
    """A picture of a folder by plain diffusers, in a process that has no dgq."""
    command = [sys.executable, "-P", "-c", SCRIPT, str(made), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(file)


def test_plain_diffusers_draws_nearly_the_same(tiny_checkpoint, tmp_path):
    made = folder.export(open_checkpoint(tiny_checkpoint), tmp_path / "made")
    assert made.layers.keys() == {"unet", "vae"}
    assert made.bytes == sum(file.stat().st_size for file in (tmp_path / "made").rglob("*") if file.is_file())
    for name in ("unet", "vae"):
        config = json.loads((tmp_path / "made" / name / "config.json").read_text())
        assert not {"quantization_config", "_name_or_path"} & set(config)
        written = load_file(tmp_path / "made" / name / "diffusion_pytorch_model.safetensors")
        plain = loaded(open_checkpoint(tiny_checkpoint), name).dequantize().state_dict()
        assert written.keys() == plain.keys()
        assert {tensor.dtype for tensor in written.values()} == {torch.float16}
        assert all(torch.equal(written[key], plain[key]) for key in plain)
    picture = drawn(tmp_path / "made", tmp_path / "picture.npy")
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    generator = torch.Generator().manual_seed(1)
    own = pipe("a cat", num_inference_steps=3, height=16, width=16, output_type="np", generator=generator).images[0]
    error = float(np.mean((picture - own) ** 2))
    assert 0 < error < 10**-2.5  # 25 dB


def test_text_encoders_are_made_float_too(tiny_pipeline, tmp_path):
    options = Options(prompts=["a cat"], steps=1, evaluate=0, text_encoder="int8", vae="float")
    calibrate(tiny_pipeline, tmp_path / "w8a8", Recipe(rounding="nearest"), options)
    made = folder.export(open_checkpoint(tmp_path / "w8a8"), tmp_path / "made")
    assert made.layers.keys() == {"unet", "text_encoder"}
    assert made.layers["text_encoder"] > 0
    written = load_file(tmp_path / "made" / "text_encoder" / "model.safetensors")
    plain = load_file(tiny_pipeline / "text_encoder" / "model.safetensors")
    assert written.keys() == {name for name in plain if "position_ids" not in name}
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    for name, tensor in written.items():
        assert (tensor.float() - plain[name].float()).norm() <= 0.02 * plain[name].float().norm()
    config = json.loads((tmp_path / "made" / "text_encoder" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"  # as of a text encoder that is copied: transformers goes by it
    drawn(tmp_path / "made", tmp_path / "picture.npy")


def test_nothing_is_replaced(tiny_checkpoint, tmp_path):
    source = open_checkpoint(tiny_checkpoint)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to("nowhere")
    cases = {
        tmp_path / "there": "already exists",
        tmp_path / "there" / "thesis.txt": "already exists",
        tmp_path / "link": "is a link",
        tiny_checkpoint: "is, holds or lies in",
        tiny_checkpoint / "inside": "is, holds or lies in",
    }
    for place, message in cases.items():
        with pytest.raises(DgqError, match=message):
            folder.export(source, place)
    assert (tmp_path / "there" / "thesis.txt").read_text() == "years of work"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "there"]


def test_another_family_goes_to_a_folder_but_not_to_comfyui(tmp_path):
    folder_of_flux = tiny_transformers.flux(tmp_path / "flux")
    wanted = PipelineQuantizationConfig(quant_mapping={"transformer": dgq.DgqConfig(wbits=8)})
    DiffusionPipeline.from_pretrained(folder_of_flux, quantization_config=wanted).save_pretrained(tmp_path / "w8")
    source = open_checkpoint(tmp_path / "w8")
    with pytest.raises(DgqError, match="whose tensors' names in ComfyUI's files are not known"):
        comfy.export(source, tmp_path / "flux.safetensors")
    assert not (tmp_path / "flux.safetensors").exists()
    assert folder.export(source, tmp_path / "made").layers.keys() == {"transformer"}
    before, after = (
        load_file(next((tmp_path / one / "transformer").glob("*.safetensors"))) for one in ("flux", "made")
    )
    assert before.keys() == after.keys()
    assert all((after[name] - value).norm() <= 0.02 * value.norm() for name, value in before.items())
