"""Text encoders, quantized beside the network where it is asked for: calibrated, stored, loaded by every route, and
refused where they are damaged."""

import copy
import json
import shutil
from types import SimpleNamespace

import damage
import pytest
import tiny_pipelines
import tiny_transformers
import torch
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

import dgq
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.diffusers import DgqConfig
from dgq.checkpoint.reading import encoder_headers
from dgq.checkpoint.writing import ENCODER_NAME
from dgq.errors import DgqError
from dgq.inspection.inspect import inspect
from dgq.integer.layer import IntegerLayer
from dgq.pictures.generation import Settings, generate
from dgq.recipe import Recipe

QUICK = Recipe(wbits=8, rounding="nearest", channels="none")
FAST = {"prompts": ["a cat", "a dog"], "steps": 1, "evaluate": 0, "text_encoder": "int8", "vae": "float"}
ROUTES = {
    "dgq.load": lambda folder, name: getattr(dgq.load(folder, device="cpu"), name),
    "pipeline": lambda folder, name: getattr(DiffusionPipeline.from_pretrained(folder), name),
    "alone": lambda folder, name: encoder_class(folder, name).from_pretrained(folder / name),
}


def encoder_class(folder, name):
    return getattr(transformers, json.loads((folder / "model_index.json").read_text())[name][1])


def layers(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, IntegerLayer)}


@torch.no_grad()
def read(encoder, tokens=12):
    ids = torch.arange(3, 3 + 2 * tokens).view(2, tokens) % 25
    return encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def error(result, reference):
    return float((result.float() - reference.float()).norm() / reference.float().norm())


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """(a float pipeline of two encoders whose layers have other names, the second with a projection; its checkpoint)"""
    place = tmp_path_factory.mktemp("sdxl")
    base = tiny_pipelines.sdxl(place / "float")
    calibrate(base, place / "int8", Recipe(wbits=8), Options(**{**FAST, "evaluate": 1}))
    return SimpleNamespace(base=base, checkpoint=place / "int8")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """(a float pipeline of three encoders, two of which name their layers alike, the third T5; its checkpoint)"""
    place = tmp_path_factory.mktemp("sd3")
    base = tiny_transformers.sd3(place / "float")
    calibrate(base, place / "int8", QUICK, Options(**FAST))
    return SimpleNamespace(base=base, checkpoint=place / "int8")


@pytest.fixture
def folder(sdxl, tmp_path):
    return shutil.copytree(sdxl.checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize("made", ["sdxl", "sd3"])
def test_every_route_loads_the_encoders_that_were_calibrated(made, request):
    made = request.getfixturevalue(made)
    loaded, plain = dgq.load(made.checkpoint, device="cpu"), dgq.load(made.base, device="cpu")
    names = [name for name in plain.components if name.startswith("text_encoder")]
    assert list(encoder_headers(made.checkpoint)) == names
    for name in names:
        ours, theirs = getattr(loaded, name), getattr(plain, name)
        linear = {one for one, module in theirs.named_modules() if isinstance(module, nn.Linear)}
        left = {one for one in linear if one == "text_projection" or one.endswith(".wo")}
        assert set(layers(ours)) == linear - left
        assert {type(ours.get_submodule(one)) for one in left} <= {nn.Linear}
        result = read(ours)
        assert 0 < error(result, read(theirs)) < 0.02
        for route in ("pipeline", "alone"):
            other = ROUTES[route](made.checkpoint, name)
            assert set(layers(other)) == set(layers(ours))
            assert torch.equal(read(other), result)
            assert not any(value.requires_grad for layer in layers(other).values() for value in layer.parameters())


def test_headers_and_reports(sdxl):
    headers, report = encoder_headers(sdxl.checkpoint), inspect(sdxl.checkpoint)
    predicted = estimate(sdxl.base, Recipe(wbits=8), Options(**FAST))
    assert report.encoders.keys() == headers.keys() == {"text_encoder", "text_encoder_2"}
    for name, header in headers.items():
        assert header.recipe == Recipe(wbits=8, attention="float")
        assert {plan.wbits for plan in header.layers.values()} == {8}
        assert header.calibration["calls"] == 4  # of two prompts and what they are guided away from
        assert header.calibration["sqnr_db"].keys() == header.layers.keys()
        part, file = report.encoders[name], sdxl.checkpoint / name / ENCODER_NAME
        before = ROUTES["alone"](sdxl.base, name)
        assert [layer.name for layer in part.layers] == list(header.layers)
        assert part.bytes == file.stat().st_size
        assert part.float16_bytes == 2 * sum(value.numel() for value in before.parameters())
        assert header.calibration["embeddings_error"] == part.calibration["embeddings_error"]
        assert 0.001 < part.calibration["embeddings_error"] < 0.02
        told = f"| {name} | integer W8A8, {len(header.layers)} layers"
        assert told in (sdxl.checkpoint / "README.md").read_text()
    parts = report.encoders.values()
    assert predicted.encoder_layers == sum(len(part.layers) for part in parts)
    assert predicted.encoder_float16_bytes == sum(part.float16_bytes for part in parts)
    assert 0.9 < predicted.encoder_packed_bytes / sum(part.bytes for part in parts) < 1.02


def test_without_asking_they_stay_float(sdxl, tmp_path):
    options = Options(**{**FAST, "text_encoder": Options().text_encoder})
    calibrate(sdxl.base, tmp_path / "out", QUICK, options)
    for name in ("text_encoder", "text_encoder_2"):
        for file in (sdxl.base / name).iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()
    assert encoder_headers(tmp_path / "out") == {}
    assert inspect(tmp_path / "out").encoders == {}
    assert estimate(sdxl.base, QUICK, options).encoder_layers == 0


def test_an_encoder_that_is_not_there(sd3, tmp_path):
    folder = shutil.copytree(sd3.base, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        index[name] = [None, None]
        shutil.rmtree(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index))
    calibrate(folder, tmp_path / "out", QUICK, Options(**FAST))
    assert encoder_headers(tmp_path / "out").keys() == {"text_encoder", "text_encoder_2"}
    pipe = dgq.load(tmp_path / "out", device="cpu")
    assert pipe.text_encoder_3 is None
    assert layers(pipe.text_encoder_2)
    generate(pipe, ["a cat"], Settings(1, 5.0, width=16, height=16, seed=0))


def test_one_that_is_quantized_already(sdxl, tmp_path):
    folder = shutil.copytree(sdxl.base, tmp_path / "model")
    file = folder / "text_encoder_2" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "other"}}))
    with pytest.raises(DgqError, match=r"text_encoder_2.config.json: the text encoder is quantized already"):
        calibrate(folder, tmp_path / "out", QUICK, Options(**FAST))
    assert not (tmp_path / "out").exists()


def test_interrupted_and_resumed_gives_the_same_files(sd3, tmp_path):
    """Layers of encoders that have the same names are kept apart."""
    begun = []

    def interrupt(stage, done, total, detail):
        if stage == "quantize" and detail.startswith("text_model") and done == 1:
            begun.append(detail)
        if len(begun) == 2 and done == total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(sd3.base, out, QUICK, Options(**FAST), interrupt)
    with pytest.raises(DgqError, match="other settings"):
        calibrate(sd3.base, out, QUICK, Options(**{**FAST, "text_encoder": "float"}, resume=True))
    told = []
    calibrate(sd3.base, out, QUICK, Options(**FAST, resume=True), lambda stage, *rest: told.append((stage, rest)))
    assert "record" not in {stage for stage, _ in told}
    done = [rest[2] for stage, rest in told if stage == "quantize"]
    assert 3 <= sum(name.startswith("text_model") for name in done) < 6
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        a, b = (load_file(place / name / ENCODER_NAME) for place in (sd3.checkpoint, out))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_tensors_under_two_names_are_stored_once(sd3):
    encoder = ROUTES["dgq.load"](sd3.checkpoint, "text_encoder_3")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    tables = [name for name in load_file(sd3.checkpoint / "text_encoder_3" / ENCODER_NAME) if "weight" in name]
    assert sum("shared" in name or "embed_tokens" in name for name in tables) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(sd3, dtype):
    for name in ("text_encoder", "text_encoder_3"):
        whole = ROUTES["alone"](sd3.checkpoint, name)
        cast = encoder_class(sd3.checkpoint, name).from_pretrained(sd3.checkpoint / name, dtype=dtype)
        moved = copy.deepcopy(whole).to(dtype)
        for encoder in (cast, moved):
            assert encoder.dtype == dtype
            for own, other in zip(layers(encoder).values(), layers(whole).values(), strict=True):
                assert torch.equal(own.weight_scale, other.weight_scale)
                assert torch.equal(own.natural_weight, other.natural_weight)
            assert error(read(encoder), read(whole)) < 0.03
        outputs = [module for key, module in cast.named_modules() if key.endswith(".wo")]
        assert all(module.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype) for module in outputs)
        assert bool(outputs) == (name == "text_encoder_3")


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return transformers.Gemma2Model(config)


def umt5():
    config = transformers.UMT5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return transformers.UMT5EncoderModel(config)


ENCODERS = {
    "clip": tiny_pipelines.text_encoder,
    "clip with projection": lambda: tiny_pipelines.text_encoder(projection=True),
    "t5": lambda: tiny_transformers.t5()["text_encoder"],
    "umt5": umt5,
    "qwen3": lambda: tiny_transformers.qwen3(2)["text_encoder"],
    "gemma": gemma,
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("asked", [{"wbits": 8, "channels": "rotate"}, {"wbits": 4}])
def test_on_the_fly_and_back(tmp_path, kind, asked):
    torch.manual_seed(0)
    plain = ENCODERS[kind]().eval()
    plain.save_pretrained(tmp_path / "float")
    encoder = type(plain).from_pretrained(tmp_path / "float", quantization_config=DgqConfig(**asked))
    assert layers(encoder)
    assert all(".0." in name or ".1." in name for name in layers(encoder))
    result, reference = read(encoder), read(plain)
    assert 0.0005 < error(result, reference) < (0.03 if asked["wbits"] == 8 else 0.4)
    header = encoder.config.quantization_config.header
    assert header.base_model == "float"
    assert {name: module.plan for name, module in layers(encoder).items()} == header.layers
    encoder.save_pretrained(tmp_path / "packed")
    assert "checksums" in json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    again = type(plain).from_pretrained(tmp_path / "packed")
    assert torch.equal(read(again), result)
    encoder.dequantize()
    assert not layers(encoder)
    assert 0 < error(read(encoder), result) < 0.03  # inputs are not rounded
    encoder.save_pretrained(tmp_path / "back")
    assert torch.equal(read(type(plain).from_pretrained(tmp_path / "back")), read(encoder))


def test_on_the_fly_in_a_pipeline_from_files_of_older_names(sdxl, tmp_path):
    """Files say text_model.encoder where newer classes say encoder: it is saved by the names of the header."""
    folder = shutil.copytree(sdxl.base, tmp_path / "model")
    file = folder / "text_encoder" / ENCODER_NAME
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    kind = encoder_class(folder, "text_encoder")
    encoder = kind.from_pretrained(folder / "text_encoder", quantization_config=DgqConfig(wbits=8))
    assert encoder.config.quantization_config.header.base_model == "model"
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder=encoder)
    pipe.save_pretrained(tmp_path / "saved")
    for route in ROUTES.values():
        assert torch.equal(read(route(tmp_path / "saved", "text_encoder")), read(encoder))


@pytest.mark.parametrize(
    "asked",
    [
        {"quant_mapping": {"unet": DgqConfig(wbits=4), "text_encoder": DgqConfig(wbits=8)}},
        {"quant_backend": "dgq", "quant_kwargs": {"wbits": 8}, "components_to_quantize": ["unet", "text_encoder"]},
    ],
    ids=["mapping", "backend"],
)
def test_a_whole_pipeline_on_the_fly(sdxl, asked):
    config = PipelineQuantizationConfig(**asked)
    pipe = DiffusionPipeline.from_pretrained(sdxl.base, quantization_config=config)
    assert layers(pipe.unet)
    assert len(layers(pipe.text_encoder)) == 6
    assert not layers(pipe.text_encoder_2)
    moved = copy.deepcopy(pipe.text_encoder)
    assert torch.equal(read(moved), read(pipe.text_encoder))
    generate(pipe, ["a cat"], Settings(1, 5.0, width=16, height=16, seed=0))


def test_a_value_that_is_not_finite_is_not_quantized(tmp_path):
    tiny_pipelines.text_encoder().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ENCODER_NAME)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][1, 2] = torch.inf
    save_file(tensors, tmp_path / ENCODER_NAME, metadata={"format": "pt"})
    with pytest.raises(DgqError, match=r"q_proj.weight_scale' holds values that are not finite"):
        transformers.CLIPTextModel.from_pretrained(tmp_path, quantization_config=DgqConfig(wbits=8))


def test_configurations_of_the_other_kind(folder):
    kind = encoder_class(folder, "text_encoder")
    header = DgqConfig.of(encoder_headers(folder)["text_encoder"])
    edit_config(folder, lambda q: [q.pop(key) for key in list(q) if key != "quant_method"])
    with pytest.raises(DgqError, match="says what was asked for"):
        kind.from_pretrained(folder / "text_encoder")
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(DgqError, match="the model is a float one"):
        kind.from_pretrained(folder / "text_encoder", quantization_config=header)


def edit_config(folder, change):
    damage.edit_config(folder / "text_encoder", change)


def edit_tensors(folder, change):
    damage.edit_tensors(folder / "text_encoder" / ENCODER_NAME, change)


FIRST = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: edit_config(f, lambda q: q.update(more=1)), "unknown field 'more'"),
        (lambda f: edit_config(f, lambda q: q["layers"].update(nosuch=q["layers"][FIRST])), "'nosuch' is none"),
        (lambda f: edit_config(f, lambda q: q["layers"][FIRST].update(out_features=8)), f"{FIRST}.*out_features is 8"),
        (lambda f: edit_config(f, lambda q: q["calibration"].update(embeddings_error="x")), "embeddings_error is 'x'"),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{FIRST}.weight_scale")), f"{FIRST}.weight_scale' is missing"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(2))), "unknown tensor 'extra'"),
        (lambda f: edit_tensors(f, lambda t: t[f"{FIRST}.weight_scale"].zero_()), "a scale that is not positive"),
        (lambda f: edit_tensors(f, lambda t: t["final_layer_norm.weight"].fill_(torch.nan)), "not finite"),
    ],
)
def test_a_damaged_encoder_is_named(folder, monkeypatch, route, change, message):
    monkeypatch.setenv("DGQ_VERIFY", "0")
    change(folder)
    with pytest.raises(DgqError, match=message):
        ROUTES[route](folder, "text_encoder")


@pytest.mark.parametrize("route", ROUTES)
def test_one_bit_of_a_weight(folder, route):
    file = folder / "text_encoder" / ENCODER_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DgqError, match=r"text_encoder.model.safetensors: is not as it was written"):
        ROUTES[route](folder, "text_encoder")
    assert layers(dgq.load(folder, device="cpu", verify=False).text_encoder)


def test_a_file_that_is_cut(folder):
    (folder / "text_encoder" / ENCODER_NAME).write_bytes(b"1234567890")
    with pytest.raises(DgqError, match="not a readable safetensors file"):
        dgq.load(folder, device="cpu", verify=False)
