"""Upsampling convolutions, folded: the same results, and the way back."""

import torch
from torch.nn import functional

from dgq.integer.folding import fold, unfold


def test_four_small_convolutions_are_one_of_the_upsampled_picture():
    weight, x = torch.randn(6, 5, 3, 3).double(), torch.randn(2, 5, 7, 4).double()
    large = functional.conv2d(functional.interpolate(x, scale_factor=2.0), weight, padding=1)
    for place, part in enumerate(functional.conv2d(x, fold(weight), padding=1).chunk(4, 1)):
        row, column = place // 2, place % 2
        torch.testing.assert_close(part[:, :, row : row + 7, column : column + 4], large[:, :, row::2, column::2])


def test_unfolding_is_the_nearest_way_back():
    weight = torch.randn(6, 5, 3, 3).double()
    folded = fold(weight)
    torch.testing.assert_close(unfold(folded), weight)
    noisy = folded + torch.randn_like(folded) / 10
    left = noisy - fold(unfold(noisy))  # what no 3x3 taps fold to
    assert float((left * fold(torch.randn_like(weight))).sum().abs()) < 1e-9
    assert left.norm() > 0.1
