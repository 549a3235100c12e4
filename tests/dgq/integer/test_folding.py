"""Upsampling convolutions, folded: the same results, and the way back."""

import pytest
import torch
from torch.nn import functional

from dgq.integer.folding import cut, fold, interleaved, unfold


def test_four_small_convolutions_are_one_of_the_upsampled_picture():
    weight, x = torch.randn(6, 5, 3, 3).double(), torch.randn(2, 5, 7, 4).double()
    large = functional.conv2d(functional.interpolate(x, scale_factor=2.0), weight, padding=1)
    for place, part in enumerate(functional.conv2d(x, fold(weight), padding=1).chunk(4, 1)):
        row, column = place // 2, place % 2
        torch.testing.assert_close(part[:, :, row : row + 7, column : column + 4], large[:, :, row::2, column::2])


@pytest.mark.parametrize("size", [(14, 8), (13, 8), (14, 7), (13, 7)])
def test_an_upsampled_picture_may_end_half_a_pixel_early(size):
    weight, bias, x = torch.randn(6, 5, 3, 3).double(), torch.randn(6).double(), torch.randn(2, 5, 7, 4).double()

    def run(x):
        return interleaved(functional.conv2d(x, fold(weight), bias.repeat(4), padding=1))

    large = functional.interpolate(x, size=size, mode="nearest")
    expected = functional.conv2d(large, weight, bias, padding=1)
    torch.testing.assert_close(cut(run, x, size, bias.repeat(4)), expected)
    torch.testing.assert_close(cut(run, large[:, :, ::2, ::2], size, bias), expected)
    without = functional.conv2d(large, weight, padding=1)
    torch.testing.assert_close(cut(lambda x: run(x) - bias[:, None, None], x, size, None), without)


@pytest.mark.parametrize("size", [(2, 2), (1, 2), (1, 1)])
def test_a_picture_of_one_pixel_is_cut(size):
    weight, x = torch.randn(3, 5, 3, 3).double(), torch.randn(2, 5, 1, 1).double()
    expected = functional.conv2d(functional.interpolate(x, size=size), weight, padding=1)
    got = cut(lambda x: interleaved(functional.conv2d(x, fold(weight), padding=1)), x, size, None)
    torch.testing.assert_close(got, expected)


def test_unfolding_is_the_nearest_way_back():
    weight = torch.randn(6, 5, 3, 3).double()
    folded = fold(weight)
    torch.testing.assert_close(unfold(folded), weight)
    noisy = folded + torch.randn_like(folded) / 10
    left = noisy - fold(unfold(noisy))  # what no 3x3 taps fold to
    assert float((left * fold(torch.randn_like(weight))).sum().abs()) < 1e-9
    assert left.norm() > 0.1
