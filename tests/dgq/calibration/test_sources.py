"""Single-file checkpoints and LoRA, made into float folders."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgq.calibration.run import Options, calibrate
from dgq.calibration.sources import SOURCES, float_folder
from dgq.errors import DgqError
from dgq.pictures.pipelines import load
from dgq.recipe import Recipe

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE = {
    "encoder.down_blocks": "encoder.down", "decoder.up_blocks": "decoder.up", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "resnets": "block",
    "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out",
}  # fmt: skip


def original_unet_name(name: str) -> str:
    """What the original code calls a tensor of the tiny UNet of two levels with one layer each."""
    module, leaf = name.rsplit(".", 1)
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    kind, _, rest = module.partition("_block")
    if kind == "mid":
        what, number, rest = re.fullmatch(r"\.(resnets|attentions)\.(\d)\.(.*)", rest).groups()
        place = f"middle_block.{1 if what == 'attentions' else 2 * int(number)}"
    else:
        level, what, number, rest = re.fullmatch(r"s\.(\d)\.(\w+)\.(\d)\.(.*)", rest).groups()
        first = 2 * int(level) + int(number)
        if what == "downsamplers":
            return f"input_blocks.{2 * int(level) + 2}.0.op.{leaf}"
        if what == "upsamplers":  # the first level of the way up has no attention
            return f"output_blocks.{2 * int(level) + 1}.1.conv.{leaf}"
        place = f"input_blocks.{1 + first}" if kind == "down" else f"output_blocks.{first}"
        place += f".{int(what == 'attentions')}"
    return f"{place}.{RESNET.get(rest, rest) if what == 'resnets' else rest}.{leaf}"


def original_vae_name(name: str) -> str:
    for ours, theirs in VAE.items():
        name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
    return re.sub(r"(?<=decoder\.up\.)\d", lambda level: str(1 - int(level[0])), name)


@pytest.fixture(scope="module")
def single_file(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as one file of Stable Diffusion's original names, in float16."""
    parts = {part: next((tiny_pipeline / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")}
    tensors = {}
    for name, tensor in load_file(parts["unet"]).items():
        tensors[f"model.diffusion_model.{original_unet_name(name)}"] = tensor
    for name, tensor in load_file(parts["vae"]).items():
        matrix = "attentions" in name and tensor.dim() == 2
        tensors[f"first_stage_model.{original_vae_name(name)}"] = tensor[:, :, None, None] if matrix else tensor
    for name, tensor in load_file(parts["text_encoder"]).items():
        inner = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{inner}"] = tensor
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, file)
    return file


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """The tiny pipeline's folder without its weights."""
    shutil.copytree(tiny_pipeline, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "config"


def test_single_file_is_the_model_it_was_made_of(single_file, config, tiny_pipeline, tmp_path):
    made = float_folder(str(single_file), tmp_path / "made", config)
    for part in ("unet", "vae", "text_encoder"):
        before, after = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (tiny_pipeline, made))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].half(), after[name]) for name in before), part
    header = calibrate(
        made, tmp_path / "out", Recipe(rounding="nearest"), Options(prompts=["a cat"], steps=1, evaluate=0)
    )
    assert len(header.layers) == 85
    before = (made / SOURCES).stat().st_mtime_ns
    assert float_folder(str(single_file), made, config) == made
    assert (made / SOURCES).stat().st_mtime_ns == before
    with pytest.raises(DgqError, match="already exists"):
        float_folder(None, made, None, [(single_file, 1.0)])


def lora_file(place: Path, network, alpha: float = 1.0, width: int | None = None) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on a layer in diffusers' names; returns its factors."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = network.get_submodule(name).weight
    g = torch.Generator().manual_seed(0)
    down = torch.randn(2, width or weight.shape[1], generator=g)
    up = torch.randn(weight.shape[0], 2, generator=g)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, place)
    return {"name": name, "delta": up @ down if width is None else None}


def test_lora_is_fused_by_its_weight(tiny_pipeline, tmp_path):
    plain = load(tiny_pipeline, device="cpu").unet
    lora = lora_file(tmp_path / "style.safetensors", plain)
    made = float_folder(str(tiny_pipeline), tmp_path / "made", None, [(tmp_path / "style.safetensors", 0.5)])
    fused = load(made, device="cpu").unet
    for name, tensor in plain.state_dict().items():
        expected = tensor + 0.5 * lora["delta"] if name == f"{lora['name']}.weight" else tensor
        assert torch.allclose(fused.state_dict()[name], expected, atol=1e-6), name
    assert json.loads((made / SOURCES).read_text())["weights"] == [0.5]


def test_what_cannot_be_made_into_a_folder(single_file, config, tiny_pipeline, tmp_path):
    plain = load(tiny_pipeline, device="cpu").unet
    lora_file(tmp_path / "wide.safetensors", plain, width=7)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "other.safetensors")
    cut = load_file(single_file)
    del cut["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(cut, tmp_path / "short.safetensors")
    (tmp_path / "pickle.ckpt").write_bytes(b"x")
    cases = [
        ((str(single_file), None, ()), "holds no configurations and no tokenizer"),
        ((str(tiny_pipeline), config, ()), "for a single-file checkpoint alone"),
        ((str(tmp_path / "pickle.ckpt"), config, ()), "is no safetensors file"),
        ((str(tmp_path / "nosuch.safetensors"), config, ()), "nosuch.safetensors: no such file"),
        ((str(tmp_path / "other.safetensors"), config, ()), "cannot be read as the model of"),
        ((str(tmp_path / "short.safetensors"), config, ()), "short.safetensors: "),
        ((str(tiny_pipeline), None, [(tmp_path / "wide.safetensors", 1.0)]), "wide.safetensors: cannot be loaded as"),
        ((str(tiny_pipeline), None, [(tmp_path / "other.safetensors", 1.0)]), "other.safetensors: .*LoRA"),
    ]  # fmt: skip
    for (model, folder, loras), message in cases:
        with pytest.raises(DgqError, match=message):
            float_folder(model, tmp_path / "made", folder, loras)
    shutil.rmtree(config / "tokenizer")
    with pytest.raises(DgqError, match="tokenizer: the folder is missing"):
        float_folder(str(single_file), tmp_path / "made", config)
    assert not (tmp_path / "made").exists()
