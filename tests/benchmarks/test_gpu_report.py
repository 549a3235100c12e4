"""The report of a GPU's minutes: what can be said of it where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def modules(monkeypatch):
    """(report, session), which import one another from their folder."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import report
    import session

    yield report, session
    for name in {"report", "session", "networks"} - before:
        sys.modules.pop(name, None)


def test_networks_that_there_are_not_are_one_line(tmp_path):
    command = [sys.executable, str(FOLDER / "report.py"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for only in ("nosuch", "embedded", "sd-v1.4,W2A8"):
        run = subprocess.run([*command, "--only", only, "check"], capture_output=True, text=True)
        assert run.returncode == 2
        assert run.stderr.splitlines()[-1] == (
            f"report.py: error: --only {only!r} names no network; labels are tiny W8A8, tiny W4A8, tiny W8A8 rotated"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_stage_without_a_network_ends_in_one_line(modules, tmp_path):
    from networks import quantized_steps

    some = modules[1].Session(tmp_path, "pretend", only="embedded")
    with pytest.raises(SystemExit, match=r"--only embedded: names no network .*\(sd-v1.4, sdxl-turbo\)"):
        next(quantized_steps(some))
    assert modules[1].Session(tmp_path, "pretend", only="sdxl-turbo W4A8").chosen() == ["sdxl-turbo"]


def test_results_of_another_run_are_not_counted(modules, tmp_path, monkeypatch, capsys):
    report, session = modules
    seen = []

    def run(one, stage, limit, environment):
        assert one.command(stage)[-2:] == ["--since", str(one.size())]
        one.say(stage, call=len(seen))
        seen.append([row["call"] for row in one.said(stage)])
        return "0", ""

    monkeypatch.setattr(report, "_run", run)
    for _ in range(2):
        report.lead(session.Session(tmp_path, "cpu"), ["check", "check", "compile"], 60)
        told = [line for line in capsys.readouterr().out.splitlines() if '"stage": "lead"' in line]
    assert seen == [[0], [1], [2], [3], [4], [5]]
    assert len(told) == 6  # when it is said, and in the summary
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 12


def test_a_row_that_was_cut_costs_no_other_one(modules, tmp_path):
    one = modules[1].Session(tmp_path, "cpu")
    one.say("check", call=0)
    with open(tmp_path / "report.jsonl", "a") as file:
        file.write('{"stage": "check", "ca')
    one.say("check", call=1)
    one.say("check", call=2)
    assert [row["call"] for row in one.said("check")] == [0, 1, 2]
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 4
