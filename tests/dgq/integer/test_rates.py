"""What a rounding is predicted to take."""

import time

import pytest
import torch
from torch import nn

from dgq.integer.plan import Layer, plan_layer
from dgq.integer.rates import rates, rounding_seconds
from dgq.integer.rounding import quantize_layers
from dgq.integer.statistics import Statistics
from dgq.recipe import Recipe


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates.cache_clear()
    yield
    torch.set_num_threads(threads)
    rates.cache_clear()


@torch.no_grad()
def test_a_rounding_takes_what_is_predicted(one_thread):
    """Of a convolution of Stable Diffusion: its factors, a block's thin products and the rotation cost as much as the
    multiplications that are counted."""
    module, recipe = nn.Conv2d(320, 320, 3, padding=1), Recipe()
    layer = Layer("one", module, plan_layer(module, 4, recipe))
    seen = Statistics(layer.plan, 4)
    start = time.thread_time()
    for _ in range(4):
        seen.add(torch.randn(2, 320, 16, 16) * torch.rand(320, 1, 1))
    quantize_layers([layer], seen, recipe)
    taken = time.thread_time() - start
    assert taken / 1.8 < rounding_seconds(layer.plan, recipe, True, seen.count) < 1.8 * taken
