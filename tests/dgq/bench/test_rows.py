"""The bookkeeping of a benchmark: turns, percentiles, sentences, CSV. No test looks at how long anything took."""

import csv
import dataclasses
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgq.bench import Report, Row, interleaved, kernel_verdicts, make_rows, verdicts
from dgq.bench.rows import FACTS, WARM_UP, check_csv
from dgq.errors import DgqError

CPU = torch.device("cpu")


def recording(seen: list[str], name: str, fails_at: int | None = None) -> Callable[[], float]:
    """A timer that notes its calls and fails at one of them."""

    def timer() -> float:
        seen.append(name)
        if seen.count(name) == fails_at:
            raise DgqError("lost")
        return float(seen.count(name))

    return timer


def test_interleaved_takes_turns_after_the_warm_up() -> None:
    seen: list[str] = []
    calls: list[tuple[int, int]] = []
    timers = {name: recording(seen, name) for name in "ab"}
    times = interleaved(timers, 3, on_call=lambda *done: calls.append(done))
    assert "".join(seen) == "ab" * (WARM_UP + 3)
    assert times == {name: [WARM_UP + 1, WARM_UP + 2, WARM_UP + 3] for name in "ab"}
    assert calls[-1] == (6, 6)


def test_a_timer_that_fails_has_no_more_turns() -> None:
    seen: list[str] = []
    failures: dict[str, str] = {}
    timers = {"a": recording(seen, "a"), "b": recording(seen, "b", 2), "c": recording(seen, "c")}
    times = interleaved(timers, 3, 0, on_failure=lambda name, error: failures.update({name: error.message}))
    assert "".join(seen) == "abcabcac"
    assert list(times) == ["a", "c"]
    assert failures == {"b": "lost"}
    with pytest.raises(DgqError, match="lost"):
        interleaved({"a": recording([], "a", 1)}, 1, 0)


def test_rows_hold_percentiles_and_ratios_to_float32() -> None:
    slow, fast = make_rows("x", {"float32": [1, 2, 3, 4, 5], "dgq": [1.5] * 5}, "kernels")
    assert (slow.p50_ms, slow.ratio_to_float32) == (3, 1)
    assert slow.p20_ms < slow.p50_ms < slow.p80_ms
    assert (fast.p20_ms, fast.p80_ms, fast.ratio_to_float32) == (1.5, 1.5, 0.5)
    assert fast.relative_error is None


def step(system: str, ms: float, base: float = 10) -> Row:
    """A row of the step table."""
    return Row(system, "UNet step", ms, ms, ms, ms / base, table="step")


def test_verdicts_say_plainly_what_is_slower_and_why() -> None:
    slower = verdicts([step("float32", 10), step("bfloat16", 5), step("dgq W4A8", 13)], CPU)
    assert slower[0].startswith("dgq W4A8 is 1.3x slower than float32 here: ")
    assert slower[1].startswith("dgq W4A8 is 2.6x slower than bfloat16 here: ")
    faster = verdicts([step("float32", 10), step("dgq W4A8", 5)], CPU)
    assert faster == ["dgq W4A8 is 2.0x faster than float32 here"]


def test_verdicts_compare_ratios_as_groups_have_only_float32_in_common() -> None:
    # dgq ran in a group whose turns were twice as slow
    rows = [step("float32", 10), step("other int8", 4), step("dgq W8A8", 6, 20)]
    assert verdicts(rows, CPU)[1] == "dgq W8A8 is 1.3x faster than other int8 here"


def test_kernel_verdicts_count_slower_shapes() -> None:
    rows = [Row("dgq W8A8", case, 1, 1, 1, ratio) for case, ratio in (("a", 0.5), ("b", 2.0), ("c", 3.0))]
    (sentence,) = kernel_verdicts(rows, CPU)
    assert sentence.startswith("dgq W8A8 is slower than float32 in 2 of 3 layer shapes here: ")


def test_the_csv_holds_machine_versions_and_every_column_of_a_row(tmp_path: Path) -> None:
    row = dataclasses.replace(step("OpenVINO, int8", 3), peak_rss_mib=100.5, packages="openvino 1, nncf 2")
    report = Report({name: f"the {name}" for name in FACTS}, [row], [])
    file = tmp_path / "new" / "results.csv"
    report.append_csv(file)
    report.append_csv(file)
    with open(file, newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    assert list(table[0]) == [*FACTS, *(item.name for item in dataclasses.fields(Row))]
    assert table[0] == table[1]
    assert table[0]["date"] == "the date"
    assert table[0]["system"] == "OpenVINO, int8"
    assert table[0]["packages"] == "openvino 1, nncf 2"
    assert float(table[0]["peak_rss_mib"]) == 100.5
    assert table[0]["disk_mib"] == ""  # not measured


def test_a_csv_of_other_columns_is_not_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DgqError, match="other columns"):
        Report({}, [], []).append_csv(file)
    assert file.read_text() == "a,b\n1,2\n"


def test_a_csv_that_cannot_be_appended_to_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for file in (tmp_path / "other.csv", tmp_path, tmp_path / "other.csv" / "x.csv", Path("/proc/nowhere/x.csv")):
        with pytest.raises(DgqError):
            check_csv(file)
    check_csv(tmp_path / "new" / "results.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["other.csv"]


def test_a_csv_is_as_it_was_where_the_disk_is_full(tmp_path: Path) -> None:
    report = Report({name: f"the {name}" for name in FACTS}, [step("float32", 10)] * 100, [])
    file = tmp_path / "results.csv"
    report.append_csv(file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))  # the next rows do not fit
    try:
        with pytest.raises(DgqError, match="cannot be written"):
            report.append_csv(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    with pytest.raises(DgqError, match="No space left"):
        report.append_csv(Path("/dev/full"))
