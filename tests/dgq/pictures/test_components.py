"""A pipeline's components as they are loaded."""

import torch
from transformers import CLIPTextModel

from dgq.pictures.components import component


def test_text_encoder_is_what_transformers_loads(tiny_checkpoint):
    """With the buffers that no file holds, and of which the network is made on the meta device first."""
    loaded = component(tiny_checkpoint, "text_encoder", "transformers", "CLIPTextModel", torch.float32)
    expected = CLIPTextModel.from_pretrained(tiny_checkpoint / "text_encoder", dtype=torch.float32)
    tensors, own = ({**dict(net.named_parameters()), **dict(net.named_buffers())} for net in (expected, loaded))
    assert tensors.keys() == own.keys()
    assert "position_ids" in " ".join(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor), name
        assert own[name].dtype == tensor.dtype
