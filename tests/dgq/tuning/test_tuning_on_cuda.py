"""Tuning and tuned scales on CUDA, on pretended devices: the kernels take them, and results are the CPU's."""

import pytest
import torch
from pretended_devices import Pretended

import dgq
from dgq.integer.shared_input import prepare_all
from dgq.tuning.apply import attach
from dgq.tuning.forward import Experts, differentiable
from dgq.tuning.layout import Layout, integer_layers
from tests.dgq.tuning.test_apply import tuned_scales

PLACE = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def call():
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 8, generator=g), torch.tensor([700]), torch.randn(1, 24, 32, generator=g)


def error(got, expected):
    return float((got.cpu() - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_kernels_take_tuned_scales(tiny_checkpoint):
    unet = dgq.load(tiny_checkpoint, device="cpu").unet
    scales = tuned_scales(unet, size=0.2)

    class Pipe:
        pass

    Pipe.unet = unet
    plain = unet(*call()).sample
    attach(Pipe, "x", scales)
    expected = unet(*call()).sample
    with Pretended() as mode:
        Pipe.unet = unet = dgq.load(tiny_checkpoint, device="cuda", dtype=torch.float32).unet
        prepare_all(unet, PLACE)
        joined = [layer._prepared.joined for layer in integer_layers(unet).values() if layer._prepared.joined]
        assert joined
        arguments = [argument.to(PLACE) for argument in call()]
        first = unet(*arguments).sample.cpu()
        attach(Pipe, "x", scales)
        got = unet(*arguments).sample.cpu()
        dgq.set_tuned(Pipe, {"x": 0.0})
        again = unet(*arguments).sample.cpu()
    # one step of a code is up to 3% of this model's outputs
    assert error(got, expected) < 0.06 < 0.2 < error(got, plain)
    assert torch.equal(first, again)
    assert "linear_int4" in {op.__name__.split(".")[0] for op, _ in mode.ran if op.namespace == "dgq"}


def test_gradients_on_the_device_are_the_cpus(tiny_checkpoint):
    found = []
    for device in ("cpu", "cuda"):
        with Pretended() as mode:
            unet = dgq.load(tiny_checkpoint, device=device, dtype=torch.float32).unet
            for parameter in unet.parameters():
                parameter.requires_grad_(False)
            place = next(unet.parameters()).device
            experts = Experts(Layout.of(unet, True), 2, 1000, place)
            with differentiable(unet, experts):
                experts.choose([700])
                unet(*(argument.to(place) for argument in call())).sample.square().mean().backward()
            found.append(experts.vectors[1].grad.cpu())
            layers = len(integer_layers(unet))
    assert error(found[1], found[0]) < 1e-4
    ran = {op.__name__.split(".")[0]: count for (op, _), count in mode.ran.items() if op.namespace == "dgq"}
    assert ran == {"unscaled_product": layers, "unscaled_product_input": layers}
