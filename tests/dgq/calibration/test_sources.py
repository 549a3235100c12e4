"""Single-file checkpoints and LoRA, made into float folders."""

import json
import shutil
from pathlib import Path

import original_names
import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from dgq.calibration.run import Options, calibrate
from dgq.calibration.sources import SOURCES, check_sources, float_folder
from dgq.errors import DgqError
from dgq.export import comfy
from dgq.export.source import open_checkpoint
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import load
from dgq.recipe import Recipe


@pytest.fixture(scope="module")
def single_file(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as one file of Stable Diffusion's original names, in float16."""
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(original_names.single_file(tiny_pipeline, [("clip", "cond_stage_model.transformer.")]), file)
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
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(DgqError, match="already exists"):
        float_folder(None, made, None, [(tmp_path / "lora.safetensors", 1.0)])


def test_a_file_without_a_vae_takes_that_of_the_configuration(single_file, config, tiny_pipeline, tmp_path):
    whole = load_file(single_file)
    cut = {name: tensor for name, tensor in whole.items() if not name.startswith("first_stage_model.")}
    save_file(cut, tmp_path / "no-vae.safetensors")
    with pytest.raises(DgqError, match=r"holds no VAE .*, and .*vae has no weights"):
        float_folder(str(tmp_path / "no-vae.safetensors"), tmp_path / "made", config)
    made = float_folder(str(tmp_path / "no-vae.safetensors"), tmp_path / "made", tiny_pipeline)
    for part in ("unet", "vae"):
        before, after = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (tiny_pipeline, made))
        assert all(torch.equal(before[name].half(), after[name]) for name in before), part
    # another VAE makes another model
    (vae,) = (tiny_pipeline / "vae").glob("*.safetensors")
    shutil.copytree(tiny_pipeline, tmp_path / "other")
    save_file({name: tensor + 1 for name, tensor in load_file(vae).items()}, tmp_path / "other" / "vae" / vae.name)
    with pytest.raises(DgqError, match="already exists"):
        float_folder(str(tmp_path / "no-vae.safetensors"), made, tmp_path / "other")


KINDS = {
    "sd2": [("open_clip", "cond_stage_model.model.")],
    "sdxl": [("clip", "conditioner.embedders.0.transformer."), ("open_clip", "conditioner.embedders.1.model.")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_of_other_kinds(kind, tmp_path):
    """Stable Diffusion 2 with OpenCLIP and v-prediction, SDXL with both encoders."""
    if kind == "sdxl":
        folder = tiny_pipelines.sdxl(tmp_path / "float")
    else:
        scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction")
        folder = tiny_pipelines.stable_diffusion(tmp_path / "float", scheduler, use_linear_projection=True)
    file = tmp_path / "model.safetensors"
    save_file(original_names.single_file(folder, KINDS[kind], attends_first=kind == "sdxl"), file)
    made = float_folder(str(file), tmp_path / "made", folder)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])):
        before, after = (load_file(next((place / part).glob("*.safetensors"))) for place in (folder, made))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].half(), after[name]) for name in before), part
    pipes = [load(place, device="cpu", dtype=torch.float16) for place in (folder, made)]
    drawn = [generate(pipe, ["a cat"], Settings(1, 5.0, width=16, height=16, seed=0))[0].image for pipe in pipes]
    assert drawn[0] == drawn[1]


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


@pytest.mark.parametrize("kind", ["lora", "single", "comfy"])
def test_a_folder_is_not_taken_again_when_what_it_was_made_of_has_changed(kind, single_file, tiny_pipeline, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    if kind == "lora":
        lora_file(tmp_path / "style.safetensors", load(base, device="cpu").unet)
        given = (str(base), tmp_path / "made", None, [(tmp_path / "style.safetensors", 1.0)])
        changed = base / "unet" / "diffusion_pytorch_model.safetensors"
    elif kind == "single":
        given = (str(single_file), tmp_path / "made", base)
        changed = base / "scheduler" / "scheduler_config.json"
    else:
        calibrate(base, tmp_path / "q", Recipe("convrot", channels="rotate", attention="float"), Options(evaluate=0))
        comfy.export(open_checkpoint(tmp_path / "q"), tmp_path / "unet.safetensors")
        given = (str(tmp_path / "unet.safetensors"), tmp_path / "made", base)
        changed = base / "text_encoder" / "model.safetensors"
    made = float_folder(*given)
    before = (made / SOURCES).stat().st_mtime_ns
    assert float_folder(*given) == made
    assert (made / SOURCES).stat().st_mtime_ns == before
    if changed.suffix == ".json":
        changed.write_text(changed.read_text() + "\n")
    else:
        save_file({name: tensor + 1 for name, tensor in load_file(changed).items()}, changed)
    with pytest.raises(DgqError, match="already exists, made of other files"):
        float_folder(*given)


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
        ((str(tmp_path / "short.safetensors"), config, ()), "short.safetensors: "),
        ((str(tiny_pipeline), None, [(tmp_path / "wide.safetensors", 1.0)]), "wide.safetensors: cannot be loaded as"),
        ((str(tiny_pipeline), None, [(tmp_path / "other.safetensors", 1.0)]), "other.safetensors: holds no LoRA"),
        ((str(tiny_pipeline), None, [(single_file, 1.0)]), "model.safetensors: holds no LoRA"),
    ]
    for (model, folder, loras), message in cases:
        with pytest.raises(DgqError, match=message):
            float_folder(model, tmp_path / "made", folder, loras)
    shutil.rmtree(config / "tokenizer")
    with pytest.raises(DgqError, match="tokenizer: the folder is missing"):
        float_folder(str(single_file), tmp_path / "made", config)
    assert not (tmp_path / "made").exists()


def test_what_a_single_file_is_not_is_told_by_its_names(single_file, config, tiny_pipeline, tmp_path):
    """Before anything is loaded: parts of a model, adapters, other kinds of models."""
    names = list(load_file(single_file))
    inside = [name for name in names if not name.startswith("cond_stage_model.")]
    held = {
        "vae": [name for name in names if name.startswith("first_stage_model.")],
        "no-vae": [name for name in names if not name.startswith("first_stage_model.")],
        "lora": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
        "loha": ["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"],
        "flux": ["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"],
        "xl": [*inside, "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"],
        "refiner": [*inside, "conditioner.embedders.0.model.x"],
    }
    for name, tensors in held.items():
        save_file({tensor: torch.zeros(1) for tensor in tensors}, tmp_path / f"{name}.safetensors")
    cases = {
        "vae": "holds no UNet",
        "no-vae": "holds no VAE",
        "lora": "is a LoRA, not a model",
        "flux": "holds no UNet",
        "xl": "is SDXL, but .* is a StableDiffusionPipeline",
        "refiner": "is SDXL's refiner, which draws from pictures",
    }
    for name, message in cases.items():
        with pytest.raises(DgqError, match=f"{name}.safetensors: {message}"):
            float_folder(str(tmp_path / f"{name}.safetensors"), tmp_path / "made", config)
    with pytest.raises(DgqError, match=r"loha\.safetensors: holds LoHa of LyCORIS"):
        check_sources(str(tiny_pipeline), None, [(tmp_path / "loha.safetensors", 1.0)])
    index = json.loads((config / "model_index.json").read_text())
    for pipeline in ("StableDiffusionXLPipeline", "StableDiffusionInpaintPipeline"):
        (config / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
        with pytest.raises(DgqError, match=pipeline):
            float_folder(str(single_file), tmp_path / "made", config)
    assert not (tmp_path / "made").exists()


def test_a_lora_of_a_text_encoder_is_fused_too(tmp_path):
    """FLUX's own fusing leaves it out."""
    folder = tiny_transformers.flux(tmp_path / "flux")
    before = load_file(next((folder / "text_encoder").glob("*.safetensors")))
    encoder = "text_model.encoder.layers.0.self_attn.q_proj"
    factors = {part: torch.full(shape, 0.1) for part, shape in {"A": (1, 32), "B": (32, 1)}.items()}
    layers = [f"text_encoder.{encoder}", "transformer.transformer_blocks.0.attn.to_q"]
    save_file(
        {f"{layer}.lora_{part}.weight": value.clone() for layer in layers for part, value in factors.items()},
        tmp_path / "lora.safetensors",
    )
    made = float_folder(str(folder), tmp_path / "made", None, [(tmp_path / "lora.safetensors", 1.0)])
    after = load_file(next((made / "text_encoder").glob("*.safetensors")))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("self_attn.q_proj.weight")}


def test_lokr_is_fused_and_joined_projections_are_taken_apart(tmp_path):
    """FLUX.2's in the original names, whose queries, keys and values are one layer; a LoRA of one of them besides."""
    folder = tiny_transformers.flux2_klein(tmp_path / "flux2")
    before = load_file(next((folder / "transformer").glob("*.safetensors")))
    g = torch.Generator().manual_seed(0)
    first, second, up, down = (torch.randn(*shape, generator=g) for shape in ((4, 4), (24, 8), (32, 2), (2, 32)))
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{name}.lokr_w1": first, f"{name}.lokr_w2": second}, tmp_path / "lokr.safetensors")
    attention = "transformer_blocks.0.attn"
    halves = {"A": down, "B": up}
    save_file(
        {f"transformer.{attention}.to_q.lora_{half}.weight": value for half, value in halves.items()},
        tmp_path / "lora.safetensors",
    )
    loras = [(tmp_path / "lokr.safetensors", 0.5), (tmp_path / "lora.safetensors", 2.0)]
    made = float_folder(str(folder), tmp_path / "made", None, loras)
    after = load_file(next((made / "transformer").glob("*.safetensors")))
    assert after.keys() == before.keys()
    changes = dict(zip(("to_q", "to_k", "to_v"), torch.kron(first / 2, second).chunk(3), strict=True))
    changes["to_q"] = changes["to_q"] + 2 * up @ down
    for layer, change in changes.items():
        torch.testing.assert_close(after[f"{attention}.{layer}.weight"], before[f"{attention}.{layer}.weight"] + change)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{attention}.{layer}.weight" for layer in changes}


def test_a_control_lora_is_refused(tmp_path):
    """It widens the network's input for a second picture: nothing could load what it would make."""
    folder = tiny_transformers.flux(tmp_path / "flux")
    factors = {"transformer.x_embedder.lora_A.weight": (1, 32), "transformer.x_embedder.lora_B.weight": (32, 1)}
    save_file({name: torch.ones(shape) for name, shape in factors.items()}, tmp_path / "control.safetensors")
    with pytest.raises(DgqError, match=r"control\.safetensors: is a control LoRA, which draws from pictures"):
        float_folder(str(folder), tmp_path / "made", None, [(tmp_path / "control.safetensors", 1.0)])
    assert not (tmp_path / "made").exists()
