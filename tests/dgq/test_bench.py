"""The benchmark's bookkeeping: shapes, rows, notes and files. No test looks at how long anything took."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from dgq import bench
from dgq.bench import Case, Row
from dgq.checkpoint import read_header
from dgq.errors import DgqError
from dgq.layers import IntegerLayer
from dgq.recipe import LayerPlan, Recipe

CPU = torch.device("cpu")
LINEAR = LayerPlan("linear", 32, 48, 4, 8, True, class_ends=[32])
CONV = LayerPlan("conv2d", 16, 24, 4, 8, True, kernel_size=3, stride=2, padding=1, class_ends=[16])


def test_operations_of_a_linear_layer_are_two_per_product() -> None:
    case = Case(LINEAR, (10, 32))
    assert str(case) == "linear 10x32x48"
    assert case.operations == 2 * 10 * 32 * 48


def test_operations_of_a_strided_convolution_count_its_outputs() -> None:
    case = Case(CONV, (2, 16, 8, 8))
    assert str(case) == "conv3 2x16x8x8 to 24 stride 2"
    assert case.operations == 2 * (2 * 4 * 4) * (16 * 9) * 24


def test_interleaved_takes_turns_after_the_warm_up() -> None:
    seen: list[str] = []
    calls: list[tuple[int, int]] = []
    times = bench.interleaved(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, CPU, lambda *done: calls.append(done)
    )
    assert "".join(seen) == "ab" * (bench.WARM_UP + 3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert calls[-1] == (6, 6)


def test_rows_hold_percentiles_and_ratios_to_float32() -> None:
    slow, fast = (row for row in bench.make_rows("x", {"float32": [1, 2, 3, 4, 5], "dgq": [1.5] * 5}, "kernels"))
    assert (slow.p50_ms, slow.ratio_to_float32) == (3, 1)
    assert slow.p20_ms < slow.p50_ms < slow.p80_ms
    assert (fast.p20_ms, fast.p80_ms, fast.ratio_to_float32) == (1.5, 1.5, 0.5)
    assert fast.relative_error is None


def test_verdicts_say_plainly_what_is_slower_and_why() -> None:
    def row(system: str, ms: float) -> Row:
        return Row(system, "UNet step", ms, ms, ms, ms / 10, table="step")

    slower = bench.verdicts([row("float32", 10), row("bfloat16", 5), row("dgq W4A8", 13)], CPU)
    assert slower[0].startswith("dgq W4A8 is 1.3x slower than float32 here: ")
    assert slower[1].startswith("dgq W4A8 is 2.6x slower than bfloat16 here: ")
    faster = bench.verdicts([row("float32", 10), row("dgq W4A8", 5)], CPU)
    assert faster == ["dgq W4A8 is 2.0x faster than float32 here"]


def test_kernel_verdicts_count_slower_shapes() -> None:
    rows = [Row("dgq W8A8", case, 1, 1, 1, ratio) for case, ratio in (("a", 0.5), ("b", 2.0), ("c", 3.0))]
    (sentence,) = bench.kernel_verdicts(rows, CPU)
    assert sentence.startswith("dgq W8A8 is slower than float32 in 2 of 3 layer shapes here: ")


@pytest.mark.parametrize("wbits", [4, 8])
def test_random_layers_use_the_whole_range_of_weights(wbits: int) -> None:
    layer = bench.random_layer(dataclasses.replace(LINEAR, wbits=wbits))
    assert layer.integer_weight().abs().max() > 64  # below, the exact path would be a faster one
    assert layer(torch.randn(3, 32)).shape == (3, 48)


def test_kernel_rows_cover_every_system_and_case() -> None:
    rows = bench.bench_kernels([Case(LINEAR, (5, 32)), Case(CONV, (2, 16, 8, 8))], (8, 4), 1, CPU)
    assert [row.system for row in rows] == ["float32", "bfloat16", "dgq W8A8", "dgq W4A8"] * 2
    assert {row.case for row in rows} == {"linear 5x32x48", "conv3 2x16x8x8 to 24 stride 2"}
    assert all(row.gops is not None and row.p20_ms <= row.p50_ms <= row.p80_ms for row in rows)


def test_cases_of_a_model_are_distinct_and_of_its_own_layers(tiny_pipeline: Path) -> None:
    cases = bench.model_cases(tiny_pipeline)
    names = [str(case) for case in cases]
    assert len(set(names)) == len(names)
    assert "linear 2x32x128" in names  # the time embedding, one row a sample
    assert "conv3 2x32x8x8 to 32 stride 2" in names
    assert {case.plan.kind for case in cases} == {"linear", "pointwise", "conv2d"}


def test_step_of_a_float_model_is_quantized_on_the_fly(tiny_pipeline: Path, tmp_path: Path) -> None:
    report = bench.bench(tiny_pipeline, what="step", bits=8, repeats=1)
    rows = {row.system: row for row in report.rows}
    assert list(rows) == ["float32", "float32 channels-last", "bfloat16", "dgq W8A8"]
    assert rows["float32"].relative_error == 0
    for name, limit in (("float32 channels-last", 1e-4), ("bfloat16", 0.1), ("dgq W8A8", 0.3)):
        error = rows[name].relative_error
        assert error is not None
        assert 0 < error < limit
    size = rows["dgq W8A8"].disk_mib
    assert size is not None
    assert size < 0.5 * (rows["float32"].weights_mib or 0)
    assert all(row.peak_rss_mib is None for row in report.rows)
    assert any("on the fly" in note for note in report.notes)

    file = tmp_path / "results.csv"
    report.append_csv(file)
    report.append_csv(file)
    with open(file, newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    assert len(table) == 2 * len(report.rows)
    assert table[0]["system"] == "float32"
    assert table[0]["peak_rss_mib"] == ""  # not measured


def test_a_csv_of_other_columns_is_not_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DgqError, match="other columns"):
        bench.Report({}, [], []).append_csv(file)


def test_on_the_fly_header_describes_the_layers_it_made(tiny_pipeline: Path) -> None:
    unet = bench.load(tiny_pipeline).unet
    header = bench.quantize_nearest(unet, Recipe(wbits=4, rounding="nearest", channels="none"))
    made = {name: module.plan for name, module in unet.named_modules() if isinstance(module, IntegerLayer)}
    assert header.layers == made
    stored = bench.weight_bytes(unet)
    layer = unet.get_submodule("time_embedding.linear_1")
    packed = layer.packed.nbytes
    ready = layer.prepare(CPU)
    if ready.engine is None:
        assert bench.weight_bytes(unet) == stored + 32 * 128  # the dense copy the backend keeps
    else:
        assert bench.weight_bytes(unet) == stored - packed + ready.engine.packed.nbytes


def test_checkpoint_with_its_float_model_gone_measures_no_error(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(tiny_checkpoint)
    assert header is not None
    header.base_model = "/nowhere/model"
    monkeypatch.setattr(bench, "RECORDED_STEPS", 2)
    monkeypatch.setattr(bench, "read_header", lambda folder: header)
    rows, notes = bench.bench_step(tiny_checkpoint, None, 1, False, CPU)
    assert rows[-1].system == "dgq W4A8"
    assert rows[-1].relative_error is None
    assert any("not at hand" in note for note in notes)


@pytest.mark.parametrize("options", [{"what": "speed"}, {"bits": 3}, {"repeats": 0}, {"threads": 0}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(DgqError):
        bench.bench(None, **options)  # type: ignore[arg-type]


def test_bits_are_refused_for_a_checkpoint(tiny_checkpoint: Path) -> None:
    with pytest.raises(DgqError, match="W4A8 already"):
        bench.bench(tiny_checkpoint, what="step", bits=8)
