"""A method is one entry: weights rounded to int8 and nothing else, the whole way; and what every entry keeps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgq
from dgq import architectures
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.header import Header
from dgq.checkpoint.reading import read_header
from dgq.errors import DgqError
from dgq.family import network_of
from dgq.inspection.inspect import inspect
from dgq.inspection.measure import MeasureOptions, measure_checkpoint
from dgq.method import METHODS, Cost, LayerCost, LayerFacts, Made, Method, Work
from dgq.pictures.generation import Settings, generate
from dgq.recipe import Recipe

OPTIONS = Options(prompts=["a cat"], steps=2, evaluate=1, vae="float")


class Rounded(nn.Module):
    """A linear layer whose weight is int8 codes and a scale for each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(outputs, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


def chosen(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: one for name, one in network.named_modules() if isinstance(one, nn.Linear) and one.bias is not None}


def quantize(work: Work) -> Made:
    layers = chosen(work.network)
    for i, (name, module) in enumerate(layers.items()):
        rounded = Rounded(module.in_features, module.out_features)
        rounded.scale.copy_(module.weight.detach().abs().amax(1, keepdim=True) / 127)
        rounded.codes.copy_((module.weight.detach() / rounded.scale).round())
        rounded.bias.data.copy_(module.bias.detach())
        work.network.set_submodule(name, rounded)
        work.progress("quantize", i + 1, len(layers), name)
    sizes = {name: [one.in_features, one.out_features] for name, one in layers.items()}
    return Made(table={"sizes": sizes}, facts={"rounded": len(sizes), "sqnr_db": dict.fromkeys(sizes, 40.0)})


def skeleton(network: nn.Module, header: Header) -> None:
    layers = chosen(network)
    for name, (inputs, outputs) in header.table["sizes"].items():
        if name not in layers:
            raise DgqError(f"layer {name!r} is none of the model's")
        network.set_submodule(name, Rounded(inputs, outputs))


def facts(header: Header) -> dict[str, LayerFacts]:
    sizes = header.table["sizes"].items()
    return {name: LayerFacts("linear", (n, k), 8, 0, "none", name, name) for name, (k, n) in sizes}


def cost(network: nn.Module, recipe: Recipe, budget: int, call: dict[str, Any]) -> Cost:
    layers = {
        name: LayerCost(one, one.weight.numel(), one.out_features, one.weight.numel(), one.weight.numel())
        for name, one in chosen(network).items()
    }
    return Cost(layers, {})


@pytest.fixture
def toy() -> Iterator[Method]:
    method = Method(
        "toy",
        "weights alone",
        quantize,
        skeleton,
        facts,
        lambda layer, x: x,
        cost,
        lambda recipe: "toy",
        read_table=lambda table: table,
    )
    METHODS["toy"] = method
    yield method
    del METHODS["toy"]


def test_a_method_calibrates_loads_draws_and_is_reported(toy: Method, tiny_pipeline: Path, tmp_path: Path) -> None:
    recipe, out = Recipe("toy", wbits=8), tmp_path / "out"
    predicted = estimate(tiny_pipeline, recipe, OPTIONS)
    stages = set()
    header = calibrate(tiny_pipeline, out, recipe, OPTIONS, lambda stage, *rest: stages.add(stage))
    assert stages == {"record", "quantize", "compare", "save"}
    assert recipe.label == "toy W8A8"
    assert predicted.layers == header.calibration["rounded"] == len(header.table["sizes"]) > 5
    assert predicted.calls == 2  # recorded, and never replayed
    assert header.calibration["fidelity"]["psnr_db"] > 30

    pipe, plain = dgq.load(out, device="cpu"), dgq.load(tiny_pipeline, device="cpu")
    assert sum(isinstance(one, Rounded) for one in network_of(pipe).modules()) == predicted.layers
    pictures = [generate(one, ["a cat"], Settings(steps=2, guidance=3.0))[0] for one in (plain, pipe)]
    error = pictures[1].latents - pictures[0].latents
    assert 0 < float(error.norm() / pictures[0].latents.norm()) < 0.02

    told = inspect(out)
    assert [layer.sqnr_db for layer in told.worst] == [40.0] * 10
    assert told.suggestion is None  # there is no layer whose bits an override could raise
    found = inspect(out, measurement=measure_checkpoint(out, MeasureOptions(prompts=1, steps=1, device="cpu")))
    assert found.label == "toy W8A8"
    assert found.words == {"rounding": "nearest", "attention": "float"}
    assert [layer.name for layer in found.layers] == sorted(header.table["sizes"])
    k, n = header.table["sizes"][found.layers[0].name]
    assert found.layers[0].bytes == n * k + 4 * n + 2 * n  # codes, scales, and the bias in half precision
    assert found.measurement is not None
    assert all(one.sqnr_db > 30 and one.input_sqnr_db == 99 for one in found.measurement.layers)
    assert f"| quantized layers | {predicted.layers} |" in (out / "README.md").read_text()


def test_a_table_belongs_to_its_method(toy: Method) -> None:
    data = Header(Recipe("toy"), table={"sizes": {}}).to_dict()
    assert Header.from_dict(data).table == {"sizes": {}}
    for wrong in ({"toy": None}, {"paper": {}}, {"recipe": Recipe().to_dict()}):
        with pytest.raises(DgqError, match="the table of"):
            Header.from_dict({**data, **wrong})
    del METHODS["toy"]
    try:
        with pytest.raises(DgqError, match="recipe 'toy' is not one of integer, paper"):
            Recipe("toy")
        with pytest.raises(DgqError, match="unknown field 'toy'"):
            Header.from_dict(data)
    finally:
        METHODS["toy"] = toy


@pytest.mark.parametrize("name", ["integer", "paper", "convrot"])
def test_every_method_counts_the_layers_that_it_makes(name: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    recipe = Recipe(name, rounding="nearest", channels="none") if name == "integer" else Recipe(name)
    header = calibrate(tiny_pipeline, tmp_path / "out", recipe, Options(prompts=["a cat"], steps=2, evaluate=0))
    layers = {key: one for key, one in header.method.layers(header).items() if one.kind != "attention"}
    predicted = estimate(tiny_pipeline, recipe, OPTIONS)
    assert predicted.layers == len(layers)
    stored = sum(report.bytes for report in inspect(tmp_path / "out").layers if report.kind != "attention")
    network = network_of(dgq.load(tiny_pipeline, device="cpu"))
    call = architectures.call(network, 1, torch.device("cpu"))
    costs = METHODS[name].cost(network, recipe, 2**30, call).layers
    counted = sum(one.stored_bytes for one in costs.values())
    assert 0.8 * stored < counted <= stored  # the published method's ranges of inputs are not counted
    again = read_header(tmp_path / "out")
    assert again is not None
    assert again.to_dict() == header.to_dict()


def test_the_help_names_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written by hand, as help may not take the seconds that the library's import does."""
    command = [sys.executable, "-m", "dgq_cli", "calibrate", "--help"]
    monkeypatch.setenv("COLUMNS", "400")
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for method in METHODS.values():
        assert f"{method.name} ({method.help})" in shown


def test_options_that_a_method_does_not_take() -> None:
    with pytest.raises(DgqError, match="takes no overrides"):
        Recipe("paper", overrides=(("x", 8),))
    attention: Any = {"bits": 8, "fraction_bits": 4}
    assert METHODS["integer"].words(Recipe(), attention)["attention"] == "log2, 8 bits, 16 steps per octave"
