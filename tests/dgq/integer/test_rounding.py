"""Statistics and the walk over the layers."""

import copy
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dgq import architectures
from dgq.errors import DgqError
from dgq.family import family_of
from dgq.integer import rounding, weights
from dgq.integer.channels import candidates, form_groups, to_matrix, worth
from dgq.integer.layer import IntegerLayer
from dgq.integer.plan import Layer, plan_layer, plan_layers
from dgq.integer.rounding import (
    JUDGED_ROWS,
    Roundings,
    by_input,
    choose_rounded,
    input_bytes,
    pass_bytes,
    passes,
    quantize_layers,
    quantize_network,
    round_layer,
    rounding_bytes,
)
from dgq.integer.skeleton import build_skeleton
from dgq.integer.statistics import (
    FEWEST_ROWS,
    MOMENT_ROWS,
    ROWS_PER_VALUE,
    WINDOW,
    Quota,
    Statistics,
    gather,
    moment_rows,
    reading_order,
)
from dgq.integer.weights import GPTQ
from dgq.recipe import Recipe
from dgq.replay import spread


class Net(nn.Module):
    """A small net with every kind of layer, called as a UNet is."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 24, 3, padding=1)
        self.point = nn.Conv2d(24, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 8, bias=False)])
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample):
        x = self.depthwise(self.point(torch.relu(self.body(self.conv_in(sample)))))
        x = self.head[1](torch.relu(self.head[0](x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.conv_out(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def calls():
    g = torch.Generator().manual_seed(1)
    return [{"sample": torch.randn(2, 4, 6, 6, generator=g)} for _ in range(6)]


def test_sums_that_could_overflow_are_refused_without_packing(monkeypatch):
    """255 codes times 127, 66,000 times, stay in int32; 70,000 times do not."""
    monkeypatch.setattr(IntegerLayer, "prepare", lambda *_: pytest.fail("packed"))
    recipe = Recipe(wbits=8, rounding="nearest", channels="none")
    for channels in (66_000, 70_000):
        module = nn.Linear(channels, 1, bias=False)
        nn.init.ones_(module.weight)
        layer = Layer("wide", module, plan_layer(module, 8, recipe))
        statistics = Statistics(layer.plan, 1)
        statistics.add(torch.ones(2, channels))
        if channels == 70_000:
            with pytest.raises(DgqError, match="wide: a sum over 70000 products could overflow int32"):
                quantize_layers([layer], statistics, recipe)
        else:
            assert quantize_layers([layer], statistics, recipe)[0].layer.weight.min() == 127


def test_plan_covers_what_can_be_quantized_and_says_why_not(net):
    layers, kept = plan_layers(net, Recipe(overrides=(("head.1", 0), ("body", 8))))
    assert {layer.name: (layer.plan.kind, layer.plan.wbits) for layer in layers} == {
        "body": ("conv2d", 8),
        "point": ("pointwise", 4),
        "head.0": ("linear", 4),
    }
    assert set(kept) == {"conv_in", "conv_out", "depthwise", "head.1"}
    assert "groups=16" in kept["depthwise"]


@pytest.mark.parametrize("arch", ["sd-v1.4", "sdxl-turbo"])
def test_joined_inputs_are_where_the_up_blocks_join_them(arch, monkeypatch):
    unet = architectures.skeleton(architectures.architecture(arch).config)
    expected, joined = [], torch.cat

    def cat(tensors, *args, **kwargs):
        if len(tensors) == 2 and tensors[0].dim() == 4:
            expected.append(tuple(tensor.shape[1] for tensor in tensors))
        return joined(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", cat)
    with torch.no_grad():
        unet(**architectures.call(unet, 1, torch.device("meta")))
    found = family_of(unet).joined_inputs(unet)
    assert [(first, unet.get_submodule(name).in_channels - first) for name, first in found.items()] == expected
    assert len(found) == sum(len(block.resnets) for block in unet.up_blocks)


def small_unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("wbits", [4, 8])
def test_a_joined_input_has_a_scale_for_each_part(wbits):
    """A small skip beside a large hidden state is not rounded away, and only one part carries the bias."""
    torch.manual_seed(0)
    unet = small_unet()
    name, reference = "up_blocks.0.resnets.1.conv_shortcut", copy.deepcopy(unet)
    shortcut = reference.get_submodule(name)
    hidden = family_of(unet).joined_inputs(unet)[name]
    shortcut.weight[:, :hidden] = 0  # the output is the skip's alone
    unet.load_state_dict(reference.state_dict())
    g = torch.Generator().manual_seed(0)
    calls = [
        {"sample": torch.randn(2, 4, 8, 8, generator=g), "timestep": 10, "encoder_hidden_states": torch.randn(2, 5, 32)}
        for _ in range(4)
    ]
    plans, _ = quantize_network(unet, calls, Recipe(wbits=wbits))
    parts = [plan for key, plan in plans.items() if plan.owner(key) == name]
    assert [plan.columns for plan in parts] == [[0, hidden], [hidden, shortcut.in_channels]]
    assert [plan.bias for plan in parts] == [True, False]
    x = torch.randn(2, shortcut.in_channels, 4, 4, generator=g)
    x[:, :hidden] *= 1000
    residual = torch.randn(2, shortcut.out_channels, 4, 4, generator=g)
    target = shortcut(x) + residual
    error = (unet.get_submodule(name)(x, residual) - target).norm() / (target - residual).norm()
    assert error < (0.02 if wbits == 8 else 0.15)
    empty = copy.deepcopy(reference)
    build_skeleton(empty, plans)
    empty.load_state_dict(unet.state_dict())
    assert torch.equal(empty.get_submodule(name)(x), unet.get_submodule(name)(x))
    short = {key: plan for key, plan in plans.items() if key != f"{name}.1"}
    with pytest.raises(DgqError, match="input channels"):
        build_skeleton(copy.deepcopy(reference), short)


def test_override_that_matches_nothing_is_an_error(net):
    with pytest.raises(DgqError, match="nosuch"):
        plan_layers(net, Recipe(overrides=(("nosuch*", 8),)))


def test_second_moment_is_that_of_the_matrix_form():
    """x x^T of im2col columns, in the order the weight matrix has."""
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 3, 7, 7)
    statistics = Statistics(plan_layer(conv, 8, Recipe()), 1)
    statistics.add(x)
    matrix = to_matrix(conv.weight.detach())
    outputs = conv(x).permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(matrix @ statistics.moment @ matrix.t(), outputs @ outputs.t(), rtol=1e-3, atol=1e-3)
    assert statistics.count == outputs.shape[1]
    assert torch.allclose(statistics.mean_square, x.square().mean((0, 2, 3)))


def test_of_large_pictures_a_window_is_a_sample():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    statistics = Statistics(plan_layer(conv, 8, Recipe()), 1)
    statistics.add(torch.randn(2, 3, WINDOW + 1, 3 * WINDOW))
    assert statistics.samples.shape == (2, 3, WINDOW, WINDOW)


@given(
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(5, 9), st.integers(5, 9)),
    wanted=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_some_of_many_rows_are_drawn_without_repeats(kernel, stride, padding, size, wanted, dtype):
    """Each with its own taps: im2col has every row that is drawn, and none is drawn twice."""
    plan = dataclasses.replace(
        plan_layer(nn.Conv2d(size[1], 5, kernel, padding=kernel // 2), 8, Recipe()),
        kind="conv2d",
        stride=stride,
        padding=padding,
    )
    x = torch.randn(size, generator=torch.Generator().manual_seed(wanted)).to(dtype)
    statistics = Statistics(plan, 1)
    statistics._summed = Quota(wanted, 1)
    found = statistics._columns(x.permute(0, 2, 3, 1))
    unfolded = nn.functional.unfold(x.float(), kernel, padding=padding, stride=stride).unflatten(1, (size[1], -1))
    possible = unfolded.permute(0, 3, 2, 1).flatten(0, 1).flatten(1)
    assert len(found) == min(wanted, len(possible))
    assert found.dtype == torch.float32
    left = possible.tolist()
    for row in found.tolist():
        left.remove(row)


@pytest.mark.parametrize("features", [3, 1000])
def test_second_moments_are_of_enough_rows_evenly_from_all_calls(features):
    module = nn.Linear(features, 4)
    calls, rows = 7, 5 * max(ROWS_PER_VALUE * features, FEWEST_ROWS) // 7 + 1
    statistics = Statistics(plan_layer(module, 8, Recipe()), calls)
    for i in range(calls):
        x = torch.zeros(rows, features)
        x[:, 0] = 1
        x[:, i % features] = 1
        statistics.add(x)
    assert statistics.count == moment_rows(features, calls * rows) < calls * rows
    each = statistics.moment.diagonal()[1 : min(features, calls)]
    shares = each / statistics.count * calls
    assert torch.allclose(shares, shares.round(), atol=0.01)
    assert float(statistics.mean_square[0]) == 1


def test_second_moments_are_whole_however_many_blocks_they_were_summed_in():
    linear = nn.Linear(2 * MOMENT_ROWS + 70, 4)
    x = torch.randn(50, linear.in_features)
    statistics = Statistics(plan_layer(linear, 8, Recipe()), 2)
    for part in x.split(30):
        statistics.add(part)
    moment = statistics.moment
    assert torch.allclose(moment, x.t() @ x, rtol=1e-4, atol=1e-3)
    assert statistics.moment is moment
    assert Statistics(statistics.plan, 1, moments=False).moment is None


def test_streaming_equals_one_batch():
    linear = nn.Linear(6, 4)
    x = torch.randn(40, 6)
    whole, parts = (Statistics(plan_layer(linear, 8, Recipe()), n) for n in (1, 4))
    whole.add(x)
    for part in x.split(10):
        parts.add(part)
    assert torch.allclose(whole.moment, parts.moment, rtol=1e-5, atol=1e-4)  # of sums near 40
    assert parts.samples.shape[1] == 6


def test_spread_takes_every_prompt_and_different_steps():
    recorded = [[{"prompt": i, "step": j} for j in range(10)] for i in range(8)]
    chosen = spread(recorded, 16)
    assert len(chosen) == 16
    assert len({call["step"] for call in chosen}) >= 8
    assert len({call["prompt"] for call in chosen}) >= 6
    assert spread(recorded, 1000) == [call for calls in recorded for call in calls]


def test_passes_keep_to_the_budget(net):
    layers, _ = plan_layers(net, Recipe())
    order = [layer.name for layer in layers]
    groups = passes(layers, Recipe(), 1, order)
    assert [len(group) for group in groups] == [1] * len(layers)
    assert len(passes(layers, Recipe(), 2**40, order)) == 1
    for budget in (40_000, 60_000, 100_000):
        groups = passes(layers, Recipe(), budget, order)
        assert [layer for group in groups for layer in group] == layers
        assert all(len(group) == 1 or pass_bytes(group, Recipe()) <= budget for group in groups)
        assert all(pass_bytes([*one, after[0]], Recipe()) > budget for one, after in itertools.pairwise(groups))
    assert [pass_bytes(group, Recipe()) > sum(input_bytes(layer, Recipe()) for layer in group) for group in groups] == [
        True
    ] * len(groups)


def most_bytes_held(run) -> int:
    """The most memory that torch had taken at one time in `run`, less what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("mode", ["none", "shift"])
def test_rounding_takes_the_memory_that_the_estimate_counts(mode):
    """A sum of 11,520 has moments of half a gigabyte: every copy of them counts."""
    module = nn.Conv2d(96, 8, 3, padding=1)
    layer = Layer("one", module, plan_layer(module, 4, Recipe()))
    seen = Statistics(layer.plan, 1)
    x = torch.randn(1, 96, 4, 4)
    x[:, :10] *= 8
    seen.add(x)
    groups = form_groups(mode, seen.mean_square.sqrt(), 4)
    assert groups.mode == mode
    held = most_bytes_held(lambda: round_layer(layer, Roundings(seen, Recipe()), groups))
    assert 4 * layer.plan.reduction**2 < held < 1.7 * rounding_bytes(layer, Recipe())


def test_rotated_moments_are_counted_where_a_rotation_is_tried():
    module = nn.Linear(256, 8)
    layer, k = Layer("one", module, plan_layer(module, 4, Recipe())), 256
    counted = {mode: rounding_bytes(layer, Recipe(channels=mode)) for mode in ("auto", "none", "smooth", "rotate")}
    assert counted["rotate"] - counted["none"] == 4 * k * k
    assert counted["smooth"] == counted["none"]
    for mode, taken in counted.items():
        rotated = any(one.rotation for one in candidates(mode, torch.ones(k), 4))
        assert taken == counted["rotate" if rotated else "none"]
    assert rounding_bytes(layer, Recipe(rounding="nearest")) == 4 * 8 * k * 8


@pytest.mark.parametrize("wbits, abits, floor", [(8, 8, 33), (4, 8, 20), (4, 6, 18)])
@torch.no_grad()
def test_whole_net(net, calls, wbits, abits, floor):
    expected = net(calls[0]["sample"])
    plans, sqnr = quantize_network(net, calls, Recipe(wbits=wbits, abits=abits))
    assert set(plans) == set(sqnr) == {"body", "point", "head.0", "head.1"}
    assert all(isinstance(net.get_submodule(name), IntegerLayer) for name in plans)
    y = net(calls[0]["sample"])
    assert float(20 * torch.log10(expected.norm() / (y - expected).norm())) > floor


@torch.no_grad()
def test_many_passes_give_the_same_model(net, calls):
    import copy

    one, many = copy.deepcopy(net), copy.deepcopy(net)
    quantize_network(one, calls, Recipe())
    quantize_network(many, calls, Recipe(), budget=1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name]), name


@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_outlier_channels_are_found_and_plain_layers_left_alone(kind, wbits):
    g = torch.Generator().manual_seed(0)
    module = nn.Linear(64, 32, bias=False) if kind == "linear" else nn.Conv2d(64, 32, 3, padding=1, bias=False)
    x = torch.randn((512, 64) if kind == "linear" else (8, 64, 6, 6), generator=g)
    recipe = Recipe(wbits=wbits)

    def chosen():
        layer = Layer("one", module, plan_layer(module, wbits, recipe))
        seen = Statistics(layer.plan, 1)
        seen.add(x)
        return layer, seen, choose_rounded([layer], seen, recipe)[0]

    module.weight.data.normal_(generator=g)
    assert chosen()[2].groups.mode == "none"
    x[:, :3] *= 20
    module.weight.data[:, :3] /= 20
    layer, seen, best = chosen()
    assert best.groups.mode != "none"
    assert (best.groups.divisor[:3] > 1).all()
    tried = [
        (groups, round_layer(layer, Roundings(seen, recipe), groups).error)
        for groups in candidates("auto", seen.mean_square.sqrt(), wbits)
    ]
    assert best.error in [error for _, error in tried]
    judged = [
        (round_layer(layer, Roundings(seen, recipe), groups, judged=True).error / (1 - worth(groups)), groups)
        for groups, _ in tried
    ]
    least = min(judged, key=lambda one: one[0])[1]
    assert (best.groups.mode, best.groups.rotation) == (least.mode, least.rotation)


def test_layers_of_one_input_are_handled_alike():
    """Queries, keys and values: whatever suits all of them best, so that one quantized input serves them."""

    class Attention(nn.Module):
        is_cross_attention = False

        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, sample):
            return self.to_q(sample) + self.to_k(sample) + self.to_v(sample)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

        def forward(self, sample):
            return self.attn(sample)

    torch.manual_seed(0)
    net = Whole()
    x = torch.randn(200, 64)
    x[:, 3] *= 30
    with torch.no_grad():
        net.attn.to_k.weight[:, :3] = net.attn.to_k.weight[:, 4:] = 0  # alone it would not mind the outlier
    alone = {}
    for name, module in net.attn.named_children():
        layer = Layer(name, module, plan_layer(module, 8, Recipe(wbits=8)))
        seen = Statistics(layer.plan, 1)
        seen.add(x)
        alone[name] = choose_rounded([layer], seen, Recipe(wbits=8))[0].plan
    plans, _ = quantize_network(net, [{"sample": x}], Recipe(wbits=8))
    kinds = {(plan.channels, plan.rotation, tuple(plan.class_ends)) for plan in plans.values()}
    assert len(kinds) == 1
    assert len({(plan.channels, plan.rotation) for plan in alone.values()}) > 1


@torch.no_grad()
def test_what_an_input_takes_is_made_once_for_all_its_layers(monkeypatch):
    """Queries, keys and values read one input: one set of statistics, one matrix for each handling, and one factor."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()
    layers = [layer for layer in plan_layers(unet, Recipe())[0] if ".attn1.to_" in layer.name and layer.owner]
    together = by_input(layers)[0]
    assert len(together) == 3
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": 10, "encoder_hidden_states": torch.randn(2, 5, 32)}
    gathered = gather(unet, layers, [call], reading_order(unet, layers, call))
    assert set(gathered) == {some[0].name for some in by_input(layers)}
    prepared, factored = [], []
    monkeypatch.setattr(rounding, "GPTQ", Watched := type("Watched", (GPTQ,), {}))
    monkeypatch.setattr(
        Watched, "__init__", lambda *args, **options: prepared.append(1) or GPTQ.__init__(*args, **options)
    )
    factor = weights._upper_factor
    monkeypatch.setattr(weights, "_upper_factor", lambda *args: factored.append(1) or factor(*args))
    seen = gathered[together[0].name]
    tried = len(candidates("auto", seen.mean_square.sqrt(), 4))
    quantize_layers(together, seen, Recipe())
    assert tried <= len(prepared) <= tried + 1  # another than the last may be chosen
    assert len(factored) == 1


def test_some_rows_choose_for_a_wide_layer(monkeypatch):
    g = torch.Generator().manual_seed(0)
    module = nn.Linear(64, 1000, bias=False)
    module.weight.data.normal_(generator=g)
    x = torch.randn(512, 64, generator=g)
    x[:, :3] *= 20
    module.weight.data[:, :3] /= 20
    layer = Layer("one", module, plan_layer(module, 4, Recipe()))
    seen = Statistics(layer.plan, 1)
    seen.add(x)
    rounded = []
    whole = round_layer

    def watched(*args, **options):
        rounded.append(whole(*args, **options))
        return rounded[-1]

    monkeypatch.setattr(rounding, "round_layer", watched)
    best = choose_rounded([layer], seen, Recipe())[0]
    assert [len(one.weight.codes) for one in rounded] == [JUDGED_ROWS] * (len(rounded) - 1) + [1000]
    monkeypatch.setattr(rounding, "JUDGED_ROWS", 1000)
    expected = choose_rounded([layer], seen, Recipe())[0]
    assert best.groups.mode == expected.groups.mode != "none"
    assert torch.equal(best.weight.codes, expected.weight.codes)
    assert best.error == expected.error


def test_finished_layers_are_not_done_again(net, calls):
    import copy

    stored = {}
    first = copy.deepcopy(net)
    quantize_network(first, calls, Recipe(), store=stored.__setitem__)
    again = []
    done = {name: stored[name] for name in ("body", "head.0")}
    quantize_network(net, calls, Recipe(), store=lambda name, _: again.append(name), done=done)
    assert again == ["point", "head.1"]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])


def test_the_files_of_a_model_are_let_go_of_while_layers_are_rounded_and_afterwards(net, calls, tmp_path):
    """Else the whole float model is resident beside what rounding takes, and beside the VAE and text encoders later."""
    net.head[0] = nn.Sequential(nn.Linear(16, 40_000), nn.Linear(40_000, 32))  # two of 2.5 and 5 MB that stay float
    file = tmp_path / "net.safetensors"
    save_file(net.state_dict(), file)
    net.load_state_dict(load_file(file), assign=True)
    expected, resident = {name: tensor.clone() for name, tensor in net.state_dict().items()}, []

    def told(stage, *_):
        entries = [entry for entry in Path("/proc/self/smaps").read_text().split("VmFlags:") if str(file) in entry]
        sizes = [int(re.search(r"^Rss: +(\d+) kB", entry, re.MULTILINE)[1]) for entry in entries]
        resident.append((stage, sum(sizes)))

    plans, _ = quantize_network(net, calls, Recipe(overrides=(("head.0.*", 0),)), progress=told)
    assert max(kib for stage, kib in resident if stage == "statistics") > 5000
    assert max(kib for stage, kib in resident if stage == "quantize") < 500
    assert str(file) not in Path("/proc/self/maps").read_text()
    for name, tensor in net.state_dict().items():
        if name.rpartition(".")[0] not in plans:
            assert torch.equal(tensor, expected[name])


def test_layer_with_bad_weights_is_named(net, calls):
    net.point.weight.data[0, 0] = float("nan")
    with pytest.raises(DgqError, match=r"point|body|head"):
        quantize_network(net, calls, Recipe())


def test_gather_removes_its_hooks(net, calls):
    layers, _ = plan_layers(net, Recipe())
    gather(net, layers, calls, reading_order(net, layers, calls[0]))
    assert not any(layer.module._forward_pre_hooks for layer in layers)


class Twice(Net):
    """Names in another order than it computes in, and one layer that reads twice in a call."""

    def forward(self, sample):
        x = self.body(self.conv_in(sample))
        x = self.point(torch.relu(self.point(torch.relu(x)).repeat(1, 2, 1, 1)[:, :24]))
        x = self.head[0](x.permute(0, 2, 3, 1))
        return self.conv_out(self.head[1](x).permute(0, 3, 1, 2))


def counted(modules):
    """How often each module computes in what follows."""
    done = dict.fromkeys(modules, 0)

    def hook(name):
        def count(*_):
            done[name] += 1

        return count

    for name, module in modules.items():
        module.register_forward_hook(hook(name))
    return done


@torch.no_grad()
def test_calls_end_at_the_last_layer_that_a_pass_is_for(calls, monkeypatch):
    torch.manual_seed(0)
    net = Twice().eval()
    layers, _ = plan_layers(net, Recipe())
    order = reading_order(net, layers, calls[0])
    assert order == ["body", "point", "point", "head.0", "head.1"]
    whole = gather(net, layers, calls, [*order, "body"])  # as if more was read: no call ends early
    done = counted({name: net.get_submodule(name) for name in ("conv_in", "body", "point", "head.0", "conv_out")})
    (point,) = (layer for layer in layers if layer.name == "point")
    early = gather(net, [point], calls, order)["point"]
    assert torch.equal(early.moment, whole["point"].moment)
    assert torch.equal(early.samples, whole["point"].samples)
    assert early.count == 2 * 2 * 6 * 6 * len(calls)
    # its second reading ends the call, before it computes
    assert done == {"conv_in": 6, "body": 6, "point": 6, "head.0": 0, "conv_out": 0}


@torch.no_grad()
def test_passes_follow_the_network_and_end_early():
    """A UNet names its up blocks before the middle one, which computes before them."""
    torch.manual_seed(0)
    unet = small_unet()
    recipe, budget = Recipe(), 12 * 2**20
    layers, _ = plan_layers(unet, recipe)
    calls = [architectures.call(unet, 1, torch.device("cpu"), timestep=i, seed=i) for i in (3, 500)]
    one, many, stored = copy.deepcopy(unet), copy.deepcopy(unet), {}
    plans = quantize_network(one, calls, recipe)
    done = counted({name: many.get_submodule(name) for name in ("conv_in", "mid_block", "up_blocks.1", "conv_out")})
    assert quantize_network(many, calls, recipe, store=stored.__setitem__, budget=budget) == plans
    assert list(plans[0]) == [layer.name for layer in layers]  # as the model has them, in whichever order they are done
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name]), name
    places = {name.split(".")[0]: i for i, name in enumerate(stored)}
    assert places["down_blocks"] < places["mid_block"] < places["up_blocks"]
    order = reading_order(unet, layers, calls[0])
    last = [group[-1].name for group in passes(layers, recipe, budget, order)]
    up = sum(name.startswith("up_blocks") for name in last)
    assert 0 < up < len(last) - 1
    # one call tells the order; all others end before conv_out
    assert done == {
        "conv_in": 1 + len(last) * len(calls),
        "mid_block": 1 + up * len(calls),
        "up_blocks.1": 1,
        "conv_out": 1,
    }
