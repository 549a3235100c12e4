"""The file format: strict reading, atomic writing."""

import json
import os
import shutil
import stat
from pathlib import Path

import damage
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import dgq
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.header import FORMAT_VERSION, Header
from dgq.checkpoint.reading import (
    check_folder,
    float16_bytes,
    network_bytes,
    read_header,
    tensor_table,
    weight_files,
    weight_variant,
)
from dgq.checkpoint.writing import component_files, copied_files, index_shards
from dgq.errors import DgqError
from dgq.outputs import atomic_folder
from dgq.recipe import LayerPlan, Recipe

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def copy_of(tiny_checkpoint, tmp_path, monkeypatch):
    """A checkpoint that a test may damage; what is wrong with it is seen without checksums too."""
    monkeypatch.setenv("DGQ_VERIFY", "0")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_config(folder, change):
    damage.edit_config(folder / "unet", change)


def edit_tensors(folder, change):
    damage.edit_tensors(folder / WEIGHTS, change)


def test_a_table_of_a_file_that_is_larger_than_memory(tmp_path):
    file, size = tmp_path / "model.safetensors", 2**40
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, size // 4], "data_offsets": [0, size]}}).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + size)  # a hole
    assert tensor_table(file) == {"a": ((2, size // 4), "BF16")}


def test_header_round_trip():
    plan = LayerPlan("linear", 32, 64, 4, 8, False, class_ends=[32])
    header = Header(Recipe(), {"a.b": plan}, base_model="x", calibration={"seed": 1}, dgq_version="9")
    assert Header.from_dict(json.loads(json.dumps(header.to_dict()))) == header


def test_nothing_in_a_checkpoint_is_a_pickle(tiny_checkpoint):
    suffixes = {file.suffix for file in tiny_checkpoint.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md"}


def test_loads_and_draws(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint)
    image = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q: q.update(format_version=FORMAT_VERSION + 1), "format version"),
        (lambda q: q.update(quant_method="other"), "quant_method"),
        (lambda q: q.update(surprise=1), "surprise"),
        (lambda q: q["recipe"].update(wbits=5), "wbits"),
        (lambda q: q.pop("recipe"), "recipe"),
        (lambda q: next(iter(q["layers"].values())).update(in_features=-1), "sizes"),
        (lambda q: q.update(layers=[]), "damaged"),
    ],
)
def test_damaged_headers_are_named(copy_of, change, message):
    edit_config(copy_of, change)
    with pytest.raises(DgqError, match=message):
        dgq.load(copy_of)


def test_header_of_another_model(copy_of):
    edit_config(copy_of, lambda q: q["layers"].update(nosuch=next(iter(q["layers"].values()))))
    with pytest.raises(DgqError, match="nosuch"):
        dgq.load(copy_of)


NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.packed"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NAME), f"{NAME}.*missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensor 'extra'"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), f"{NAME}.*shape"),
        (lambda t: t.update({NAME: t[NAME].float()}), f"{NAME}.*dtype"),
        (lambda t: t["conv_in.weight"].fill_(float("nan")), "conv_in.weight.*finite"),
        (lambda t: t.pop("conv_in.weight"), "conv_in.weight.*missing"),
    ],
)
def test_wrong_tensors_are_named(copy_of, change, message):
    edit_tensors(copy_of, change)
    with pytest.raises(DgqError, match=message):
        dgq.load(copy_of)


@pytest.mark.parametrize("length", [0, 7, 200, -1000])
def test_truncated_weights(copy_of, length):
    data = (copy_of / WEIGHTS).read_bytes()
    (copy_of / WEIGHTS).write_bytes(data[:length])
    with pytest.raises(DgqError, match=r"diffusion_pytorch_model.safetensors.*safetensors"):
        dgq.load(copy_of)


def test_missing_component(copy_of):
    shutil.rmtree(copy_of / "vae")
    with pytest.raises(DgqError, match=r"vae.*missing"):
        dgq.load(copy_of)


def test_pickled_weights_are_refused(copy_of):
    (copy_of / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, copy_of / "vae" / "diffusion_pytorch_model.bin")
    for load in (dgq.load, DiffusionPipeline.from_pretrained):  # as safe_serialization=False leaves it
        with pytest.raises(DgqError, match="pickle"):
            load(copy_of)


def test_paths_that_lead_outside(copy_of):
    index = json.loads((copy_of / "model_index.json").read_text())
    (copy_of / "model_index.json").write_text(json.dumps({**index, "../vae": index["vae"]}))
    with pytest.raises(DgqError, match="plain folder name"):
        check_folder(copy_of)
    (copy_of / "model_index.json").write_text(json.dumps(index))
    shards = json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
    (copy_of / "unet" / "x.safetensors.index.json").write_text(shards)
    with pytest.raises(DgqError, match="outside"):
        check_folder(copy_of)


def test_not_a_model(tmp_path):
    with pytest.raises(DgqError, match=r"model_index.json"):
        dgq.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{not json")
    with pytest.raises(DgqError, match="cannot be read"):
        dgq.load(tmp_path)


def linked_model(tiny_pipeline, folder):
    """The tiny pipeline as the Hugging Face cache holds it: a snapshot of links to blobs. Returns the snapshot."""
    repository = folder / "models--owner--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for i, file in enumerate(file for file in sorted(tiny_pipeline.rglob("*")) if file.is_file()):
        place = snapshot / file.relative_to(tiny_pipeline)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, repository / "blobs" / str(i))
        place.symlink_to(os.path.relpath(repository / "blobs" / str(i), place.parent))
    return snapshot


def test_the_hugging_face_caches_links_are_followed(tiny_pipeline, tmp_path):
    snapshot = linked_model(tiny_pipeline, tmp_path)
    copied = set(copied_files(snapshot))
    assert copied == set(copied_files(tiny_pipeline))
    assert {"model_index.json", "concepts.json", "scheduler/scheduler_config.json"} <= copied


@pytest.mark.parametrize(
    "name, cached",
    [
        ("LICENSE", False),
        ("LICENSE", True),
        ("tokenizer/secret.txt", False),
        ("unet/config.json", True),
        ("vae", False),
    ],
)
def test_links_out_of_the_model_are_not_followed(tiny_pipeline, tmp_path, name, cached):
    source = linked_model(tiny_pipeline, tmp_path) if cached else shutil.copytree(tiny_pipeline, tmp_path / "model")
    secret = tmp_path / "secret"
    if name == "vae":
        shutil.move(source / name, secret)
    else:
        secret.write_text('{"secret": "of this machine"}')
        (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(DgqError, match=f"{name}.*leads out of the model's folder"):
        calibrate(source, tmp_path / "out", Recipe(), Options(prompts=["a cat"]))
    assert not (tmp_path / "out").exists()


def test_a_checkpoints_files_have_the_modes_that_open_gives(tiny_checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    for file in (tiny_checkpoint, *tiny_checkpoint.rglob("*")):
        assert stat.S_IMODE(file.stat().st_mode) == (0o777 if file.is_dir() else 0o666) & ~umask, file


def test_interrupted_write_leaves_nothing(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:  # noqa: PT012
        (folder / "model_index.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(DgqError, match="No space left"), atomic_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_kept_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(DgqError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(ZeroDivisionError), atomic_folder(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "old").exists()
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert [file.name for file in target.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_place_that_cannot_be_written():
    with pytest.raises(DgqError, match="cannot be written"), atomic_folder(Path("/proc/nowhere/out")):
        pass


def test_sizes(tiny_checkpoint, tiny_pipeline):
    packed, full = network_bytes(tiny_checkpoint), float16_bytes(tiny_checkpoint)
    assert full == pytest.approx(network_bytes(tiny_pipeline) / 2, rel=0.1)
    assert packed < 0.4 * full  # tiny layers: headers, scales and biases weigh more than in a real model


@pytest.mark.parametrize(
    "names, chosen, variant",
    [
        ("model.safetensors model.fp16.safetensors", "model.safetensors", None),
        ("model.fp16.safetensors model.bin", "model.fp16.safetensors", "fp16"),
        (
            "diffusion_pytorch_model.non_ema.safetensors lora.safetensors diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
            "fp16",
        ),
        (
            "model-00002-of-00002.safetensors model-00001-of-00002.safetensors model.fp16.safetensors",
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors",
            None,
        ),
        (
            "model.fp16-00001-of-00002.safetensors model.fp16-00002-of-00002.safetensors",
            "model.fp16-00001-of-00002.safetensors model.fp16-00002-of-00002.safetensors",
            "fp16",
        ),
        ("model-00001-of-00001.fp16.safetensors", "model-00001-of-00001.fp16.safetensors", "fp16"),
        ("model-00001-of-00001.safetensors model.safetensors", "model.safetensors", None),
        ("vocab.json scorer.safetensors", "", None),
    ],
)
def test_weight_files(tmp_path, names, chosen, variant):
    for name in names.split():
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path)] == chosen.split()
    assert weight_variant(tmp_path) == variant


def shards(folder, variant, count):
    """Shards of one tensor each, as transformers names them, with their index."""
    names = [f"model{variant}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        save_file({f"tensor{i}": torch.full((2,), float(i))}, folder / name)
    index = {"metadata": {}, "weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize("variants", [["", ".fp16"], [".fp16"]])
def test_a_component_is_copied_with_one_set_of_weights_under_plain_names(tmp_path, variants):
    whole, split = tmp_path / "whole", tmp_path / "split"
    for folder in (whole, split):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.py").write_text("raise SystemExit")
        for variant in variants:
            shards(folder, variant, 3)
    for i, variant in enumerate(variants):
        save_file({"w": torch.full((1,), float(i))}, whole / f"model{variant}.safetensors")
    save_file({"w": torch.zeros(1)}, whole / "adapter.safetensors")

    def copy(source, target):
        target.mkdir()
        for name, file in component_files(source).items():
            shutil.copyfile(file, target / name)
        index_shards(target)

    copy(whole, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "a" / "model.safetensors")["w"] == 0

    copy(split, tmp_path / "b")
    names = {f"tensor{i}": f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)}
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == names
    found = {file.name for file in (tmp_path / "b").iterdir()}
    assert found == {"config.json", "model.safetensors.index.json", *names.values()}
    for i, name in enumerate(names.values()):
        assert load_file(tmp_path / "b" / name)[f"tensor{i}"].tolist() == [i, i]


def test_model_card_says_what_it_is(tiny_checkpoint):
    card = (tiny_checkpoint / "README.md").read_text()
    for part in ("integer W4A8", "gptq", 'dgq.load("tiny-w4a8")', "num_inference_steps=3", "PSNR"):
        assert part in card
    assert read_header(tiny_checkpoint).recipe == Recipe()
