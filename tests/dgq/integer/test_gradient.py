"""Gradients through frozen layers: those of the float layers that the integers stand for; and adapters that train."""

import dataclasses

import pytest
import torch
from torch import nn

from dgq.integer.channels import form_groups
from dgq.integer.layer import IntegerLayer
from dgq.integer.plan import Layer, plan_layer
from dgq.integer.rounding import Roundings, choose_rounded, round_layer
from dgq.integer.shared_input import project
from dgq.integer.statistics import Statistics
from dgq.recipe import Recipe
from dgq_kernels import backend, native, scaled_product

BUILDS = {
    "linear": (lambda: nn.Linear(48, 64), (3, 5, 48)),
    "conv2d": (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 6, 5)),
    "strided": (lambda: nn.Conv2d(32, 20, 3, stride=2, padding=1, bias=False), (2, 32, 7, 6)),
    "pointwise": (lambda: nn.Conv2d(48, 24, 1), (2, 48, 4, 5)),
}


@pytest.fixture(params=["engine", "onednn", "reference", "triton"])
def form(request, monkeypatch):
    """What runs the layers: the engine, what takes its place, the definition, Triton's interpreter."""
    if request.param == "engine":
        if not native.available():
            pytest.skip(f"no CPU engine: {native.describe()}")
        return request.param
    monkeypatch.setattr(native, "available", lambda: False)
    if request.param != "onednn":
        monkeypatch.setenv("DGQ_BACKEND", request.param)
    elif backend.cpu_path() == "reference":
        pytest.skip("oneDNN's products are missing or inexact here")
    return request.param


def built(kind, wbits, channels):
    """(an integer layer, the float layer that it stands for, an input)."""
    torch.manual_seed(0)
    build, shape = BUILDS[kind]
    x = torch.randn(shape)
    x.select(-1 if kind == "linear" else 1, 1).mul_(12)
    recipe = Recipe(wbits=wbits, rounding="nearest", channels="smooth" if channels == "rotate" else channels)
    module = build()
    planned = Layer("layer", module, plan_layer(module, wbits, recipe))
    statistics = Statistics(planned.plan, 1)
    statistics.add(x)
    (one,) = choose_rounded([planned], statistics, recipe)
    if channels == "rotate" and module.weight.shape[1] % 16 == 0:
        smooth = form_groups("smooth", statistics.mean_square.sqrt(), wbits)
        one = round_layer(planned, Roundings(statistics, recipe), dataclasses.replace(smooth, rotation=16))
    weight = one.groups.unfold(one.weight.dequantize(), one.plan)
    with torch.no_grad():
        module.weight.copy_(weight.view_as(module.weight))
    module.requires_grad_(False)
    return IntegerLayer.from_quantized(one.plan, one.weight, one.groups, module.bias), module, x


def around(kind):
    """What `forward` takes beside x for a kind of layer."""
    if kind == "linear":
        return {"norm": nn.LayerNorm(48), "residual": torch.randn(3, 5, 64)}
    if kind == "pointwise":
        return {"norm": nn.GroupNorm(8, 48), "residual": torch.randn(2, 24, 4, 5)}
    channels, n, size = (24, 40, (6, 5)) if kind == "conv2d" else (32, 20, (4, 3))
    return {
        "norm": nn.GroupNorm(8, channels),
        "activation": "silu",
        "offset": torch.randn(2, channels),
        "sample_bias": torch.randn(2, n),
        "residual": torch.randn(2, n, *size),
    }


def plainly(module, x, residual=None, sample_bias=None, norm=None, activation="none", offset=None):
    """`IntegerLayer.forward` of the float layer, in float."""
    x = x if offset is None else x + offset[:, :, None, None]
    x = x if norm is None else norm(x)
    y = module(nn.functional.silu(x) if activation == "silu" else x)
    y = y if sample_bias is None else y + sample_bias[:, :, None, None]
    return y if residual is None else y + residual


def leaves(*values):
    """Every tensor of them, and the parameters of every norm."""
    found = []
    for value in values:
        found += list(value.parameters()) if isinstance(value, nn.Module) else [value]
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def gradients(run, sources):
    """(the result of `run`, the gradients of these leaves under a fixed gradient of it)."""
    for leaf in sources:
        leaf.requires_grad_()
        leaf.grad = None
    y = run()
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return y.detach(), [leaf.grad for leaf in sources]


def close(ours, expected, tolerance=1e-4):
    for a, b in zip(ours, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("channels", ["none", "smooth", "shift", "rotate"])
@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("kind", BUILDS)
def test_the_input_has_the_float_layers_gradient(kind, wbits, channels, form):
    layer, module, x = built(kind, wbits, channels)
    y, got = gradients(lambda: layer(x), [x])
    with torch.no_grad():
        assert torch.equal(y, layer(x))  # the integers' result, whoever asks for gradients
    close(got, gradients(lambda: module(x), [x])[1], 1e-5)


@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("kind", BUILDS)
def test_kernels_multiply_by_the_packed_weight(kind, wbits, monkeypatch):
    """Where they unpack weights themselves, no tile of a gradient's product is made; half precision is near too."""
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    monkeypatch.setattr(scaled_product.Weight, "tiles", None)
    layer, module, x = built(kind, wbits, "rotate")
    expected = gradients(lambda: module(x), [x])[1]
    half = x.detach().half()
    (got,) = gradients(lambda: layer(half), [half])[1]
    assert got.dtype == torch.float16
    close([got.float()], expected, 2e-3)


@pytest.mark.parametrize("kind", BUILDS)
def test_all_that_a_layer_takes_in_has_gradients(kind, form):
    """Residual, embedding and norm: where the layer takes them over, and where only one of them takes gradients."""
    layer, module, x = built(kind, 4, "none")
    given = around(kind)
    sources = leaves(x, *given.values())
    y, got = gradients(lambda: layer(x, **given), sources)
    close(got, gradients(lambda: plainly(module, x, **given), sources)[1])
    with torch.no_grad():
        assert float((y - layer(x, **given)).norm() / y.norm()) < 0.02
    for source in sources:
        for leaf in sources:
            leaf.requires_grad_(leaf is source)
        assert layer(x, **given).requires_grad


def test_gates_pixels_and_shared_inputs_have_gradients(form):
    layer, module, x = built("linear", 8, "smooth")
    norm = nn.LayerNorm(48)
    sources = leaves(x, norm)

    def gated():
        value, gate = module(norm(x)).chunk(2, -1)
        return value * nn.functional.gelu(gate)

    close(gradients(lambda: layer.gated(x, norm), sources)[1], gradients(gated, sources)[1], 0.02)
    shared = gradients(lambda: torch.cat(project([layer, layer], x, norm)), sources)[1]
    close(shared, gradients(lambda: torch.cat([module(norm(x))] * 2), sources)[1])

    group_norm = nn.GroupNorm(8, 48)
    for kind in ("linear", "pointwise"):
        layer, module, _ = built(kind, 8, "smooth")
        pixels = torch.randn(2, 48, 4, 5)
        residual = torch.randn(2, 4, 5, layer.out_features)
        sources = leaves(pixels, group_norm, residual)

        def over_pixels(module=module, pixels=pixels, residual=residual):
            weight = module.weight.flatten(1)
            return nn.functional.linear(group_norm(pixels).permute(0, 2, 3, 1), weight, module.bias) + residual

        ours = gradients(lambda layer=layer, p=pixels, r=residual: layer.over_pixels(p, group_norm, r), sources)[1]
        close(ours, gradients(over_pixels, sources)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    layer, module, x = built("linear", 4, "smooth")
    expected = gradients(lambda: module(x), [x])[1]
    half = x.detach().to(dtype)
    y = layer(half.requires_grad_())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    assert half.grad.dtype == y.dtype == dtype
    close([half.grad.float()], expected, 0.02)


def test_without_gradients_nothing_is_noted():
    layer, _, x = built("linear", 8, "none")
    assert layer(x).grad_fn is None
    x.requires_grad_()
    assert type(layer(x).grad_fn).__name__ == "_StraightThroughBackward"
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert layer(x).grad_fn is None


def test_nothing_of_the_weight_is_kept_for_the_way_back():
    layer, _, x = built("linear", 4, "smooth")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert not saved


def test_a_norm_learns_of_pixels_that_take_no_gradient(form):
    """Torch's own GroupNorm of channels-last pixels ends the process there."""
    layer, module, x = built("conv2d", 8, "none")
    norm = nn.GroupNorm(8, 24)
    found = []
    for run in (layer, lambda x, norm, activation: plainly(module, x, norm=norm, activation=activation)):
        shape = torch.channels_last if run is layer else torch.contiguous_format
        norm.zero_grad()
        run(x.contiguous(memory_format=shape), norm=norm, activation="silu").square().sum().backward()
        found.append((norm.weight.grad.clone(), norm.bias.grad.clone()))
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() < 0.02 * expected.norm()
