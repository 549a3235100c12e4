"""`dgq inspect` as a user runs it."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from dgq_cli import inspect_command

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_json_of_a_checkpoint(dgq_command: Run, tiny_checkpoint: Path) -> None:
    run = dgq_command("inspect", tiny_checkpoint, "--json", "--worst", 3, alone=True)
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert data["quantized"] is True
    assert data["label"] == "integer W4A8"
    assert len(data["worst"]) == 3
    assert len(data["layers"]) > 3
    assert data["suggestion"]["overrides"][0].endswith("=8")


def test_text_of_a_checkpoint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command.command(str(tiny_checkpoint), layers=True, worst=2, budget=2)
    text = capsys.readouterr().out
    assert "integer W4A8" in text
    assert "worst 2 layers by output SQNR" in text
    assert "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj" in text  # names are never cut
    assert "dgq calibrate ... --override '" in text


def test_files_are_compared_with_their_checksums_on_demand(
    dgq_command: Run, tiny_checkpoint: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    run = dgq_command("inspect", folder, "--verify")
    assert run.returncode == 0, run.stderr
    assert "of 10 files, every one as it was written" in run.stdout
    merges = folder / "tokenizer" / "tokenizer.json"
    merges.write_text(merges.read_text() + " ")
    assert "of 10 files; --verify compares them" in dgq_command("inspect", folder).stdout
    for command in (("inspect", folder, "--verify", "--json"), ("generate", "a cat", "--model", folder)):
        run = dgq_command(*command)
        assert (run.returncode, run.stdout) == (1, "")
        assert f"error: {merges}: is not as it was written: another checksum" in run.stderr
    picture = tmp_path / "cat.png"
    run = dgq_command("generate", "a cat", "--model", folder, "--no-verify", "--steps", 1, "--out", picture)
    assert run.returncode == 0, run.stderr
    assert picture.exists()
    run = dgq_command("inspect", tiny_pipeline, "--verify")
    assert run.returncode == 1
    assert f"error: {tiny_pipeline}: has no checksums to verify" in run.stderr


def test_text_of_a_float_model(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command.command(str(tiny_pipeline), worst=10, budget=2)
    assert "is a float model: nothing in it is quantized" in capsys.readouterr().out


def test_measured_checkpoint_as_text_picture_and_json(dgq_command: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "picture.png", tmp_path / "page.html"
    arguments = ("inspect", tiny_checkpoint, "--prompts", 1, "--steps", 2, "--worst", 3)
    run = dgq_command(*arguments, "--png", file, "--html", page, "--json")
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    measured = data["measurement"]
    assert len(measured["layers"]) == len(data["layers"])
    assert len(measured["layers"][0]["sqnr_db_by_step"]) == 2
    assert data["suggestion"]["predicted_sqnr_db"] > 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {file}" in run.stderr
    assert f"wrote {page}" in run.stderr
    assert measured["layers"][0]["name"] in page.read_text()


def test_measured_text_fits_a_narrow_terminal(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    inspect_command.command(str(tiny_checkpoint), measure=True, prompts=1, steps=2, worst=3)
    text = capsys.readouterr().out
    assert "\x1b" not in text  # no terminal, no colours
    start = text.index("output SQNR in dB")
    end = text.index("dgq calibrate ...")
    assert max(len(line) for line in text[start:end].splitlines()) <= 80
    for line in ("UNet output", "worst 3 layers", "up 1 attention 1 0.attn2", "predicted: SQNR", "budget"):
        assert line in text


def test_options_that_need_measuring() -> None:
    with pytest.raises(typer.BadParameter, match=r"not a \.png"):
        inspect_command.command(png=Path("picture.jpg"))
    with pytest.raises(typer.BadParameter, match="needs --measure"):
        inspect_command.command(against="dgq-emoji")
