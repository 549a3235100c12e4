"""`dgq inspect` as a user runs it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dgq_cli import inspect_command

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_json_of_a_checkpoint(dgq_command: Run, tiny_checkpoint: Path) -> None:
    run = dgq_command("inspect", tiny_checkpoint, "--json", "--worst", 3)
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


def test_text_of_a_float_model(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command.command(str(tiny_pipeline), worst=10, budget=2)
    assert "is a float model: nothing in it is quantized" in capsys.readouterr().out
