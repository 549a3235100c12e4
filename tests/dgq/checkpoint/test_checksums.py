"""Checksums of a checkpoint's files: what is in range and still another value is refused, whatever loads it."""

import inspect
import json
import os
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import dgq
from dgq.checkpoint import checksums
from dgq.errors import DgqError

UNET = Path("unet/diffusion_pytorch_model.safetensors")
COMPONENTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def unet_alone(folder):
    return UNet2DConditionModel.from_pretrained(folder / "unet")


def load_on_cpu(folder):
    return dgq.load(folder, device="cpu")


ROUTES = (load_on_cpu, DiffusionPipeline.from_pretrained, unet_alone)


def edit_json(file, change):
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def flip(file, place):
    """One bit of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def refused(route, folder, file, reason="another checksum"):
    with pytest.raises(DgqError, match=reason) as caught:
        route(folder)
    assert caught.value.message.startswith(f"{folder / file}: ")
    assert "\n" not in caught.value.message


def draws(pipe):
    generator = torch.Generator().manual_seed(1)
    return pipe("a cat", num_inference_steps=1, output_type="np", generator=generator).images


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 4096, 12345])
def test_the_checksum_is_zlibs_however_many_threads_compute_it(tmp_path, monkeypatch, size):
    monkeypatch.setattr(checksums, "SPAN", 1000)
    monkeypatch.setattr(checksums, "PIECE", 300)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert checksums.crc32(tmp_path / "file") == f"{zlib.crc32(data):08x}"


def test_a_checkpoint_has_them_of_all_that_is_loaded(folder):
    names = checksums.stored(folder / "unet")
    files = {os.path.relpath(file, folder / "unet") for file in folder.rglob("*") if file.is_file()}
    assert set(names) == {
        name
        for name in files
        if name.removeprefix("../").partition("/")[0]
        not in (
            "README.md",
            "concepts.json",
        )
    }
    assert all(draws(route(folder)).shape == (1, 16, 16, 3) for route in ROUTES[:2])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("file", [UNET, Path("vae") / UNET.name, Path("text_encoder/model.safetensors")])
def test_one_bit_of_a_weight(folder, route, file):
    flip(folder / file, -2)
    refused(route, folder, file)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "file, key, value",
    [
        ("unet/config.json", "cross_attention_norm", "group_norm"),
        ("vae/config.json", "scaling_factor", 0.2),
        ("scheduler/scheduler_config.json", "beta_end", 0.013),
        ("text_encoder/config.json", "layer_norm_eps", 1e-3),
        ("tokenizer/tokenizer_config.json", "unk_token", "a"),
        ("model_index.json", "_diffusers_version", "0.1"),
    ],
)
def test_a_setting_that_can_be(folder, route, file, key, value):
    edit_json(folder / file, lambda config: config.update({key: value}))
    refused(route, folder, file)


@pytest.mark.parametrize("route", ROUTES)
def test_a_plan_that_can_be(folder, route):
    def change(config):
        plan = next(iter(config["quantization_config"]["layers"].values()))
        plan["abits"] = 7

    edit_json(folder / "unet/config.json", change)
    refused(route, folder, "unet/config.json")


def test_the_checksums_themselves(folder):
    whole = (folder / "unet/config.json").read_text()
    for change, file in (
        (lambda sums: sums.pop("../vae/config.json"), "unet/config.json"),
        (lambda sums: sums.update({"../vae/config.json": "00000000"}), "vae/config.json"),
        (lambda sums: sums.update({"config.json": None}), "unet/config.json"),
        (lambda sums: sums.update({"../../etc/passwd": "00000000"}), "unet/config.json"),
        (lambda sums: sums.update({"/etc/passwd": "00000000"}), "unet/config.json"),
    ):
        edit_json(
            folder / "unet/config.json",
            lambda config, change=change: change(config["quantization_config"]["checksums"]),
        )
        refused(load_on_cpu, folder, file, "checksum")
        (folder / "unet/config.json").write_text(whole)
    edit_json(folder / "unet/config.json", lambda config: config["quantization_config"].update(checksums=[]))
    refused(load_on_cpu, folder, "unet/config.json", "checksums")


@pytest.mark.parametrize("route", ROUTES)
def test_a_tokenizers_files_are_those_that_were_written(folder, route):
    (folder / "tokenizer/added_tokens.json").write_text('{"cat": 5}')
    refused(route, folder, "tokenizer/added_tokens.json", "no part of the checkpoint")
    (folder / "tokenizer/added_tokens.json").rename(folder / "tokenizer/.notes")
    route(folder)
    (folder / "tokenizer/tokenizer_config.json").unlink()
    refused(route, folder, "tokenizer/tokenizer_config.json", "is missing")


def test_what_is_done_with_folders_and_files_is_no_damage(folder, tmp_path):
    picture = draws(load_on_cpu(folder))
    edit_json(folder / "unet/config.json", lambda config: None)  # another layout
    (folder / "README.md").write_text("mine")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    # as the hub's cache has it: links, to names that say nothing
    snapshot = tmp_path / "snapshots" / "abc"
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        place = snapshot / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.rename(tmp_path / "blobs" / str(number)))
    for route in ROUTES[:2]:
        assert (draws(route(snapshot)) == picture).all()
    # the network alone, beside what belongs to others
    alone = Path(shutil.copytree(snapshot / "unet", tmp_path / "nets" / "mine"))
    (tmp_path / "nets" / "vae").mkdir()
    (tmp_path / "nets" / "vae" / "config.json").write_text("{}")
    UNet2DConditionModel.from_pretrained(alone)
    flip(alone / UNET.name, -2)
    with pytest.raises(DgqError, match="another checksum"):
        UNet2DConditionModel.from_pretrained(alone)


def test_a_component_that_is_given_need_not_be_there(folder):
    pipe = load_on_cpu(folder)
    shutil.rmtree(folder / "vae")
    (folder / "text_encoder/model.safetensors").unlink()
    given = DiffusionPipeline.from_pretrained(folder, vae=pipe.vae, text_encoder=pipe.text_encoder)
    assert (draws(given) == draws(pipe)).all()


def test_a_component_changed_on_purpose(folder, monkeypatch):
    before = draws(load_on_cpu(folder))
    tensors = load_file(folder / "vae" / UNET.name)
    tensors["decoder.conv_out.bias"] += 0.5
    save_file(tensors, folder / "vae" / UNET.name, metadata={"format": "pt"})
    refused(load_on_cpu, folder, Path("vae") / UNET.name)
    mine = draws(dgq.load(folder, device="cpu", verify=False))
    assert (mine != before).any()
    refused(DiffusionPipeline.from_pretrained, folder, Path("vae") / UNET.name)
    monkeypatch.setenv("DGQ_VERIFY", "0")
    for route in ROUTES[:2]:
        assert (draws(route(folder)) == mine).all()


def test_older_checkpoints_have_none(folder):
    for component in ("unet", "vae"):
        edit_json(folder / component / "config.json", lambda config: config["quantization_config"].pop("checksums"))
    flip(folder / "vae" / UNET.name, -2)
    for route in ROUTES:
        route(folder)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}])
def test_saving_through_diffusers_writes_them_anew(folder, tmp_path, options):
    """diffusers writes components one after the other: the network's own are all that can be known."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    again = tmp_path / "again"
    assert "safe_serialization" in inspect.signature(pipe.unet.save_pretrained).parameters  # pipelines ask
    if "variant" in options:
        pipe.save_pretrained(again, **options)
        load = lambda: DiffusionPipeline.from_pretrained(again, **options)  # noqa: E731
        assert (draws(load()) == draws(pipe)).all()
    else:
        pipe.unet.save_pretrained(again / "unet", **options)
        load = lambda: UNet2DConditionModel.from_pretrained(again / "unet")  # noqa: E731
        load()
    weights = sorted((again / "unet").glob("*.safetensors"))
    assert (len(weights) > 1) == ("max_shard_size" in options)
    assert set(checksums.stored(again / "unet")) == {"config.json", *(file.name for file in weights)}
    flip(weights[-1], -2)
    with pytest.raises(DgqError, match="another checksum"):
        load()


def test_a_model_quantized_on_the_fly_is_saved_with_them(tiny_pipeline, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet", quantization_config=dgq.DgqConfig(wbits=8))
    unet.save_pretrained(tmp_path)
    UNet2DConditionModel.from_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(center_input_sample=True))
    with pytest.raises(DgqError, match=r"config.json: is not as it was written"):
        UNet2DConditionModel.from_pretrained(tmp_path)
