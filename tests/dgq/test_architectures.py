"""Well-known architectures: their sizes, their calls, and what is refused."""

import json

import pytest
import torch

from dgq import architectures
from dgq.architectures import ARCHITECTURES
from dgq.errors import DgqError
from dgq.replay import predicted

META = torch.device("meta")
# published: of the UNets of Stable Diffusion v1.4 and SDXL-Turbo
PARAMETERS = {"sd-v1.4": 859_520_964, "sd-turbo": 865_910_724, "sdxl-turbo": 2_567_463_684}
# what their authors call them, in 1000 millions
BILLIONS = {
    "sd3.5-medium": 2.2,
    "sd3.5-large": 8.1,
    "flux.1-dev": 11.9,
    "flux.1-schnell": 11.9,
    "flux.2-klein-4b": 3.9,
    "flux.2-klein-9b": 9.1,
    "pixart-alpha": 0.6,
    "pixart-sigma": 0.6,
    "z-image": 6.2,
    "qwen-image": 20.4,
    "sana-1.6b": 1.6,
}
SAMPLES = {  # of the output at the default size
    "sd-v1.4": (4, 64, 64),
    "sd-turbo": (4, 64, 64),
    "sdxl-turbo": (4, 64, 64),
    "sd3.5-medium": (16, 128, 128),
    "sd3.5-large": (16, 128, 128),
    "flux.1-dev": (4096, 64),
    "flux.1-schnell": (4096, 64),
    "flux.2-klein-4b": (4096, 128),
    "flux.2-klein-9b": (4096, 128),
    "pixart-alpha": (8, 64, 64),
    "pixart-sigma": (8, 128, 128),
    "z-image": (16, 1, 128, 128),
    "qwen-image": (4096, 64),
    "sana-1.6b": (32, 32, 32),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_the_models(name):
    known = ARCHITECTURES[name]
    network = architectures.network(known)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == PARAMETERS[name] if name in PARAMETERS else round(count / 1e9, 1) == BILLIONS[name]
    with META:
        output = predicted(network, architectures.call(network, known.batch, META, tokens=known.tokens))
        assert output.shape == (known.batch, *SAMPLES[name])
        smaller = predicted(network, architectures.call(network, known.batch, META, pixels=256))
    # 256 pixels are 32 rows of latents, 8 of Sana's, or 256 patches
    assert smaller.shape[1 if smaller.dim() == 3 else -1] == {"sana-1.6b": 8}.get(
        name, 256 if smaller.dim() == 3 else 32
    )


def test_calls_differ_by_their_seed_only(small_config):
    unet = architectures.skeleton(json.loads(small_config.read_text()))
    first, again, other = (architectures.call(unet, 2, torch.device("cpu"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first["sample"], again["sample"])
    assert not torch.equal(first["sample"], other["sample"])
    assert first["timestep"].shape == ()
    assert first["encoder_hidden_states"].shape == (2, 77, 32)


def test_the_call_of_a_unet_that_is_told_the_guidance_and_of_one_width_a_level(small_config):
    config = {**json.loads(small_config.read_text()), "time_cond_proj_dim": 16, "cross_attention_dim": [32, 32]}
    unet = architectures.skeleton(config)
    call = architectures.call(unet, 2, META)
    assert call["timestep_cond"].shape == (2, 16)
    assert call["encoder_hidden_states"].shape == (2, 77, 32)
    ran = []
    unet.time_embedding.cond_proj.register_forward_hook(lambda *_: ran.append(True))
    assert unet(**call).sample.shape == (2, 4, 16, 16)
    assert ran == [True]


def test_a_config_file_is_an_architecture(small_config, tmp_path):
    assert architectures.architecture(str(small_config)).config["cross_attention_dim"] == 32
    with pytest.raises(DgqError, match="no such file"):
        architectures.architecture(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DgqError, match="not a JSON object"):
        architectures.architecture(str(tmp_path / "config.json"))


def test_an_unknown_architecture_and_a_bad_configuration_are_refused(small_config):
    with pytest.raises(DgqError, match=r"not one of sd-v1\.4, sd-turbo, sdxl-turbo"):
        architectures.architecture("sd-v9")
    with pytest.raises(DgqError, match="cannot be used"):
        architectures.skeleton({"down_block_types": ["NoBlock"]})
    config = json.loads(small_config.read_text())
    images = architectures.skeleton({**config, "class_embed_type": "timestep"})
    with pytest.raises(DgqError, match="conditions"):
        architectures.call(images, 2, META)
    for other in ({"cross_attention_dim": [32, 48]}, {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}):
        with pytest.raises(DgqError, match="single cross_attention_dim"):
            architectures.call(architectures.skeleton({**config, **other}), 2, META)
    shapeless = architectures.skeleton({**config, "sample_size": None})
    with pytest.raises(DgqError, match="lacks a sample_size"):
        architectures.call(shapeless, 2, META)
