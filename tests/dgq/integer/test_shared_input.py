"""Layers all over a network that read one tensor: one product's parts are bit for bit what each layer gives alone."""

import copy
import dataclasses
import gc
import weakref
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgq.integer.adapters import direct
from dgq.integer.channels import form_groups, no_groups
from dgq.integer.layer import IntegerLayer
from dgq.integer.on_the_fly import round_to_nearest
from dgq.integer.plan import plan_layer
from dgq.integer.shared_input import prepare_all, project, rescale_joined, share
from dgq.recipe import Recipe
from dgq_kernels import native
from tests.dgq.integer.test_fused_unet import call, quantize, unet

CPU = torch.device("cpu")
K = 48


class Ran(TorchDispatchMode):
    """Counts own operators by name."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times[function.__name__.split(".")[0]] += function.namespace == "dgq"
        return function(*args, **(kwargs or {}))


def layer(n, wbits=8, divide=False):
    module, recipe = nn.Linear(K, n), Recipe(wbits=wbits, channels="none", rounding="nearest")
    plan, groups = plan_layer(module, wbits, recipe), no_groups(K)
    if divide:
        groups = form_groups("smooth", torch.linspace(1, 30, K), wbits)
        plan = dataclasses.replace(plan, channels="smooth")
    weight = round_to_nearest(module.weight.detach() * groups.divisor, wbits, plan.weight_group)
    return IntegerLayer.from_quantized(plan, weight, groups, module.bias.detach())


def shared(*layers):
    """(layers that share, copies of them that do not)"""
    apart = copy.deepcopy(layers)
    share(layers, CPU)
    return layers, apart


@pytest.fixture(params=["cpu", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("DGQ_BACKEND", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_gets_what_it_gives_alone(backend, dtype):
    torch.manual_seed(0)
    some = [layer(32), layer(64), layer(32, divide=True), layer(32), layer(64, 4), layer(32, divide=True)]
    layers, apart = shared(*some, layer(64), layer(64, 4))
    for seed in range(2):
        x = torch.randn(2, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with Ran() as ran:
            together = [one(x, activation="silu") for one in layers]
        for one, y in zip(apart, together, strict=True):
            assert torch.equal(y, one(x, activation="silu"))
    if backend == "triton":  # 8 bits, 8 bits divided, 4 bits
        assert (ran.times["silu_quantize_rows"], ran.times["linear_int8"], ran.times["linear_int4"]) == (3, 2, 1)


@torch.no_grad()
def test_results_are_of_the_tensor_that_is_asked_for(backend):
    torch.manual_seed(0)
    (layers, apart), (x, other) = shared(*[layer(32) for _ in range(3)]), torch.randn(2, 2, K)

    def check(one, given, **done):
        assert torch.equal(layers[one](given, **done), apart[one](given, **done))

    def take_all():
        for one in range(3):
            check(one, x)

    for order in ((0, x), (1, other)), ((0, other), (1, x)), ((1, x), (2, other)), ((2, x),):
        for one, given in order:
            check(one, given)
        take_all()
    check(0, x)
    check(1, x, activation="silu")
    take_all()
    check(0, x)
    check(1, x, residual=torch.ones(2, 32))
    check(2, x, norm=nn.LayerNorm(K))
    take_all()
    check(0, x)
    x.mul_(2)
    check(1, x)
    with torch.inference_mode():
        y = torch.randn(2, K)
        check(0, y)
        y.mul_(2)
        check(1, y)
    rows = torch.randn(2, K, requires_grad=True)
    with torch.enable_grad(), Ran() as ran:
        layers[0](rows).sum().backward()
    assert rows.grad is not None
    if backend == "triton":
        assert ran.times["quantize_rows"] == 1
        assert layers[0]._prepared.joined is not None


def exchange_bias(one):
    one.bias = nn.Parameter(one.bias.detach() + 1, requires_grad=False)


def exchange_scale(one):
    one.weight_scale = nn.Parameter(one.weight_scale * 2, requires_grad=False)


def give_memory(one):
    one.bias.data = one.bias.data + 1


def write(one):
    one.bias.add_(1)
    one.weight_scale.mul_(2)


@torch.no_grad()
@pytest.mark.parametrize("change", [exchange_bias, exchange_scale, give_memory, write])
def test_scales_and_biases_that_change_later(backend, change):
    torch.manual_seed(0)
    (layers, apart), x = shared(*[layer(32) for _ in range(3)]), torch.randn(2, K)
    together = [one(x) for one in layers]
    assert backend == "cpu" or all(one.bias.untyped_storage().nbytes() == 3 * 32 * 4 for one in layers)
    for some in (layers, apart):
        change(some[1])
    for _ in range(2):
        changed = [one(x + 0) for one in layers]
        assert all(torch.equal(y, one(x)) for y, one in zip(changed, apart, strict=True))
        rescale_joined(layers)  # finds nothing tuned
    assert not torch.equal(changed[1], together[1])
    for one, same in zip(layers, apart, strict=True):  # files want tensors that share no memory
        saved, expected = one.state_dict(), same.state_dict()
        assert all(torch.equal(saved[name], value) for name, value in expected.items())
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in saved.values())


@torch.no_grad()
def test_layers_go_with_who_holds_them(backend):
    """Without a search for cycles, which a device's memory does not cause."""
    layers, x = [layer(32) for _ in range(3)], torch.randn(2, K)
    share(layers, CPU)
    for one in layers:
        one(x)
    gone = [weakref.ref(one) for one in layers] + [weakref.ref(one._prepared) for one in layers]
    gc.collect()
    gc.disable()
    try:
        del one
        lost = layers.pop()
        expected = copy.deepcopy(lost)(x)
        assert torch.equal(lost(x), expected)
        del lost
        for one in layers:  # compute without the one that is gone
            assert torch.equal(one(x), copy.deepcopy(one)(x))
        del layers, one
        assert not any(ref() for ref in gone)
    finally:
        gc.enable()


@torch.no_grad()
def test_results_that_nobody_asks_for_are_not_made_for_long(backend):
    """Where an attention calls but its values, or tensors that are made anew for each layer."""
    (layers, apart), (x, other) = shared(*[layer(32) for _ in range(3)]), torch.randn(2, 2, K)
    for one, given in ((2, x), (2, other), *[(one, x.clone()) for one in range(3)], (0, x), (1, x), (2, x)):
        assert torch.equal(layers[one](given), apart[one](given))
    assert layers[0]._prepared.shared._last is None  # holds nothing


@torch.no_grad()
@pytest.mark.parametrize("wbits", [8, 4])
def test_a_batch_of_nothing(backend, wbits):
    """Gives one, as float layers do."""
    layers, _ = shared(layer(32, wbits), layer(64, wbits))
    nothing = torch.empty(0, 5, K)
    assert [one.shape for one in project(layers, nothing)] == [(0, 5, 32), (0, 5, 64)]
    assert layers[1].gated(nothing).shape == (0, 5, 32)


@torch.no_grad()
def test_the_projections_of_a_plain_attention(backend):
    """As diffusers calls them: the input is quantized once."""
    attention = Attention(K, heads=2, dim_head=24, bias=True)
    for name in ("to_q", "to_k", "to_v"):
        setattr(attention, name, layer(K))
    apart = copy.deepcopy(attention)
    prepare_all(attention, CPU)
    x = torch.randn(1, 5, K)
    with Ran() as ran:
        y = attention(x)
    assert torch.equal(y, apart(x))
    if backend == "triton":
        assert (ran.times["quantize_rows"], ran.times["linear_int8"]) == (1, 1)


@torch.no_grad()
def test_tuned_scales_take_them_apart_and_put_them_together(backend):
    torch.manual_seed(0)
    layers, apart = shared(*[layer(32) for _ in range(3)])
    x = torch.randn(2, K)
    plain = [one(x) for one in apart]
    for divisors in ([torch.rand(K) + 0.5 for _ in layers], [torch.full((K,), 0.5)] * 3):
        for pair in zip(layers, apart, divisors, strict=True):
            for one in pair[:2]:
                one.set_scales(one.weight_scale * 3, pair[2])
        rescale_joined(layers)
        alone = [one(x) for one in apart]
        for one, y, before in zip(layers, alone, plain, strict=True):
            assert torch.equal(one(x), y)
            assert not torch.equal(y, before)
    for one in layers:
        one.clear_scales()
    rescale_joined(layers)
    assert all(torch.equal(one(x), y) for one, y in zip(layers, plain, strict=True))


@torch.no_grad()
def test_a_layer_whose_weight_is_away_or_another(backend):
    """Offloading exchanges the stored tensor, loading a state gives up the form: the others go on alone."""
    torch.manual_seed(0)
    layers, apart = shared(*[layer(32) for _ in range(3)])
    x = torch.randn(2, K)
    changed = layers[1]
    for one in (changed, apart[1]):
        one.load_state_dict({**one.state_dict(), "weight_scale": 2 * one.weight_scale})
    assert all(torch.equal(one(x), other(x)) for one, other in zip(layers, apart, strict=True))
    changed.restore()
    assert torch.equal(layers[0](x), apart[0](x))
    assert changed._prepared is None  # nobody packed it for another layer's sake


@pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")
def test_a_networks_time_embeddings(monkeypatch):
    model = unet(block_out_channels=(32, 64))
    quantize(model)
    apart = copy.deepcopy(model)
    prepare_all(model, CPU)
    layers = [module.time_emb_proj for module in model.modules() if hasattr(module, "time_emb_proj")]
    groups = Counter(one.out_features for one in layers)
    assert len(groups) == 2
    assert all(len(one._prepared.shared.layers) == groups[one.out_features] > 1 for one in layers)
    calls, linear = [], native.linear
    for place in (native, native.layers):  # called by the first's name, and by `Layer.linear`
        monkeypatch.setattr(
            place, "linear", lambda engines, *a, **k: calls.append(len(engines)) or linear(engines, *a, **k)
        )
    expected = call(apart)
    alone, calls[:] = len(calls), []
    assert torch.equal(call(model), expected)
    assert len(calls) == alone - len(layers) + 2
    assert not set(groups.values()) - set(calls)
    assert all(one._prepared.shared._last is None for one in layers)  # nothing is kept after a step


@torch.no_grad()
def test_float_convolutions_give_quantized_ones_no_copy():
    model = unet(block_out_channels=(32, 64))
    quantize(model)
    weight = model.conv_in.weight.clone()
    prepare_all(model, CPU)
    assert model.conv_in(torch.randn(2, 4, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv_in.weight, weight)


@torch.no_grad()
def test_an_adapter_around_one_of_them():
    peft = pytest.importorskip("peft")
    model = unet()
    quantize(model)
    prepare_all(model, CPU)
    before = call(model)
    name = next(name for name, _ in model.named_modules() if name.endswith("time_emb_proj"))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=[name]))
    adapted = model.get_submodule(name)
    assert direct(adapted, "linear") is not None
    assert torch.equal(call(model), before)  # B is zero
    adapted.lora_B["default"].weight.normal_()
    got = call(model)
    assert not torch.equal(got, before)
    for module in model.modules():
        if isinstance(module, IntegerLayer) and module._prepared is not None:
            module._prepared.shared = None
    assert torch.equal(call(model), got)
