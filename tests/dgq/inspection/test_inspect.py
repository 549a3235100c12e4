"""What inspection says about checkpoints of both recipes and about a float model."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from dgq.checkpoint.reading import network_bytes, read_header, tensor_table
from dgq.errors import DgqError
from dgq.inspection.inspect import Inspection, inspect, split_name
from dgq.inspection.measurement import AttentionMeasurement, LayerMeasurement, Measurement, decibels
from dgq.inspection.plot import draw
from dgq.integer.plan import packed_bytes


@pytest.fixture(scope="module")
def found(tiny_checkpoint: Path) -> Inspection:
    return inspect(tiny_checkpoint)


def float16_bytes(folder: Path) -> int:
    table = tensor_table(folder / "unet" / "diffusion_pytorch_model.safetensors")
    total = 0
    for shape, _ in table.values():
        size = 2
        for side in shape:
            size *= side
        total += size
    return total


def test_sizes_are_those_of_the_files(found: Inspection, tiny_checkpoint: Path, tiny_pipeline: Path) -> None:
    assert found.quantized
    assert found.unet_bytes == network_bytes(tiny_checkpoint)
    assert found.float16_bytes == float16_bytes(tiny_pipeline)
    header_bytes = found.unet_bytes - found.float_bytes - sum(layer.bytes for layer in found.layers)
    assert 0 < header_bytes < 64 * 1024  # what is left of the file is its header


def test_layers_are_the_headers_with_their_errors(found: Inspection, tiny_checkpoint: Path) -> None:
    header = read_header(tiny_checkpoint)
    assert header is not None
    assert [layer.name for layer in found.layers] == list(header.layers)
    assert {layer.name: layer.sqnr_db for layer in found.layers} == header.calibration["sqnr_db"]
    conv = next(layer for layer in found.layers if layer.name == "down_blocks.0.downsamplers.0.conv")
    assert (conv.kind, conv.shape, conv.wbits, conv.abits) == ("conv2d", (32, 32, 3, 3), 4, 8)
    assert sum(found.channel_modes.values()) == len(found.layers)
    assert found.bits_per_weight is not None
    assert 4 < found.bits_per_weight < 6
    assert found.attention == {"bits": 8, "fraction_bits": 4}
    assert "sqnr_db" not in found.calibration


def test_worst_layers_come_first(found: Inspection) -> None:
    errors = [layer.sqnr_db for layer in found.layers if layer.sqnr_db is not None]
    assert [layer.sqnr_db for layer in found.worst] == sorted(errors)[:10]


def test_suggested_overrides_name_the_worst_layers_within_the_budget(tiny_checkpoint: Path) -> None:
    found = inspect(tiny_checkpoint, budget=0.01)
    suggestion = found.suggestion
    assert suggestion is not None
    assert 0 < suggestion.extra_bytes <= suggestion.budget_bytes == int(0.01 * found.unet_bytes)
    header = read_header(tiny_checkpoint)
    assert header is not None
    owners = [header.layers[layer.name].owner(layer.name) for layer in found.worst]  # the parts of one count once
    worst = [f"{owner}=8" for owner in dict.fromkeys(owners)]
    assert suggestion.overrides == [item for item in worst if item in suggestion.overrides]
    assert suggestion.command_line.startswith(f"--override '{suggestion.overrides[0]}'")
    assert suggestion.overrides[0] == worst[0]  # a small layer: it fits


def test_nothing_is_suggested_without_a_budget(tiny_checkpoint: Path) -> None:
    assert inspect(tiny_checkpoint, budget=0).suggestion is None


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Path) -> Measurement:
    """The checkpoint's layers with figures that are easy to reckon with."""
    header = read_header(tiny_checkpoint)
    assert header is not None
    layers = [
        LayerMeasurement(
            name,
            20.0 + i,
            [20.0 + i] * 2,
            40.0,
            1e-3 * (i % 7 + 1),
            [1e-3] * 2,
            1e-4,
            [3.0, 4.0],
            [2.0, 3.0],
            [1.5, 1.0],
            "channel",
            ["channel", "pixel"],
            {},
        )
        for i, name in enumerate(header.layers)
    ]
    cross = AttentionMeasurement(
        "mid_block.attentions.0.transformer_blocks.0.attn2", True, 50.0, [50.0] * 2, 1e-5, [0.3, 0.4]
    )
    return Measurement(
        "dgq-emoji",
        ["a dog"],
        {"steps": 2, "guidance": 3.0, "seed": 0},
        [999.0, 500.0],
        21.0,
        [22.0, 20.0],
        layers,
        [cross],
    )


def test_measured_layers_are_ranked_by_the_noise_they_cause(tiny_checkpoint: Path, measured: Measurement) -> None:
    found = inspect(tiny_checkpoint, worst=5, measurement=measured)
    assert found.measurement is measured
    noise = {layer.name: layer.noise for layer in measured.layers}
    assert [noise[layer.name] for layer in found.worst] == sorted(noise.values(), reverse=True)[:5]


def reckoned(checkpoint: Path, measured: Measurement) -> dict[str, dict[str, tuple[int, float]]]:
    """Float layer -> bits -> (bytes it adds, noise it takes away)."""
    header = read_header(checkpoint)
    assert header is not None
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for layer in measured.layers:
        plan = header.layers[layer.name]
        own = found.setdefault(plan.owner(layer.name), {"8": (0, 0.0), "float": (0, 0.0)})
        sizes = {"8": packed_bytes(dataclasses.replace(plan, wbits=8)), "float": 2 * plan.out_features * plan.reduction}
        sizes["float"] += 2 * plan.out_features * plan.bias
        saved = {"8": layer.noise - layer.input_noise, "float": layer.noise}
        for bits, (size, less) in own.items():
            own[bits] = (size + sizes[bits] - packed_bytes(plan), less + saved[bits])
    return found


def test_measured_suggestion_takes_most_noise_away_per_byte(tiny_checkpoint: Path, measured: Measurement) -> None:
    suggestion = inspect(tiny_checkpoint, budget=0.02, measurement=measured).suggestion
    assert suggestion is not None
    assert 0 < suggestion.extra_bytes <= suggestion.budget_bytes
    options = reckoned(tiny_checkpoint, measured)
    chosen = dict(item.rsplit("=", 1) for item in suggestion.overrides)
    assert set(chosen.values()) == {"8"}  # rounded inputs do little here
    assert suggestion.extra_bytes == sum(options[name]["8"][0] for name in chosen)
    worth = {name: bits["8"][1] / bits["8"][0] for name, bits in options.items()}
    assert [worth[name] for name in chosen] == sorted((worth[name] for name in chosen), reverse=True)
    # what was passed over, though it is worth more than the last one taken, did not fit
    room = suggestion.budget_bytes - suggestion.extra_bytes
    last = worth[list(chosen)[-1]]
    assert all(options[name]["8"][0] > room for name in options if name not in chosen and worth[name] > last)
    left = measured.noise - sum(options[name]["8"][1] for name in chosen)
    assert suggestion.predicted_sqnr_db == pytest.approx(decibels(1, left))
    assert suggestion.predicted_sqnr_db > decibels(1, measured.noise)


def test_a_layer_whose_rounded_input_does_the_harm_is_kept_float(tiny_checkpoint: Path, measured: Measurement) -> None:
    name = "up_blocks.1.resnets.1.conv2"
    layers = [
        dataclasses.replace(one, noise=1.0, input_noise=0.9) if one.name == name else one for one in measured.layers
    ]
    changed = dataclasses.replace(measured, layers=layers)
    suggestion = inspect(tiny_checkpoint, budget=0.2, measurement=changed).suggestion
    assert suggestion is not None
    assert f"{name}=float" in suggestion.overrides
    options = reckoned(tiny_checkpoint, changed)
    chosen = [item.rsplit("=", 1) for item in suggestion.overrides]
    assert suggestion.extra_bytes == sum(options[layer][bits][0] for layer, bits in chosen) <= suggestion.budget_bytes
    left = changed.noise - sum(options[layer][bits][1] for layer, bits in chosen)
    assert suggestion.predicted_sqnr_db == pytest.approx(decibels(1, left))


def test_a_large_gain_is_not_crowded_out_by_small_ones(tiny_checkpoint: Path, measured: Measurement) -> None:
    name, small = "up_blocks.1.resnets.1.conv2", "mid_block.attentions.0.proj_in"
    noise = {name: (0.1, 0.1), small: (0.05, 0.0)}  # no others cause any
    layers = [
        dataclasses.replace(one, noise=noise.get(one.name, (0.0, 0.0))[0], input_noise=noise.get(one.name, (0, 0.0))[1])
        for one in measured.layers
    ]
    changed = dataclasses.replace(measured, layers=layers)
    options = reckoned(tiny_checkpoint, changed)
    extra = options[name]["float"][0]
    assert options[small]["8"][1] / options[small]["8"][0] > 0.1 / extra  # it comes first by what a byte saves
    budget = (extra + 1) / inspect(tiny_checkpoint).unet_bytes  # and leaves no room
    suggestion = inspect(tiny_checkpoint, budget=budget, measurement=changed).suggestion
    assert suggestion is not None
    assert suggestion.overrides == [f"{name}=float"]


def test_the_picture_shows_a_measured_checkpoint(
    tiny_checkpoint: Path, measured: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "picture.png"
    with pytest.raises(DgqError, match="was not measured"):
        draw(inspect(tiny_checkpoint), file)
    draw(inspect(tiny_checkpoint, measurement=measured), file)
    with Image.open(file) as image:
        assert min(image.size) > 1000
        assert len(image.convert("RGB").getcolors(1 << 16) or []) > 100  # not an empty sheet
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DgqError, match="needs matplotlib") as error:
        draw(inspect(tiny_checkpoint, measurement=measured), file)
    assert error.value.hint == 'pip install "dgq[plots]"'


def test_names_are_split_into_block_and_place() -> None:
    assert split_name("up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q") == (
        "up_blocks.0.attentions.1",
        "transformer_blocks.0.attn1.to_q",
    )
    assert split_name("mid_block.resnets.1.conv1") == ("mid_block.resnets.1", "conv1")
    assert split_name("time_embedding.linear_1") == ("time_embedding", "linear_1")


def test_the_report_is_json(found: Inspection, tiny_checkpoint: Path, measured: Measurement) -> None:
    data = json.loads(json.dumps(found.to_dict()))
    assert data["suggestion"]["command_line"]
    assert data["layers"][0]["shape"]
    assert data["measurement"] is None
    data = json.loads(json.dumps(inspect(tiny_checkpoint, measurement=measured).to_dict()))
    assert len(data["measurement"]["layers"]) == len(data["layers"])


def test_a_float_model_is_called_one(tiny_pipeline: Path) -> None:
    found = inspect(tiny_pipeline)
    assert not found.quantized
    assert found.layers == []
    assert found.float16_bytes == float16_bytes(tiny_pipeline)


def test_paper_checkpoint(tiny_pipeline: Path, tiny_paper_checkpoint: Path) -> None:
    found = inspect(tiny_paper_checkpoint)
    assert found.label == "paper G=8 W4A8"
    assert found.float16_bytes == float16_bytes(tiny_pipeline)
    assert {layer.kind for layer in found.layers} == {"linear", "conv2d", "attention"}
    assert found.worst == []
    assert found.suggestion is None
    attention = next(layer for layer in found.layers if layer.kind == "attention")
    assert attention.bytes > 0
    assert attention.channels.startswith("q:")


@pytest.mark.parametrize("options", [{"worst": -1}, {"budget": 2.0}])
def test_options_out_of_range(tiny_checkpoint: Path, options: dict[str, float]) -> None:
    with pytest.raises(DgqError, match="out of range"):
        inspect(tiny_checkpoint, **options)  # type: ignore[arg-type]


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(DgqError, match="/nowhere/at/all"):
        inspect("/nowhere/at/all")
