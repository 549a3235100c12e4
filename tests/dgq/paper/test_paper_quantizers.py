"""The published quantizers against loop versions written from the paper's formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq import range_search
from dgq.errors import DgqError
from dgq.paper.quantizers import (
    AxisRanges,
    axis_spread,
    dequantize_weight,
    fake_quantize,
    group_activation,
    kmeans,
    log2_codes,
    log2_quantize,
    pack_nibbles,
    quantize_weight,
    unpack_nibbles,
)

seeds = st.integers(0, 2**31 - 1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_round_trip(values: list[float], low: float, high: float, bits: int) -> list[float]:
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        scale = abs(low) or 1.0
    zero_point = round(-low / scale)
    return [(min(max(round(v / scale) + zero_point, 0), 2**bits - 1) - zero_point) * scale for v in values]


def naive_losses(row: list[float], bits: int) -> list[float]:
    losses = []
    for i in range(80):
        factor = 1 - i / 100
        rounded = naive_round_trip(row, min(row) * factor, max(row) * factor, bits)
        losses.append(sum(abs(v - r) ** 2.4 for v, r in zip(row, rounded, strict=True)) / len(row))
    return losses


# Weights.


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_search_finds_the_best_of_80_ranges(bits: int) -> None:
    weight = randn(6, 23) ** 3 + torch.tensor([0.0, 0, 0, 5, -5, 0])[:, None]  # rows 3 and 4: mostly one sign
    low, high = range_search.search_asymmetric(weight, bits)
    for n, row in enumerate(weight.double().tolist()):
        losses = naive_losses(row, bits)
        factor = float(high[n]) / max(row)
        assert float(low[n]) == pytest.approx(min(row) * factor, rel=1e-5)
        chosen = losses[round((1 - factor) * 100)]
        # float32 may settle a near tie otherwise; it may not lose anything by it
        assert chosen <= min(losses) * (1 + 1e-3)


def test_symmetric_search_finds_the_best_of_80_scales() -> None:
    weight = randn(5, 31) ** 3
    scale = range_search.search_symmetric(weight, 7, -8)
    for n, row in enumerate(weight.double().tolist()):
        widest = max(abs(v) for v in row) / 7
        losses = []
        for i in range(80):
            s = widest * (1 - i / 100)
            losses.append(sum(abs(v - min(max(round(v / s), -8), 7) * s) ** 2.4 for v in row))
        chosen = losses[round((1 - float(scale[n]) / widest) * 100)]
        assert chosen <= min(losses) * (1 + 1e-3)


def test_search_does_not_depend_on_how_rows_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(7, 40)
    whole = range_search.search_asymmetric(weight, 4), range_search.search_symmetric(weight, 7, -8)
    monkeypatch.setattr(range_search, "_BLOCK_ELEMENTS", 90)  # blocks of two rows and a last of one
    blocked = range_search.search_asymmetric(weight, 4), range_search.search_symmetric(weight, 7, -8)
    assert torch.equal(torch.stack(whole[0]), torch.stack(blocked[0]))
    assert torch.equal(whole[1], blocked[1])


def test_search_keeps_the_full_range_when_rounding_is_exact() -> None:
    low, high = range_search.search_asymmetric(torch.arange(16.0)[None] - 5, 4)
    assert (float(low), float(high)) == (-5, 10)
    assert float(range_search.search_symmetric(torch.arange(-7.0, 8)[None], 7, -8)) == 1


def test_search_shrinks_to_a_fifth_where_two_outliers_face_a_crowd() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 40_000), torch.tensor([-4.6, 4.6])])[None]
    assert 0.2 < float(range_search.search_asymmetric(weight, 4)[1]) / 4.6 < 0.26
    assert 0.2 < float(range_search.search_symmetric(weight, 7, -8)) / (4.6 / 7) < 0.26


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-3])
def test_constant_channels_are_exact(value: float) -> None:
    weight = torch.full((2, 9), value)
    for bits in (4, 8):
        torch.testing.assert_close(dequantize_weight(*quantize_weight(weight, bits)), weight, rtol=1e-6, atol=0)
    scale = range_search.search_symmetric(torch.zeros(2, 9), 7, -8)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_scales_keep_the_digits_of_float32() -> None:
    """Rows whose steps would be subnormal count as zeros: a loader refuses such scales, and 1 / scale is infinite."""
    weight = torch.tensor([[1e-45, 0, -1e-45], [1e-39, -1e-39, 3e-40], [2e-37, -1e-38, 0], [1e-30, 0, 1e-31]])
    scales = [range_search.search_symmetric(weight, 127, -127), quantize_weight(weight, 8)[1]]
    scales.append(range_search.affine_parameters(*torch.aminmax(weight, dim=1), 8)[0])
    for scale in scales:
        assert bool((scale >= range_search.SMALLEST_SCALE).all())
        assert float(scale[3]) < 1e-31


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from([4, 8]), st.sampled_from([(3, 5), (2, 3, 3, 3)]), st.floats(-4, 4))
def test_quantized_weights_are_the_formula(seed: int, bits: int, shape: tuple[int, ...], shift: float) -> None:
    weight = randn(*shape, seed=seed) + shift
    codes, scale, zero_point = quantize_weight(weight, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert int(codes.max()) < 2**bits
    low, high = range_search.search_asymmetric(weight.flatten(1), bits)
    restored = dequantize_weight(codes, scale, zero_point).flatten(1)
    for n in range(shape[0]):
        s = (float(high[n]) - float(low[n])) / (2**bits - 1)
        assert float(scale[n]) == pytest.approx(s, rel=1e-5)
        assert float(zero_point[n]) == round(float(zero_point[n]))
        assert abs(float(zero_point[n]) + float(low[n]) / s) <= 0.5 + 1e-3
        for v, code, r in zip(*(t[n].tolist() for t in (weight.flatten(1), codes.flatten(1), restored)), strict=True):
            assert abs(code - min(max(v / s + float(zero_point[n]), 0), 2**bits - 1)) <= 0.5 + 1e-3
            assert r == pytest.approx((code - float(zero_point[n])) * s, rel=1e-4, abs=1e-6)


def test_more_bits_and_the_search_both_lower_the_loss() -> None:
    weight = randn(8, 64)
    weight[:, 0] *= 6  # an outlier per channel, which the search should give up

    def loss(restored: torch.Tensor) -> float:
        return float((restored - weight).abs().pow(2.4).mean())

    searched4, searched8 = (loss(dequantize_weight(*quantize_weight(weight, b))) for b in (4, 8))
    scale, zero_point = range_search.affine_parameters(*torch.aminmax(weight, dim=1), 4)
    plain4 = loss(fake_quantize(weight, scale, zero_point, 4, 0))
    assert searched8 < searched4 < plain4


@given(st.lists(st.lists(st.integers(0, 15), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_nibbles_round_trip(rows: list[list[int]], length: int) -> None:
    codes = torch.tensor(rows, dtype=torch.uint8)[:, :length]
    packed = pack_nibbles(codes)
    assert packed.shape == (len(rows), math.ceil(length / 2))
    assert int(packed[0, 0]) & 15 == int(codes[0, 0])
    assert torch.equal(unpack_nibbles(packed, length), codes)


# Activation ranges and groups.


def test_axis_ranges_match_loops() -> None:
    ranges = AxisRanges("layer", 2)
    first, second, other = randn(2, 3, 5, seed=1), randn(4, 3, 5, seed=2), randn(1, 3, 5, seed=3)
    ranges.update(0, first)
    ranges.update(0, second)
    ranges.update(1, other)
    for step, seen in ((0, torch.cat([first, second])), (1, other)):
        for c in range(5):
            assert ranges.low["channel"][step, c] == min(seen[:, :, c].flatten().tolist())
            assert ranges.high["channel"][step, c] == max(seen[:, :, c].flatten().tolist())
        for p in range(3):
            assert ranges.low["pixel"][step, p] == min(seen[:, p].flatten().tolist())
            assert ranges.high["pixel"][step, p] == max(seen[:, p].flatten().tolist())


def test_ragged_ranges_take_texts_of_any_length() -> None:
    ranges = AxisRanges("text", 1, ragged=True)
    seen = [randn(1, length, 5, seed=length) for length in (3, 6, 4)]
    for x in seen:
        ranges.update(0, x)
    assert ranges.low["channel"][0].tolist() == torch.cat(seen, 1).amin((0, 1)).tolist()
    for p in range(6):
        assert ranges.high["pixel"][0, p] == max(float(x[:, p].max()) for x in seen if x.shape[1] > p)
    strict = AxisRanges("text", 1)
    strict.update(0, seen[0])
    with pytest.raises(DgqError, match=r"differ in size along the pixel axis \(3 and 6\)"):
        strict.update(0, seen[1])


def test_two_dimensional_inputs_are_per_tensor() -> None:
    ranges = AxisRanges("time_embedding", 1)
    x = randn(2, 8)
    ranges.update(0, x)
    grouping = group_activation(ranges, 8, 16)
    assert grouping.axis == "tensor"
    assert grouping.scale.shape == (1, 1)
    assert float(grouping.scale) == pytest.approx(float(x.max() - x.min()) / 255)


def test_four_dimensional_q_k_v_reduce_over_batch_and_heads() -> None:
    ranges = AxisRanges("query", 1)
    x = randn(2, 3, 5, 4)
    ranges.update(0, x)
    assert torch.equal(ranges.high["channel"][0], x.permute(3, 0, 1, 2).flatten(1).amax(1))
    assert torch.equal(ranges.low["pixel"][0], x.permute(2, 0, 1, 3).flatten(1).amin(1))


def test_spread_is_the_published_formula() -> None:
    low, high = torch.tensor([[-1.0, -4, 0], [0, 0, -2]]), torch.tensor([[1.0, 9, 2], [5, 5, 5]])
    assert axis_spread(low, high) == ((9 - 1) + (0 - -4)) + ((5 - 5) + (0 - -2))


def with_outliers(axis: str) -> torch.Tensor:
    x = randn(2, 48, 64)
    level = torch.tensor([25.0, -25.0])[:, None, None]
    if axis == "channel":
        x[:, :, [3, 17]] += level
    else:
        x[:, [5, 40]] += level
    return x


@pytest.mark.parametrize("axis", ["channel", "pixel"])
def test_the_axis_with_outliers_is_grouped_and_they_get_their_own_groups(axis: str) -> None:
    ranges = AxisRanges("layer", 1)
    ranges.update(0, with_outliers(axis))
    grouping = group_activation(ranges, 8, 8)
    assert grouping.axis == axis
    outliers = [3, 17] if axis == "channel" else [5, 40]
    others = [i for i in range(len(grouping.index)) if i not in outliers]
    assert not set(grouping.index[outliers].tolist()) & set(grouping.index[others].tolist())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("step", [0, 1])
def test_groups_see_both_bounds_and_all_steps(sign: int, step: int) -> None:
    ranges = AxisRanges("layer", 2)
    steps = torch.rand(2, 2, 4, 10, generator=torch.Generator().manual_seed(0))
    steps[step, :, :, 6] += 30  # an outlier of one bound, at one step
    for index, x in enumerate(steps):
        ranges.update(index, sign * x)
    grouping = group_activation(ranges, 8, 2)
    assert grouping.axis == "channel"
    assert (grouping.index == grouping.index[6]).sum() == 1


def test_group_scales_cover_exactly_their_members() -> None:
    ranges = AxisRanges("layer", 3)
    for step in range(3):
        ranges.update(step, with_outliers("channel") * (step + 1) + step)
    grouping = group_activation(ranges, 6, 8)
    assert sorted(set(grouping.index.tolist())) == list(range(8))
    for step in range(3):
        for group in range(8):
            members = [i for i, g in enumerate(grouping.index.tolist()) if g == group]
            low = min(float(ranges.low["channel"][step, i]) for i in members)
            high = max(float(ranges.high["channel"][step, i]) for i in members)
            scale = (high - low) / 63
            assert float(grouping.scale[step, group]) == pytest.approx(scale, rel=1e-5)
            assert abs(float(grouping.zero_point[step, group]) + low / scale) <= 0.5 + 1e-3


def test_one_group_is_the_per_tensor_range_at_any_size() -> None:
    ranges = AxisRanges("layer", 1)
    x = with_outliers("pixel")
    ranges.update(0, x)
    grouping = group_activation(ranges, 8, 1)
    assert (grouping.axis, len(grouping.index)) == ("tensor", 1)
    assert float(grouping.scale) == pytest.approx(float(x.max() - x.min()) / 255)


def test_zero_points_may_lie_outside_the_codes() -> None:
    ranges = AxisRanges("layer", 1)
    x = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0)) + 10
    ranges.update(0, x)
    grouping = group_activation(ranges, 8, 1)
    assert float(grouping.zero_point) < -255
    restored = fake_quantize(x, grouping.scale[0], grouping.zero_point[0], 8, -1)
    assert float((restored - x).abs().max()) <= float(grouping.scale) * 1.01


@pytest.mark.parametrize("value", [0.0, 2.5, -7.0])
def test_a_constant_activation_is_exact(value: float) -> None:
    ranges = AxisRanges("layer", 1)
    x = torch.full((1, 4, 6), value)
    ranges.update(0, x)
    grouping = group_activation(ranges, 6, 16)
    assert torch.equal(fake_quantize(x, grouping.scale[0], grouping.zero_point[0], 6, -1), x)


def test_a_step_without_finite_input_is_named() -> None:
    ranges = AxisRanges("mid.conv", 2)
    with pytest.raises(DgqError, match=r"mid\.conv.*never ran"):
        group_activation(ranges, 8, 8)
    ranges.update(0, randn(1, 2, 3))
    with pytest.raises(DgqError, match=r"mid\.conv.*step 1"):
        group_activation(ranges, 8, 8)
    ranges.update(1, torch.full((1, 2, 3), torch.nan))
    with pytest.raises(DgqError, match=r"mid\.conv.*step 1"):
        group_activation(ranges, 8, 8)


def test_mixed_sizes_are_an_error() -> None:
    ranges = AxisRanges("layer", 1)
    ranges.update(0, randn(1, 4, 3))
    with pytest.raises(DgqError, match="4 and 5"):
        ranges.update(0, randn(1, 5, 3))


# K-means.


def test_kmeans_finds_separated_clusters() -> None:
    centres = torch.tensor([[0.0, 0], [100, 0], [0, 100], [1e4, 1e4]])
    truth = torch.arange(4).repeat(10)
    labels = kmeans(centres[truth] + randn(40, 2), 4)
    for cluster in range(4):
        assert len(set(labels[truth == cluster].tolist())) == 1
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 9), st.integers(1, 6))
def test_kmeans_is_a_deterministic_fixed_point(seed: int, clusters: int, distinct: int) -> None:
    points = randn(distinct, 4, seed=seed).repeat(4, 1)
    labels = kmeans(points, clusters, seed=seed)
    assert torch.equal(labels, kmeans(points, clusters, seed=seed))
    found = sorted(set(labels.tolist()))
    assert found == list(range(len(found)))
    assert len(found) <= min(clusters, distinct)
    if clusters >= distinct:  # every distinct point is its own cluster
        assert len(found) == distinct
    means = [points[labels == c].double().mean(dim=0) for c in found]
    for point, label in zip(points.double(), labels.tolist(), strict=True):
        distances = [float((point - mean).square().sum()) for mean in means]
        assert distances[label] <= min(distances) + 1e-9


# Fake quantization.


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([4, 6, 8]), st.sampled_from([-1, -2, 0]))
def test_fake_quantize_is_the_formula(seed: int, bits: int, dim: int) -> None:
    x = randn(2, 3, 4, seed=seed) * 3
    size = x.shape[dim]
    scale, zero_point = randn(size, seed=seed).abs() + 0.01, randn(size, seed=seed + 1).mul(100).round()
    restored = fake_quantize(x, scale, zero_point, bits, dim)
    for b in range(2):
        for p in range(3):
            for c in range(4):
                i = (b, p, c)[dim]
                s, z = float(scale[i]), float(zero_point[i])
                code = min(max(torch.round(x[b, p, c] / scale[i]).item() + z, 0), 2**bits - 1)
                assert float(restored[b, p, c]) == pytest.approx((code - z) * s, rel=1e-5, abs=1e-6)


def test_fake_quantize_computes_in_float32_and_returns_the_inputs_dtype() -> None:
    x = randn(3, 5).half()
    scale, zero_point = torch.tensor([1 / 300]), torch.tensor([100.0])
    half, single = (fake_quantize(t, scale, zero_point, 8, -1) for t in (x, x.float()))
    assert half.dtype == torch.float16
    assert torch.equal(half, single.half())


# Log2 attention.


def probabilities(seed: int = 0, sharpness: float = 3.0) -> torch.Tensor:
    return (randn(3, 2, 5, 7, seed=seed) * sharpness).softmax(dim=-1)


@pytest.mark.parametrize("start_token", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_log2_is_the_formula_with_d_per_sample(bits: int, start_token: bool) -> None:
    attention = probabilities(sharpness=8)
    quantized = log2_quantize(attention, bits, start_token)
    first = int(start_token)
    for b in range(3):
        values = attention[b, :, :, first:].double()
        d = float(values.max())
        for a, q in zip(values.flatten().tolist(), quantized[b, :, :, first:].flatten().tolist(), strict=True):
            assert q == pytest.approx(d * 2.0 ** -min(max(round(-math.log2(a / d)), 0), 2**bits - 1), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.1, 30))
def test_log2_error_is_at_most_half_an_octave(seed: int, sharpness: float) -> None:
    attention = probabilities(seed, sharpness)
    quantized = log2_quantize(attention, 8, False)
    seen = attention > 1e-30  # below, d * 2^-q leaves float32's normal range
    ratio = (quantized / attention)[seen]
    assert float(ratio.max()) <= 2**0.5 * (1 + 1e-5)
    assert float(ratio.min()) >= 2**-0.5 * (1 - 1e-5)
    largest = attention.flatten(1).argmax(dim=1)
    for b in range(3):  # the largest probability is d itself
        assert quantized[b].flatten()[largest[b]] == attention[b].flatten()[largest[b]]


def test_start_token_column_is_exact_and_outside_d() -> None:
    attention = probabilities()
    quantized = log2_quantize(attention, 6, True)
    assert torch.equal(quantized[..., 0], attention[..., 0])
    assert torch.equal(quantized[..., 1:], log2_quantize(attention[..., 1:], 6, False))


def test_a_sample_is_quantized_as_if_alone() -> None:
    attention = probabilities()
    batch = log2_quantize(attention, 6, True)
    for b in range(3):
        assert torch.equal(batch[b : b + 1], log2_quantize(attention[b : b + 1], 6, True))


def test_zero_probabilities_get_the_top_code() -> None:
    attention = torch.tensor([[[[0.75, 0.25, 0.0]]], [[[1.0, 0.0, 0.0]]]])
    codes, largest = log2_codes(attention, 6)
    assert codes.flatten().tolist() == [0, 2, 63, 0, 63, 63]
    assert largest.tolist() == [0.75, 1.0]
    assert log2_codes(torch.zeros(1, 1, 1, 2), 6)[0].flatten().tolist() == [63, 63]  # not NaN codes
    all_on_start = log2_quantize(attention[1:], 6, True)  # d = 0
    assert torch.equal(all_on_start, attention[1:])
