"""Tuned layers against the plain formula, by the float weight that a layer stands for."""

import dataclasses

import pytest
import torch
from torch import nn

from dgq.integer.channels import form_groups
from dgq.integer.folding import interleaved
from dgq.integer.layer import IntegerLayer
from dgq.integer.plan import Layer, plan_layer
from dgq.integer.rounding import Roundings, quantize_layers, round_layer
from dgq.integer.statistics import Statistics
from dgq.recipe import Recipe
from dgq.tuning.forward import Experts, differentiable, expert_of
from dgq.tuning.layout import Layout


class Unet(nn.Module):
    """Something with layers, as `differentiable` sees a UNet."""

    def __init__(self, layer):
        super().__init__()
        self.attn_processors = {}
        self.layer = layer

    def set_attn_processor(self, processor):
        pass


def float_weight(layer: IntegerLayer):
    """(N, C) or (N, C, kh, kw) without the output scale, from the stored form by docs/format.md's words."""
    plan = layer.plan
    k = plan.kernel_size
    matrix = layer.integer_weight().double().view(plan.out_features, k * k, plan.in_features)
    order = layer.order.long() if plan.reordered else torch.arange(plan.in_features)
    result = torch.empty_like(matrix)
    if plan.rotation:  # entries are +-1/4: the matrix of 16 channels, from the operator's docstring
        four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
        assert plan.rotation == 16
        matrix = (matrix.unflatten(-1, (-1, 16)) @ torch.kron(four, four)).flatten(-2)
    for place, channel in enumerate(order):
        shift = sum(end <= place for end in plan.class_ends[:-1])
        divisor = float(layer.inv_divisor[channel]) if plan.channels != "none" else 1.0
        result[:, :, channel] = matrix[:, :, place] * 2.0**shift * divisor
    if plan.kind == "linear":
        return result[:, 0].float()
    return result.view(-1, k, k, plan.in_features).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("form", ["stored", "engine", "triton"])
@pytest.mark.parametrize("channels", ["none", "smooth", "shift", "rotate"])
@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "strided", "pointwise", "upsampled"])
def test_forward_and_gradients_equal_the_formula(kind, wbits, channels, form, monkeypatch):
    torch.manual_seed(0)
    build, shape = {
        "linear": (lambda: nn.Linear(48, 35), (3, 9, 48)),
        "conv2d": (lambda: nn.Conv2d(21, 40, 3, padding=1), (3, 21, 6, 5)),
        "strided": (lambda: nn.Conv2d(32, 20, 3, stride=2, padding=1, bias=False), (3, 32, 7, 6)),
        "pointwise": (lambda: nn.Conv2d(33, 24, 1), (3, 33, 4, 5)),
        "upsampled": (lambda: nn.Conv2d(32, 16, 3, padding=1), (3, 32, 4, 3)),
    }[kind]
    x = torch.randn(shape)
    if kind == "upsampled":  # as the float layer takes it
        x = nn.functional.interpolate(x, scale_factor=2.0)
    axis = -1 if kind == "linear" else 1
    x.select(axis, 1).mul_(12)
    wanted = Recipe(wbits=wbits, channels=channels)
    module = build()
    planned = Layer("layer", module, plan_layer(module, wbits, wanted, kind == "upsampled"))
    statistics = Statistics(planned.plan, 1)
    statistics.add(planned.own(x))
    if channels == "rotate" and kind in ("linear", "strided"):
        smooth = form_groups("smooth", statistics.mean_square.sqrt(), wbits)
        one = round_layer(planned, Roundings(statistics, wanted), dataclasses.replace(smooth, rotation=16))
        layer = IntegerLayer.from_quantized(one.plan, one.weight, one.groups, module.bias)
    else:
        layer = quantize_layers([planned], statistics, wanted)[0].layer
    if form == "triton":
        monkeypatch.setenv("DGQ_BACKEND", "triton")
    if form != "stored":
        layer.prepare(x.device)
    unet = Unet(layer)
    experts = Experts(Layout.of(unet, True), 3, 1000, x.device)
    with torch.no_grad():
        for vector in experts.vectors:
            vector.normal_(0, 0.2)
    times = [900, 10, 950]  # the last, the first and the last expert
    x.requires_grad_()
    with differentiable(unet, experts):
        experts.choose(times)
        y = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
    ours = [y.detach(), x.grad, *(experts.vectors[i].grad for i in (0, 2))]
    assert experts.vectors[1].grad is None

    x.grad = None
    weight, deltas = float_weight(layer), [vector.detach().clone().requires_grad_() for vector in experts.vectors]
    samples = []
    for sample, t in zip(x, times, strict=True):
        parts = experts.layout.split(deltas[min(max(t * 3 // 1000, 0), 2)])
        d_in, d_out = 1 + parts["layer.in"], layer.weight_scale * (1 + parts["layer.out"])
        if kind == "linear":
            samples.append(nn.functional.linear(sample, d_out[:, None] * weight * d_in, layer.bias))
        else:
            scaled = d_out[:, None, None, None] * weight * d_in[:, None, None]
            size = (layer.plan.stride, layer.plan.padding)
            y = nn.functional.conv2d(planned.own(sample[None]), scaled, layer.bias, *size)
            samples.append((interleaved(y) if kind == "upsampled" else y)[0])
    plain = torch.stack(samples)
    plain.backward(g)
    expected = [plain.detach(), x.grad, deltas[0].grad, deltas[2].grad]
    for a, b in zip(ours, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize(
    "t, experts, expected",
    [
        (0, 2, 0),
        (499, 2, 0),
        (500, 2, 1),
        (999, 2, 1),
        (1000, 2, 1),
        (-1, 2, 0),
        (333, 3, 0),
        (334, 3, 1),
        (999, 1, 0),
        (499.7, 2, 0),
    ],
)
def test_the_expert_of_a_timestep(t, experts, expected):
    assert expert_of(t, experts, 1000) == expected


def test_experts_that_a_step_does_not_use_stay_bit_for_bit():
    torch.manual_seed(0)
    wanted = Recipe(wbits=8)
    module, x = nn.Linear(32, 16), torch.randn(2, 5, 32)
    planned = Layer("layer", module, plan_layer(module, 8, wanted))
    statistics = Statistics(planned.plan, 1)
    statistics.add(x)
    unet = Unet(quantize_layers([planned], statistics, wanted)[0].layer)
    experts = Experts(Layout.of(unet, True), 2, 1000, x.device)
    optimizer = torch.optim.AdamW(experts.vectors, lr=0.01, weight_decay=0)
    with differentiable(unet, experts):
        for times in ([0, 999], [100, 200], [0, 999], [900, 800]):  # momentum is there when an expert rests
            before = [vector.detach().clone() for vector in experts.vectors]
            experts.choose(times)
            unet.layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            used = {expert_of(t, 2, 1000) for t in times}
            for number, vector in enumerate(experts.vectors):
                assert torch.equal(vector, before[number]) == (number not in used)
