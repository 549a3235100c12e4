"""LoRA files on loaded pipelines: what diffusers draws with them, and what is refused."""

import warnings

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from safetensors.torch import save_file

import dgq
from dgq.checkpoint.reading import family_at
from dgq.errors import DgqError
from dgq.pictures.generation import Settings, generate
from dgq.pictures.loras import check_lora, load_loras

FAST = Settings(steps=2, guidance=3.0, seed=7)


def draw(pipe):
    return generate(pipe, ["a cat"], FAST)[0].latents


@pytest.mark.parametrize("kind", ["checkpoint", "float"])
def test_files_add_up_at_their_strengths(kind, tiny_checkpoint, tiny_pipeline, tmp_path, capfd):
    folder = tiny_checkpoint if kind == "checkpoint" else tiny_pipeline
    files = [tiny_pipelines.lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    pipe, own = dgq.load(folder), dgq.load(folder)
    plain = draw(pipe)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        load_loras(pipe, [(files[0], 0.5), (files[1], -0.25)])
    assert warned == []
    assert capfd.readouterr() == ("", "")
    for name, file in zip(("one", "two"), files, strict=True):
        own.load_lora_weights(str(file), adapter_name=name)
    own.set_adapters(["one", "two"], [0.5, -0.25])
    drawn = draw(pipe)
    assert torch.equal(drawn, draw(own))
    own.set_adapters(["one"], [0.5])
    assert not torch.equal(drawn, draw(own))  # the second one counts
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)


def test_none_changes_nothing(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint)
    load_loras(pipe, [])
    assert pipe.get_active_adapters() == []


def test_a_file_of_another_model_is_refused(tiny_checkpoint, tmp_path):
    wide = tiny_pipelines.lora(tmp_path / "wide.safetensors", width=48)
    other = tmp_path / "other.safetensors"
    save_file({f"unet.nowhere.to_q.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}, other)
    for file, message in ((wide, "cannot be loaded as LoRA of this model"), (other, "LoRA of th")):
        check_lora(file, family_at(tiny_checkpoint))  # names do not tell
        with pytest.raises(DgqError, match=f"{file.name}: .*{message}"):
            load_loras(dgq.load(tiny_checkpoint), [(file, 1.0)])


def test_what_names_tell(tiny_pipeline, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    for name, part in (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("lora", "lora_down.weight"), ("none", "weight")):
        save_file({f"{layer if name != 'none' else 'x'}.{part}": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "pickle.ckpt").write_bytes(b"")
    unet, pixart = family_at(tiny_pipeline), family_at(tiny_transformers.pixart(tmp_path / "pixart"))
    for family, name, message in (
        (unet, "loha.safetensors", "holds LoHa of LyCORIS"),
        (unet, "lokr.safetensors", "holds LoKr, which diffusers reads for FLUX.2 and Z-Image alone"),
        (unet, "none.safetensors", "holds no LoRA"),
        (unet, "nowhere.safetensors", "no such file"),
        (unet, "pickle.ckpt", "is no safetensors file"),
        (pixart, "lora.safetensors", "diffusers loads no LoRA for the PixArt transformer"),
    ):
        with pytest.raises(DgqError, match=f"{name}: {message}"):
            check_lora(tmp_path / name, family)
    check_lora(tmp_path / "lora.safetensors", unet)


def test_without_peft_it_says_what_to_install(tiny_pipeline, tmp_path, monkeypatch):
    file = tiny_pipelines.lora(tmp_path / "style.safetensors")
    monkeypatch.setattr("dgq.pictures.loras.find_spec", lambda name: None)
    with pytest.raises(DgqError, match="needs peft") as error:
        check_lora(file, family_at(tiny_pipeline))
    assert error.value.hint == 'pip install "dgq[lora]"'
