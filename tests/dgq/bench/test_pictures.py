"""Whole pictures: pipelines that are written, parts that are timed, systems that draw, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgq.bench import Options, PictureOptions, bench, bench_picture, drawing, files, pictures, steps
from dgq.bench.drawing import PARTS, Stopwatch, Subject
from dgq.bench.systems import Size, System
from dgq.checkpoint.reading import decoder_header, encoder_headers, read_header, text_encoders, weight_files
from dgq.errors import DgqError
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import find_model, load
from dgq.replay import put_together, take_apart

CPU = torch.device("cpu")
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def recipe(small_picture: Path) -> dict[str, Any]:
    """What `files.random_pipeline` takes."""
    config = json.loads(small_picture.read_text())
    pipeline = config.pop("pipeline")
    return {"config": config, "pipeline": {key: pipeline[key] for key in pipeline if key not in ("steps", "guidance")}}


@pytest.fixture(scope="module")
def base(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of random weights, in shards."""
    folder = tmp_path_factory.mktemp("pictures") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD", 2**17)
        files.random_pipeline(**recipe, target=str(folder), dtype="bfloat16")
    return folder


def subject(folder: Path, size: int = 16) -> Subject:
    """A picture of two steps with guidance."""
    return Subject(PROMPT, asdict(Settings(2, 3.0, width=size, height=size)), str(folder))


def test_a_random_pipeline_loads_and_draws(base: Path) -> None:
    assert len(weight_files(base / "unet")) > 1
    pipe = load(base, dtype=torch.float32)  # strict: every tensor of every part
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert list(text_encoders(base)) == ["text_encoder", "text_encoder_2"]
    assert type(pipe.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    (picture,) = generate(pipe, [PROMPT], Settings(1, 0.0, width=16, height=16))
    assert picture.image.size == (16, 16)
    assert np.asarray(picture.image).std() > 1


def test_shards_hold_what_one_file_does(recipe: dict[str, Any], base: Path, tmp_path: Path) -> None:
    files.random_pipeline(**recipe, target=str(tmp_path / "one"), dtype="bfloat16")
    assert len(weight_files(tmp_path / "one" / "unet")) == 1
    one, several = (load(folder, dtype=torch.float32).unet.state_dict() for folder in (tmp_path / "one", base))
    assert all(torch.equal(tensor, several[name]) for name, tensor in one.items())


def test_a_tokenizer_of_bytes_has_a_token_for_each(base: Path) -> None:
    tokenizer = files.byte_tokenizer(600, 77)
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))
    ids = tokenizer(PROMPT).input_ids
    assert len(ids) == len(PROMPT.replace(" ", "")) + 2
    assert ids[0], ids[-1] == (598, 599)


def test_a_quantized_pipeline_is_a_checkpoint_with_its_decoder(base: Path, tmp_path: Path) -> None:
    files.quantized_pipeline(str(base), str(tmp_path / "plain"), 4, False)
    header, vae = read_header(tmp_path / "plain"), decoder_header(tmp_path / "plain")
    assert header is not None
    assert vae is not None
    assert (header.recipe.wbits, vae.recipe.wbits) == (4, 8)
    assert encoder_headers(tmp_path / "plain") == {}
    files.quantized_pipeline(str(base), str(tmp_path / "text"), 8, True)
    assert sorted(encoder_headers(tmp_path / "text")) == ["text_encoder", "text_encoder_2"]
    want = Stopwatch(load(base, dtype=torch.float32), subject(base), CPU).draw()[0]
    for folder, limit in ((tmp_path / "plain", 0.3), (tmp_path / "text", 0.15)):
        got = Stopwatch(load(folder, dtype=torch.float32), subject(base), CPU).draw()[0]
        first, second = (np.asarray(picture.image, dtype=np.float32) for picture in (want, got))
        assert 0 < np.linalg.norm(first - second) / np.linalg.norm(first) < limit


def test_the_parts_of_a_picture_make_up_its_time(base: Path) -> None:
    pipe = load(base, dtype=torch.float32)
    seen: list[str] = []
    pipe.unet.register_forward_hook(lambda *_: seen.append("steps"))
    pipe.text_encoder_2.register_forward_hook(lambda *_: seen.append("text"))
    pipe.vae.decoder.register_forward_hook(lambda *_: seen.append("decoder"))
    (plain,) = generate(pipe, [PROMPT], Settings(2, 3.0, width=16, height=16))
    seen.clear()
    watch = Stopwatch(pipe, subject(base), CPU)
    for name in PARTS:
        watch._ends[name] = -1.0  # nothing of a picture before stays
    picture, ms, parts = watch.draw()
    assert list(parts) == list(PARTS)
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(ms)
    assert np.array_equal(np.asarray(picture.image), np.asarray(plain.image))
    assert list(dict.fromkeys(seen)) == ["text", "steps", "decoder"]


def test_a_hollow_pipeline_holds_no_weights_and_knows_its_sizes(base: Path) -> None:
    pipe = drawing.hollow(base)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    storages = {weight.untyped_storage().nbytes() for weight in pipe.unet.parameters()}
    assert max(storages) <= 4
    assert pictures.check_size(pipe, Settings(1, 0.0)) == (16, 16)


class Request:
    """An OpenVINO model's stand-in that runs the float component which it would be made of."""

    def __init__(self, base: Path, name: str, call: files.Call) -> None:
        part = getattr(load(base, dtype=torch.float32), name)
        self.flat = files._Flat(part, take_apart(call)[0])
        with torch.no_grad():
            self.flat(*take_apart(call)[1])
        self.shapes = [tuple(tensor.shape) for tensor in take_apart(call)[1]]
        self.made: list[torch.Tensor] = []

    @torch.no_grad()
    def infer(self, arrays: list[np.ndarray], share_inputs: bool) -> None:
        assert [array.shape for array in arrays] == self.shapes
        made = self.flat(*map(torch.from_numpy, arrays))
        self.made = list(made) if isinstance(made, tuple) else [made]

    @property
    def model_outputs(self) -> list[torch.Tensor]:
        return self.made

    def get_output_tensor(self, i: int) -> Any:
        return type("Tensor", (), {"data": self.made[i].numpy()})


def test_openvinos_models_stand_in_the_places_of_all_parts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls are recorded, taken apart, run and put together again as the pipeline wants them."""
    wanted = subject(base)
    calls = files.recorded(base, Settings(**wanted.settings), "a dog", torch.bfloat16)
    assert {name: len(of) for name, of in calls.items()} == {
        "text_encoder": 2,
        "text_encoder_2": 2,
        "unet": 2,
        "vae": 1,
    }
    requests = {name: Request(base, name, of[0]) for name, of in calls.items()}
    for name, request in requests.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / files.RESULT).write_text(json.dumps(request.flat.result))
    monkeypatch.setattr(drawing, "openvino_request", lambda folder, dtype, threads: requests[folder.name])
    pipe = drawing.openvino_pipeline(tmp_path, base, "float32", 1)
    got = Stopwatch(pipe, wanted, CPU).draw()[0]
    want = Stopwatch(load(base, dtype=torch.float32), wanted, CPU).draw()[0]
    assert np.array_equal(np.asarray(got.image), np.asarray(want.image))
    assert all(request.made for request in requests.values())
    assert put_together(requests["unet"].flat.result, requests["unet"].made).shape == (2, 4, 8, 8)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What would be written and measured, with nothing of both done."""
    seen: dict[str, list[Any]] = {"written": [], "systems": [], "case": []}

    def measured(systems: list[System], case: str, size: Size, *args: Any) -> tuple[list[Any], list[str]]:
        seen["systems"] += systems
        seen["case"].append(case)
        assert all(system.needed(size) > 2**30 for system in systems)
        assert args[-1] == "picture"
        return [], []

    monkeypatch.setattr(steps, "write", lambda task, **arguments: seen["written"].append(task))
    monkeypatch.setattr(pictures, "measure", measured)
    return seen


def test_every_system_in_its_place(small_picture: Path, planned: dict[str, list[Any]]) -> None:
    wanted = PictureOptions(steps=6, guidance=3.0, bits=8, text_encoder=True, pixels=32)
    bench_picture(str(small_picture), wanted, Options(1, CPU, ("openvino",), compiled=False))
    assert planned["written"] == ["pipeline", "OpenVINO pipeline", "NNCF pipeline", "dgq pipeline"]
    assert [system.name for system in planned["systems"]] == [
        "float32",
        "bfloat16",
        "OpenVINO float32",
        "OpenVINO bfloat16",
        "OpenVINO NNCF int8",
        "dgq W8A8, text encoder int8",
    ]
    (drawn,) = {json.dumps(asdict(system.specs[0].picture)) for system in planned["systems"]}  # type: ignore[arg-type]
    assert json.loads(drawn)["settings"] == asdict(Settings(6, 3.0, width=32, height=32))
    assert planned["case"] == ["picture.json picture, 32 x 32, 6 steps, guidance 3"]


def test_an_architecture_draws_as_it_is_used(small_picture: Path, planned: dict[str, list[Any]]) -> None:
    bench_picture(str(small_picture), PictureOptions(), Options(1, CPU, compiled=False))
    assert planned["case"] == ["picture.json picture, 16 x 16, 1 step"]


def test_a_checkpoint_is_set_beside_its_float_model(
    tiny_checkpoint: Path, tiny_pipeline: Path, planned: dict[str, list[Any]]
) -> None:
    bench_picture(find_model(tiny_checkpoint), PictureOptions(steps=3), Options(1, CPU, compiled=False))
    assert planned["written"] == []
    places = {system.name: system.specs[0].folder for system in planned["systems"]}
    assert places == {
        "float32": str(tiny_pipeline),
        "bfloat16": str(tiny_pipeline),
        "dgq W4A8": str(tiny_checkpoint),
    }


def test_a_checkpoint_whose_float_model_is_gone_is_refused(tiny_checkpoint: Path) -> None:
    found = find_model(tiny_checkpoint)
    assert found.header is not None
    found.header.base_model = "/nowhere/model"
    with pytest.raises(DgqError, match=r"the float model it was made of \(/nowhere/model\) is not at hand"):
        bench_picture(found, PictureOptions(), Options(1, CPU, compiled=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "flux.1-dev"}, r"flux\.1-dev: what stands around the network in a pipeline is not known"),
        ({"arch": "sd-turbo", "pixels": 60}, "pictures of 60 pixels cannot be drawn"),
        ({"arch": "sd-turbo", "steps": 0}, "steps 0 is out of range"),
        ({"pixels": 60}, "width 60 must be a multiple of 8"),
        ({"compiled": True}, "only openvino draws whole pictures"),
        ({"what": "step", "steps": 3}, "are those of pictures"),
    ],
)
def test_what_pictures_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DgqError, match=message):
        bench(**{"what": "picture", "device": "cpu", **options})


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_cannot_be_is_told_in_one_line(part: str, recipe: dict[str, Any]) -> None:
    pipeline = {**recipe["pipeline"], part: {**recipe["pipeline"][part], "_class_name": "Nothing"}}
    with pytest.raises(DgqError, match="Nothing"):
        files.pipeline_parts(recipe["config"], pipeline)


@pytest.mark.parametrize("name", ["sd-v1.4", "sd-turbo", "sdxl-turbo"])
def test_well_known_pipelines_fit_together(name: str) -> None:
    """Sizes of the published text encoders and VAE; the text is as wide as the network reads it."""
    which = files.architectures.architecture(name)
    parts = files.pipeline_parts({**which.config, "_class_name": which.network}, which.pipeline or {})
    millions = {part: round(sum(p.numel() for p in module.parameters()) / 1e6) for part, module in parts.items()}
    encoders = {"sd-v1.4": [123], "sd-turbo": [340], "sdxl-turbo": [123, 695]}[name]
    assert millions["vae"] == 84
    assert [millions[part] for part in parts if part.startswith("text_encoder")] == encoders
    width = sum(module.config.hidden_size for part, module in parts.items() if part.startswith("text_encoder"))
    assert width == parts["unet"].config.cross_attention_dim
