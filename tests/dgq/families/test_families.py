"""A family is one object: a transformer with other arguments, other latents and no start token, the whole way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import WIDTH, text_encoder, tokenizer

import dgq
from dgq import architectures
from dgq.bench.files import load_network, random_model
from dgq.bench.layers import model_cases
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.reading import family_at, read_header, tensor_table, weight_files
from dgq.errors import DgqError
from dgq.family import FAMILIES, FIRST_AND_LAST, UNKNOWN, Family, family_of, network_of
from dgq.inspection.inspect import inspect, short_block, split_name
from dgq.inspection.measure import MeasureOptions, measure_checkpoint
from dgq.integer.attention import LogAttnProcessor
from dgq.pictures.generation import Settings, generate
from dgq.recipe import Recipe

CHANNELS = 8


class Toy(Family):
    """A tiny relative of Stable Diffusion 3's transformer."""

    import re

    network = "SD3Transformer2DModel"
    title = "toy"
    component = "transformer"
    pipelines = ("StableDiffusion3Pipeline",)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    arguments = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    float_layers: Mapping[str, str] = dict.fromkeys(("pos_embed.proj", "proj_out"), "first and last layer stay float")
    block = re.compile(r"transformer_blocks\.\d+")
    shortened = (("transformer_blocks", "block"),)

    def call(
        self,
        config: Any,
        batch: int,
        device: torch.device,
        *,
        tokens: int,
        timestep: int = 500,
        seed: int = 0,
        pixels: int | None = None,
    ) -> dict[str, Any]:
        size = config.sample_size
        return {
            "hidden_states": torch.zeros(batch, config.in_channels, size, size, device=device),
            "encoder_hidden_states": torch.zeros(batch, tokens, config.joint_attention_dim, device=device),
            "pooled_projections": torch.zeros(batch, config.pooled_projection_dim, device=device),
            "timestep": torch.full((batch,), timestep, device=device),
        }


CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 4 * WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": 8,
}


def build(folder: Path) -> Path:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=16,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**CONFIG),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("toy") / "float")


@pytest.fixture
def unknown() -> Iterator[None]:
    """dgq without the family that knows this network."""
    families = FAMILIES[:]
    FAMILIES[:] = [family for family in families if family.network != Toy.network]
    yield
    FAMILIES[:] = families


@pytest.fixture
def toy(unknown: None) -> Toy:
    family = Toy()
    FAMILIES.append(family)
    return family


def test_a_family_is_calibrated_loaded_drawn_inspected_and_measured(toy: Toy, folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(wbits=8, rounding="nearest", channels="none")
    options = Options(prompts=["a cat"], steps=2, guidance=3.0, evaluate=1)
    predicted = estimate(folder, recipe, options)
    header = calibrate(folder, tmp_path / "out", recipe, options)
    assert predicted.layers == len(header.layers) > 20
    assert predicted.network == "toy"
    assert set(predicted.kept) == set(toy.float_layers)
    assert header.attention is None  # there is no start token: attention stays float
    assert header.calibration["fidelity"]["latent_sqnr_db"] > 20

    assert family_at(tmp_path / "out") is toy
    float_pipe, pipe = dgq.load(folder, device="cpu"), dgq.load(tmp_path / "out", device="cpu")
    assert family_of(network_of(pipe)) is toy
    assert not any(isinstance(one, LogAttnProcessor) for one in network_of(pipe).attn_processors.values())
    pictures = [generate(one, ["a cat"], Settings(steps=2, guidance=3.0))[0] for one in (float_pipe, pipe)]
    assert pictures[0].image.size == (16, 16)
    error = pictures[1].latents - pictures[0].latents
    assert 0 < float(error.norm() / pictures[0].latents.norm()) < 0.1

    measured = measure_checkpoint(
        tmp_path / "out", MeasureOptions(prompts=1, steps=2, device="cpu", against=str(folder))
    )
    assert measured.output_sqnr_db > 20
    assert {one.name for one in measured.layers} == set(header.layers)
    assert not any(one.start_mass for one in measured.attention)
    found = inspect(tmp_path / "out", measurement=measured)
    assert found.network == "toy"
    assert 0.5 < found.ratio < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| toy file |" in card
    block, place = split_name("transformer_blocks.1.attn.to_q")
    assert (short_block(block), place) == ("block 1", "attn.to_q")


def test_a_picture_is_the_one_that_diffusers_makes(toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same noise, the latents' shift included; also where the family packs latents otherwise."""
    pipe = dgq.load(folder, device="cpu")
    picture = generate(pipe, ["a cat"], Settings(steps=2, guidance=3.0, seed=7))[0]
    plain = pipe(
        "a cat",
        negative_prompt="",
        num_inference_steps=2,
        guidance_scale=3.0,
        width=16,
        height=16,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert picture.image.tobytes() == plain.tobytes()

    seen = []
    monkeypatch.setattr(toy, "packed", lambda pipe, latents: latents.flip(-1), raising=False)
    monkeypatch.setattr(toy, "unpacked", lambda pipe, latents, *size: (seen.append(size), latents.flip(-1))[1])
    other = generate(pipe, ["a cat"], Settings(steps=2, guidance=3.0, seed=7))[0]
    assert seen == [(16, 16)]
    assert other.image.tobytes() != plain.tobytes()


def test_a_family_is_benched_by_its_configuration(toy: Toy, folder: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "_class_name": toy.network}
    random_model(config, str(tmp_path / "random"), "float32")
    (weights,) = weight_files(tmp_path / "random" / "transformer")
    assert set(tensor_table(weights)) == set(architectures.skeleton(config).state_dict())  # its table of positions too
    network = load_network(tmp_path / "random", torch.float32)
    call = architectures.call(network, 2, torch.device("cpu"))
    with torch.no_grad():
        assert network(**call).sample.shape == (2, CHANNELS, 8, 8)
    assert {case.plan.in_features for case in model_cases(folder)} >= {32, 128}


def test_without_its_family_it_is_refused_before_anything_is_loaded(
    unknown: None, folder: Path, tmp_path: Path
) -> None:
    for attempt in (
        lambda: dgq.load(folder),
        lambda: calibrate(folder, tmp_path / "out", Recipe()),
        lambda: inspect(folder),
    ):
        with pytest.raises(DgqError, match="'StableDiffusion3Pipeline'; dgq works with StableDiffusionPipeline"):
            attempt()
    assert not list(tmp_path.iterdir())
    assert read_header(folder) is None  # a network that is known by its folder alone
    with pytest.raises(DgqError, match="SD3Transformer2DModel is no network that dgq works with"):
        architectures.skeleton({**CONFIG, "_class_name": "SD3Transformer2DModel"})


@pytest.mark.parametrize("name", ["flux.1-dev", "sd3.5-medium", "qwen-image", "pixart-sigma", "sana-1.6b"])
def test_a_network_of_no_family_is_quantized_nearly_as_by_its_own(name: str) -> None:
    """By the names that layers have in diffusers: no block's layer stays float, no embedder is quantized."""
    network = architectures.network(architectures.ARCHITECTURES[name])
    family = family_of(network)
    layers = [at for at, one in network.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)]
    assert {at for at in layers if UNKNOWN.kept(at)} == {at for at in layers if family.kept(at)}
    assert [UNKNOWN.weight_bits(at, 4) for at in layers] == [family.weight_bits(at, 4) for at in layers]


def test_networks_of_no_family_keep_a_first_and_a_last_convolution() -> None:
    assert family_of(torch.nn.Linear(2, 2)) is UNKNOWN
    assert all(UNKNOWN.kept(name) for name in FIRST_AND_LAST)
    with pytest.raises(DgqError, match="has no network that dgq works with"):
        network_of(object())


def test_a_subclass_is_of_its_class_family() -> None:
    from diffusers import UNet2DConditionModel

    class Own(UNet2DConditionModel):
        pass

    with torch.device("meta"):
        own = Own(block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    assert family_of(own) is FAMILIES[0]


def test_fused_classes_name_the_layers_that_take_in_what_precedes_them() -> None:
    net = architectures.network(architectures.architecture("sd-v1.4"))
    layers = {name for name, one in net.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)}
    after = family_of(net).after_norm(net)
    assert after <= layers
    ends = (
        "attn2.to_k",
        "attn2.to_v",
        "to_out.0",
        "proj_out",
        "conv_shortcut",
        "conv",
        "conv_in",
        "conv_out",
        "linear_1",
    )
    assert [name for name in layers - after if not name.endswith(ends)] == []
    assert not any(name.endswith(ends) for name in after)
