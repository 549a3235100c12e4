"""The forms of a weight, and a backend that comes from outside."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

from dgq.devices import check_device, default_device, present
from dgq.errors import DgqError
from dgq.integer import prepared
from dgq.integer.layer import IntegerLayer
from dgq.integer.plan import plan_layer
from dgq.integer.prepared import Dense, Engine, OneDnn, Packed, form_of
from dgq.recipe import Recipe
from dgq_kernels import backend, native
from dgq_kernels.linear import reference as linear
from dgq_kernels.quantize_activation import reference as quantize

CPU = torch.device("cpu")


def layer_of(module, wbits=8):
    layer = IntegerLayer(plan_layer(module, wbits, Recipe(wbits=wbits)))
    g = torch.Generator().manual_seed(0)
    for name, tensor in layer.named_parameters():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=g) / 10)
        elif name == "subscales":
            tensor.fill_(0x11)
        else:
            tensor.copy_(torch.randint(0, 100, tensor.shape, generator=g))
    return layer


@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_the_form_of_each_backend(name, wbits, monkeypatch):
    monkeypatch.setenv("DGQ_BACKEND", name)
    plan = layer_of(nn.Linear(64, 8), wbits).plan
    on_cpu = Engine if native.available() else OneDnn
    assert form_of(plan, CPU) is {"cpu": on_cpu, "triton": Packed if wbits == 4 else Dense, "reference": Dense}[name]
    shifted = dataclasses.replace(plan, class_ends=[32, 64])
    if name == "cpu" and backend.cpu_path() != "reference":
        assert form_of(shifted, CPU) is OneDnn  # the engine has no shift classes


@pytest.fixture
def abacus():
    """A backend with two ops of its own; the rest runs the references."""
    used = Counter()

    def counted(reference):
        def run(*args, **kwargs):
            used[reference.__name__] += 1
            return reference(*args, **kwargs)

        return run

    def enter(**abilities):
        kernels = {
            one.__name__: counted(one) for one in (linear.linear_int8, linear.linear_int4, quantize.quantize_rows)
        }
        backend.register(backend.Backend("abacus", (), lambda device: "beads", kernels=kernels, **abilities))
        return used

    yield enter
    backend.unregister("abacus")


@torch.no_grad()
@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("fuses", [False, True])
def test_a_backend_from_outside_runs_layers(abacus, wbits, fuses, monkeypatch):
    layer, conv = layer_of(nn.Linear(64, 8), wbits), layer_of(nn.Conv2d(8, 8, 3, padding=1), wbits)
    x, picture, residual = torch.randn(5, 64), torch.randn(2, 8, 4, 4), torch.randn(5, 8)
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    expected = layer(x, residual), conv(picture), layer.gated(x)
    used = abacus(fuses=fuses, unpacks=True)
    monkeypatch.setenv("DGQ_BACKEND", "abacus")
    assert backend.describe(CPU) == ("abacus", "beads")
    for one in (layer, conv):
        one.restore()
    got = layer(x, residual), conv(picture), layer.gated(x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert used == {"quantize_rows": 2, "linear_int4" if wbits == 4 else "linear_int8": 2}
    backend.unregister("abacus")
    with pytest.raises(ValueError, match="DGQ_BACKEND=abacus is not one of reference, cpu, triton"):
        layer.restore(), layer(x)


def test_a_form_from_outside_is_asked_first(abacus, monkeypatch):
    class Beads(Dense):
        @staticmethod
        def serves(plan, which):
            return which.name == "abacus"

    monkeypatch.setattr(prepared, "FORMS", [Beads, *prepared.FORMS])
    used = abacus()
    monkeypatch.setenv("DGQ_BACKEND", "abacus")
    layer = layer_of(nn.Linear(64, 8))
    assert isinstance(layer.prepare(CPU), Beads)
    layer(torch.randn(2, 64))
    assert used["linear_int8"] == 1
    monkeypatch.setenv("DGQ_BACKEND", "cpu")
    assert not issubclass(form_of(layer.plan, CPU), Beads)


def test_a_device_of_its_own(monkeypatch):
    """A backend's devices are selected, found and named in messages, with nothing else told of them."""

    class Module:
        count = 2
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: Module.count)

    really = torch.get_device_module
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module if kind == "xpu" else really(kind))
    monkeypatch.delenv("DGQ_BACKEND", raising=False)
    with pytest.raises(ValueError, match="no kernels for xpu devices, only for cuda and cpu"):
        backend.select(torch.device("xpu"))
    with pytest.raises(DgqError, match="'xpu' is not cpu, cuda or cuda:N"):
        check_device("xpu")
    backend.register(backend.Backend("abacus", ("xpu",), lambda device: "beads"))
    try:
        assert backend.select(torch.device("xpu:1")) == "abacus"
        assert check_device("xpu:1") == torch.device("xpu:1")
        assert torch.device("xpu:1") in present()
        assert default_device().type == ("cuda" if torch.cuda.is_available() else "xpu")
        with pytest.raises(DgqError, match="no device 'xpu:2': torch sees 2, xpu:0 to xpu:1"):
            check_device("xpu:2")
        Module.count = 0
        with pytest.raises(DgqError, match="no XPU device"):
            check_device("xpu")
    finally:
        backend.unregister("abacus")
    assert torch.device("xpu:1") not in present()
