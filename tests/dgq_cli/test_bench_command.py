"""`dgq bench` as a user runs it."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import BUILDERS

from dgq.architectures import ARCHITECTURES
from dgq.checkpoint.writing import WEIGHTS_NAME
from dgq_cli import bench_command

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_help_names_every_architecture() -> None:
    assert bench_command.NAMES.split(", ") == list(ARCHITECTURES)


def test_step_of_a_checkpoint_as_json_and_csv(dgq_command: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "results" / "bench.csv"
    run = dgq_command(
        "bench",
        "--model",
        tiny_checkpoint,
        "--what",
        "step",
        "--repeats",
        1,
        "--threads",
        1,
        "--json",
        "--csv",
        file,
        alone=True,
    )
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert set(data) == {"machine", "rows", "notes"}
    assert {"cpu", "cores", "isa", "cpu_path", "torch", "threads", "date", "model"} <= set(data["machine"])
    assert data["machine"]["threads"] == 1
    rows = {row["system"]: row for row in data["rows"]}
    assert list(rows) == ["float32", "bfloat16", "dgq W4A8"]
    quantized = rows["dgq W4A8"]
    assert 0 < quantized["relative_error"] < 1
    assert quantized["disk_mib"] < rows["float32"]["disk_mib"]
    assert quantized["peak_rss_mib"] > 64
    assert any(note.startswith("dgq W4A8 is ") for note in data["notes"])
    with open(file, newline="", encoding="utf-8") as handle:
        assert [row["system"] for row in csv.DictReader(handle)] == list(rows)


@pytest.mark.slow
def test_step_of_sdxl(dgq_command: Run, tmp_path: Path) -> None:
    folder = BUILDERS["sdxl"](tmp_path / "sdxl")
    run = dgq_command("bench", "--model", folder, "--what", "step", "--bits", 8, "--repeats", 1, "--json")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    assert [row["system"] for row in rows] == ["float32", "bfloat16", "dgq W8A8"]
    assert 0 < rows[2]["relative_error"] < 0.1
    # the UNet's file alone
    assert rows[0]["disk_mib"] == (folder / "unet" / WEIGHTS_NAME).stat().st_size / 2**20


def test_pictures_of_a_checkpoint_as_json_and_csv(dgq_command: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    asked = ["--model", tiny_checkpoint, "--steps", 2, "--repeats", 1, "--threads", 1, "--json", "--csv", file]
    run = dgq_command("bench", "--what", "picture", "--device", "cpu", *asked)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    whole = {row["system"]: row for row in rows if row["table"] == "picture"}
    assert list(whole) == ["float32", "bfloat16", "dgq W4A8"]
    assert {row["case"] for row in whole.values()} == {"tiny-w4a8 picture, 16 x 16, 2 steps, guidance 7.5"}
    for system, row in whole.items():
        parts = {
            one["case"].split(": ")[1]: one["p50_ms"]
            for one in rows
            if one["table"] == "part" and one["system"] == system
        }
        assert list(parts) == ["text", "steps", "decoder", "PNG", "load"]
        assert parts.pop("load") > 0
        assert sum(parts.values()) == pytest.approx(row["p50_ms"])  # of one picture
        assert row["peak_rss_mib"] > 64
    weights = sum(path.stat().st_size for path in tiny_checkpoint.rglob("*.safetensors"))
    assert whole["dgq W4A8"]["disk_mib"] == weights / 2**20
    assert 0 < whole["dgq W4A8"]["relative_error"] < 1
    with open(file, newline="", encoding="utf-8") as handle:
        assert [row["table"] for row in csv.DictReader(handle)] == ["picture", *["part"] * 5] * 3


@pytest.mark.slow
def test_pictures_of_an_architecture_as_tables(dgq_command: Run, small_picture: Path) -> None:
    run = dgq_command("bench", "--what", "picture", "--arch", small_picture, "--repeats", 1, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("picture.json picture, 16 x 16, 1 step ")]
    assert len(lines) == 3
    head = next(line for line in run.stdout.splitlines() if line.startswith("system"))
    assert head.split("  ")[0] == "system"
    assert [title for title in ("text ms", "steps ms", "decoder ms", "PNG ms", "load ms") if title in head] != []
    assert "note: picture.json has random weights" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--what", "picture", "--arch", "flux.1-dev"], 1, "flux.1-dev: what stands around the network"),
        (["--what", "picture", "--arch", "sd-turbo", "--pixels", 60], 1, "pictures of 60 pixels cannot be drawn"),
        (["--what", "picture", "--steps", 0], 2, "--steps"),
        (["--what", "step", "--steps", 4], 2, "go with --what picture"),
        (["--pixels", 64], 2, "--pixels goes with --arch, --predict and --what picture"),
    ],
)
def test_pictures_that_cannot_be_timed(dgq_command: Run, arguments: list[object], code: int, message: str) -> None:
    run = dgq_command("bench", *arguments)
    assert run.returncode == code
    assert run.stdout == ""
    assert message in run.stderr


@pytest.mark.parametrize(
    "option", [("--csv", "rows.csv"), ("--what", "step"), ("--bits", 8), ("--arch", "sd-v1.4"), ("--repeats", 1)]
)
def test_options_of_measuring_do_not_go_with_predictions(dgq_command: Run, option: tuple[object, ...]) -> None:
    run = dgq_command("bench", "--predict", "sd-v1.4", *option)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "--predict measures nothing" in run.stderr


def test_bad_bits_are_a_usage_error(dgq_command: Run) -> None:
    run = dgq_command("bench", "--bits", 5)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "5 is not one of 4, 8" in run.stderr


def test_an_unknown_architecture_is_one_line(dgq_command: Run) -> None:
    run = dgq_command("bench", "--arch", "sd-v9")
    assert run.returncode == 1
    assert run.stdout == ""
    assert "architecture 'sd-v9' is not one of sd-v1.4, sd-turbo, sdxl-turbo" in run.stderr


@pytest.mark.slow
def test_an_architecture_as_a_table(dgq_command: Run, small_config: Path) -> None:
    run = dgq_command("bench", "--arch", small_config, "--bits", 8, "--no-compile", "--repeats", 1, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("small.json step")]
    assert [line.split()[2] for line in lines] == ["float32", "bfloat16", "dgq"]
    assert "peak RSS MiB" in run.stdout
    assert "note: small.json has random weights" in run.stderr


def test_kernels_tell_the_fraction_of_the_peak(dgq_command: Run, tiny_checkpoint: Path) -> None:
    run = dgq_command(
        "bench",
        "--model",
        tiny_checkpoint,
        "--what",
        "kernels",
        "--bits",
        8,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--json",
    )
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    engine = (
        data["machine"]["backend"].startswith("cpu (") and data["machine"]["cpu_engine"] in data["machine"]["backend"]
    )
    for row in data["rows"]:
        assert (row["peak_fraction"] is not None) == (engine and row["system"].startswith("dgq"))


def test_kernels_as_a_table(dgq_command: Run, tiny_checkpoint: Path) -> None:
    run = dgq_command("bench", "--model", tiny_checkpoint, "--what", "kernels", "--repeats", 1, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if " dgq " in line]
    assert "note: " in run.stderr


def test_packages_that_are_missing_are_a_usage_error(dgq_command: Run, tmp_path: Path) -> None:
    """Python is kept from finding any of the optional packages."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('openvino', 'nncf') else find(name, *rest)\n"
    )
    run = dgq_command("bench", "--arch", "sd-v1.4", "--with", "openvino", first_on_path=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "openvino and nncf not installed: pip install openvino nncf" in run.stderr
    unknown = dgq_command("bench", "--arch", "sd-v1.4", "--with", "onnx")
    assert unknown.returncode == 2
    assert "'onnx' is not one of openvino, torchao, sdnq, all" in unknown.stderr
