"""The exported folder loads offline, without a warning, and holds what it should."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from diffusers import AutoencoderKL

from embedded.captions import read_concepts
from embedded.export import build_pipeline, notice, vocabulary, write_folder
from embedded.train_unet import build_scheduler
from embedded.train_vae import build_vae

LOAD = """
import sys, warnings
warnings.simplefilter("error")
import torch
from diffusers import StableDiffusionPipeline
print("== loading", file=sys.stderr, flush=True)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a cat", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
assert image.shape == (1, 64, 64, 3), image.shape
assert pipe.scheduler.config.prediction_type == "v_prediction"
"""


@pytest.fixture
def folder(tiny_models, tiny_tokenizer, tmp_path):
    unet, encoder = tiny_models
    build_vae((8, 8, 8, 16)).save_pretrained(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    pipeline = build_pipeline(vae, unet, encoder, tiny_tokenizer, build_scheduler())
    package = {"name": "@a/b", "version": "1.0.0", "licence": "CC-BY-4.0", "attribution": "By the makers of b."}
    out = tmp_path / "model"
    write_folder(
        pipeline, out, {"concepts.json": {"concepts": []}, "manifest.json": {}}, notice({"packages": [package]})
    )
    return out


def test_loads_offline_without_warnings(folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    output = done.stderr.partition("== loading")[2].lower()
    assert not [word for word in ("warn", "unexpected", "missing", "deprecat") if word in output], output


def test_holds_its_notices(folder):
    assert "CC-BY-4.0" in (folder / "NOTICE").read_text()
    assert "By the makers of b." in (folder / "NOTICE").read_text()
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {path.name for path in (folder / "tokenizer").iterdir()}
    assert not folder.with_name("model.new").exists()


def test_manifest_lists_the_weights(folder):
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert hashes.keys() == {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    data = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hashes["unet/diffusion_pytorch_model.safetensors"] == hashlib.sha256(data).hexdigest()


def test_configs_hold_no_path_of_this_machine(folder):
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(), path


def test_vocabulary_names_held_out_pairs():
    words = vocabulary(read_concepts())
    cat = next(entry for entry in words["concepts"] if entry["name"] == "a cat")
    assert "a kitten" in cat["synonyms"]
    assert words["styles"]["fluent-3d"] == "3d"
    assert any(entry["held_out_styles"] for entry in words["concepts"])
    assert any(entry["held_out_backgrounds"] for entry in words["concepts"])
