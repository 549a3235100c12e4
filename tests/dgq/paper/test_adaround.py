"""The learned rounding of the paper recipe, on a tiny UNet of diffusers' real class."""

import copy
import dataclasses
from typing import Any

import pytest
import tiny_pipelines
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import dgq
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate, decoder_recipe, encoder_recipes, float_model
from dgq.checkpoint.reading import read_header
from dgq.checkpoint.writing import WEIGHTS_NAME
from dgq.errors import DgqError
from dgq.inspection.inspect import inspect
from dgq.paper import adaround
from dgq.paper.adaround import (
    BlockPlan,
    Samples,
    block_costs,
    block_plans,
    kept_calls,
    learn_block,
    learn_rounding,
    pack,
    passes,
    record_blocks,
    unpack,
)
from dgq.paper.calibration import calibrate_paper, quantizable_layers
from dgq.paper.quantizers import QuantizedWeight, dequantize_weight, quantize_weight, weight_grid
from dgq.progress import silent
from dgq.recipe import ITERATIONS, Recipe

pytestmark = pytest.mark.usefixtures("quick")

RESNET = "down_blocks.1.resnets.0"
TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    model: UNet2DConditionModel = tiny_pipelines.unet(cross_attention_dim=24)
    return model.eval()


def calls(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "sample": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor(900 - 100 * i),
            "encoder_hidden_states": torch.randn(2, 6, 24, generator=generator),
        }
        for i in range(count)
    ]


def record(unet: nn.Module, names: list[str], given: list[dict[str, Any]]) -> dict[str, Samples]:
    costs = block_costs(unet, given[0], {name: block_plans(unet, 4)[name] for name in names})
    return record_blocks(unet, given, costs, lambda done, total: None)


def weights_of(unet: nn.Module, plan: BlockPlan) -> dict[str, torch.Tensor]:
    return {layer: unet.get_submodule(layer).weight.detach() for layer in plan.shapes}


@torch.no_grad()
def error(unet: nn.Module, name: str, weights: dict[str, QuantizedWeight], samples: Samples) -> float:
    """Of a block's output, squared and relative, with quantized weights and float activations."""
    args, kwargs, target = samples.batch(range(len(samples)))
    named = {f"{layer}.weight".removeprefix(f"{name}."): dequantize_weight(*one) for layer, one in weights.items()}
    made = functional_call(unet.get_submodule(name), named, tuple(args), kwargs)
    return float((made - target).square().sum() / target.square().sum())


def test_every_quantized_layer_is_in_one_block(unet: UNet2DConditionModel) -> None:
    plans = block_plans(unet, 4)
    layers = [layer for plan in plans.values() for layer in plan.shapes]
    assert sorted(layers) == sorted(quantizable_layers(unet))
    inside = {"conv1", "time_emb_proj", "conv2", "conv_shortcut"}
    assert set(plans[RESNET].shapes) == {f"{RESNET}.{layer}" for layer in inside}
    assert f"{TRANSFORMER}.attn2.to_k" in plans[TRANSFORMER].shapes
    alone = {"time_embedding.linear_1", "mid_block.attentions.0.proj_in", "down_blocks.0.downsamplers.0.conv"}
    assert all(list(plans[name].shapes) == [name] for name in alone)
    assert "conv_in" not in plans


@pytest.mark.parametrize("name", [RESNET, TRANSFORMER, "up_blocks.0.upsamplers.0.conv", "time_embedding.linear_2"])
def test_learned_rounding_beats_nearest_on_inputs_that_it_never_saw(unet: UNet2DConditionModel, name: str) -> None:
    plan = block_plans(unet, 4)[name]
    seen, others = (record(unet, [name], calls(8, seed))[name] for seed in (1, 2))
    learned = learn_block(unet, name, plan, seen, 150)
    nearest = {layer: quantize_weight(weight, 4) for layer, weight in weights_of(unet, plan).items()}
    gain = error(unet, name, learned, others) / error(unet, name, nearest, others)
    assert gain < 0.85


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_one_of_the_two_beside_its_weight(unet: UNet2DConditionModel, bits: int) -> None:
    plan = block_plans(unet, bits)[RESNET]
    up = down = 0
    for layer, (codes, scale, zero_point) in learn_block(
        unet, RESNET, plan, record(unet, [RESNET], calls(2))[RESNET], 30
    ).items():
        weight = unet.get_submodule(layer).weight.detach()
        assert codes.shape == weight.shape
        assert all(torch.equal(a, b) for a, b in zip((scale, zero_point), weight_grid(weight, bits), strict=True))
        shape = (-1,) + (1,) * (weight.ndim - 1)
        exact = weight / scale.view(shape)
        low, high = ((one + zero_point.view(shape)).clamp(0, 2**bits - 1) for one in (exact.floor(), exact.floor() + 1))
        assert bool(((codes == low) | (codes == high)).all())
        up += int(((codes == high) & (low != high)).sum())
        down += int(((codes == low) & (low != high)).sum())
    assert min(up, down) > 0.3 * (up + down)


def learn(unet: nn.Module, given: list[dict[str, Any]], **options: Any) -> dict[str, QuantizedWeight]:
    own = {"budget": 2**20, "progress": silent, "store": lambda name, weights: None, "done": {}, **options}
    return learn_rounding(unet, given, block_plans(unet, 4), 4, **own)


def same(one: dict[str, QuantizedWeight], other: dict[str, QuantizedWeight]) -> bool:
    equal = (torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
    return one.keys() == other.keys() and all(equal)


def test_the_same_calls_give_the_same_codes_however_they_are_held_and_resumed(unet: UNet2DConditionModel) -> None:
    before, stored, told = copy.deepcopy(unet.state_dict()), {}, []
    whole = learn(unet, calls(3), store=stored.__setitem__, progress=lambda stage, *rest: told.append((stage, *rest)))
    assert whole.keys() == quantizable_layers(unet).keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())
    assert not any(module._forward_hooks for module in unet.modules())
    learning = [rest for stage, *rest in told if stage == "learn"]
    total = 4 * len(stored)
    assert [done for done, _, _ in learning] == list(range(1, total + 1))
    assert {of for _, of, _ in learning} == {total}
    assert same(whole, learn(unet, calls(3), budget=2**40))

    done, again = {name: stored[name] for name in list(stored)[:10]}, {}
    files = {name: pack(weights) for name, weights in done.items()}
    done = {name: unpack(block_plans(unet, 4)[name], *file) for name, file in files.items()}
    assert same(whole, learn(unet, calls(3), done=done, store=again.__setitem__))
    assert again.keys() == stored.keys() - done.keys()
    assert same(whole, learn(unet, calls(3), done=stored, progress=lambda *_: pytest.fail("it learned again")))


def test_what_is_held_is_bounded(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = calls(6)
    costs = block_costs(unet, given[0], block_plans(unet, 4))
    for name, samples in record_blocks(unet, given, costs, lambda done, total: None).items():
        held = [tensor.nbytes for tensors in samples.inputs for tensor in tensors]
        assert sum(held) + sum(tensor.nbytes for tensor in samples.outputs) == 6 * costs[name].held
    groups = passes(costs, 6, 2**20)
    assert [name for names in groups for name in names] == list(costs)
    sizes = [sum(6 * costs[name].held for name in names) for names in groups]
    assert 2 < len(groups) < len(costs)
    assert all(size <= 2**20 or len(names) == 1 for size, names in zip(sizes, groups, strict=True))

    monkeypatch.setattr(adaround, "HELD_BYTES", 3 * costs[RESNET].held)
    assert kept_calls(costs[RESNET], 6) == 3
    ran = []
    found = record_blocks(unet, given, {RESNET: costs[RESNET]}, lambda done, total: ran.append((done, total)))
    assert ran == [(1, 3), (2, 3), (3, 3)]
    assert len(found[RESNET]) == 6  # two samples a call
    (temb,) = found[RESNET].inputs[1][1:]
    every = record(unet, ["time_embedding.linear_2"], given)["time_embedding.linear_2"]
    assert torch.equal(temb, every.outputs[2])  # of the calls 0, 2 and 4
    monkeypatch.setattr(adaround, "HELD_BYTES", 1)
    assert kept_calls(costs[RESNET], 6) == 1


def test_learned_weights_reach_the_layers(unet: UNet2DConditionModel) -> None:
    quantized, given = copy.deepcopy(unet), calls(2)
    learned = learn(unet, given)
    calibrate_paper(quantized, [given], wbits=4, abits=8, groups=8, weights=learned)
    for name, weight in learned.items():
        assert torch.equal(quantized.get_submodule(name).float_weight(), dequantize_weight(*weight))
    nearest = copy.deepcopy(unet)
    calibrate_paper(nearest, [given], wbits=4, abits=8, groups=8)
    a, b = nearest.state_dict(), quantized.state_dict()
    others = {key for key in a if not torch.equal(a[key], b[key])}
    assert others == {f"{name}.weight" for name in learned}  # scales and ranges are those of the range search


def test_what_is_not_finite_or_never_runs_is_named(unet: UNet2DConditionModel) -> None:
    broken = copy.deepcopy(unet)
    broken.get_submodule(f"{RESNET}.conv2").weight.data[0, 0] = torch.nan
    with pytest.raises(DgqError, match=r"down_blocks\.1\.resnets\.0: its output is not finite"):
        learn_block(broken, RESNET, block_plans(unet, 4)[RESNET], record(broken, [RESNET], calls(1))[RESNET], 1)
    with pytest.raises(DgqError, match=r"resnets\.0\.conv2: the weight holds NaN"):
        learn_block(broken, RESNET, block_plans(unet, 4)[RESNET], record(unet, [RESNET], calls(1))[RESNET], 1)
    broken.add_module("spare", nn.Linear(2, 2))
    with pytest.raises(DgqError, match="spare: never ran"):
        learn(broken, calls(1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop(f"{RESNET}.conv1.scale"),
        lambda tensors: tensors.update(other=torch.zeros(1)),
        lambda tensors: tensors[f"{RESNET}.conv1.codes"].fill_(16),
        lambda tensors: tensors.update({f"{RESNET}.conv1.codes": torch.zeros(3, dtype=torch.uint8)}),
        lambda tensors: tensors.update({f"{RESNET}.conv1.scale": torch.ones(64).half()}),
    ],
)
def test_a_stored_block_is_held_against_its_plan(unet: UNet2DConditionModel, damage: Any) -> None:
    plan = block_plans(unet, 4)[RESNET]
    made = {layer: quantize_weight(weight, 4) for layer, weight in weights_of(unet, plan).items()}
    tensors, rest = pack(made)
    assert same(unpack(plan, dict(tensors), rest), made)
    damage(tensors)
    with pytest.raises((DgqError, KeyError)):
        unpack(plan, tensors, rest)


# The recipe.


def test_the_recipe_says_how_long_it_learned() -> None:
    recipe = Recipe("paper", rounding="adaround", groups=1)
    assert (recipe.iterations, recipe.label) == (ITERATIONS, "paper G=1 adaround W4A8")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    longer = Recipe("paper", rounding="adaround", iterations=20_000)
    assert Recipe.from_dict(longer.to_dict()).iterations == 20_000
    assert "iterations" not in Recipe("paper").to_dict() | Recipe().to_dict()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rounding": "adaround"}, "the integer recipe has rounding 'gptq' or 'nearest', not 'adaround'"),
        ({"name": "convrot", "rounding": "adaround"}, "the convrot recipe has rounding 'nearest'"),
        ({"iterations": 5}, "the integer recipe has no iterations"),
        ({"name": "paper", "iterations": 5}, "the rounding is 'nearest'"),
        ({"name": "paper", "rounding": "adaround", "iterations": 0}, "from 1 to"),
    ],
)
def test_recipes_that_cannot_be_learned(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DgqError, match=message):
        Recipe(**fields)


def test_checkpoints_that_name_the_integer_recipes_rounding_are_of_nearest() -> None:
    """Versions before this one stored the default that they did not read."""
    assert Recipe.from_dict({**Recipe("paper").to_dict(), "rounding": "gptq"}).rounding == "nearest"


def test_what_is_quantized_beside_it_is_rounded_as_integers_are(tiny_pipeline: Any) -> None:
    model, options = float_model(str(tiny_pipeline)), Options(vae="int8", text_encoder="int8")
    learned = Recipe("paper", rounding="adaround")
    beside = Recipe(wbits=8, attention="float")
    assert decoder_recipe(model, learned, options) == beside
    assert encoder_recipes(model, learned, options) == {"text_encoder": beside}
    assert decoder_recipe(model, Recipe(rounding="nearest"), options) == dataclasses.replace(beside, rounding="nearest")


# The whole way.


def test_interrupted_while_it_learns_and_resumed_gives_the_same_file(tiny_pipeline: Any, tmp_path: Any) -> None:
    recipe = Recipe("paper", rounding="adaround", iterations=2, groups=8)
    fast: dict[str, Any] = {"prompts": ["a cat"], "steps": 2, "evaluate": 0}
    header = calibrate(tiny_pipeline, tmp_path / "whole", recipe, Options(**fast))
    assert read_header(tmp_path / "whole") == header
    assert header.recipe == recipe
    dgq.load(tmp_path / "whole", device="cpu")("a cat", num_inference_steps=1)
    assert inspect(tmp_path / "whole").words["rounding"] == "adaround, 2 iterations"
    assert "| weight rounding | adaround, 2 iterations |" in (tmp_path / "whole" / "README.md").read_text()

    def interrupt(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "learn" and done == total // 2:
            raise KeyboardInterrupt

    out, told = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, out, recipe, Options(**fast), interrupt)
    blocks = sorted((tmp_path / ".out.partial").glob("layer-*"))
    assert len(blocks) > 5
    blocks[0].write_bytes(blocks[0].read_bytes()[:-10])
    longer = Recipe("paper", rounding="adaround", iterations=3, groups=8)
    with pytest.raises(DgqError, match="other settings"):
        calibrate(tiny_pipeline, out, longer, Options(**fast, resume=True))
    calibrate(
        tiny_pipeline, out, recipe, Options(**fast, resume=True), lambda stage, *rest: told.append((stage, *rest))
    )
    steps = [rest for stage, *rest in told if stage == "learn"]
    assert 0 < len(steps) < steps[-1][1]
    assert [rest[-1].split()[0] for stage, *rest in told if stage == "resume"] == [blocks[0].name]
    a, b = (load_file(place / "unet" / WEIGHTS_NAME) for place in (tmp_path / "whole", out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_estimate_knows_of_learning(tiny_pipeline: Any, tmp_path: Any) -> None:
    options = Options(prompts=["a cat"], steps=2, evaluate=0, budget=2**40)
    nearest, short, long = (
        estimate(tiny_pipeline, recipe, options)
        for recipe in (
            Recipe("paper"),
            Recipe("paper", rounding="adaround", iterations=10),
            Recipe("paper", rounding="adaround", iterations=1000),
        )
    )
    assert nearest.seconds < short.seconds < long.seconds
    assert long.seconds - nearest.seconds > 20 * (short.seconds - nearest.seconds)
    assert (nearest.passes, short.passes) == (1, 2)
    assert short.calls == nearest.calls + 2
    assert short.memory_bytes > nearest.memory_bytes
    assert short.packed_bytes == nearest.packed_bytes
    ran: list[str] = []
    calibrate(
        tiny_pipeline,
        tmp_path / "out",
        Recipe("paper", rounding="adaround", iterations=1),
        options,
        lambda stage, *_: ran.append(stage),
    )
    assert ran.count("statistics") + ran.count("calibrate") + 2 == short.calls  # two calls were recorded
