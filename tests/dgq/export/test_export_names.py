"""The original names of a UNet's tensors, held against what diffusers makes of them."""

import pytest
import tiny_pipelines
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from dgq.errors import DgqError
from dgq.export.names import original_names

UNETS = {
    "two levels": {},
    "attention everywhere, two layers": {
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "SDXL's": {
        "layers_per_block": 2,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}


@pytest.mark.parametrize("kind", UNETS)
def test_diffusers_finds_every_tensor_by_its_original_name(kind):
    unet = tiny_pipelines.unet(**UNETS[kind])
    names = original_names(unet, unet.state_dict())
    assert len(set(names.values())) == len(names)
    file = {f"model.diffusion_model.{theirs}": ours for ours, theirs in names.items()}
    found = convert_ldm_unet_checkpoint(file, dict(unet.config))
    assert found == {name: name for name in names}


def test_a_unet_of_another_kind_is_refused():
    unet = tiny_pipelines.unet(time_cond_proj_dim=16)
    with pytest.raises(DgqError, match=r"'time_embedding\.cond_proj\.weight' has no name in the original code"):
        original_names(unet, unet.state_dict())
