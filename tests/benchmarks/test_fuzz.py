"""Damaged checkpoints of every class, through both routes: refused in one line, or the same picture."""

from collections import Counter

import pytest

from benchmarks import fuzz

SIZE = 16  # the tiny model's


def test_every_damage_is_refused_or_harmless(tiny_checkpoint, tmp_path):
    cases = list(fuzz.run(tiny_checkpoint, SIZE, 75, 1, tmp_path))
    assert [case for case in cases if fuzz.wrong(case)] == []
    assert Counter(case.route for case in cases) == {"dgq": 60, "diffusers": 15}
    assert {case.damage for case in cases} == set(fuzz.DAMAGES)
    assert "refused" in {case.verified for case in cases}  # dgq.verify told what diffusers did not


def test_what_is_silent_is_told(tiny_checkpoint, tmp_path, monkeypatch):
    """The fuzz can fail: without checksums another bit is another picture."""
    monkeypatch.setenv("DGQ_VERIFY", "0")
    (exchanged,) = fuzz.run(tiny_checkpoint, SIZE, 0, 1, tmp_path, only=list(fuzz.DAMAGES).index("tensors exchanged"))
    assert exchanged.outcome == "silent"
    assert fuzz.wrong(exchanged)


def test_a_foreign_error_that_nothing_told_is_wrong():
    case = fuzz.Case(1, 1, "truncated", "", "diffusers", "library, no file", "JSONDecodeError", "refused")
    assert not fuzz.wrong(case)
    case.verified = "harmless"
    assert fuzz.wrong(case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_damages(tiny_checkpoint, tmp_path, seed):
    assert [case for case in fuzz.run(tiny_checkpoint, SIZE, 1000, seed, tmp_path) if fuzz.wrong(case)] == []
