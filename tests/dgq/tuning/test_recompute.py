"""What a UNet keeps for its backward pass: less, and nothing of the result or the gradients changes."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from tiny_pipelines import unet as tiny_unet
from torch import nn

from dgq.tuning import recompute
from dgq.tuning.recompute import lean, replaced


@pytest.fixture
def unet(monkeypatch):
    monkeypatch.setattr(recompute, "_ROWS", 48)  # of 64 tokens a sample: several strips, the last one shorter
    unet = tiny_unet().eval()
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.requires_grad_(False)
    return unet


def call():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([700, 20]), torch.randn(2, 24, 32, generator=g)


def run(unet):
    """(output, gradients of the parameters, bytes that the forward pass kept beside the parameters)."""
    parameters = list(unet.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = unet(*call()).sample
    before = sum(kept.values())  # recomputation packs too
    gradients = torch.autograd.grad(y.square().mean(), trained)
    return y.detach(), gradients, before


def test_results_are_diffusers(unet):
    y, gradients, _ = run(unet)
    with lean(unet, True):
        ours, theirs, _ = run(unet)
    assert torch.allclose(ours, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(theirs, gradients, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-7
    assert not any("forward" in module.__dict__ for module in unet.modules())


def test_checkpointing_changes_no_bit_and_keeps_less(unet):
    with lean(unet, False):
        y, gradients, kept = run(unet)
    with lean(unet, True):
        again, theirs, less = run(unet)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))
    assert less < kept / 3
    unet.enable_gradient_checkpointing()
    assert less < 0.8 * run(unet)[2]


def test_norms_and_activations_are_never_kept(unet):
    block = next(module for module in unet.modules() if isinstance(module, ResnetBlock2D))
    x = torch.randn(1, block.in_channels, 8, 8)
    temb = torch.randn(1, block.time_emb_proj.in_features)

    def kept(forward):
        """Pictures that are kept: of a block between two others its input is there anyway."""
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            forward(x.requires_grad_(), temb)
        return len({t.data_ptr() for t in found if t.dim() == 4 and t.shape[2] == 8} - {x.data_ptr()})

    assert kept(block) == 5
    with lean(unet, False):
        assert kept(block) == 3  # the inputs of the convolutions and of the second norm


def test_what_was_replaced_is_put_back_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), replaced({module: lambda x: 1 / x}):
        module(0)
    assert module(torch.zeros(1, 2)).shape == (1, 2)
