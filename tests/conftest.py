"""A tiny Stable Diffusion pipeline with random weights, for every test that needs a whole model."""

import gc
import json
import os
from collections import Counter
from importlib import metadata, util
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import interpreter
import pytest
import tiny_pipelines
import torch

# Triton decides at its import, which diffusers causes, whether kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if util.find_spec("triton"):
        interpreter.improve()
# What is compared with the CPU must not be rounded to ten bits on the way.
torch.backends.cudnn.allow_tf32 = False
# Memory that nobody wrote shows: torch.empty is NaN, or the largest integer.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


TOKENS = 24  # of a prompt, as the embedded model has them


def pytest_collection_finish() -> None:
    """Have Python look for cycles in what tests make alone: going through all modules takes a tenth of their time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Triton's bindings complain of what is never given back."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests did not run, and why Triton's fail where they cannot run."""
    skipped = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"not run, {count}: {reason.removeprefix('Skipped: ')}", yellow=True)
    numpy = tuple(map(int, metadata.version("numpy").split(".")[:2]))
    try:
        old = metadata.version("triton").startswith("3.6.")
    except metadata.PackageNotFoundError:
        return
    if old and numpy >= (2, 4) and os.environ.get("TRITON_INTERPRET") == "1" and terminalreporter.stats.get("failed"):
        terminalreporter.write_line("Triton 3.6's interpreter does not run with NumPy 2.4 or newer: install numpy<2.4")


def build_tiny_pipeline(folder: Path) -> Path:
    """Save a tiny pipeline with outlier channels in its norms to `folder`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet = tiny_pipelines.unet()
    with torch.no_grad():
        for name, module in unet.named_modules():
            if "norm" in name and getattr(module, "weight", None) is not None:
                module.weight[3] *= 4
    pipe = StableDiffusionPipeline(
        vae=tiny_pipelines.vae(),
        text_encoder=tiny_pipelines.text_encoder(tokens=TOKENS),
        tokenizer=tiny_pipelines.tokenizer(TOKENS),
        unet=unet,
        scheduler=DDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    concepts = {
        "concepts": [{"name": "a cat"}, {"name": "a dog"}],
        "backgrounds": {"white": [255, 255, 255], "blue": [0, 0, 255], "red": [255, 0, 0]},
        "default_background": "white",
    }
    (folder / "concepts.json").write_text(json.dumps(concepts))
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny float pipeline."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W4A8 integer checkpoint of the tiny pipeline."""
    from dgq.calibration.run import Options, calibrate
    from dgq.recipe import Recipe

    out = tmp_path_factory.mktemp("checkpoints") / "tiny-w4a8"
    calibrate(tiny_pipeline, out, Recipe(wbits=4, abits=8), Options(prompts=["a cat", "a dog"], steps=3, evaluate=1))
    return out


@pytest.fixture(scope="session")
def tiny_paper_checkpoint(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W4A8 checkpoint of the tiny pipeline by the published recipe, eight groups."""
    from dgq.calibration.run import Options, calibrate
    from dgq.recipe import Recipe

    out = tmp_path_factory.mktemp("checkpoints") / "tiny-paper"
    calibrate(tiny_pipeline, out, Recipe(name="paper", groups=8), Options(prompts=["a cat"], steps=2, evaluate=0))
    return out


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet's config.json: Stable Diffusion's blocks at a width that a test can afford."""
    config = {
        "sample_size": 16,
        "block_out_channels": [32, 64],
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    }
    file = tmp_path_factory.mktemp("configs") / "small.json"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture(scope="session")
def small_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet's config.json as SDXL-Turbo's, at a width that a test can afford, with the pipeline around it."""
    text = {
        "_class_name": "CLIPTextModel",
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": 598,
        "eos_token_id": 599,
        "pad_token_id": 599,
    }
    pipeline = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder": text,
        "text_encoder_2": {
            **text,
            "_class_name": "CLIPTextModelWithProjection",
            "hidden_size": 64,
            "projection_dim": 64,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [16, 32],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 8,
        },
        "scheduler": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        "steps": 1,
        "guidance": 0.0,
    }
    config = {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 96,
        "attention_head_dim": [2, 4],
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 112,
        "pipeline": pipeline,
    }
    file = tmp_path_factory.mktemp("configs") / "picture.json"
    file.write_text(json.dumps(config))
    return file
