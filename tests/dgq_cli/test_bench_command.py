"""`dgq bench` as a user runs it."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_step_of_a_checkpoint_as_json_and_csv(dgq_command: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "results" / "bench.csv"
    run = dgq_command(
        "bench", "--model", tiny_checkpoint, "--what", "step", "--repeats", 1, "--threads", 1, "--json", "--csv", file
    )
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert set(data) == {"machine", "rows", "notes"}
    assert {"cpu", "cores", "isa", "cpu_path", "torch", "threads", "date", "model"} <= set(data["machine"])
    assert data["machine"]["threads"] == 1
    rows = {row["system"]: row for row in data["rows"]}
    assert list(rows) == ["float32", "float32 channels-last", "bfloat16", "dgq W4A8"]
    quantized = rows["dgq W4A8"]
    assert 0 < quantized["relative_error"] < 1
    assert quantized["disk_mib"] < rows["float32"]["disk_mib"]
    assert quantized["peak_rss_mib"] is None  # --memory was not given
    assert any(note.startswith("dgq W4A8 is ") for note in data["notes"])
    with open(file, newline="", encoding="utf-8") as handle:
        assert [row["system"] for row in csv.DictReader(handle)] == list(rows)


def test_bad_bits_are_a_usage_error(dgq_command: Run) -> None:
    run = dgq_command("bench", "--bits", 5)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "5 is not one of 4, 8" in run.stderr


def test_an_unknown_architecture_is_one_line(dgq_command: Run) -> None:
    run = dgq_command("bench", "--arch", "sd-v9")
    assert run.returncode == 1
    assert run.stdout == ""
    assert "architecture 'sd-v9' is not one of sd-v1.4, sdxl-turbo" in run.stderr
