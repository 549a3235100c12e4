"""dgq tune, and drawing with what it makes, as a person runs them."""

import json

import pytest
import tiny_pipelines
from PIL import Image

from dgq.tuning import train
from dgq_cli import tune_command


@pytest.mark.parametrize("written", [False, True])
def test_an_interrupted_run_says_what_goes_on_from_it(monkeypatch, tmp_path, written):
    """A file that is there already, before its last validation pictures, is not replaced by --resume alone."""
    file = tmp_path / "cat.safetensors"

    def interrupted(*_):
        if written:
            file.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "tune", interrupted)
    monkeypatch.setattr(tune_command, "going_on", told := [])
    with pytest.raises(KeyboardInterrupt):
        tune_command.command("x", [tmp_path], ["a cat"], file)
    assert (told[0] == f"{file} is whole") == written
    assert ("--resume --overwrite" in told[-1]) == written


def test_tune_draw_and_inspect(dgq_command, tiny_checkpoint, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), "teal").save(tmp_path / name / "1.png")
    file = tmp_path / "pets.safetensors"
    run = dgq_command(
        "tune",
        tiny_checkpoint,
        "--images",
        tmp_path / "cat",
        "--prompt",
        "a photo of sks cat",
        "--images",
        tmp_path / "dog",
        "--prompt",
        "a photo of zwx dog",
        "--out",
        file,
        "--steps",
        3,
        "--learning-rate",
        0.1,
        "--mixed-precision",
        "bf16",
        "--high-noise-strength",
        0.25,
        "--validation-prompt",
        "a cat",
        "--json",
        alone=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert [one["prompt"] for one in result["subjects"]] == ["a photo of sks cat", "a photo of zwx dog"]
    assert result["bytes"] == file.stat().st_size
    assert result["options"]["high_noise_strength"] == 0.25
    names = ["cat", "dog", "pets-step3-1.png", "pets.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names

    def draw(name, *more):
        out = tmp_path / name
        draws = ("generate", "a cat", "--model", tiny_checkpoint, "--seed", 1, "--steps", 2, "--out", out)
        run = dgq_command(*draws, *more)
        assert run.returncode == 0, run.stderr
        with Image.open(out) as image:
            return image.tobytes(), image.text["parameters"]

    plain, tuned = draw("plain.png"), draw("tuned.png", "--tuned", file)
    assert plain[0] != tuned[0]
    assert 'Tuned: "pets:1"' in tuned[1]
    assert draw("zero.png", "--tuned", f"{file}:0")[0] == plain[0]
    lora = tiny_pipelines.lora(tmp_path / "style.safetensors")
    styled, both = (draw(f"{len(more)}.png", "--lora", lora, *more) for more in ((), ("--tuned", file)))
    assert len({plain[0], tuned[0], styled[0], both[0]}) == 4
    assert both[1].endswith('Lora: "style:1", Tuned: "pets:1"')

    run = dgq_command("inspect", file)
    assert run.returncode == 0, run.stderr
    for text in ("integer W4A8", "2 of 1000 timesteps", "'a photo of zwx dog', 1 pictures"):
        assert text in run.stdout
