"""Devices and pipelines that dgq can work with, and those it refuses before anything is loaded."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch

import dgq
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.header import Header
from dgq.devices import check_device, default_device
from dgq.errors import DgqError
from dgq.inspection.inspect import inspect
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import described, find_model, resolve
from dgq.recipe import Recipe


@pytest.mark.parametrize("device", ["", "xyz", "mps", "meta", "CPU", " cpu", "cpu:3", "cuda:", "cuda:1e9", 0])
def test_devices_that_are_none(device):
    with pytest.raises(DgqError, match="is not cpu, cuda or cuda:N"):
        check_device(device)


def test_devices():
    assert check_device(None) == default_device()
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    count = torch.cuda.device_count()
    with pytest.raises(DgqError, match="no CUDA device: torch .* sees none" if not count else "torch sees"):
        check_device(f"cuda:{count}")
    if count:
        assert check_device("cuda:0") == torch.device("cuda", 0)


def test_a_device_is_checked_before_the_model(tmp_path):
    with pytest.raises(DgqError, match="'xyz' is not cpu"):
        dgq.load(tmp_path / "nosuch", device="xyz")


@pytest.mark.parametrize(
    "index, message",
    [
        (
            {"_class_name": "StableDiffusionControlNetPipeline"},
            "'StableDiffusionControlNetPipeline'; dgq works with",
        ),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "'StableDiffusionUpscalePipeline'; dgq works with Stable"),
        ({"_class_name": "ChromaPipeline", "unet": None}, "'ChromaPipeline'; dgq works with StableDiffusionPipeline"),
        ({"_class_name": "FluxPipeline", "unet": None}, "the pipeline has no transformer"),
        ({"unet": [None, None]}, "has no unet"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel'; dgq works with diffusers.UNet2DC"),
        ({"unet": ["diffusers", "x" * 10**5]}, "; dgq works with diffusers.UNet2DConditionModel"),
    ],
)
def test_pipelines_that_cannot_work_are_refused_first(tiny_pipeline, tmp_path, index, message):
    """Nothing is there but the index."""
    known = json.loads((tiny_pipeline / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**known, **index}))
    with pytest.raises(DgqError, match=message) as caught:
        resolve(tmp_path)
    assert str(tmp_path / "model_index.json") in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("shards", [False, True])
def test_half_precision_files_alone(tiny_pipeline, tmp_path, shards):
    """A folder whose weights are only of the variant "fp16", whole or in shards, is the same model."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16)
    size = {"max_shard_size": "200KB"} if shards else {}
    pipe.save_pretrained(tmp_path / "half", variant="fp16", **size)
    names = {file.name for file in (tmp_path / "half").rglob("*.safetensors")}
    assert all(".fp16" in name for name in names)
    assert any("-of-" in name for name in names) == shards
    loaded = dgq.load(tmp_path / "half", device="cpu", dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipe, part).state_dict()
        for name, tensor in getattr(loaded, part).state_dict().items():
            assert torch.equal(tensor, expected[name])
    extra = next((tmp_path / "half" / "unet").glob("*.safetensors"))
    extra.unlink()
    with pytest.raises(DgqError, match="half"):
        dgq.load(tmp_path / "half", device="cpu")


def test_a_dtype_by_its_name(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    with pytest.raises(DgqError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        dgq.load(tiny_checkpoint, device="cpu", dtype="int8")


def test_a_model_is_described_once(tiny_checkpoint, monkeypatch):
    """The headers of network and VAE are parsed where it is found, and again where diffusers and the strict loading
    build them."""
    parsed, plain = [], Header.from_dict
    monkeypatch.setattr(Header, "from_dict", classmethod(lambda cls, data: (parsed.append(1), plain(data))[1]))
    found = find_model(tiny_checkpoint)
    assert (found.name, found.label, found.embedded) == (str(tiny_checkpoint), "integer W4A8", False)
    assert Settings(guidance=2.0).resolved(found).steps == found.generation["steps"] == 3
    assert len(parsed) == 2
    assert dgq.load(found, device="cpu").unet is not None
    assert len(parsed) == 6
    own = find_model(None)
    assert (own.name, own.label, own.embedded) == ("dgq-emoji", "float", True)
    assert described(own.folder) == own
    assert described(tiny_checkpoint).header.to_dict() == found.header.to_dict()


def test_a_process_is_left_as_it_was(tiny_pipeline):
    """Neither a word on stderr, nor a filter or a switch of another library that stays."""
    code = """
import logging, sys, dgq
dgq.load(sys.argv[1], device="cpu")
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
assert diffusers_logging.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()
log = logging.getLogger("transformers.utils.import_utils")
assert log.filters == [] and log.level == logging.NOTSET
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny_pipeline)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_safety_checker_loads_strictly_and_quietly(tiny_pipeline, tmp_path, caplog):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = shutil.copytree(tiny_pipeline, tmp_path / "checked")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size=16, crop_size=16).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    log = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")
    log.addHandler(caplog.handler)  # diffusers' loggers do not propagate
    try:
        assert type(dgq.load(folder, device="cpu").safety_checker) is StableDiffusionSafetyChecker
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.text == ""
    file = folder / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("concept_embeds_weights")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DgqError, match=r"safety_checker/model.safetensors: tensor 'concept_embeds_weights' is missing"):
        dgq.load(folder, device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "tokenizer/tokenizer.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_what_diffusers_reads_before_it_asks_dgq_is_verified(tiny_checkpoint, tmp_path, name):
    """Where diffusers ends in an error of its own, which may name no file."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert dgq.verify(folder) == 10
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-9])
    with pytest.raises(DgqError) as told:
        dgq.verify(folder)
    assert str(folder / name) in told.value.message
    assert "\n" not in told.value.message


def test_a_configuration_of_something_else_is_told(tiny_checkpoint, tiny_pipeline, tmp_path):
    """The checksums went with the checkpoint's own; a float model never had any."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    shutil.copy(folder / "model_index.json", folder / "unet" / "config.json")
    with pytest.raises(DgqError, match="has no quantization_config, and the weights are packed"):
        dgq.verify(folder)
    assert dgq.verify(tiny_pipeline) == 0


SD, XL = {"sample_size": 64}, {"sample_size": 128, "addition_embed_type": "text_time"}
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"


@pytest.mark.parametrize(
    "name, scheduler, settings, network, expected",
    [
        ("sd-turbo", EULER, {"timestep_spacing": "trailing"}, SD, (1, 0)),
        ("sdxl-turbo", ANCESTRAL, {"timestep_spacing": "trailing"}, {**XL, "sample_size": 64}, (1, 0)),
        ("mine", ANCESTRAL, {"timestep_spacing": "trailing"}, {**XL, "sample_size": 64}, (1, 0)),
        ("mine", EULER, {"timestep_spacing": "trailing"}, {**SD, "_name_or_path": "stabilityai/sd-turbo"}, (1, 0)),
        ("mine", EULER, {"timestep_spacing": "trailing"}, {**SD, "_name_or_path": "/models/sd-turbo/unet"}, (1, 0)),
        (
            "models--stabilityai--sd-turbo/snapshots/b261bac6fd2cf515557d5d0707481eafa0485ec2",
            EULER,
            {"timestep_spacing": "trailing"},
            SD,
            (1, 0),
        ),
        ("sdxl_lightning_8step", EULER, {"timestep_spacing": "trailing"}, XL, (8, 0)),
        ("RealVisXL_V4.0_Lightning", EULER, {"timestep_spacing": "trailing"}, XL, (4, 0)),
        ("lcm", "LCMScheduler", {}, {**SD, "time_cond_proj_dim": 256}, (4, 8)),
        ("with-lcm-lora", "LCMScheduler", {}, XL, (4, 1)),
        ("hyper", "TCDScheduler", {}, XL, (4, 1)),
        # plain models and their fine-tunes, whatever they are called and however their steps lie
        ("stable-diffusion-v1-4", "PNDMScheduler", {}, SD, (25, 7.5)),
        ("sdxl-base", EULER, {"timestep_spacing": "leading"}, XL, (25, 7.5)),
        ("turbo", EULER, {"timestep_spacing": "leading"}, XL, (25, 7.5)),
        ("turbo", "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, XL, (25, 7.5)),
        ("mine", EULER, {"timestep_spacing": "trailing"}, XL, (25, 7.5)),
        ("turbot", EULER, {"timestep_spacing": "trailing"}, SD, (25, 7.5)),
        ("turbo/mine", EULER, {"timestep_spacing": "trailing"}, SD, (25, 7.5)),
        ("turbo", EULER, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, SD, (25, 7.5)),
        ("turbo", EULER, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, SD, (25, 7.5)),
    ],
)
def test_models_of_few_steps_are_known(tmp_path, name, scheduler, settings, network, expected):
    """By what diffusers writes of the schedulers that they come with, and by a second sign."""
    import diffusers

    folder = tmp_path / name
    kind = "StableDiffusionXLPipeline" if "addition_embed_type" in network else "StableDiffusionPipeline"
    getattr(diffusers, scheduler)(**settings).save_pretrained(folder / "scheduler")
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **network}))
    generation = described(folder).generation
    assert (generation["steps"], generation["guidance"]) == expected


def test_turbo_takes_one_call_of_one_sample(tmp_path):
    """And is calibrated so: its checkpoint says the same."""
    folder = tiny_pipelines.sdxl_turbo(tmp_path / "sdxl-turbo")
    calibrate(folder, tmp_path / "w8a8", Recipe(wbits=8, abits=8), Options(prompts=["a cat"], evaluate=0))
    for place in (folder, tmp_path / "w8a8"):
        found = find_model(place)
        assert found.generation == {"steps": 1, "guidance": 0.0}
        pipe, batches = dgq.load(found, device="cpu"), []
        pipe.unet.register_forward_pre_hook(lambda _, args, batches=batches: batches.append(len(args[0])))
        (picture,) = generate(pipe, ["a cat"], Settings(seed=1).resolved(found))
        assert batches == [1]
        assert "Steps: 1, Sampler: EulerAncestralDiscrete, CFG scale: 0.0" in picture.parameters


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_missing_file_is_told_where_none_may_be_given_in_its_place(tiny_checkpoint, tmp_path, name):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(DgqError, match=f"{name}: is missing"):
        dgq.verify(folder)


def test_files_of_packed_weights_leave_memory(tiny_checkpoint, tmp_path):
    """Once a model is loaded hardly anything of them is read, and they would be resident for as long as it lives."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "own")  # of which no other test's model maps files
    pipe = dgq.load(folder, device="cpu")
    entries = Path("/proc/self/smaps").read_text().split("VmFlags:")
    for name in ("unet", "vae"):
        of = [entry for entry in entries if str(folder / name) in entry]
        assert of  # mapped still
        assert all(re.search(r"^Rss: +0 kB", entry, re.MULTILINE) for entry in of)
    assert pipe("a cat", num_inference_steps=1, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("size", [{}, {"max_shard_size": "50KB"}])
def test_weights_of_another_variant_are_told_as_such(tiny_checkpoint, tmp_path, size):
    """diffusers saves, and loads, any variant; dgq reads "fp16" alone."""
    dgq.load(tiny_checkpoint).save_pretrained(tmp_path / "made", variant="int8", **size)
    with pytest.raises(DgqError, match="text_encoder: holds weights of the variant 'int8' alone"):
        dgq.load(tmp_path / "made")
    with pytest.raises(DgqError, match="unet: holds weights of the variant 'int8' alone"):
        inspect(tmp_path / "made")
    for file in (tmp_path / "made" / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DgqError, match="unet: holds no safetensors weights"):
        inspect(tmp_path / "made")
