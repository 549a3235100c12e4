"""`make gpu` where there is no GPU: it installs what lacks, then says that there is no device."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "check.py"


def load():
    specification = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_only_what_lacks_is_missing():
    wanted = ["torch>=2", "no-such-distribution>=1", "numpy>=999", "neither; sys_platform == 'nowhere'"]
    assert load().missing(wanted) == ["no-such-distribution>=1", "numpy>=999"]
    assert any(one.startswith("hypothesis") for one in load().required())


def test_no_device_is_one_line_and_no_index_is_asked(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--into", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "sees no CUDA device" in run.stderr
    assert "Traceback" not in run.stderr
    assert "== doctor" not in run.stdout


def test_a_stage_ends_at_its_limit():
    assert not load().run("sleeper", 1, [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))


def test_the_report_runs_on_a_pretended_device(tmp_path):
    """All but the compilation, of which this shard has no share."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    where = [
        "--out",
        str(tmp_path),
        "--device",
        "pretend",
        "--only",
        "embedded W8A8",
        "--cache",
        str(tmp_path / "kernels"),
    ]
    code = (
        "import report; report.main()\n"
        "import stages; assert all(callable(getattr(stages, name)) for name in report.LIMITS)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "--run", "shard", "--shard", "99999/100000", *where],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "report.jsonl").exists()  # no error either


def test_compiled_steps_stand_beside_graphs(tmp_path):
    """On a tiny UNet; what cannot be compiled is told, and stops nothing. (Inductor itself would take a minute.)"""
    paths = [str(SCRIPT.parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DGQ_BACKEND": "reference"}
    code = """
import report, torch
def broken(function, **options):
    raise RuntimeError("no compiler")
for torch.compile in (broken, lambda function, **options: function):
    report.main()
"""
    command = [sys.executable, "-c", code, "--run", "compiled", "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    systems = [("float16 compiled", "max-autotune"), ("float16 compiled", "default"), ("dgq W8A8 compiled", "default")]
    assert [(row["system"], row["mode"]) for row in rows] == 2 * systems
    assert all("no compiler" in row["error"] for row in rows[:3])
    assert all(row["p50_ms"] > 0 and row["float16_graph_ms"] > 0 and row["dgq_W8A8_graph_ms"] > 0 for row in rows[3:])
