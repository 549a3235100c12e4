"""Single layers: cases, random layers, rows and the int8 peak."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dgq.bench import Case, bench_kernels, int8_peak, layers, model_cases
from dgq.recipe import LayerPlan
from dgq_kernels import native

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


@pytest.mark.parametrize("wbits", [4, 8])
def test_random_layers_use_the_whole_range_of_weights(wbits: int) -> None:
    layer = layers.random_layer(dataclasses.replace(LINEAR, wbits=wbits))
    assert layer.integer_weight().abs().max() > 64  # below, the exact path would be a faster one
    assert layer(torch.randn(3, 32)).shape == (3, 48)


def test_kernel_rows_cover_every_system_and_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "int8_peak", lambda device: 1000.0)
    rows = bench_kernels([Case(LINEAR, (5, 32)), Case(CONV, (2, 16, 8, 8))], (8, 4), 1, CPU)
    assert [row.system for row in rows] == ["float32", "bfloat16", "dgq W8A8", "dgq W4A8"] * 2
    assert {row.case for row in rows} == {"linear 5x32x48", "conv3 2x16x8x8 to 24 stride 2"}
    for row in rows:
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.gops is not None
        expected = row.gops / 1000 if row.system.startswith("dgq") else None  # float products have another peak
        assert row.peak_fraction == expected


def test_a_quantized_layer_takes_the_dtype_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    random_layer = layers.random_layer

    def noted(plan: LayerPlan) -> torch.nn.Module:
        layer = random_layer(plan)
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        return layer

    monkeypatch.setattr(layers, "random_layer", noted)
    monkeypatch.setattr(layers, "int8_peak", lambda device: None)
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        bench_kernels([Case(LINEAR, (5, 32), dtype)], (8,), 1, CPU)
        assert set(seen) == {dtype}
    assert {case.dtype for case in layers.large_cases()} == {torch.bfloat16}


def test_the_peak_is_that_of_the_best_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        assert int8_peak(CPU) is None
        pytest.skip("the CPU engine is not built")
    monkeypatch.setattr(layers, "PEAK_SHAPES", ((16, 64, 32), (16, 64, 64)))
    monkeypatch.setattr(layers, "PEAK_CALLS", 2)
    times = iter([4.0, 2.0, 5.0, 2.0])
    monkeypatch.setattr(layers, "timed", lambda run, device: (run(), next(times))[1])
    assert int8_peak(CPU) == pytest.approx(2 * 16 * 64 * 64 / 2 / 1e6)


def test_without_the_engine_there_is_no_peak_and_no_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    assert int8_peak(CPU) is None
    assert all(row.peak_fraction is None for row in bench_kernels([Case(LINEAR, (5, 32))], (8,), 1, CPU))


def test_cases_of_a_model_are_distinct_and_of_its_own_layers(tiny_pipeline: Path) -> None:
    cases = model_cases(tiny_pipeline)
    names = [str(case) for case in cases]
    assert len(set(names)) == len(names)
    assert "linear 2x32x128" in names  # the time embedding, one row a sample
    assert "linear 48x32x32" in names  # a key projection: two prompts of 24 tokens
    assert "conv3 2x32x8x8 to 32 stride 2" in names
    assert {case.plan.kind for case in cases} == {"linear", "pointwise", "conv2d"}
