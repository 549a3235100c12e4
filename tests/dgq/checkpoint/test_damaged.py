"""Damaged checkpoints through both routes: refused in a line that names the file, never a crash, a hang or a trace.

They have no checksums, as those of older versions: what is checked here must hold whatever a file's checksum is.
"""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from damage import edit_tensors
from diffusers import DiffusionPipeline, UNet2DConditionModel

import dgq
from dgq.bench.files import load_network
from dgq.checkpoint.header import Header
from dgq.checkpoint.writing import write_checkpoint
from dgq.errors import DgqError
from dgq.integer.attention import AttentionPlan
from dgq.integer.channels import form_groups
from dgq.integer.layer import IntegerLayer
from dgq.integer.on_the_fly import round_to_nearest
from dgq.integer.plan import plan_layers
from dgq.integer.skeleton import place
from dgq.paper.calibration import calibrate_paper
from dgq.paper.plan import PaperTable
from dgq.recipe import LayerPlan, Recipe

UNET, TEXT, VAE = (
    Path("unet/diffusion_pytorch_model.safetensors"),
    Path("text_encoder/model.safetensors"),
    Path("vae/diffusion_pytorch_model.safetensors"),
)
BASES = ("w4", "w8", "shift4", "shift8", "paper")


def build(tiny_pipeline: Path, name: str, out: Path) -> None:
    """A checkpoint without calibration and checksums: rounded to nearest, with made-up outlier channels."""
    unet = load_network(tiny_pipeline, torch.float32)
    wbits = 8 if name.endswith("8") else 4
    if name == "paper":
        torch.manual_seed(0)
        call = {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 24, 32),
        }
        table = calibrate_paper(unet, [[call]], wbits=4, abits=8, groups=4)
        header = Header(Recipe("paper", groups=8), table=PaperTable.from_dict(table))
    else:
        recipe = Recipe(wbits=wbits, rounding="nearest")
        layers = {}
        generator = torch.Generator().manual_seed(0)
        for layer in plan_layers(unet, recipe)[0]:
            rms = torch.exp2(2 * torch.randn(layer.plan.in_features, generator=generator).abs())
            shifted = name.startswith("shift") and not layer.plan.upsampled
            groups = form_groups("shift" if shifted else "smooth", rms, wbits)
            plan = dataclasses.replace(
                layer.plan, channels=groups.mode, class_ends=groups.class_ends, reordered=groups.order is not None
            )
            weight = round_to_nearest(groups.fold(layer.weight), plan.wbits, plan.weight_group)
            layers[layer.name] = IntegerLayer.from_quantized(plan, weight, groups, layer.bias)
        header = Header(recipe, {key: one.plan for key, one in layers.items()}, AttentionPlan.for_activations(8))
        place(unet, layers)
    write_checkpoint(tiny_pipeline, unet, header, out)
    edit_json(out / "unet" / "config.json", lambda config: config["quantization_config"].pop("checksums"))


@pytest.fixture(scope="module")
def checkpoints(tiny_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name in BASES:
        build(tiny_pipeline, name, root / name)
    shutil.copytree(tiny_pipeline, root / "float")
    return root


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    return lambda base: Path(shutil.copytree(checkpoints / base, tmp_path / "copy", dirs_exist_ok=True))


def edit_json(file, change):
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def named(tensors, leaf):
    """The first tensor of a kind."""
    return tensors[min(name for name in tensors if name.endswith(leaf))]


def load_unet_alone(folder):
    return UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)


ROUTES = [dgq.load, load_unet_alone]


def refused(route, folder, *parts):
    """The message; it names every one of the parts, and on our own route the file by its whole path."""
    with pytest.raises(DgqError) as caught:
        route(folder)
    message = caught.value.message
    assert "\n" not in message
    assert str(folder) in message or (route is load_unet_alone and message.startswith("config.json: "))
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("base", BASES)
def test_whole_checkpoints_load_and_draw(checkpoints, base):
    pipe = dgq.load(checkpoints / base, device="cpu")
    picture = pipe("a cat", num_inference_steps=1, output_type="np").images
    assert picture.shape == (1, 16, 16, 3)


def bad_order(order, seed):
    rng = random.Random(seed)
    i = rng.randrange(len(order))
    j = (i + 1 + rng.randrange(len(order) - 1)) % len(order)
    if seed % 5 == 4:
        order.copy_(order.roll(1))
    elif seed % 5 == 3:
        order[i], order[j] = int(order[j]), int(order[i])
    else:
        order[i] = (int(order[j]), -1 - i, len(order) + rng.randrange(2**20))[seed % 5]


@pytest.mark.parametrize("base", ["shift4", "shift8"])
def test_bad_orders(copy_of, base):
    folder = copy_of(base)
    whole = (folder / UNET).read_bytes()
    for seed in range(30):
        (folder / UNET).write_bytes(whole)
        edit_tensors(folder / UNET, lambda tensors, seed=seed: bad_order(named(tensors, ".order"), seed))
        refused(ROUTES[seed % 10 > 0], folder, ".order'", UNET.name)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "base, leaf, value",
    [
        *(("w4", ".weight_scale", value) for value in (0.0, -1.0, 1e-45, float("nan"), float("inf"))),
        ("w8", ".inv_divisor", 0.0),
        ("w8", ".inv_divisor", 1.5),
        ("w4", ".bias", float("inf")),
        ("w4", ".subscales", 0),
        ("shift8", ".inv_divisor", 0.5),
        ("shift4", ".inv_divisor", 0.3),
        ("paper", ".weight_scale", -1.0),
        ("paper", ".input.scale", 1e-45),
        ("paper", ".weight_zero_point", 0.5),
        ("paper", "norm1.weight", float("nan")),
        ("paper", "attentions.0.proj_in.input.index", 255),
    ],
)
def test_values_without_a_meaning(copy_of, route, base, leaf, value):
    folder = copy_of(base)

    def change(tensors):
        tensor = named(tensors, leaf).view(-1)
        tensor[(tensor != value).nonzero()[0]] = value

    edit_tensors(folder / UNET, change)
    # another power of two is a divisor that there can be, but not with this order
    refused(route, folder, ".order'" if value == 0.5 and base == "shift8" else f"{leaf.rpartition('.')[2]}'", UNET.name)


WRONG = [True, None, "4", 4.0, -1, 0, 3, 10**9, 10**400, [], {}, [1, 2], float("nan")]
PLAN = {
    "kind": ["conv9d", "pointwise"],
    "in_features": [64, 16],
    "out_features": [33],
    "wbits": [5, 8.0],
    "abits": [3, 9],
    "bias": [1, False],
    "kernel_size": [3, 2**19],
    "stride": [2],
    "padding": [1, 8],
    "channels": ["none", "magic"],
    "class_ends": [[32], [-1, 32], [40, 32], [True, 32]],
    "reordered": [False, 1],
    "weight_group": [16, 64, 33],
    "columns": [[0, 32], [5, 1]],
    "surprise": [1],
}


@pytest.mark.parametrize("field", PLAN)
def test_plans_that_are_not_the_layers(copy_of, field):
    folder = copy_of("shift4")
    file = folder / "unet" / "config.json"
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    plan = LayerPlan.from_dict(json.loads(file.read_text())["quantization_config"]["layers"][name])
    for number, value in enumerate([*PLAN[field], *WRONG]):
        if repr(value) == repr(getattr(plan, field, None)) and field != "surprise":
            continue
        edit_json(file, lambda c, value=value: c["quantization_config"]["layers"][name].update({field: value}))
        # sub-scales of longer groups are a tensor of another shape
        refused(ROUTES[number % 7 > 0], folder, "subscales'" if (field, value) == ("weight_group", 64) else file.name)


def test_parts_that_are_not_a_layers_channels(copy_of):
    for change in (
        lambda layers, a, b: layers.pop(b),
        lambda layers, a, b: layers.update({a: layers[b], b: layers[a]}),
        lambda layers, a, b: layers.update({f"{a[:-2]}.7": layers.pop(b)}),
        lambda layers, a, b: layers.update({a[:-2]: layers["time_embedding.linear_1"]}),
    ):
        folder = copy_of("w8")

        def both(config, change=change):
            layers = config["quantization_config"]["layers"]
            first = min(name for name in layers if layers[name].get("columns"))
            change(layers, first, f"{first[:-2]}.1")

        edit_json(folder / "unet" / "config.json", both)
        refused(load_unet_alone, folder, "conv_shortcut", "config.json")


@pytest.mark.parametrize("field", ["recipe", "layers", "attention", "paper", "base_model", "generation", "calibration"])
def test_header_fields_of_another_type(copy_of, field):
    folder = copy_of("w8")
    file = folder / "unet" / "config.json"
    harmless = [{}, None] if field in ("attention", "paper") else [{}, "4"]
    for value in WRONG:
        if value in harmless and (value != {} or field not in ("layers", "paper", "attention", "base_model")):
            continue
        edit_json(file, lambda config, value=value: config["quantization_config"].update({field: value}))
        refused(load_unet_alone, folder)


@pytest.mark.parametrize("attention", [{"bits": 9, "fraction_bits": 4}, {"bits": 8, "fraction_bits": 8}, {"bits": 8}])
def test_attention_out_of_range(copy_of, attention):
    folder = copy_of("w8")
    edit_json(folder / "unet" / "config.json", lambda c: c["quantization_config"].update(attention=attention))
    for route in ROUTES:
        refused(route, folder, "config.json", "ttention")


@pytest.mark.parametrize(
    "path, values",
    [
        (("timesteps",), [[], ["1"], [True], [float("nan")], [10**400], "123", None, 7]),
        (("layers", "time_embedding.linear_1"), [None, [], {}]),
        (("layers", "time_embedding.linear_1", "wbits"), [3, "4", 4.0, True]),
        (("layers", "time_embedding.linear_1", "bias"), [False, None]),
        (("layers", "mid_block.resnets.0.conv1", "stride"), [[2, 2], 1, [0, 0]]),
        (("layers", "mid_block.resnets.0.conv1", "input"), [None, {}, {"axis": "channel", "groups": 4, "size": 10**9}]),
        (("layers", "mid_block.resnets.0.conv1", "input", "groups"), [0, 257, -1, 10**9, "4", None]),
        (("layers", "mid_block.resnets.0.conv1", "input", "axis"), ["row", None, [], {}]),
        (("layers", "mid_block.attentions.0.transformer_blocks.0.attn1", "abits"), [3, 9, "8"]),
        (("layers", "mid_block.attentions.0.transformer_blocks.0.attn1", "surprise"), [1]),
    ],
)
def test_tables_of_the_paper_recipe(copy_of, path, values):
    folder = copy_of("paper")
    for value in values:

        def change(config, value=value):
            inner = config["quantization_config"]["paper"]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value

        edit_json(folder / "unet" / "config.json", change)
        refused(load_unet_alone, folder, "config.json")


NOT_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    str(UNET),
    str(TEXT),
    str(VAE),
)


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_regular_file_is_not_opened(copy_of, tmp_path, name):
    folder = copy_of("w4")
    file = folder / name
    whole = tmp_path / "elsewhere"
    file.rename(whole)
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
        make(file)
        refused(dgq.load, folder, name, "not a regular file")
        file.rmdir() if file.is_dir() else file.unlink()
    file.symlink_to(whole)
    dgq.load(folder, device="cpu")


@pytest.mark.parametrize("name", [name for name in NOT_FILES if name.endswith(".json")])
def test_damaged_json(copy_of, name):
    folder = copy_of("w4")
    whole = (folder / name).read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole + b"x", b"\xff\xfe" + whole, b"[]", b"null", b"{}", b"[" * 10**5):
        (folder / name).write_bytes(data)
        refused(dgq.load, folder, name.partition("/")[0])
    (folder / name).unlink()
    if name != "tokenizer/tokenizer.json" or "neither" in refused(dgq.load, folder, "tokenizer"):
        refused(dgq.load, folder, name.partition("/")[0])


@pytest.mark.parametrize("base", ["w4", "float"])
@pytest.mark.parametrize("file", [UNET, TEXT, VAE])
def test_tensors_that_are_not_the_components(copy_of, file, base):
    folder = copy_of(base)
    whole = (folder / file).read_bytes()
    name = {UNET: "conv_in.bias", VAE: "decoder.conv_in.bias"}.get(file, "final_layer_norm.bias")
    for change, what in (
        (lambda tensors: tensors.pop(name), name),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra"),
        (lambda tensors: tensors.update({name: tensors[name][:-1].clone()}), name),
        (lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}), name),
        (lambda tensors: tensors[name][1:2].fill_(float("nan")), name),
        (lambda tensors: tensors[name][1:2].fill_(float("-inf")), name),
    ):
        (folder / file).write_bytes(whole)
        edit_tensors(folder / file, change)
        refused(dgq.load, folder, str(file), what)
    for data in (b"", whole[:7], whole[:-1], whole + b"x"):
        (folder / file).write_bytes(data)
        refused(dgq.load, folder, str(file))


def test_a_long_name_is_told_in_short(copy_of):
    folder = copy_of("w4")
    edit_json(folder / "model_index.json", lambda index: index.update({"[" * 10**5: ["diffusers", "AutoencoderKL"]}))
    assert len(refused(dgq.load, folder, "model_index.json: component '[[")) < 500


@pytest.mark.parametrize("base, place", [("w4", ()), ("w4", ("layers",)), ("paper", ("paper", "layers"))])
def test_a_long_field_is_told_in_short(copy_of, base, place):
    """Unknown in the header, in a layer's plan, in the paper recipe's table."""
    folder = copy_of(base)

    def change(config):
        inner = config["quantization_config"]
        for key in place:
            inner = inner[key]
        (inner[min(inner)] if place else inner)["[" * 10**5] = 1

    edit_json(folder / "unet" / "config.json", change)
    assert len(refused(dgq.load, folder, "unet/config.json", "unknown field '[[")) < 500


def test_tensors_that_old_text_encoders_hold(copy_of):
    folder = copy_of("w4")
    more = {"text_model.embeddings.position_ids": torch.arange(24)[None], "text_projection.weight": torch.zeros(32, 32)}
    edit_tensors(folder / TEXT, lambda tensors: tensors.update(more))
    dgq.load(folder, device="cpu")


@pytest.mark.parametrize(
    "file, change",
    [
        ("text_encoder/config.json", {"num_hidden_layers": 2}),
        ("text_encoder/config.json", {"num_hidden_layers": 0}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}),
        ("text_encoder/config.json", {"hidden_size": 2 * 10**6}),
        ("text_encoder/config.json", {"vocab_size": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**7}),
        ("text_encoder/config.json", {"hidden_act": "nosuch"}),
        ("vae/config.json", {"layers_per_block": 10**6}),
        ("vae/config.json", {"block_out_channels": [10**5, 10**5]}),
        ("vae/config.json", {"block_out_channels": "x"}),
        ("vae/config.json", {"latent_channels": 10**9}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("unet/config.json", {"block_out_channels": [10**5, 10**5]}),
        ("unet/config.json", {"transformer_layers_per_block": 10**6}),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 5000}),
        ("unet/config.json", {"quantization_config": []}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**7}),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}),
        ("scheduler/scheduler_config.json", {"prediction_type": "nosuch"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**9}),
        ("tokenizer/tokenizer.json", {"model": None}),
        ("tokenizer/tokenizer.json", {"model": {"type": "BPE"}}),
        ("tokenizer/tokenizer_config.json", {"bos_token": 3}),
        ("unet/config.json", {"attention_head_dim": -1}),
        ("unet/config.json", {"sample_size": "x"}),
        ("model_index.json", {"_class_name": "FluxPipeline"}),
        ("model_index.json", {"_class_name": ["pipeline", "Own"]}),
        ("model_index.json", {"unet": [None, None]}),
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}),
        ("model_index.json", {"text_encoder": ["transformers", "Nosuch"]}),
        ("model_index.json", {"text_encoder": ["os", "system"]}),
        ("model_index.json", {"vae": ["diffusers", 3]}),
        ("model_index.json", {"tokenizer": ["transformers", "pipeline"]}),
        ("model_index.json", {"scheduler": ["diffusers", "Nosuch"]}),
        ("model_index.json", {"\ud800": ["diffusers", "AutoencoderKL"]}),
    ],
)
def test_configurations(copy_of, file, change):
    folder = copy_of("w4")
    dtype = torch.get_default_dtype()
    edit_json(folder / file, lambda config: config.update(change))
    with pytest.raises(DgqError) as caught:
        dgq.load(folder, device="cpu", dtype=torch.bfloat16)
    assert str(folder / file).partition(".json")[0].rpartition("/")[0] in caught.value.message
    assert torch.get_default_dtype() == dtype


@pytest.mark.parametrize(
    "file, change",
    [
        ("vae/config.json", {"block_out_channels": [10**5, 10**5]}),
        ("text_encoder/config.json", {"hidden_size": 2 * 10**6}),
    ],
)
def test_sizes_are_compared_before_anything_is_made(copy_of, file, change):
    """The libraries would ask for terabytes, or leave another default dtype behind."""
    folder = copy_of("w4")
    edit_json(folder / file, lambda config: config.update(change))
    refused(dgq.load, folder, file, "has shape [")


def flip(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def edit(data, rng):
    i, count = rng.randrange(len(data)), rng.randrange(1, 9)
    return data[:i] + rng.randbytes(count) + data[i + rng.randrange(9) :]


def raised(route, folder):
    try:
        route(folder)
    except Exception as error:
        return error


FILES = (
    "unet/config.json",
    str(UNET),
    "model_index.json",
    str(TEXT),
    str(VAE),
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_refused_or_loads(checkpoints, copy_of, seed):
    """What loads is a model that draws: a flipped bit of a weight or a setting is a value like any other."""
    rng = random.Random(seed)
    base = rng.choice(BASES)
    folder = copy_of(base)
    name = rng.choice(FILES)
    file = folder / name
    file.write_bytes(rng.choice((flip, cut, edit))(file.read_bytes(), rng))
    error = raised(dgq.load, folder)
    assert error is None or (isinstance(error, DgqError) and str(folder) in error.message)
    error = raised(load_unet_alone, folder)
    # diffusers reads both of the UNet's files before it asks dgq
    assert error is None or isinstance(error, DgqError) or name.startswith("unet/")


def test_the_pipelines_route(copy_of):
    """`DiffusionPipeline.from_pretrained` checks the UNet as `dgq.load` does; other components are diffusers' own."""
    folder = copy_of("shift8")
    DiffusionPipeline.from_pretrained(folder)
    edit_tensors(folder / UNET, lambda tensors: bad_order(named(tensors, ".order"), 2))
    refused(DiffusionPipeline.from_pretrained, folder, ".order'")
