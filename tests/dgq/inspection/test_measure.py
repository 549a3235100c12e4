"""What `measure` says of layers, beside the same figures made by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgq.checkpoint.header import Header
from dgq.checkpoint.reading import read_header
from dgq.errors import DgqError
from dgq.inspection import measure as measurement
from dgq.inspection.measure import MeasureOptions, measure_checkpoint
from dgq.inspection.measurement import SQNR_MAX, AttentionMeasurement, LayerMeasurement, Measurement, decibels
from dgq.inspection.probes import AttentionProbe, LayerProbe, _Outliers
from dgq.integer.layer import IntegerLayer
from dgq.method import METHODS
from dgq.pictures import embedded
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import load
from dgq.pictures.prompts import calibration_prompts, evaluation_prompts
from dgq.recipe import LayerPlan
from dgq.replay import record_inputs

OPTIONS = MeasureOptions(prompts=2, steps=3, guidance=3.0, seed=7)
CONV, LINEAR = "down_blocks.0.downsamplers.0.conv", "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
POINTWISE = "down_blocks.0.attentions.0.proj_in"


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Path) -> Measurement:
    return measure_checkpoint(tiny_checkpoint, OPTIONS)


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path, tiny_pipeline: Path) -> tuple[Any, Any, Header, list[list[dict[str, Any]]]]:
    """The float UNet, the quantized one, the header, and the calls that `measure` replays."""
    pipe = load(tiny_pipeline, dtype=torch.float32)
    header = read_header(tiny_checkpoint)
    assert header is not None

    def run(prompt: str, i: int) -> object:
        return generate(pipe, [prompt], Settings(3, 3.0, seed=7 + i).resolved(tiny_pipeline))

    calls = record_inputs(run, pipe.unet, evaluation_prompts(tiny_pipeline, 2))
    return pipe.unet, load(tiny_checkpoint, dtype=torch.float32).unet, header, calls


def by_name(found: Measurement) -> dict[str, LayerMeasurement]:
    return {layer.name: layer for layer in found.layers}


@torch.no_grad()
def seen(unet: Any, name: str, calls: list[list[dict[str, Any]]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Per prompt and step, the input and the output of a module."""
    kept: list[tuple[Tensor, Tensor]] = []
    handle = unet.get_submodule(name).register_forward_hook(lambda _, args, y: kept.append((args[0], y)))
    for group in calls:
        for call in group:
            unet(**call)
    handle.remove()
    steps = len(calls[0])
    return [kept[i : i + steps] for i in range(0, len(kept), steps)]


def test_every_layer_and_step_is_measured(measured: Measurement, tiny_checkpoint: Path, tiny_pipeline: Path) -> None:
    header = read_header(tiny_checkpoint)
    assert header is not None
    assert sorted(by_name(measured)) == sorted(header.layers)
    assert measured.layers[0].name == "time_embedding.linear_1"  # it runs first
    for layer in measured.layers:
        lists = (
            layer.sqnr_db_by_step,
            layer.noise_by_step,
            layer.kurtosis,
            layer.channel_ratio,
            layer.pixel_ratio,
            layer.axis_by_step,
        )
        assert {len(values) for values in lists} == {3}
        assert min(layer.sqnr_db_by_step) <= layer.sqnr_db <= max(layer.sqnr_db_by_step)
        assert layer.input_sqnr_db > layer.sqnr_db  # 4-bit weights cost more than 8-bit inputs
    assert measured.timesteps == sorted(measured.timesteps, reverse=True)
    assert measured.against == str(tiny_pipeline)
    assert not set(measured.prompts) & set(calibration_prompts(tiny_pipeline, 100))


@pytest.mark.parametrize("name", [CONV, LINEAR, POINTWISE])
def test_sqnr_is_that_of_the_outputs(name: str, measured: Measurement, models: Any) -> None:
    unet, quantized, _, calls = models
    module, layer = unet.get_submodule(name), quantized.get_submodule(name)
    signal, noise = torch.zeros(3), torch.zeros(3)
    for group in seen(unet, name, calls):
        for step, (x, y) in enumerate(group):
            bias = module.bias[:, None, None] if y.dim() == 4 else module.bias
            with torch.no_grad():
                signal[step] += (y - bias).square().sum()
                noise[step] += (layer(x) - y).square().sum()
    found = by_name(measured)[name]
    assert found.sqnr_db == pytest.approx(float(10 * (signal.sum() / noise.sum()).log10()), abs=0.01)
    assert found.sqnr_db_by_step == pytest.approx((10 * (signal / noise).log10()).tolist(), abs=0.01)


def test_parts_of_a_joined_input_are_measured_apart(measured: Measurement, models: Any) -> None:
    unet, quantized, _, calls = models
    owner = "up_blocks.0.resnets.0.conv_shortcut"
    weight, bias = unet.get_submodule(owner).weight, unet.get_submodule(owner).bias
    for i in (0, 1):
        part = quantized.get_submodule(f"{owner}.{i}")
        columns = slice(*part.plan.columns)
        signal = noise = 0.0
        for group in seen(unet, owner, calls):
            for x, _ in group:
                with torch.no_grad():
                    target = nn.functional.conv2d(x[:, columns], weight[:, columns])
                    result = part(x[:, columns]) - (bias[:, None, None] if i == 0 else 0)
                signal += float(target.square().sum())
                noise += float((result - target).square().sum())
        assert by_name(measured)[f"{owner}.{i}"].sqnr_db == pytest.approx(decibels(signal, noise), abs=0.01)


def test_output_noise_is_what_the_layers_cause_alone(models: Any) -> None:
    """The estimate by random probes, over many of them, beside swapping one layer after the other."""
    unet, quantized, header, calls = models
    call = calls[0][1]
    names = [CONV, LINEAR, POINTWISE, "up_blocks.1.resnets.1.conv2", "mid_block.resnets.0.conv1"]
    few = dataclasses.replace(header, layers={name: header.layers[name] for name in names})
    about = {"against": "", "prompts": [], "settings": {}}
    found = measurement.measured(unet, quantized, few, [[call]] * 120, 3.0, lambda *_: None, about)
    weights = torch.tensor([-2.0, 3.0]).view(2, 1, 1, 1)
    with torch.no_grad():
        reference = (weights * unet(**call)[0]).sum(0)
    caused = {}
    for name in names:
        layer = quantized.get_submodule(name)
        handle = unet.get_submodule(name).register_forward_hook(lambda _, args, __, layer=layer: layer(args[0]))
        with torch.no_grad():
            caused[name] = float(((weights * unet(**call)[0]).sum(0) - reference).square().sum())
        handle.remove()
    energy, noise = float(reference.square().sum()), {name: by_name(found)[name].noise for name in names}
    assert sum(noise.values()) == pytest.approx(sum(caused.values()) / energy, rel=0.35)
    for name in names:  # 120 probes: a relative standard deviation of sqrt(2 / 120), and of the sum at most that
        assert noise[name] == pytest.approx(caused[name] / energy, rel=0.5)
    assert by_name(found)[CONV].input_noise < noise[CONV]


def test_the_layers_noise_adds_up_to_the_output(measured: Measurement) -> None:
    assert decibels(1, measured.noise) == pytest.approx(measured.output_sqnr_db, abs=2)
    for layer in measured.layers:
        assert min(layer.noise_by_step) <= layer.noise <= max(layer.noise_by_step)


def test_the_float_model_is_left_as_it_was(models: Any) -> None:
    unet, quantized, header, calls = models
    before = {name: value.requires_grad for name, value in unet.named_parameters()}
    with torch.no_grad():
        expected = unet(**calls[0][0])[0]
        about = {"against": "", "prompts": [], "settings": {}}
        with torch.enable_grad():
            measurement.measured(unet, quantized, header, [[calls[0][0]]], 3.0, lambda *_: None, about)
        assert torch.equal(unet(**calls[0][0])[0], expected)
    assert {name: value.requires_grad for name, value in unet.named_parameters()} == before
    assert all(value.grad is None for value in unet.parameters())


def test_start_token_mass_and_attention(measured: Measurement, models: Any) -> None:
    unet, quantized, _, calls = models
    attention: dict[str, AttentionMeasurement] = {one.name: one for one in measured.attention}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    module = unet.get_submodule(name)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, y: kept.append((args[0], kwargs["encoder_hidden_states"], y)), with_kwargs=True
    )
    with torch.no_grad():
        for group in calls:
            unet(**group[2])
        handle.remove()
        mass, signal, noise = [], 0.0, 0.0
        for x, context, y in kept:
            scores = module.get_attention_scores(
                module.head_to_batch_dim(module.to_q(x)), module.head_to_batch_dim(module.to_k(context))
            )
            mass.append(float(scores[..., 0].mean()))
            rounded = quantized.get_submodule(name).processor(module, x, context)
            signal += float((y - module.to_out[0].bias).square().sum())
            noise += float((rounded - y).square().sum())
    found = attention[name]
    assert found.cross
    assert found.start_mass[2] == pytest.approx(sum(mass) / len(mass), abs=1e-5)
    assert found.sqnr_db_by_step[2] == pytest.approx(decibels(signal, noise), abs=0.05)
    own = attention[name.replace("attn2", "attn1")]
    assert not own.cross
    assert own.start_mass == []
    assert len(attention) == 2 * sum(one.cross for one in attention.values())


def test_float_attention_has_no_sqnr(models: Any) -> None:
    unet = models[0]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    probe = AttentionProbe(name, unet.get_submodule(name).processor, 1)
    x = torch.randn(2, 16, 64)
    assert probe.measure(0, unet.get_submodule(name), x, None, x) == []
    assert probe.found([1.0]).sqnr_db is None


def test_outlier_measures() -> None:
    outliers = _Outliers("layer", 2)
    x = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] += 30
    outliers.add(0, x[:2])
    outliers.add(0, x[2:])
    y = x[..., :16].mT.contiguous()  # the outlier is a pixel now
    outliers_of_pixels = _Outliers("layer", 1)
    outliers_of_pixels.add(0, y)
    centred = x.double() - x.double().mean()
    kurtosis = float(centred.pow(4).mean() / centred.square().mean().square())
    assert outliers.kurtosis[0] == pytest.approx(kurtosis, rel=1e-6)
    assert outliers.kurtosis[1] == 0  # nothing seen
    channels = x.abs().amax(1)
    ratio = float((channels.amax(1) / channels.median(1).values).mean())
    assert outliers.ratios(1)[0] == pytest.approx(ratio, rel=1e-5)
    assert ratio > 10
    assert outliers.ratios(2)[0] < 5
    assert outliers.axis(slice(0, 1)) == "channel"
    assert outliers_of_pixels.axis() == "pixel"
    assert outliers_of_pixels.ratios(2)[0] == pytest.approx(ratio, rel=1e-5)


def test_images_and_vectors_have_outliers_too() -> None:
    image, vector = _Outliers("conv", 1), _Outliers("time", 1)
    x = torch.rand(2, 8, 4, 4) + 1
    x[:, 5] *= 10
    image.add(0, x)
    vector.add(0, x[:, :, 0, 0])
    assert image.axis() == "channel"
    assert image.ratios(1)[0] > 5
    assert vector.axis() == "tensor"
    assert vector.ratios(1)[0] > 3
    assert vector.ratios(2)[0] == 1


def test_exponents_of_shift_groups() -> None:
    plan = LayerPlan("linear", 4, 2, 4, 8, False, channels="shift", class_ends=[4], reordered=True)
    layer = IntegerLayer(plan)
    layer.set_stored("inv_divisor", torch.tensor([1.0, 0.25, 0.5, 1.0]))
    probe = LayerProbe("layer", nn.Linear(4, 2), layer, METHODS["integer"].rounded_input, 1)
    probe.outliers.add(0, torch.ones(2, 3, 4))
    assert probe.found([1.0]).exponents == {0: 2, 1: 1, 2: 1}


def test_decibels_have_ends() -> None:
    assert decibels(100, 1) == pytest.approx(20)
    assert decibels(1, 0) == SQNR_MAX
    assert decibels(0, 1) == -SQNR_MAX


def test_a_paper_checkpoint_is_measured(tiny_paper_checkpoint: Path) -> None:
    from dgq.inspection.inspect import inspect

    out = tiny_paper_checkpoint
    found = measure_checkpoint(out, MeasureOptions(prompts=1))  # the checkpoint's own two steps
    header = read_header(out)
    assert header is not None
    assert header.table is not None
    planned = {name: plan for name, plan in header.table.layers.items() if plan.kind != "attention"}
    assert sorted(by_name(found)) == sorted(planned)
    assert len(found.timesteps) == 2
    assert all(0 < layer.sqnr_db < layer.input_sqnr_db + 3 for layer in found.layers)
    assert all(one.sqnr_db is not None and 0 < one.sqnr_db < 60 for one in found.attention)
    inspection = inspect(out, measurement=found)
    assert len(inspection.worst) == 10
    assert inspection.suggestion is None  # the paper recipe takes no overrides


def test_models_that_cannot_be_measured(tiny_checkpoint: Path, tiny_pipeline: Path) -> None:
    with pytest.raises(DgqError, match="is a float model, nothing in it is quantized"):
        measure_checkpoint(tiny_pipeline)
    with pytest.raises(DgqError, match="is quantized"):
        measure_checkpoint(tiny_checkpoint, MeasureOptions(against=str(tiny_checkpoint)))
    with pytest.raises(DgqError, match="the float model has no such layer"):
        measure_checkpoint(tiny_checkpoint, MeasureOptions(prompts=1, steps=1, against=embedded.NAME))
    with pytest.raises(DgqError, match="at least one"):
        measure_checkpoint(tiny_checkpoint, MeasureOptions(prompts=0))
