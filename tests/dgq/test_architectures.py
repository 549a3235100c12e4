"""Well-known architectures: their sizes, their calls, and what is refused."""

import json

import pytest
import torch

from dgq import architectures
from dgq.architectures import ARCHITECTURES
from dgq.errors import DgqError

META = torch.device("meta")
# published: of the UNets of Stable Diffusion v1.4 and SDXL-Turbo
PARAMETERS = {"sd-v1.4": 859_520_964, "sdxl-turbo": 2_567_463_684}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_number_of_parameters_is_the_models(name):
    unet = architectures.skeleton(ARCHITECTURES[name].config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_call_fits_the_model(name):
    unet = architectures.skeleton(ARCHITECTURES[name].config)
    output = unet(**architectures.call(unet, ARCHITECTURES[name].batch, META)).sample
    assert output.shape == (ARCHITECTURES[name].batch, 4, 64, 64)


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
    with pytest.raises(DgqError, match=r"not one of sd-v1\.4, sdxl-turbo"):
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
