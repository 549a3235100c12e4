"""dgq generate as a person runs it."""

import json

import pytest
import tiny_pipelines
from PIL import Image


def test_pictures_grid_and_json(dgq_command, tiny_checkpoint, tmp_path):
    run = dgq_command(
        "generate",
        "a cat",
        "a zebra",
        "--model",
        tiny_checkpoint,
        "--out",
        tmp_path,
        "--steps",
        2,
        "--count",
        2,
        "--seed",
        5,
        "--grid",
        "--batch",
        2,
        "--json",
        alone=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["seed"] == 5
    assert [p["seed"] for p in result["pictures"]] == [5, 6, 7, 8]
    names = ["a-cat-5.png", "a-cat-6.png", "a-zebra-7.png", "a-zebra-8.png", "grid.png"]
    assert result["files"] == [str(tmp_path / name) for name in names]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert "never saw: zebra" in run.stderr


@pytest.mark.parametrize(
    "args, code, message",
    [
        ((" ",), 2, "empty"),
        (("a cat", "--size", "17"), 1, "multiple of"),
        (("a cat", "--size", "axb"), 2, "--size"),
        (("a cat", "--steps", "0"), 2, "--steps"),
        (("cat " * 40,), 1, "tokens"),
        (("a cat", "--device", "nosuch"), 1, "nosuch"),
        (("a cat", "--device", "cpu", "--offload"), 1, "there is no GPU to offload from"),
        (("a cat", "--sampler", "Euler b"), 1, "this model's: DDIM, DDPM, PLMS, Euler, Euler Karras"),
        (("a cat", "--dtype", "int8"), 2, "float32, bfloat16 or float16"),
        (("a cat", "a dog", "--out", "x.png"), 2, "folder"),
    ],
)
def test_wrong_input_ends_in_one_line(dgq_command, tiny_checkpoint, tmp_path, args, code, message):
    run = dgq_command("generate", *args, "--model", tiny_checkpoint, cwd=tmp_path)
    assert run.returncode == code
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("guidance, told", [(1, True), (3, False)])
def test_a_negative_prompt_that_is_not_read_is_told(dgq_command, tiny_checkpoint, tmp_path, guidance, told):
    options = ("--negative", "a dog", "--guidance", guidance, "--steps", 1, "--model", tiny_checkpoint)
    run = dgq_command("generate", "a cat", *options, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert ("note: at guidance 1 this model does not read the negative prompt" in run.stderr) == told


def test_loras_add_up_at_their_strengths(dgq_command, tiny_checkpoint, tmp_path):
    one, two = (tiny_pipelines.lora(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("a:1", "b")))

    def draw(*more):
        given = ("--model", tiny_checkpoint, "--seed", 5, "--steps", 1, "--out", tmp_path / "x.png", "--overwrite")
        run = dgq_command("generate", "a cat", *given, *more)
        assert run.returncode == 0, run.stderr
        assert "peft" not in run.stderr
        with Image.open(tmp_path / "x.png") as image:
            return image.tobytes(), image.text["parameters"]

    plain, text = draw()
    assert "Lora" not in text
    both, text = draw("--lora", f"{one}:0.5", "--lora", two)
    assert text.endswith(', Quantization: integer W4A8, Lora: "a:1:0.5, b:1"')
    first, text = draw("--lora", f"{one}:0.5")
    none, text = draw("--lora", f"{one}:0")
    assert len({plain, both, first}) == 3
    assert none == plain
    (tmp_path / "none.safetensors").write_bytes(b"")
    for given, code, message in (
        (f"{one}:inf", 2, "the strength is not finite"),
        (tmp_path / "nowhere.safetensors", 1, "nowhere.safetensors: no such file"),
        (tmp_path / "none.safetensors", 1, "not a readable safetensors file"),
        (tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors", 1, "holds no LoRA"),
    ):
        run = dgq_command("generate", "a cat", "--model", tiny_checkpoint, "--lora", given)
        assert run.returncode == code
        assert message in run.stderr
        assert "Traceback" not in run.stderr


def test_a_dtype_is_that_of_the_drawing(dgq_command, tiny_checkpoint, tmp_path):
    pictures = []
    for dtype in ("float32", "bfloat16"):
        few = ("--steps", 1, "--seed", 5, "--no-metadata", "--model", tiny_checkpoint)
        run = dgq_command("generate", "a cat", *few, "--dtype", dtype, "--out", tmp_path / f"{dtype}.png")
        assert run.returncode == 0, run.stderr
        pictures.append((tmp_path / f"{dtype}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_place_that_cannot_be_written(dgq_command, tiny_checkpoint):
    run = dgq_command("generate", "a cat", "--model", tiny_checkpoint, "--steps", 1, "--out", "/proc/nowhere")
    assert run.returncode == 1
    assert "cannot be written" in run.stderr


def test_version_and_no_command(dgq_command):
    assert dgq_command("--version").stdout.startswith("dgq ")
    assert dgq_command().returncode in (0, 2)
    assert dgq_command("nosuch").returncode == 2


def test_what_is_done_is_written_whatever_ends_the_next_one(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from dgq.errors import DgqError
    from dgq.pictures import generation
    from dgq_cli.generate_command import command

    decode, made = generation.decode, []

    def second_fails(*arguments):
        if made:
            raise DgqError("planted")
        made.append(decode(*arguments))
        return made[0]

    monkeypatch.setattr(generation, "decode", second_fails)
    options = {"steps": 1, "seed": 3, "size": "16", "model": str(tiny_checkpoint), "out": tmp_path / "many"}
    with pytest.raises(DgqError, match="planted"):
        command(["a cat"], count=3, batch=1, grid=True, **options)
    (file,) = (tmp_path / "many").iterdir()
    assert capsys.readouterr().out.split() == [str(file)]
