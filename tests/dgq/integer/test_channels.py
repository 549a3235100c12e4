"""Channel groups: their formation, and the choice by measured error."""

import dataclasses

import pytest
import torch

from dgq.integer.channels import (
    apply_layer,
    candidates,
    fake_quantize_input,
    form_groups,
    from_matrix,
    rotate_channels,
    rotation_block,
    to_matrix,
)
from dgq.recipe import LayerPlan


def plan(kind="linear", c=64, n=32, wbits=8, abits=8, **more):
    return LayerPlan(kind, c, n, wbits, abits, False, class_ends=[c], **more)


def test_shift_exponents_are_rounded_octaves_in_0_to_2():
    rms = torch.ones(16)
    rms[3], rms[5], rms[7], rms[9] = 2.1, 3.9, 50.0, 0.01
    groups = form_groups("shift", rms, 8)
    assert groups.divisor[[3, 5, 7, 9]].tolist() == [2, 4, 4, 1]
    assert groups.class_ends == [13, 14, 16]
    exponents = groups.divisor.log2()[groups.order]
    assert (exponents.diff() >= 0).all()
    assert groups.class_of().tolist() == exponents.long().tolist()


def test_shift_without_outliers_is_no_handling():
    assert form_groups("shift", torch.ones(8), 8).mode == "none"


def test_int4_shift_folds_into_the_weight():
    rms = torch.ones(8)
    rms[2] = 4
    groups = form_groups("shift", rms, 4)
    assert not groups.shifts_accumulator
    assert groups.order is not None


def test_smooth_divides_only_what_stands_out():
    rms = torch.tensor([1.0, 1.0, 1.0, 16.0, 0.1])
    assert form_groups("smooth", rms, 8).divisor.tolist() == [1, 1, 1, 4, 1]


@pytest.mark.parametrize(
    ("mode", "outliers", "modes"),
    [
        ("auto", True, ["none", "smooth", "smooth 16"]),
        ("auto", False, ["none", "smooth", "smooth 16"]),
        ("none", True, ["none"]),
        ("rotate", True, ["none 16"]),
        ("shift", True, ["shift"]),
        ("shift", False, ["none"]),
    ],
)
def test_candidates(mode, outliers, modes):
    rms = torch.linspace(0.8, 1.2, 16)
    rms[3] = 9 if outliers else 1
    given = [f"{groups.mode} {groups.rotation or ''}".strip() for groups in candidates(mode, rms, 4)]
    assert given == modes


@pytest.mark.parametrize(("mode", "modes"), [("auto", ["none", "smooth"]), ("rotate", ["none"])])
def test_channels_that_no_block_divides_are_not_rotated(mode, modes):
    groups = candidates(mode, torch.linspace(0.8, 1.2, 24), 8)
    assert [(one.mode, one.rotation) for one in groups] == [(name, 0) for name in modes]


@pytest.mark.parametrize(("channels", "block"), [(1280, 256), (320, 64), (48, 16), (24, 0), (768, 256)])
def test_the_largest_block_that_fits(channels, block):
    assert rotation_block(channels) == block


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_folding_and_rotating_the_input_leaves_the_layer_as_it_was(kind):
    """Rotated weight times rotated input is the float layer's output; unfolding gives its weight back."""
    g = torch.Generator().manual_seed(0)
    taps = 3 if kind == "conv2d" else 1
    layer = plan(kind, kernel_size=taps, padding=taps // 2)
    weight = torch.randn(32, 64, *(3, 3) * (kind == "conv2d"), generator=g)
    x = torch.randn(2, 64, 5, 5, generator=g) if kind == "conv2d" else torch.randn(7, 64, generator=g)
    groups = dataclasses.replace(form_groups("smooth", torch.rand(64, generator=g) * 4, 8), rotation=64)
    matrix = groups.fold(weight)
    torch.testing.assert_close(groups.unfold(matrix, layer), weight)
    turned = rotate_channels(x / groups.divisor.view(1, -1, *[1] * (x.dim() - 2)), 64)
    torch.testing.assert_close(
        apply_layer(turned, from_matrix(matrix, layer), layer), apply_layer(x, weight, layer), rtol=1e-4, atol=1e-4
    )


def test_rotation_takes_an_outlier_channel_off_the_range():
    """One channel in 64 is thirty times as large: rotated, the others keep most of the bits they lost."""
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 30
    plain, rotated = (fake_quantize_input(x, 8, torch.ones(64), block) - x for block in (0, 64))
    assert rotated.norm() < 0.5 * plain.norm()


def test_fake_quantization_of_the_input_is_bounded_by_the_step():
    x = torch.randn(20, 16)
    error = (fake_quantize_input(x, 8, torch.ones(16)) - x).abs()
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
    assert (error <= step[:, None] * 1.001).all()


def test_matrix_form_runs_over_channels_within_a_tap():
    weight = torch.arange(2 * 3 * 2 * 2).float().view(2, 3, 2, 2)
    matrix = to_matrix(weight)
    assert matrix[1, 3:6].tolist() == weight[1, :, 0, 1].tolist()
    layer = LayerPlan("conv2d", 3, 2, 8, 8, False, kernel_size=2, class_ends=[3])
    assert torch.equal(from_matrix(matrix, layer), weight)
