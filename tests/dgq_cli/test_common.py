"""What the commands share."""

import pytest

from dgq_cli import common


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_that_of_the_pass(clock, capsys):
    """Passes over the same calls come between layers: the second pass's time left does not count what lay between."""
    with common.StageProgress({}) as progress:
        for at, stage, done, total in (
            (0, "statistics", 1, 32),
            (20, "statistics", 2, 32),
            (40, "quantize", 1, 9),
            (1000, "quantize", 3, 9),
            (1020, "statistics", 1, 32),
            (1060, "statistics", 5, 32),
            (1160, "quantize", 4, 9),
        ):
            clock[0] = 1000.0 + at
            progress(stage, done, total)
    left = [line.partition(", about ")[2] for line in capsys.readouterr().err.splitlines()]
    assert left == ["", "10 min left", "", "48 min left", "", "4 min left", "31 min left"]


def test_time_left_of_what_goes_on_counts_what_it_did_itself(clock, capsys):
    with common.StageProgress({}) as progress:
        progress("quantize", 100, 110)
        clock[0] += 100
        progress("quantize", 105, 110)
    assert capsys.readouterr().err.splitlines()[-1].endswith("about 2 min left")
